"""The history of an edited model: its edits, and the settings and metrics of its run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.runs.resume import KEY


@dataclass(frozen=True)
class Edit:
    """One entry of the ledger, in the form that a model card shows.

    Attributes:
        subject: the fact's subject.
        prompt: template with ``{}`` for the subject.
        target_new: the new target.
        target_true: the true target, if the fact names one.
        batch: number of its batch, from 1.
        fate: kept, scaled, rolled back or superseded, in words.
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None
    batch: int
    fate: str


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
    """

    batches: int
    adapted: int = 0
    edits: tuple[Edit, ...] = ()
    metrics: dict[str, float | None] = field(default_factory=dict)
    recipe: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: str = ""

    @classmethod
    def of(cls, checkpoint: dict[str, Any], path: Path) -> History:
        """The history of a checkpoint that was read from ``path``, with the run's folder around it if it is there."""
        run, batches = path.resolve().parents[1], checkpoint["global_step"]
        summary = _read(run / "summary.json", json.loads)
        config = _read(run / "config.yaml", yaml.safe_load)
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
        )

    @classmethod
    def of_run(cls, ledger: Ledger, summary: Mapping[str, Any], adapted: int = 0) -> History:
        """The history of a finished run that is still in memory.

        Args:
            ledger: its edits.
            summary: the run's summary.
            adapted: number of modules with a separate adapter.
        """
        metrics = {name: value if math.isfinite(value) else None for name, value in summary["metrics"].items()}
        return cls(
            summary["batches"], adapted, tuple(_of_ledger(ledger)), metrics, summary["recipe"], summary["seed"],
            summary["versions"],
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
            return cls(**{**values, "edits": tuple(Edit(**edit) for edit in values["edits"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError("The delta's history is not one that editlab wrote: export the delta again.") from error


def _edits(state: dict[str, Any]) -> list[Edit]:
    return _of_ledger(Ledger.of(state))


def _of_ledger(ledger: Ledger) -> list[Edit]:
    return [
        Edit(e.fact.subject, e.fact.prompt, e.fact.target_new, e.fact.target_true, e.batch + 1, fate)
        for e, fate in zip(ledger, ledger.fates, strict=True)
    ]


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
