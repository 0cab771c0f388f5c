"""Facts: the record of a single fact, readers of fact files, and the stream of batches for training."""

from typing import TYPE_CHECKING, Any

from editlab.data.fact import Fact, Neighbor, Question
from editlab.data.files import read_facts
from editlab.data.formats import (
    EVOKE,
    CounterFact,
    EasyEdit,
    FactFormat,
    HalluEditBench,
    MQuAKE,
    Plain,
    RippleEdits,
    UltraEditBench,
    WikiBigEdit,
    WikiBio,
    ZsRE,
)
from editlab.data.stream import EditStream

if TYPE_CHECKING:
    from editlab.data.datamodule import EditDataModule

__all__ = [
    "EVOKE",
    "CounterFact",
    "EasyEdit",
    "EditDataModule",
    "EditStream",
    "Fact",
    "FactFormat",
    "HalluEditBench",
    "MQuAKE",
    "Neighbor",
    "Plain",
    "Question",
    "RippleEdits",
    "UltraEditBench",
    "WikiBigEdit",
    "WikiBio",
    "ZsRE",
    "read_facts",
]


def __getattr__(name: str) -> Any:
    """Import the data module, and Lightning with it, at its first use; checking a fact file needs neither."""
    if name == "EditDataModule":
        from editlab.data.datamodule import EditDataModule

        return EditDataModule
    raise AttributeError(f"module 'editlab.data' has no attribute {name!r}")
