"""Prompts of different lengths in one batch, against each prompt alone by full passes."""

import pytest
import torch

from editlab.lm import together
from editlab.lm.together import continue_together
from tests.tiny import FAMILIES, tiny_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 3, 4], [12], [13, 14], [15, 16, 17]]


@torch.no_grad()
def alone(model, prompt, room, end, enough):
    """The most likely tokens of one prompt, each by a pass over all tokens before it."""
    new = []
    while len(new) < room and not (new and enough(new)):
        token = int(model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_has_the_text_that_it_has_alone(family):
    """Rows end at their end token, when they are done, or for lack of room, and the others go on unchanged."""
    model = tiny_model(family)
    end = alone(model, PROMPTS[0], 4, None, lambda new: False)[-1]
    rooms = [6, 6, 0, 2, 6, 6]

    def enough(index, new):
        return index == 4 and len(new) == 3

    found = continue_together(model, PROMPTS, rooms, {end}, enough)
    expected = [
        alone(model, prompt, room, end, lambda new, i=i: enough(i, new))
        for i, (prompt, room) in enumerate(zip(PROMPTS, rooms, strict=True))
    ]
    assert found == expected
    assert [len(found[i]) for i in (2, 3)] == [0, 2]
    assert len(found[0]) <= 3
    assert len(found[4]) <= 3


def test_a_position_takes_one_pass_and_ended_rows_take_none(monkeypatch):
    model = tiny_model("llama")
    read, ticks = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    continue_together(model, [[5, 6, 7], [8, 9]], [3, 1], set(), lambda index, new: False, ticks.append)
    # Both prompts have two tokens. The third one of the first prompt is fed alone, as the other prompt has its one
    # new token by then; two of its three new tokens are fed too.
    assert read == [(2, 2), (1, 1), (1, 1), (1, 1)]
    assert ticks == [2]
    monkeypatch.setattr(together, "ROWS", 4)
    continue_together(model, PROMPTS, [1] * 6, set(), lambda index, new: False, ticks.append)
    assert ticks == [2, 4, 2]
    assert continue_together(model, [], [], set(), lambda index, new: True) == []
