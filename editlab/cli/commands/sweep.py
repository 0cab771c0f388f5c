"""``editlab sweep``: runs an experiment that a YAML file describes, and writes its tables and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.errors import UserError

if TYPE_CHECKING:
    from editlab.experiments.plan import Options
    from editlab.experiments.spec import Experiment

QUICK: dict[str, Any] = {"facts": "worldfacts", "heldout": "builtin", "moments": "self", "moment_tokens": 4096}
QUICK_CALLBACKS: tuple[tuple[str, str, Any], ...] = (("LoRAAdjust", "steps", 4),)
QUICK_FLAGS = {"model.evaluation.heldout_tokens": "512"}
"""What ``--quick`` sets in each experiment: built-in data, little of it, and short trainings."""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", type=str, help="YAML file of the experiment, such as configs/experiments/replay_ablation.yaml.")
    add("--only", nargs="+", type=str, help="Names of the cases to run. Default: all.")
    add("--where", nargs="+", type=str, metavar="COLUMN=VALUE[,VALUE]", help="Labels of the cases to run: "
        "batch_size=32,128.")  # fmt: skip
    add("--seeds", nargs="+", type=int, help="Seeds. Default: those of the experiment.")
    add("--edits", type=int, help="Number of facts. Default: that of the experiment.")
    add("--batch_size", type=int, help="Facts in a batch, in cases without a batch size of their own.")
    add("--path", help="File of facts, or worldfacts for the built-in ones.")
    add("--heldout", help="Text of the perplexity, or builtin.")
    add("--moments", help="Text of the second moments, or self for text of the model's own.")
    add("--tokens", type=int, help="Tokens of the second moments. Default: 24576 of self, 160000 of other texts.")
    add("--callback", nargs="+", type=str, metavar="CLASS.NAME=VALUE",
        help="Settings of callbacks, in all cases that have them: LoRAAdjust.steps=4.")  # fmt: skip
    add("--set", nargs="+", type=str, metavar="NAME=VALUE",
        help="Settings of all cases, over their own: model.evaluation.neighbors=1.")  # fmt: skip
    add("--work", help="Folder of the runs. Default: lightning_logs/NAME.")
    add("--out", help="Folder that results/ and figs/ are written to. Default: the project's.")
    add("--workers", type=int, default=1, help="Runs at a time; they share the cores.")
    add("--launcher", choices=["local", "ray"], default="local", help="ray: on the machines of a Ray cluster.")
    add("--quick", action="store_true", help="A few small runs on built-in facts, to see that everything works.")
    add("--dry-run", action="store_true", help="Show what would be run, and how long it takes.")
    add("--no-run", action="store_true", help="Write tables and figures of the runs that are finished.")


def _sweep(given: Namespace) -> None:
    from editlab.experiments.spec import load_experiment  # these import much: only when needed
    from editlab.experiments.sweep import sweep

    experiment = load_experiment(given.experiment)
    sweep(experiment, options_of(experiment, given))


def options_of(experiment: Experiment, given: Namespace) -> Options:
    """What the command line says, over what ``--quick`` sets.

    Raises:
        UserError: for a value that is out of range or in the wrong form, or ``--quick`` of an experiment without it.
    """
    from editlab.experiments.plan import Options

    for name in ("edits", "batch_size", "tokens", "workers"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"--{name} must be at least 1, and is {given[name]}.")
    values: dict[str, Any] = {
        "only": given.only, "seeds": given.seeds, "edits": given.edits, "batch_size": given.batch_size,
        "facts": _full_path(given.path), "heldout": _full_path(given.heldout), "moments": _full_path(given.moments),
        "moment_tokens": given.tokens,
    }  # fmt: skip
    callbacks = [_callback_setting(text) for text in given.callback or ()]
    flags = dict(_assignment(text, "--set") for text in given.set or ())
    home = experiment.project
    if given.quick:
        quick = experiment.quick
        if quick is None:
            raise UserError(f"{given.experiment} has no 'quick': name cases with --only, and a few facts with --edits.")
        defaults = {**QUICK, "seeds": [1], "only": quick.only, "edits": quick.edits, "batch_size": quick.batch_size}
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        callbacks, flags = [*QUICK_CALLBACKS, *callbacks], {**QUICK_FLAGS, **flags}
        home = home / "lightning_logs" / "quick"
    out = Path(given.out).absolute() if given.out else home
    usual = out / "runs" if given.quick else experiment.project / "lightning_logs"
    work = Path(given.work).absolute() if given.work else usual / experiment.name
    where = {name: tuple(value.split(",")) for name, value in (_assignment(t, "--where") for t in given.where or ())}
    return Options(
        **values, where=where, callback_settings=callbacks, flags=flags, work=work, out=out, workers=given.workers,
        launcher=given.launcher, dry_run=given.dry_run, no_run=given.no_run,
    )  # fmt: skip


def _full_path(text: str | None) -> str | None:
    """The full path of a file that exists, as runs start in another folder; other words as they are."""
    return str(Path(text).resolve()) if text is not None and Path(text).is_file() else text


def _callback_setting(text: str) -> tuple[str, str, Any]:
    """Class, name and value of ``CLASS.NAME=VALUE``; the value as JSON, or else as text."""
    found = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)
    if found is None:
        raise UserError(f"--callback {text!r} must have the form CLASS.NAME=VALUE: LoRAAdjust.steps=4.")
    owner, name, value = found.groups()
    try:
        return owner, name, json.loads(value)
    except json.JSONDecodeError:
        return owner, name, value


def _assignment(text: str, option: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"{option} {text!r} must have the form NAME=VALUE.")
    return name, value


COMMAND = Command(
    "sweep", "Runs an experiment of many runs, and writes its tables and figures.", _add_arguments, _sweep
)
