"""Folders of runs: finding them, reading settings, summary and curve, and grouping runs that differ only by seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from editlab.errors import UserError
from editlab.metrics.names import BEFORE, IMMEDIATE, METRICS, PERPLEXITY, RETAINED, full_name
from editlab.runs.figures import Series
from editlab.runs.outcomes import FILE as OUTCOMES
from editlab.runs.outcomes import Row, read_outcomes
from editlab.runs.run_table import read_table

SUMMARY, TABLE, CONFIG = "summary.json", "metrics.csv", "config.yaml"

_OURS = {"edits": int, "metrics": dict}
"""Entries that every summary of editlab has, and their types."""

SEEDS = ("seed_everything", "data.seed")
"""Settings in which the runs of one group may differ."""

_IGNORED = (
    *(
        f"trainer.{name}"
        for name in (
            "logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "default_root_dir",
            "log_every_n_steps", "num_sanity_val_steps", "check_val_every_n_epoch", "val_check_interval", "profiler",
            "limit_val_batches", "limit_test_batches", "limit_predict_batches", "inference_mode", "detect_anomaly",
        )
    ),
    "EditCheckpoint", "ForgettingCurve", "DownstreamEval", "EditProgressBar", "TQDMProgressBar", "RichProgressBar",
    "ckpt_path", "weights_only", "model.moments.cache", "model.evaluation.age_bins", "model.evaluation.snapshot_tokens",
    "model.evaluation.snapshot_generation",
)  # fmt: skip
"""Settings, and callbacks with their settings, that have no effect on what is compared: they choose what is written,
shown or measured, and no edit depends on them."""

_BEFORE, _RETAINED = (full_name(group, PERPLEXITY) for group in (BEFORE, RETAINED))

_SHOWN = (
    "ES", "accuracy", "generation", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy", "bystander_accuracy",
    "bystander_generation",
)  # fmt: skip

MEASURES = (
    *(full_name(RETAINED, name) for name in _SHOWN), full_name(IMMEDIATE, "accuracy"), _RETAINED, "perplexity_ratio",
    "edits", "seconds",
)  # fmt: skip
"""Columns of a comparison of runs: metrics by their names, the perplexity divided by the unedited model's, the number
of edited facts, and the duration."""

BEST: Mapping[str, Callable[..., float]] = {
    **{full_name(group, metric.name): metric.best for group in (RETAINED, IMMEDIATE) for metric in METRICS},
    "perplexity_ratio": min,
}
"""Columns of which the best value is marked, with the function that picks it."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """Content of ``summary.json``; None if the run has not finished."""
        file = self.path / SUMMARY
        return _read_summary(file) if file.exists() else None

    @cached_property
    def curve(self) -> Series:
        """Content of ``metrics.csv``: number of edits -> name -> value; {} if there is none."""
        return read_table(self.path / TABLE)

    @cached_property
    def outcomes(self) -> list[Row]:
        """Content of ``outcomes.csv``: a dict for each edit (:mod:`editlab.runs.outcomes`).

        Raises:
            UserError: if there is none, or it is damaged.
        """
        return read_outcomes(self.path / OUTCOMES)

    @property
    def has_outcomes(self) -> bool:
        """Whether there is an ``outcomes.csv``; runs by older versions and unfinished ones have none."""
        return (self.path / OUTCOMES).is_file()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe with dotted names: ``model.values.steps``, and ``MemoryReplay.rate`` for callbacks."""
        file = self.path / CONFIG
        if not file.exists():
            return {}
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid YAML: leave the run out, or correct the file.") from error
        if not isinstance(loaded or {}, Mapping):
            raise UserError(f"{file} is not a recipe: leave the run out, or correct the file.")
        return flat_settings(loaded or {})

    def measures(self) -> dict[str, float]:
        """The columns of a comparison; for a run that has not finished, those of its last measured point."""
        summary = self.summary
        if summary is None:
            return self._last_point()
        metrics = summary["metrics"]
        found = {name: metrics.get(name) for name in MEASURES}
        if metrics.get(_BEFORE) and metrics.get(_RETAINED):
            found["perplexity_ratio"] = metrics[_RETAINED] / metrics[_BEFORE]
        found |= {"edits": summary["edits"], "seconds": summary.get("seconds")}
        return {name: float(value) for name, value in found.items() if value is not None}

    def _last_point(self) -> dict[str, float]:
        retained = [name for name in MEASURES if name.startswith(f"{RETAINED}/")]
        points = [row for _, row in sorted(self.curve.items()) if any(name in row for name in retained)]
        last = points[-1] if points else {}
        edits = {"edits": float(max(self.curve))} if self.curve else {}
        return {name: last[name] for name in retained if name in last} | edits


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seeds."""

    name: str
    runs: tuple[RunFolder, ...]

    @property
    def unfinished(self) -> int:
        """Number of its runs that have not finished."""
        return sum(run.summary is None for run in self.runs)

    def measures(self) -> dict[str, tuple[float, float, float]]:
        """Column -> (mean, lowest, highest value) over the runs, for the columns that all of them have."""
        found = [run.measures() for run in self.runs]
        shared = [name for name in MEASURES if all(name in one for one in found)]
        columns = {name: [one[name] for one in found] for name in shared}
        return {name: (mean(values), min(values), max(values)) for name, values in columns.items()}


def find_runs(folders: Iterable[str]) -> list[RunFolder]:
    """The runs in each folder or below it, each run once.

    Raises:
        UserError: if one of them is not a folder, or has no run in it.
    """
    found: dict[Path, RunFolder] = {}
    for given in folders:
        root = Path(given).expanduser()
        if not root.is_dir():
            raise UserError(
                f"There is no folder {given!r}: name a run's folder, such as lightning_logs/emmet/version_0."
            )
        measured = measured_folders(root)
        if not measured:
            raise UserError(
                f"{given} has no run in it (no {SUMMARY} or {TABLE}): name a run's folder, or a parent of some."
            )
        for folder in measured:
            found.setdefault(folder.resolve(), RunFolder(folder))
    return list(found.values())


def measured_folders(root: Path) -> list[Path]:
    """The folders in and below ``root`` that hold a summary or a table of metrics of editlab, sorted."""
    files = [file for name in (SUMMARY, TABLE) for file in root.rglob(name) if _is_ours(file)]
    return sorted({file.parent for file in files})


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as dotted names and values, without the settings that have no effect on what is compared."""
    return {name: value for name, value in _flat("", recipe) if not name.startswith(_IGNORED)}


def differing(several: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the settings, except seeds, that have several values in these flat recipes.

    A setting that is absent from a recipe does not count as different: it belongs to a callback that the recipe does
    not have (the callback's own name then differs), or it was added by a later version of editlab.
    """
    known = [settings for settings in several if settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in SEEDS)
    classes = {name for settings in known for name, value in settings.items() if name == value}
    found = []
    for name in names:
        named = [settings.get(name) for settings in known if name in classes or name in settings]
        if len({json.dumps(value, default=str) for value in named}) > 1:
            found.append(name)
    return found


def group_runs(runs: Sequence[RunFolder]) -> list[Group]:
    """Groups of runs that have the same settings except for seeds, in the order in which they are first met."""
    names = differing(run.settings for run in runs)
    by_settings: dict[str, list[RunFolder]] = {}
    for run in runs:
        # Without settings a run cannot be matched with another.
        key = json.dumps([run.settings.get(n) for n in names], default=str) if run.settings else str(run.path)
        by_settings.setdefault(key, []).append(run)
    grouped = list(by_settings.values())
    labels = _distinct(_short([_common(some) for some in grouped]), [some[0].settings for some in grouped])
    return [Group(label, tuple(some)) for label, some in zip(labels, grouped, strict=True)]


def _distinct(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels; those that occur more than once get the settings in which their groups differ."""
    found = []
    for label, own in zip(labels, settings, strict=True):
        alike = [other for name, other in zip(labels, settings, strict=True) if name == label]
        apart = [f"{name.rpartition('.')[2]}={own.get(name)}" for name in differing(alike)]
        found.append(f"{label} ({', '.join(apart)})" if apart else label)
    return found


def _common(runs: Sequence[RunFolder]) -> Path:
    """The folder after which a group is named: the run's own, or the recipe's for several runs."""
    return runs[0].path if len(runs) == 1 else runs[0].path.parent


def _short(paths: Sequence[Path]) -> list[str]:
    """Paths without the parts at the start and at the end that all of them share."""
    parts = [path.parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [str(Path(*p)) if len(parts) > 1 else "/".join(p[-2:]) for p in parts]


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Dotted names and values; a class and its arguments are named by the setting that holds it."""
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        setting = prefix.removesuffix(".")
        if setting == "trainer.callbacks":
            setting = name
        yield setting, name
        yield from _flat(f"{setting}.", value.get("init_args") or {})
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}{key}.", inner)
    elif prefix == "trainer.callbacks." and isinstance(value, list):
        for inner in value:
            yield from _flat(prefix, inner)
    else:
        yield prefix.removesuffix("."), value


def _is_ours(file: Path) -> bool:
    """Whether a summary or a table is one of editlab's: other programs write files with these names, too."""
    if file.name == TABLE:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return "edits" in lines.readline().strip().split(",")
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True  # damaged: reported when it is read
    return isinstance(loaded, dict) and loaded.keys() >= _OURS.keys()


def _read_summary(path: Path) -> dict[str, Any]:
    damaged = UserError(f"{path} is damaged, or not of this version of editlab: leave the run out, or run it again.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(name), kind) for name, kind in _OURS.items()):
        raise damaged
    return loaded
