"""What :func:`editlab.edit_model` gives back: the facts, the numbers, and ways to keep or remove the edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from editlab.api.changes import Changes, measure_changes
from editlab.api.surroundings import as_it_was
from editlab.data import Fact
from editlab.editor import SequentialEditor
from editlab.edits import standing
from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.runs.delta import Delta
from editlab.runs.frames import RunFrames


@dataclass
class EditResult(RunFrames):
    """Result of :func:`edit_model`; it is read like an :class:`editlab.Run`, whether or not a folder was written.

    :attr:`metrics`, :attr:`outcomes` and :attr:`events` are pandas frames, and ``print(result)`` shows the metrics
    before, right after, and at the end, as a table.
    """

    facts: list[Fact]
    """facts that the weights hold now, in the order of their edits"""
    rolled_back: list[Fact]
    """facts that a callback rolled back or dropped, or that a later edit superseded"""
    summary: dict[str, Any]
    """what a run writes to ``summary.json``; its ``metrics`` are named ``group/metric``, such as ``retained/ES``"""
    editor: SequentialEditor
    """the LightningModule that edited the model, with updates, ledger and evaluation"""
    folder: Path | None = None
    """the run's folder, which :class:`editlab.Run` reads; None if none was asked for"""
    curve_rows: Mapping[int, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """number of edits -> ``group/metric`` -> value: the content of :attr:`metrics`, for programs without pandas"""
    outcome_rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """the content of :attr:`outcomes`, a dict for each edit"""
    event_rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """the content of :attr:`events`, a dict for each event"""
    settings: str = field(default="", repr=False)
    """the settings of the call as a recipe in YAML, which :meth:`delta` keeps"""

    _reverted: bool = field(default=False, init=False, repr=False)

    def revert(self) -> None:
        """Removes the edits of this call from the model; those of later calls stay.

        If nothing else has changed the edited weights since, they are what they were before the call, bit for bit.
        """
        standing.remove(changed_layers(self.editor))
        self._reverted = True

    def changes(self) -> Changes:
        """What the edits changed: answers to the facts, to neighbors and to bystanders, perplexity, weights.

        The bystanders are those of the setting ``evaluation``.

        Raises:
            UserError: The edits were reverted.
        """
        self._require_edits("changes")
        with as_it_was(self.editor.lm.model):
            return measure_changes(self.editor, self.facts, self.summary)

    def delta(self) -> Delta:
        """The sums of updates of this call, which :meth:`~editlab.runs.delta.Delta.save` writes as a patch.

        Raises:
            UserError: The edits were reverted.
        """
        self._require_edits("delta")
        return Delta.of_run(self.editor, self.summary, self.settings)

    def _require_edits(self, method: str) -> None:
        if self._reverted:
            raise UserError(f"The edits were taken out by revert(): call {method}() before it.")

    def _curve(self) -> Mapping[int, Mapping[str, float]]:
        return self.curve_rows

    def _outcome_rows(self) -> Sequence[Mapping[str, Any]]:
        return self.outcome_rows

    def _event_rows(self) -> Sequence[Mapping[str, Any]]:
        return self.event_rows


def changed_layers(editor: SequentialEditor) -> list[EditedLayer]:
    """The weights that an editor has changed; [] if ``layers: auto`` has not chosen any yet."""
    layers = [*editor.edited.values(), *editor.adjusted.values()]
    return [layer for layer in layers if isinstance(layer, EditedLayer)]


def take_out(editor: SequentialEditor) -> None:
    """Puts the original weights back, for an editor that has failed and has no result."""
    for layer in changed_layers(editor):
        layer.adapter = None
        layer.restore(torch.zeros_like(layer.total))
