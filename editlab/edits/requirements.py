"""Checks that a method and its post-steps can work with the rest of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.solver.base import EditMethod


def require_batch_size(method: EditMethod, size: int) -> None:
    """Makes sure that a method can edit batches of this size.

    Raises:
        UserError: The size is above the method's largest.
    """
    if (largest := method.largest_batch) is not None and size > largest:
        raise UserError(f"{type(method).__name__} edits {largest} fact a step: set data.batch_size to {largest}.")


def require_compatible(
    settings: SolveSettings, independent: bool, callbacks: Iterable[Any], experts: bool = False
) -> None:
    """Makes sure that a run has what its method needs, and nothing that its post-steps cannot work with.

    Args:
        settings: the method, the post-steps and the other settings of a solve.
        independent: whether each batch is edited on the original weights.
        callbacks: the run's callbacks.
        experts: whether the edited layers are mixtures of experts.

    Raises:
        UserError: The method needs past keys and no callback keeps them; past keys or training are asked of mixtures of
            experts; there is no next batch to carry anything into; or a callback changes the weights after the
            post-steps.
    """
    callbacks = list(callbacks)
    method = type(settings.method).__name__
    keeper = next((type(c).__name__ for c in callbacks if getattr(c, "keeps_past_keys", False)), None)
    if experts and settings.method.changes_weights and not settings.method.solves:
        raise UserError(
            f"{method} trains linear maps, and the edited layers are mixtures of experts, whose weights are no modules "
            "of their own: set model.method to one that solves the closed form, such as MEMIT, or name a linear map "
            "with model.edit_module."
        )
    if experts and (keeper or settings.method.edits_between_refreshes):
        fix = f"set {keeper}.memory to sampled" if keeper else "set model.method to MEMIT, EMMET, ROME or AlphaEdit"
        raise UserError(
            f"{keeper or method} keeps one matrix over all features of a layer for the past keys, and the edited "
            f"layers are mixtures of experts, whose features together are too many for it: {fix}."
        )
    if settings.method.edits_between_refreshes and not keeper:
        raise UserError(
            f"{method} computes its projector from past keys: add the callback MemoryReplay with memory: consolidated."
        )
    if not settings.post_steps:
        return
    if independent and settings.compensate:
        raise UserError(
            "model.compensate carries what post-steps cut off into the next batch, and model.restore_between_batches "
            "edits each batch on the original weights: set compensate to false."
        )
    changing = next((c for c in callbacks if getattr(c, "adjusts_weights", False)), None)
    if changing is not None:
        raise UserError(
            f"{type(changing).__name__} changes weights after model.post_steps, so that what they protect would be "
            "changed all the same: remove one of the two."
        )
