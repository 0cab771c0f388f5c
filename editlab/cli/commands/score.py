"""``editlab score``: measures any model on facts as if it had been edited, whichever program has edited it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.printing import add_json_argument, show
from editlab.cli.commands.writing import add_device_argument
from editlab.data import EditDataModule
from editlab.data.datamodule import SPLITS
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.subject_keys import too_long
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import device_named
from editlab.metrics.names import BEFORE, RETAINED, add_group
from editlab.runs.tables import Table, metric_table


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="The model: a folder, a GGUF file, a hub id, or smollm2-135m.")
    parser.add_argument("--path", default="worldfacts", help="The file of facts, as --data.path of editlab fit.")
    parser.add_argument("--base", help="Its model before the edits, which gets a column of its own.")
    parser.add_argument("--limit", type=int, help="Number of facts, the first ones of the file. Default: all.")
    parser.add_argument("--split", default="all", choices=SPLITS, help="Half of the facts that is measured.")
    parser.add_argument("--skip_bad", action="store_true", help="Skip records that do not fit their schema or a model.")
    parser.add_class_arguments(EvaluationSettings, "evaluation")
    add_device_argument(parser)
    add_json_argument(parser)


def _score(given: Namespace) -> None:
    show(given, _metrics, dict, lambda found: table(found, given.base is not None).to_text())


def _metrics(given: Namespace) -> dict[str, float]:
    """``before/metric`` of the base model, if there is one, and ``retained/metric`` of the model."""
    data = EditDataModule(
        given.path, given.limit, keep="all", split=given.split, shuffle=False, skip_bad=given.skip_bad
    )
    data.setup()  # before a model is loaded, which takes longer
    settings = EvaluationSettings(**{**vars(given.evaluation), "age_bins": 0})  # the edits' order is not known
    device = device_named(given.device)
    found: dict[str, float] = {}
    for group, name in ((BEFORE, given.base), (RETAINED, given.model)):  # one model at a time
        if name is not None:
            lm = LanguageModel.from_name(name, torch.float32, device=device)
            lm.model.to(device)  # type: ignore[arg-type]
            found |= add_group(group, _measured(lm, data, settings))
    return found


def _measured(lm: LanguageModel, data: EditDataModule, settings: EvaluationSettings) -> dict[str, float]:
    """What the end of a run measures, as if the model held all facts; metric -> value."""
    lm.joint, data.fault = data.joint, lambda fact: too_long(lm, fact, [""])
    data.select(lambda facts: [True] * len(facts))
    evaluation = Evaluation(settings)
    evaluation.bystanders = data.other_facts(settings.bystanders)
    found = evaluation.measure_retained(lm, data.facts, len(data.facts), [])
    return {name.removeprefix(f"{RETAINED}/"): value for name, value in found.items()}


def table(metrics: Mapping[str, float], base: bool) -> Table:
    """A row for each metric; a column for the base model, if there is one, and one for the model.

    >>> print(table({"before/ES": 0.0, "retained/ES": 0.875}, base=True).to_text())
         base  model
    ES  0.000  0.875
    """
    rows = metric_table(metrics).rows
    columns = {"base": 1, "model": 3} if base else {"model": 3}
    cells = [[row[0], *(row[column] for column in columns.values())] for row in rows]
    return Table(["", *columns], cells, range(1, 1 + len(columns)))


COMMAND = Command(
    "score", "Measure any model on facts as if it had been edited, with a column for its base.", _add_arguments, _score
)
