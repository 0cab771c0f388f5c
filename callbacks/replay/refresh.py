"""Metrics that are computed again after some edits, from the past keys at that time (BetaEdit's projector)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from callbacks.replay.past_keys import packed, unpacked
from editlab.editor import SequentialEditor
from editlab.solver.preservation import Preservation


class Refresh:
    """The last refresh of the metrics without past keys; nothing happens with methods that need none."""

    def __init__(self) -> None:
        self.kept = 0
        """number of kept edits at the last refresh"""
        self.standing = 0
        """number of these whose keys were in the past, which superseded edits have left"""
        self.past: dict[int, Tensor] = {}
        """layer -> the past keys' sum at the last refresh, float64 [d_k, d_k]; {} before the first"""

    def due(self, editor: SequentialEditor) -> bool:
        """Whether enough edits were kept since the last refresh."""
        every = editor.method.edits_between_refreshes
        return bool(every) and editor.ledger.kept - self.kept >= every

    def take(self, editor: SequentialEditor, past: dict[int, Tensor]) -> None:
        """Notes the past keys' sums of this moment; they are not copied, since they are replaced and never changed."""
        self.kept, self.standing, self.past = editor.ledger.kept, len(editor.ledger.standing), dict(past)

    def metrics(self, editor: SequentialEditor) -> dict[int, Preservation]:
        """The metric without past keys of each layer, as the last refresh makes it; {} before the first."""
        solver = editor.solver
        return {layer: solver.refreshed_metric(layer, past, self.standing) for layer, past in self.past.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state, from which :meth:`metrics` returns the same bits."""
        return {"kept": self.kept, "standing": self.standing, "past": packed(self.past)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.kept, self.standing, self.past = state["kept"], state["standing"], unpacked(state["past"])
