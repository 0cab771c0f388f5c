"""Checks that memory replay can work with the settings of a run, before a model is loaded."""

from __future__ import annotations

from typing import Protocol

from callbacks.replay.trained import Settings, require_for_training
from editlab.editor import SequentialEditor
from editlab.errors import UserError


class Replay(Settings, Protocol):
    """The settings of MemoryReplay that the editor's may contradict."""

    @property
    def samples(self) -> bool:
        """Whether earlier edits take part in solves."""


def require_settings(editor: SequentialEditor, replay: Replay) -> None:
    """Make sure that MemoryReplay's settings agree with the editor's, which needs no model for it.

    Raises:
        UserError: Batches are independent, keys would be cached although they change, or the method has no use for a
            setting.
    """
    if editor.restore_between_batches:
        raise UserError(
            "MemoryReplay has nothing to remember with model.restore_between_batches: remove one of the two."
        )
    if replay.cache_keys and len(editor.layer_numbers) > 1:
        raise UserError(
            f"MemoryReplay.cache_keys cannot be used with layers {editor.layer_numbers}: an edit of a lower layer "
            "changes the keys of the higher ones. Edit one layer, or remove cache_keys."
        )
    if replay.cache_keys and editor.solve_settings.key_mode != "bare":
        raise UserError(
            f"MemoryReplay.cache_keys keeps one key for each fact, and model.keys is "
            f"{editor.solve_settings.key_mode}: set it to bare."
        )
    require_for_training(editor.method, replay)
    if replay.samples and editor.solve_settings.bare_denominator:
        raise UserError(
            "MemoryReplay adds constraints to a solve, and with ROME's published conventions it has one: set "
            "MemoryReplay.memory to consolidated, or model.conventions to own."
        )
