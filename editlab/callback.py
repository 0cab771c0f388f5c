"""The callback class with the five hooks of an edit, from which replay, trust, LoRA and a user's own derive.

====================  ==============================================================================================
hook                  when it is called, and what it may do
====================  ==============================================================================================
``on_edit_planned``   before the solve: add constraints (replay)
``on_edit_applied``   the updates are in the weights: scale them, drop facts, or roll back (trust)
``on_edit_settled``   the verdict is carried out: remember kept edits (replay)
``on_edit_adjust``    after that: change weights by other means (LoRA)
``on_edit_done``      the weights are those that the next batch starts from: measure
====================  ==============================================================================================

All callbacks get one event before any gets the next. Within an event they are called by ascending ``priority``, so
the order in which the YAML lists them never changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer

from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome, EditPlan


class EditCallback(Callback):
    """A Lightning callback that also gets the events of an edit; each hook does nothing by default."""

    priority: int = 0
    """Order of the callbacks within an event: lower ones are called first, equal ones by their ``state_key``. editlab's
    own have: ForgettingCurve 10, DownstreamEval 20, LoRAAdjust 30, MemoryReplay 40, TrustRollback 50. So a callback
    with the default 0 sees a plan before any of them, and one above 50 sees the outcome after trust has judged it."""

    measured_groups: Sequence[str] = ()
    """Groups of metrics that the callback measures during a run, such as ``retained``: EarlyStopping may watch them."""

    keeps_past_keys: bool = False
    """Whether the callback keeps the keys of past edits in each layer's metric, which some methods need (BetaEdit)."""

    adjusts_weights: bool = False
    """Whether the callback changes weights in ``on_edit_adjust``, which no post-step sees (LoRAAdjust)."""

    charts: Mapping[str, Sequence[str]] = {}
    """Charts of what the callback logs, for TensorBoard's custom scalars: title -> patterns of the names in a chart."""

    def require_settings(self, editor: SequentialEditor) -> None:
        """Refuses settings of the editor that the callback cannot work with; to be called in ``on_fit_start``.

        ``editlab validate-config`` calls it too, with an editor that has no model yet.

        Raises:
            UserError: for such a setting.
        """

    def reset_for_new_run(self, editor: SequentialEditor, initial_state: Mapping[str, Any]) -> None:
        """Forgets an earlier run in which the same object was used; to be called in ``on_fit_start``.

        Args:
            editor: of the new run. If it has edits, it resumes from a checkpoint and the callback's state is kept.
            initial_state: the callback's ``state_dict`` when it was made.
        """
        if not editor.edits:
            self.load_state_dict(dict(initial_state))

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Called before the solve, with the values found: constraints may be added by :meth:`EditPlan.add`."""

    def on_edit_applied(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Called with the updates in the weights: ``outcome.scale``, ``drop`` and ``roll_back`` may be called.

        If facts were dropped, it is called again after the batch was solved without them.
        """

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Called when all callbacks have decided and the weights hold what stays of the batch."""

    def on_edit_adjust(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Called for further changes of the weights; ``outcome.before_adjustment`` has to hold those before them."""

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Called when the weights are those that the next batch starts from."""
