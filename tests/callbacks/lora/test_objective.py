"""The objective against plain whole forwards and hand-worked numbers."""

import math

import pytest
import torch

from callbacks.lora.objective import (
    LOSSES,
    Objective,
    distributions,
    divergence,
    loss_weights,
    prompt_rows,
    text_rows,
)
from editlab.lm.language_model import LanguageModel
from editlab.training.rows import Row, edit_rows, logits_of
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama").requires_grad_(False), tiny_tokenizer())


def whole_logits(lm, row):
    """The row's logits at its positions, by the model's own forward pass on this row alone."""
    with torch.no_grad():
        return lm.model(torch.tensor([row.ids])).logits[0, list(row.indices)].float()


def following_logps(lm, row):
    """Log-probabilities of the row's following tokens, picked out of a whole forward."""
    return whole_logits(lm, row).log_softmax(1)[range(len(row.indices)), list(row.following)]


def test_rows_of_edits_hold_the_targets(lm):
    fact = FACTS[0]
    bare, prefixed = edit_rows(lm, [fact], ["", "Oslo lies in Norway. "])
    for row, context in ((bare, ""), (prefixed, "Oslo lies in Norway. ")):
        text = lm.tokenizer.decode([*row.ids, row.following[-1]])
        assert text == f"{context}{fact.question} {fact.target_new}"
        assert lm.tokenizer.decode(row.following) == f" {fact.target_new}"
        following = [*row.ids, row.following[-1]]
        assert [following[place + 1] for place in row.indices] == list(row.following)


def test_rows_of_prompts_and_texts(lm):
    (row,) = prompt_rows(lm, [FACTS[0]])
    assert lm.tokenizer.decode(row.ids) == FACTS[0].question
    assert row.indices == (len(row.ids) - 1,)
    assert text_rows(lm, [[5, 6, 7], [8]]) == [Row((5, 6), (0, 1), (6, 7))]


@pytest.mark.parametrize("packs", [False, True])
def test_logits_and_distributions_are_those_of_whole_forwards(lm, packs):
    lm.packs = packs
    rows = [*edit_rows(lm, FACTS[:3], ["", "Oslo lies. "]), *text_rows(lm, [list(range(3, 20))])]
    expected = [whole_logits(lm, row) for row in rows]
    torch.testing.assert_close(logits_of(lm, rows), torch.cat(expected), rtol=1e-4, atol=1e-4)
    said = distributions(lm, rows, size=2)
    for one, logits in zip(said, expected, strict=True):
        torch.testing.assert_close(one, logits.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_divergence_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = (ln 2 + ln(2/3)) / 2 = ln(4/3) / 2; the second place agrees and counts 0.
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    logits = torch.tensor([[0.0, math.log(3)], [7.0, 7.0]])
    assert float(divergence(reference, logits)) == pytest.approx(math.log(4 / 3) / 4)
    assert float(divergence(reference, reference)) == 0


def objective(lm, weights, facts=FACTS[:4]):
    others = [*prompt_rows(lm, FACTS[4:6]), *text_rows(lm, [list(range(3, 12))])]
    said = distributions(lm, others)
    shifted = [(one + torch.linspace(0, 1, one.shape[1])).log_softmax(1) for one in said]
    return Objective(edit_rows(lm, facts, [""]), others, said, shifted, weights)


def test_the_loss_is_made_of_its_parts(lm):
    parts_of = objective(lm, {"edits": 2.0, "before": 1.0, "unedited": 3.0})
    parts = parts_of.loss(lm, [0, 2], [0, 1, 2])
    # Cross-entropy by picking each target's log-probability out of a whole forward.
    picked = [following_logps(lm, parts_of.edits[i]) for i in (0, 2)]
    assert float(parts["edits"]) == pytest.approx(-float(torch.cat(picked).mean()), rel=1e-4)
    assert float(parts["before"]) == pytest.approx(0, abs=1e-5)
    p = torch.cat(parts_of.unedited).exp()
    expected = (p * (torch.cat(parts_of.unedited) - torch.cat(parts_of.before))).sum(1).mean()
    assert float(parts["unedited"]) == pytest.approx(float(expected), rel=1e-3)
    total = 2 * parts["edits"] + parts["before"] + 3 * parts["unedited"]
    assert float(parts_of.total(parts)) == pytest.approx(float(total))


def test_losses_of_weight_0_are_not_computed(lm):
    parts = objective(lm, {"edits": 1.0, "before": 0.0, "unedited": 0.0}).loss(lm, [0], [0])
    assert list(parts) == ["edits"]


def test_parts_of_the_loss_that_are_not_named_keep_their_weights():
    assert loss_weights("x", {"unedited": 0.5}) == {"edits": 1.0, "before": 2.0, "unedited": 0.5}
    assert LOSSES["unedited"] == 0  # what was given is not written into the defaults
