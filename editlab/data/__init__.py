"""Facts: the record of one, the readers of fact files, and the stream of batches into training."""

from editlab.data.datamodule import EditDataModule
from editlab.data.fact import Fact, Neighbor
from editlab.data.files import read_facts
from editlab.data.formats import CounterFact, EasyEdit, FactFormat, Plain, ZsRE
from editlab.data.stream import EditStream

__all__ = [
    "CounterFact",
    "EasyEdit",
    "EditDataModule",
    "EditStream",
    "Fact",
    "FactFormat",
    "Neighbor",
    "Plain",
    "ZsRE",
    "read_facts",
]
