"""Greedy continuation of prompts of different lengths in one batch, without padding.

All rows stand at the same position: a row whose prompt is longer than the others' is fed its own next prompt token
while the others are fed their new tokens. So no architecture needs a mask or positions of its own, and the weights are
read once for a position of all rows. Small models spend most of the time of generation on reading weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from editlab.distributed import ranks
from editlab.lm.forward import cache_in, with_cache
from editlab.lm.memory import by_halves
from editlab.lm.placement import runs_on

ROWS = 64
"""Number of prompts that are continued at once."""


def continue_together(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    ends: Collection[int],
    done: Callable[[int, list[int]], bool],
    tick: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths by the most likely token at each step. Ranks share the prompts.

    Args:
        model: the model, in eval mode.
        prompts: token ids, at least one for each prompt.
        rooms: the largest number of new tokens of each prompt.
        ends: tokens that end a text; they are not part of the result.
        done: called with the index of a prompt and its new tokens after each of them; returns whether they are enough.
        tick: called after each group of prompts with their number.

    Returns:
        The new token ids of each prompt, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # similar lengths share a batch
    groups = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]

    def go_on(group: Sequence[int]) -> list[list[int]]:
        found = by_halves(lambda some: _continued(model, prompts, rooms, ends, done, some), group)
        if tick is not None:
            tick(len(group))
        return found

    return ranks.each(groups, go_on)


@torch.no_grad()
def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    ends: Collection[int],
    done: Callable[[int, list[int]], bool],
    group: Sequence[int],
) -> list[list[int]]:
    """Continue the prompts of a group, which run together until each of them has ended."""
    device = runs_on(model.get_input_embeddings())
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    new: dict[int, list[int]] = {index: [] for index in group}
    rows = [index for index in group if rooms[index] > 0]
    at = min((len(prompts[index]) for index in rows), default=0)
    fed = [list(prompts[index][:at]) for index in rows]
    cache: Any = None
    while rows:
        out = model(input_ids=torch.tensor(fed, device=device), **with_cache(model, cache), **keep)
        cache = cache_in(out)
        likely = out.logits[:, -1].float().argmax(1).tolist()
        going: list[int] = []  # indices within the batch
        for number, (index, token) in enumerate(zip(rows, likely, strict=True)):
            if at >= len(prompts[index]):
                if token in ends:
                    continue
                new[index].append(token)
                if done(index, new[index]) or len(new[index]) >= rooms[index]:
                    continue
            going.append(number)
        rows = [rows[number] for number in going]
        fed = [[(*prompts[index], *new[index])[at]] for index in rows]
        if rows and len(going) < len(likely):
            cache.batch_select_indices(torch.tensor(going, device=device))
        at += 1
    return [new[index] for index in group]
