"""History of an edited model: its edits, and its run's metrics, settings and versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.runs.resume import KEY
from editlab.runs.summary import GROUPS

_LANGUAGE = ("perplexity", "generation_entropy")


@dataclass(frozen=True)
class Edit:
    """One line of the ledger, for a reader."""

    subject: str
    prompt: str
    """template with ``{}`` for the subject"""
    target_new: str
    target_true: str | None
    batch: int
    """number of its batch, from 1"""
    fate: str
    """kept, scaled, rolled back or superseded, in words"""


@dataclass(frozen=True)
class History:
    """Everything that a model card states about the origin of the weights; unknown fields are empty."""

    batches: int
    """number of edit batches, including those rolled back"""
    adapted: int = 0
    """number of modules with an adapter, which is not part of the sums of updates"""
    edits: tuple[Edit, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """``before``, ``immediate``, ``retained``, ``perplexity``, ``generation_entropy`` of the run's summary"""
    recipe: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: str = ""
    """the sections ``model`` and ``data`` and the callbacks of the run's config.yaml"""

    @classmethod
    def of(cls, checkpoint: dict[str, Any], path: Path) -> History:
        """The history in a checkpoint read from ``path``, and in the run's folder around it, if that still exists."""
        run, batches = path.resolve().parents[1], checkpoint["global_step"]
        summary = _read(run / "summary.json", json.loads)
        config = _read(run / "config.yaml", yaml.safe_load)
        # The summary describes the end of the run, not the weights of an earlier checkpoint.
        measured = summary if summary.get("batches") == batches else {}
        return cls(
            batches,
            checkpoint[KEY].get("adapted", 0),
            tuple(_edits(checkpoint[KEY])),
            {name: measured[name] for name in (*GROUPS, *_LANGUAGE) if measured.get(name)},
            summary.get("recipe"),
            summary.get("seed", config.get("seed_everything")),
            summary.get("versions", {}),
            _settings(config),
        )

    def to_json(self) -> str:
        """The history as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> History:
        """The inverse of :meth:`to_json`.

        Raises:
            UserError: The text is something else.
        """
        try:
            values = json.loads(text)
            return cls(**{**values, "edits": tuple(Edit(**edit) for edit in values["edits"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError("The delta's history is not one that editlab wrote: export the delta again.") from error


def _edits(state: dict[str, Any]) -> list[Edit]:
    ledger = Ledger.of(state)
    return [
        Edit(e.fact.subject, e.fact.prompt, e.fact.target_new, e.fact.target_true, e.batch + 1, fate)
        for e, fate in zip(ledger, ledger.fates, strict=True)
    ]


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """A file of the run's folder as a dict; {} if it does not exist, since a checkpoint may be copied alone."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(config: dict[str, Any]) -> str:
    chosen: dict[str, Any] = {name: config[name] for name in ("model", "data") if name in config}
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and trainer.get("callbacks"):
        chosen["trainer"] = {"callbacks": trainer["callbacks"]}
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True) if chosen else ""
