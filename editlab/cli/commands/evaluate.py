"""``editlab evaluate``: runs tasks of lm-evaluation-harness on the edited model, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.printing import add_json_argument, show
from editlab.cli.commands.writing import add_checkpoint_arguments, add_device_argument
from editlab.evaluation.downstream import Downstream, Score
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import device_named
from editlab.runs.checkpoint import find_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.tables import Table
from editlab.utils.validation import at_least_one

Scores = Mapping[str, Mapping[str, Score]]
"""task -> metric -> score"""


def _add_arguments(parser: ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=str,
        required=True,
        help="Names of tasks of lm-evaluation-harness, such as mmlu, and paths of YAML files of tasks.",
    )
    parser.add_argument("--limit", type=int, help="Number of documents of each task, the first ones. Default: all.")
    parser.add_argument("--batch_size", type=int, default=8, help="Number of prompts that are run together.")
    parser.add_argument("--unedited", action="store_true", help="Evaluate the unedited model, too.")
    add_device_argument(parser)
    add_json_argument(parser)


def _evaluate(given: Namespace) -> None:
    show(
        given,
        _scores,
        lambda found: {name: _plain(scores) for name, scores in found.items()},
        lambda found: table(found).to_text(),
    )


def _scores(given: Namespace) -> dict[str, Scores]:
    """The scores of the edited model, and of the unedited one if it is wanted, by these names."""
    at_least_one("evaluate", limit=given.limit, batch_size=given.batch_size)
    device = device_named(given.device)
    downstream = Downstream(given.tasks, given.limit, given.batch_size)
    downstream.load()  # before a model is loaded, which takes longer
    delta = Delta.from_checkpoint(find_checkpoint(given.ckpt_path))
    model, tokenizer = delta.base(given.model)
    model.to(device)  # type: ignore[arg-type]
    lm = LanguageModel(model, tokenizer, delta.edit_module)
    found: dict[str, Scores] = {}
    if given.unedited:
        found["unedited"] = downstream.scores(lm, stderr=True)
    delta.put_on(model)
    found["edited"] = downstream.scores(lm, stderr=True)
    return found


def table(found: Mapping[str, Scores]) -> Table:
    """A row for each metric of each task, a column for each model; the standard error follows in brackets.

    >>> print(table({"edited": {"t": {"acc": Score(0.5, 0.125), "f1": Score(0.25)}}}).to_text())
    task  metric           edited
    t     acc     0.5000 [0.1250]
    t     f1               0.2500
    """
    rows = {(task, metric): None for scores in found.values() for task, row in scores.items() for metric in row}
    cells = [
        [task, metric, *(_cell(scores.get(task, {}).get(metric)) for scores in found.values())] for task, metric in rows
    ]
    return Table(["task", "metric", *found], cells, numbers=range(2, 2 + len(found)))


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" [{score.stderr:.4f}]")


def _plain(scores: Scores) -> dict[str, dict[str, Any]]:
    return {
        task: {metric: {"value": score.value, "stderr": score.stderr} for metric, score in row.items()}
        for task, row in scores.items()
    }


COMMAND = Command(
    "evaluate", "Run tasks of lm-evaluation-harness on the edited model of a checkpoint.", _add_arguments, _evaluate
)
