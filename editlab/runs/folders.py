"""Runs as they lie in their folders: settings, summary and curve; found, told apart, and grouped over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from editlab.errors import UserError
from editlab.runs.figures import Series
from editlab.runs.logger import read_table

SUMMARY, TABLE, CONFIG = "summary.json", "metrics.csv", "config.yaml"

_OURS = {"edits": int, "immediate": dict, "retained": dict}
"""What a summary of editlab's has, and of which kind."""

SEEDS = ("seed_everything", "data.seed")
"""Settings in which runs of one group may differ."""

_ASIDE = ("trainer.logger", "trainer.enable_progress_bar", "EditCheckpoint", "ForgettingCurve", "ckpt_path")
"""Settings that change nothing of what is compared."""

MEASURES = ("ES", "accuracy", "PS", "NS", "immediate", "perplexity", "ratio", "edits", "seconds")
"""Columns of a comparison: retained ES, accuracy, PS and NS; accuracy right after each edit; held-out perplexity and
what it is over the unedited model's; facts edited; the run's time."""

BEST: Mapping[str, Any] = {**dict.fromkeys(("ES", "accuracy", "PS", "NS", "immediate"), max), "perplexity": min,
                           "ratio": min}  # fmt: skip
"""Of which measures the best is marked, and which end is the best."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """What the run came to; None where it has not finished."""
        file = self.path / SUMMARY
        return _read_summary(file) if file.exists() else None

    @cached_property
    def curve(self) -> Series:
        """The run's table: number of edits -> name -> value; {} where it has none."""
        return read_table(self.path / TABLE)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe, flat: ``model.values.steps``, and callbacks' by their names, ``MemoryReplay.rate``."""
        file = self.path / CONFIG
        if not file.exists():
            return {}
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not valid YAML: leave the run out, or mend the file.") from error
        if not isinstance(loaded or {}, Mapping):
            raise UserError(f"{file} is no recipe: leave the run out, or mend the file.")
        return flat_settings(loaded or {})

    def measures(self) -> dict[str, float]:
        """What a comparison shows of it: of a run that has not finished, its last measured point."""
        summary = self.summary
        if summary is None:
            return self._last_point()
        perplexity = summary.get("perplexity", {})
        found = {name: summary["retained"].get(name) for name in ("ES", "accuracy", "PS", "NS")}
        found["immediate"] = summary["immediate"].get("accuracy")
        found["perplexity"] = perplexity.get("after")
        if perplexity.get("before") and perplexity.get("after"):
            found["ratio"] = perplexity["after"] / perplexity["before"]
        found |= {"edits": summary["edits"], "seconds": summary.get("seconds")}
        return {name: float(value) for name, value in found.items() if value is not None}

    def _last_point(self) -> dict[str, float]:
        curve = self.curve
        points = [row for _, row in sorted(curve.items()) if "retained/ES" in row or "retained/accuracy" in row]
        last = points[-1] if points else {}
        found = {
            name: last[f"retained/{name}"] for name in ("ES", "accuracy", "PS", "NS") if f"retained/{name}" in last
        }
        if "perplexity/heldout" in last:
            found["perplexity"] = last["perplexity/heldout"]
        return found | ({"edits": float(max(curve))} if curve else {})


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds alone."""

    name: str
    runs: tuple[RunFolder, ...]

    @property
    def unfinished(self) -> int:
        """Runs of it that have not come to their end."""
        return sum(run.summary is None for run in self.runs)

    def measures(self) -> dict[str, tuple[float, float, float]]:
        """Mean, lowest and highest over its runs of each measure that all of them have."""
        found = [run.measures() for run in self.runs]
        shared = [name for name in MEASURES if all(name in one for one in found)]
        columns = {name: [one[name] for one in found] for name in shared}
        return {name: (mean(values), min(values), max(values)) for name, values in columns.items()}


def find_runs(places: Iterable[str]) -> list[RunFolder]:
    """The runs at or below each place, each once.

    Raises:
        UserError: where a place is no folder, or has no run in it.
    """
    found: dict[Path, RunFolder] = {}
    for place in places:
        root = Path(place).expanduser()
        if not root.is_dir():
            raise UserError(
                f"There is no folder {place!r}: name a run's folder, such as lightning_logs/emmet/version_0."
            )
        files = [file for name in (SUMMARY, TABLE) for file in root.rglob(name) if _is_ours(file)]
        if not files:
            raise UserError(f"{place} has no run in it (no {SUMMARY} or {TABLE}): name a run's folder, or one of runs.")
        for folder in sorted({file.parent for file in files}):
            found.setdefault(folder.resolve(), RunFolder(folder))
    return list(found.values())


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as dotted names and values, without what changes nothing of what is compared."""
    return {name: value for name, value in _flat("", recipe) if not name.startswith(_ASIDE)}


def differing(several: Iterable[Mapping[str, Any]]) -> list[str]:
    """Settings, but for seeds, that have several values in these flat recipes.

    A setting that a recipe does not name makes no difference: it is of a callback that it does without, which is one
    itself, or has come with a later version.
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
    """Runs of the same settings but for the seeds, in the order in which they come."""
    names = differing(run.settings for run in runs)
    by_settings: dict[str, list[RunFolder]] = {}
    for run in runs:
        # Without settings there is no telling what a run shares with another.
        key = json.dumps([run.settings.get(n) for n in names], default=str) if run.settings else str(run.path)
        by_settings.setdefault(key, []).append(run)
    grouped = list(by_settings.values())
    labels = _told_apart(_short([_common(some) for some in grouped]), [some[0].settings for some in grouped])
    return [Group(label, tuple(some)) for label, some in zip(labels, grouped, strict=True)]


def _told_apart(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels, those that occur more than once with the settings in which their groups differ."""
    found = []
    for label, own in zip(labels, settings, strict=True):
        alike = [other for name, other in zip(labels, settings, strict=True) if name == label]
        apart = [f"{name.rpartition('.')[2]}={own.get(name)}" for name in differing(alike)]
        found.append(f"{label} ({', '.join(apart)})" if apart else label)
    return found


def _common(runs: Sequence[RunFolder]) -> Path:
    """The folder that stands for some runs: its own for one, that of the recipe for several."""
    return runs[0].path if len(runs) == 1 else runs[0].path.parent


def _short(paths: Sequence[Path]) -> list[str]:
    """Paths without what they all begin with, and without a part that all of them end with."""
    parts = [path.parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [str(Path(*p)) if len(parts) > 1 else "/".join(p[-2:]) for p in parts]


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Dotted names and values; a class stands under its place, and its arguments too."""
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        place = prefix.removesuffix(".")
        if place == "trainer.callbacks":
            place = name
        yield place, name
        yield from _flat(f"{place}.", value.get("init_args") or {})
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}{key}.", inner)
    elif prefix == "trainer.callbacks." and isinstance(value, list):
        for inner in value:
            yield from _flat(prefix, inner)
    else:
        yield prefix.removesuffix("."), value


def _is_ours(file: Path) -> bool:
    """Whether a summary or a table is one of editlab's: others write files of those names, too."""
    if file.name == TABLE:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return "edits" in lines.readline().strip().split(",")
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True  # damaged: to be said where it is read
    return isinstance(loaded, dict) and loaded.keys() >= _OURS.keys()


def _read_summary(path: Path) -> dict[str, Any]:
    damaged = UserError(f"{path} is damaged or not one of editlab's: leave the run out, or run it again.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged from error
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(name), kind) for name, kind in _OURS.items()):
        raise damaged
    return loaded
