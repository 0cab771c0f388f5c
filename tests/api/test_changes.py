"""What edits change, against the probabilities that two copies of the model give in plain forward passes."""

import math

import pytest
import torch

from editlab.api.changes import BUILT_IN, NEIGHBORS, Changes, FactChange, Flip, Others, Probability
from editlab.data import Fact


def naive(model, tokenizer, prompt, answer):
    """The probability of an answer after a prompt, and whether each of its tokens is the likeliest: token by token."""
    start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer).input_ids
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    steps = [(float(logps[i - 1, ids[i]]), int(logps[i - 1].argmax()) == ids[i]) for i in range(start, len(ids))]
    return math.exp(sum(logp for logp, _ in steps)), all(hit for _, hit in steps)


@pytest.fixture(scope="module")
def changes(edited):
    return edited.result.changes()


def test_the_probability_of_the_whole_target_and_of_the_truth(edited, changes):
    for one, fact in zip(changes.facts, edited.facts, strict=True):
        assert one.fact == fact
        pairs = [(one.target, fact.target_new)] + ([(one.truth, fact.target_true)] if one.truth else [])
        for found, text in pairs:
            before, said = naive(edited.original, edited.tokenizer, fact.question, text)
            after, says = naive(edited.model, edited.tokenizer, fact.question, text)
            assert found.text == text
            assert (found.before, found.after) == pytest.approx((before, after), rel=1e-4, abs=0)
            assert (found.said, found.says) == (said, says)
            assert before != pytest.approx(after, rel=1e-2, abs=0)
    assert [one.truth is None for one in changes.facts] == [False, True]


def test_neighbors_that_were_right_and_are_wrong_now(edited, changes):
    assert edited.known
    found = {others.kind: others for others in changes.others}
    assert found[NEIGHBORS].asked == len(edited.known) + 1  # and one whose answer the model does not give
    assert found[NEIGHBORS].right == len(edited.known)
    lost = [n for n in edited.known if not naive(edited.model, edited.tokenizer, n.prompt, n.truth)[1]]
    assert [(flip.prompt, flip.truth) for flip in found[NEIGHBORS].flips] == lost
    assert all(not flip.says.startswith(flip.truth + " ") for flip in found[NEIGHBORS].flips)
    assert found[BUILT_IN].asked == 8


def test_perplexity_and_norms_are_those_of_the_run(edited, changes):
    metrics = edited.result.summary["metrics"]
    assert changes.perplexity == (metrics["before/perplexity"], metrics["retained/perplexity"])
    weights = {n: edited.original.model.layers[n].mlp.down_proj.weight.detach() for n in (1, 2)}
    moved = {n: edited.model.model.layers[n].mlp.down_proj.weight.detach() - weight for n, weight in weights.items()}
    assert changes.norms == pytest.approx(
        {n: float(moved[n].norm() / weights[n].norm()) for n in weights}, rel=1e-4, abs=0
    )


def test_the_model_is_left_as_it_is(edited):
    weight = edited.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1.0  # a change that the result does not know of
        before = weight.clone()
        edited.model.train()
        edited.result.changes()
        assert torch.equal(weight, before)
        assert edited.model.training
        edited.model.eval()
        weight[0, 0] -= 1.0
        weight.copy_(edited.result.editor.layers[0].value())


def test_as_text():
    long = Fact("A city with a name that is far too long for one line", "{} is in", "Peru", "Norway")
    changed = FactChange(
        long, Probability("Peru", 0.00125, 0.9, False, True), Probability("Norway", 0.5, 0.0, True, False)
    )
    flips = tuple(Flip(f"City {i} is in", "Chile", "Peru.") for i in range(3))
    others = (Others(NEIGHBORS, 9, 7, flips), Others(BUILT_IN, 4, 0, ()))
    shown = Changes((changed,), others, (49.256, 49.4), {4: 0.02})
    assert shown.held == 1
    assert shown.to_text(flips=2).splitlines() == [
        "prompt                                        probability of  before   after",
        "...e that is far too long for one line is in  Peru            0.0013  0.9000",
        "                                              Norway (truth)  0.5000  0.0000",
        "",
        "3 of 7 neighbors that the unedited model answers rightly are now wrong",
        "                before  after",
        "  City 0 is in  Chile   Peru.",
        "  City 1 is in  Chile   Peru.",
        "  and 1 more",
        "the unedited model answers none of 4 built-in facts rightly, so that none can get lost",
        "held-out perplexity 49.26 before, 49.40 after",
        "||delta|| / ||W||: 0.0200 (layer 4)",
    ]
