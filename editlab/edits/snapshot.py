"""A snapshot of the edited weights and the random generators, from which a batch of edits can be undone."""

from __future__ import annotations

from collections.abc import Sequence

from editlab.edits.edited_layer import EditedLayer
from editlab.utils.rng import rng_state, set_rng_state


class Snapshot:
    """The state of the weights and the random generators at one moment, as far as a training step may change it.

    Args:
        layers: the layers whose weights may change.
    """

    def __init__(self, layers: Sequence[EditedLayer]) -> None:
        self.layers = layers
        self.totals = [layer.total.clone() for layer in layers]
        self.adapters = [layer.adapter for layer in layers]  # they are replaced, never written into
        self.rng = rng_state()

    def restore_weights(self) -> None:
        """Sets the weights to what they were, bit for bit; the random generators keep their states."""
        for layer, total, adapter in zip(self.layers, self.totals, self.adapters, strict=True):
            layer.adapter = adapter
            layer.restore(total)

    def restore(self) -> None:
        """Sets weights and random generators to what they were, bit for bit."""
        self.restore_weights()
        set_rng_state(self.rng)
