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
QUICK_CALLBACKS: tuple[tuple[str, str, Any], ...] = (
    ("LoRAAdjust", "steps", 4),
    ("ForgettingCurve", "every_n_edits", 8),  # two snapshots of 16 edits: a table of turns needs as many
)
QUICK_FLAGS = {"model.evaluation.heldout_tokens": "512"}
"""Settings of ``--quick`` in each experiment: a little built-in data, short trainings, and a curve."""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", type=str, help="YAML file of the experiment, or the name of one that ships.")
    add("--only", nargs="+", type=str, help="Names of the cases to run. Default: all.")
    add("--where", nargs="+", type=str, metavar="COLUMN=VALUE[,VALUE]", help="Labels of the cases to run, such as "
        "batch_size=32,128.")  # fmt: skip
    add("--seeds", nargs="+", type=int, help="Seeds. Default: those of the experiment.")
    add("--edits", type=int, help="Number of facts. Default: that of the experiment.")
    add("--batch_size", type=int, help="Number of facts in a batch, in cases without a batch size of their own.")
    add("--path", help="File of facts, or worldfacts for the built-in ones.")
    add("--heldout", help="File of the text that perplexity is measured on, or builtin.")
    add("--moments", help="File of the text of the second moments, or self for text sampled from the model.")
    add(
        "--tokens",
        type=int,
        help="Number of tokens of the second moments. Default: 24576 of self, 160000 of other texts.",
    )
    add("--callback", nargs="+", type=str, metavar="CLASS.NAME=VALUE",
        help="Settings of callbacks, in all cases that have them, such as LoRAAdjust.steps=4.")  # fmt: skip
    add("--set", nargs="+", type=str, metavar="NAME=VALUE",
        help="Settings that replace those of all cases, such as model.evaluation.neighbors=1.")  # fmt: skip
    add("--work", help="Folder of the runs. Default: lightning_logs/NAME.")
    add("--out", help="Folder that results/ and figs/ are written to. Default: the project's.")
    add("--workers", type=int, default=1, help="Number of runs at a time; they share the cores.")
    add(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="ray: start runs on a Ray cluster.",
    )
    add("--quick", action="store_true", help="Make a few small runs on built-in facts, as a test of the installation.")
    add(
        "--dry-run",
        action="store_true",
        help="Show the runs and their estimated duration, and make none.",
    )
    add("--no-run", action="store_true", help="Make no runs, and write tables and figures of the finished ones.")
    add("--archive", action="store_true", help="Also pack settings, logs and outcomes of each run in logs/NAME.")


def _sweep(given: Namespace) -> None:
    from editlab.experiments.spec import load_experiment  # imported late, because they import torch
    from editlab.experiments.sweep import sweep

    experiment = load_experiment(given.experiment)
    sweep(experiment, options_of(experiment, given))


def options_of(experiment: Experiment, given: Namespace) -> Options:
    """The options of the command line; they take precedence over those that ``--quick`` sets.

    Raises:
        UserError: A value is out of range or in the wrong form, or the experiment has no ``quick``.
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
        launcher=given.launcher, dry_run=given.dry_run, no_run=given.no_run, archive=given.archive,
    )  # fmt: skip


def _full_path(text: str | None) -> str | None:
    """The full path of a file that exists, because runs start in another folder; other texts unchanged."""
    return str(Path(text).resolve()) if text is not None and Path(text).is_file() else text


def _callback_setting(text: str) -> tuple[str, str, Any]:
    """Class, name and value of ``CLASS.NAME=VALUE``; the value is parsed as JSON or, if that fails, taken as text."""
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


COMMAND = Command("sweep", "Run an experiment of many runs and write its tables and figures.", _add_arguments, _sweep)
