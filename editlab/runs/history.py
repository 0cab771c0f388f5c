"""The history of an edited model: its edits, and the settings and metrics of its run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from editlab.data.fact import Fact, Neighbor
from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.runs.resume import KEY

NEIGHBORS = 2
"""Most neighbors of a fact that a history keeps."""


@dataclass(frozen=True)
class Edit:
    """One entry of the ledger, in the form that a model card shows.

    Attributes:
        subject: the fact's subject.
        prompt: template with ``{}`` for the subject.
        target_new: the new target.
        target_true: the true target, if the fact names one.
        batch: number of its batch, from 1.
        fate: kept, scaled, rolled back, superseded or removed, in words.
        neighbors: the first prompts about other subjects that the fact names, each with its own answer.
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None
    batch: int
    fate: str
    neighbors: tuple[tuple[str, str], ...] = ()

    @property
    def fact(self) -> Fact:
        """The fact, as far as the entry says it."""
        neighbors = tuple(Neighbor(*one) for one in self.neighbors)
        return Fact(self.subject, self.prompt, self.target_new, self.target_true, neighbors=neighbors)

    @property
    def stands(self) -> bool:
        """Whether the weights should hold it."""
        return self.fate == "kept" or self.fate.startswith("scaled")


@dataclass(frozen=True)
class Removed:
    """One removal of facts from the weights, as the ledger of a patch keeps it.

    Attributes:
        when: time in UTC, such as ``2026-01-31T12:00:00Z``.
        edits: numbers of the edits that were taken out, from 1.
        measured: name -> number, before and after the removal (:class:`editlab.runs.removal.Removal`).
    """

    when: str
    edits: tuple[int, ...]
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """The run that made a model's weights, as a model card describes it; unknown parts are empty.

    Attributes:
        batches: number of edit batches, including those that were rolled back.
        adapted: number of modules with a separate adapter, which is not part of the delta.
        edits: all edits in their order.
        metrics: ``group/metric`` -> value, from the run's ``summary.json``.
        recipe: name of the recipe.
        seed: the run's seed.
        versions: versions of the libraries that the run used.
        settings: sections ``model`` and ``data`` and the callbacks of the run's config.yaml.
        removals: removals of single facts since the run, oldest first.
        when: time at which the run was finished, in UTC; empty if its folder does not say it.
    """

    batches: int
    adapted: int = 0
    edits: tuple[Edit, ...] = ()
    metrics: dict[str, float | None] = field(default_factory=dict)
    recipe: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: str = ""
    removals: tuple[Removed, ...] = ()
    when: str = ""

    @classmethod
    def of(cls, checkpoint: dict[str, Any], path: Path) -> History:
        """The history of a checkpoint that was read from ``path``, with the run's folder around it if it is there."""
        run, batches = path.resolve().parents[1], checkpoint["global_step"]
        own = path.resolve().parent.name == "checkpoints"  # around another folder may lie files of another run
        summary = _read(run / "summary.json", json.loads) if own else {}
        config = _read(run / "config.yaml", yaml.safe_load) if own else {}
        # The summary is of the end of the run: it does not describe the weights of an earlier checkpoint.
        measured = summary if summary.get("batches") == batches else {}
        return cls(
            batches,
            checkpoint[KEY].get("adapted", 0),
            tuple(_edits(checkpoint[KEY])),
            measured.get("metrics", {}),
            summary.get("recipe"),
            summary.get("seed", config.get("seed_everything")),
            summary.get("versions", {}),
            _settings(config),
            when=_time_of(run / "summary.json") if own else "",
        )

    @classmethod
    def of_run(cls, ledger: Ledger, summary: Mapping[str, Any], adapted: int = 0, settings: str = "") -> History:
        """The history of a finished run that is still in memory.

        Args:
            ledger: its edits.
            summary: the run's summary.
            adapted: number of modules with a separate adapter.
            settings: sections of the run's recipe, in YAML.
        """
        metrics = {name: value if math.isfinite(value) else None for name, value in summary["metrics"].items()}
        return cls(
            summary["batches"], adapted, tuple(_of_ledger(ledger)), metrics, summary["recipe"], summary["seed"],
            summary["versions"], settings,
        )  # fmt: skip

    def to_json(self) -> str:
        """The history as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> History:
        """The inverse of :meth:`to_json`.

        Raises:
            UserError: if the text is not such a line.
        """
        try:
            values = json.loads(text)
            edits = tuple(Edit(**{**one, "neighbors": _pairs(one.get("neighbors", ()))}) for one in values["edits"])
            removals = tuple(Removed(**{**one, "edits": tuple(one["edits"])}) for one in values.get("removals", ()))
            return cls(**{**values, "edits": edits, "removals": removals})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError("The delta's history is not one that editlab wrote: export the delta again.") from error


def _edits(state: dict[str, Any]) -> list[Edit]:
    return _of_ledger(Ledger.of(state))


def _of_ledger(ledger: Ledger) -> list[Edit]:
    return [
        Edit(
            e.fact.subject, e.fact.prompt, e.fact.target_new, e.fact.target_true, e.batch + 1, fate,
            tuple((near.prompt, near.truth) for near in e.fact.neighbors[:NEIGHBORS]),
        )
        for e, fate in zip(ledger, ledger.fates, strict=True)
    ]  # fmt: skip


def _pairs(found: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(prompt), str(truth)) for prompt, truth in found)


def _time_of(path: Path) -> str:
    """When a file was written, in UTC; empty if there is none."""
    try:
        return utc(path.stat().st_mtime)
    except OSError:
        return ""


def utc(seconds: float) -> str:
    """A time in seconds since 1970 as text in UTC.

    >>> utc(0)
    '1970-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """The content of a file of the run's folder; {} if there is none, as next to a checkpoint that was moved."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(config: dict[str, Any]) -> str:
    chosen: dict[str, Any] = {name: config[name] for name in ("model", "data") if name in config}
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and trainer.get("callbacks"):
        chosen["trainer"] = {"callbacks": trainer["callbacks"]}
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True) if chosen else ""


def fates(edits: Iterable[Edit]) -> dict[str, int]:
    """How many edits were kept, scaled, rolled back, superseded and removed; those that occur.

    >>> fates([Edit("a", "{} b", "c", None, 1, "scaled to 0.5"), Edit("a", "{} b", "d", None, 1, "removed")])
    {'scaled': 1, 'removed': 1}
    """
    return dict(Counter(edit.fate.split(" by ")[0].split(" to ")[0] for edit in edits))
