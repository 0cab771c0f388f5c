"""The edits of one adjustment: which of them its training and its guard may see, and which are drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from callbacks.replay.callback import MemoryReplay
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.errors import UserError


def stored_edits(callbacks: Iterable[Any]) -> set[tuple[str, str]]:
    """The slots of the edits that ``MemoryReplay`` stores.

    Raises:
        UserError: No callback stores edits.
    """
    stores = [one for one in callbacks if isinstance(one, MemoryReplay) and one.samples]
    if not stores:
        raise UserError(
            "LoRAAdjust.only_stored draws earlier edits from those that MemoryReplay stores, and none is stored: add "
            "MemoryReplay with memory both or sampled, or set only_stored to false."
        )
    return {memory.fact.slot for one in stores for memory in one.buffer.memories}


def known_edits(editor: SequentialEditor, last: int, only_stored: bool) -> list[tuple[Fact, bool]]:
    """The edits in the weights that an adjustment may see, each with whether it is recent.

    Args:
        editor: the editor.
        last: number of the batch of the last adjustment; later edits are recent.
        only_stored: whether earlier edits must be stored by ``MemoryReplay``.

    Raises:
        UserError: As for :func:`stored_edits`.
    """
    batches = {entry.fact.slot: entry.batch for entry in editor.ledger if entry.kept}
    edits = [(fact, batches[fact.slot] > last) for fact in editor.edited_facts]
    if not only_stored:
        return edits
    stored = stored_edits(editor.trainer.callbacks)  # type: ignore[attr-defined]
    return [(fact, recent) for fact, recent in edits if recent or fact.slot in stored]


def draw_edits(
    edits: Sequence[tuple[Fact, bool]], replayed: int, probes: int, draw: random.Random
) -> tuple[list[Fact], list[Fact]]:
    """Draws edits to train on, and held-out edits for the guard: at most a quarter of all, and none of a single edit.

    Args:
        edits: edits that are in the weights, each with whether it was made since the last adjustment; all such edits
            are trained on.
        replayed: number of earlier edits to train on.
        probes: largest number of held-out edits.
        draw: generator of the draws.
    """
    count = min(probes, -(-len(edits) // 4)) if len(edits) > 1 else 0
    held_out = set(draw.sample(range(len(edits)), count))
    rest = [pair for i, pair in enumerate(edits) if i not in held_out]
    earlier = [fact for fact, recent in rest if not recent]
    drawn = draw.sample(earlier, min(replayed, len(earlier)))
    return [fact for fact, recent in rest if recent] + drawn, [edits[i][0] for i in sorted(held_out)]
