"""Tests of reading, scoring and sampling by LanguageModel against plain passes of the model, row by row."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from editlab.errors import NonFiniteError
from editlab.lm import language_model
from editlab.lm.language_model import LanguageModel
from tests.lm.conftest import lm_of
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [[11, 42, 7, 99, 180, 23], [5, 250], [61], [300, 12, 12, 12, 8, 9, 10], [5, 250, 31]]


@pytest.fixture
def passes(monkeypatch):
    """Record the [rows, tokens] of each forward pass, which has at most 8 padded tokens."""
    sizes: list[tuple[int, ...]] = []
    run = LanguageModel.run

    def noted(self, ids, *args, **kwargs):
        sizes.append(tuple(ids.shape))
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "run", noted)
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", 8)
    return sizes


@torch.no_grad()
def test_blocks_give_tuples_agrees_with_the_blocks(lm):
    kinds = []
    handle = lm.anatomy.blocks[-1].register_forward_hook(lambda m, a, out: kinds.append(isinstance(out, tuple)))
    lm.model(input_ids=torch.tensor([[5]]))
    handle.remove()
    assert kinds == [lm.blocks_give_tuples]


@torch.no_grad()
def test_run_is_the_models_own_forward(lm):
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(lm.run(ids).logits, lm.model(input_ids=ids, use_cache=False).logits)
    assert lm.run(ids).past_key_values is None
    assert lm.run(ids, use_cache=True).past_key_values is not None


@torch.no_grad()
def test_positions_are_passed_to_models_that_take_them(lm):
    """The default positions given by hand change nothing, in every family."""
    ids = torch.tensor([ROWS[0]])
    got = lm.run(ids, positions=torch.arange(6)[None]).logits
    torch.testing.assert_close(got, lm.run(ids).logits, rtol=1e-5, atol=1e-6)


# read


@torch.no_grad()
def test_read_gives_each_row_as_if_it_were_alone(lm, passes):
    """Compare with one plain pass per row and hand-made hooks; rows share passes, and padding has no effect."""
    wanted = {"key": (lm.anatomy.edit_module(1), "input"), "block": (lm.anatomy.blocks[2], "output")}
    got = lm.read(ROWS, wanted, stop="block")
    assert all(rows == 1 or rows * width <= 8 for rows, width in passes)
    assert len(passes) < len(ROWS)
    seen = {}
    handles = [
        wanted["key"][0].register_forward_pre_hook(lambda m, args: seen.update(key=args[0])),
        wanted["block"][0].register_forward_hook(
            lambda m, a, out: seen.update(block=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    for row, found in zip(ROWS, got, strict=True):
        lm.model(input_ids=torch.tensor([row]))
        for name in wanted:
            assert found[name].shape[0] == len(row)
            torch.testing.assert_close(found[name], seen[name].reshape(len(row), -1), rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()


def test_read_of_no_rows_runs_nothing(passes):
    lm = lm_of("llama")
    assert lm.read([], {"b": (lm.anatomy.blocks[0], "output")}, stop="b") == []
    assert passes == []


# next_token_scores


@torch.no_grad()
def test_scores_equal_a_full_softmax_of_each_row_alone(lm, passes):
    """Compare with the log_softmax in float64 of the full model's logits, with one row per pass."""
    best = [lm.model(input_ids=torch.tensor([row])).logits[0].argmax(1).tolist() for row in ROWS]
    # At each position the token that is the argmax, and one that is not.
    wanted = [
        [(p, t) for p in range(len(row)) for t in (top[p], (top[p] + 1) % 390)]
        for row, top in zip(ROWS, best, strict=True)
    ]
    logps, hits, tops, seconds = lm.next_token_scores(ROWS, wanted)
    assert len(passes) < len(ROWS)
    for row, places, logp, hit, top, second in zip(ROWS, wanted, logps, hits, tops, seconds, strict=True):
        table = lm.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(1)
        expected = torch.stack([table[p, t] for p, t in places])
        torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)
        assert logp.dtype == torch.float32
        assert hit.tolist() == [True, False] * len(row)
        assert torch.equal(top, logp[::2].repeat_interleave(2))
        runners_up = table.topk(2).values[:, 1].repeat_interleave(2)
        torch.testing.assert_close(second.double(), runners_up, rtol=0, atol=1e-4)


def test_a_row_without_requested_tokens(passes):
    """The result is right even if no row of a pass has a requested token."""
    lm = lm_of("llama")
    logps, hits, _, _ = lm.next_token_scores([[5, 6, 7], [8, 9, 10, 11, 12, 13]], [[(0, 3)], []])
    assert [len(x) for x in logps] == [len(x) for x in hits] == [1, 0]
    assert lm.next_token_scores([], []) == ([], [], [], [])


# sample


def test_samples_continue_their_prompts_by_exactly_so_many_tokens(lm):
    prompts = [[5, 6, 7], [8, 9, 10]]
    out = lm.sample(prompts, 6, seed=0)
    assert [row[:3] for row in out] == prompts
    assert [len(row) for row in out] == [9, 9]
    assert all(0 <= token < 400 for row in out for token in row)


def test_sampling_never_ends_early():
    """The end-of-text token is not generated although its bias makes it the argmax at every position."""
    lm = LanguageModel(tiny_model("phi"), tiny_tokenizer())  # phi's head has a bias
    with torch.no_grad():
        lm.model.lm_head.bias[2] = 50.0
    assert len(lm.sample([[5]], 7, seed=0)[0]) == 8
    assert len(lm.sample([[5]], 7, seed=0, greedy=True)[0]) == 8


def test_no_token_is_drawn_from_non_finite_logits():
    """Greedy decoding still returns the argmax, which for torch is the index of a NaN."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    with torch.no_grad():
        lm.model.lm_head.weight[7] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite, so no text can be drawn"):
        lm.sample([[5, 6]], 3, seed=0)
    assert len(lm.sample([[5, 6]], 3, seed=0, greedy=True)[0]) == 5


def test_a_seed_decides_the_sample_and_the_global_state_is_untouched():
    lm = lm_of("gpt2")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = lm.sample([[5, 6]], 20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)  # other draws of random numbers have no effect
    assert lm.sample([[5, 6]], 20, seed=0) == first
    assert lm.sample([[5, 6]], 20, seed=1) != first


@pytest.mark.parametrize("greedy", [False, True])
def test_a_models_own_generation_settings_have_no_effect(greedy):
    lm = lm_of("gpt2")
    plain = lm.sample([[5, 6]], 12, seed=0, greedy=greedy)
    own = GenerationConfig(eos_token_id=2, repetition_penalty=1.5, no_repeat_ngram_size=2, num_beams=1 + 2 * greedy)
    lm.model.generation_config = own
    assert lm.sample([[5, 6]], 12, seed=0, greedy=greedy) == plain
    assert lm.model.generation_config is own


@torch.no_grad()
def test_greedy_takes_the_argmax_at_each_step():
    """Compare with a loop of full passes that excludes the end-of-text token (id 2)."""
    lm = lm_of("llama")
    ids = [5, 6, 7]
    for _ in range(5):
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[2] = -torch.inf
        ids.append(int(logits.argmax()))
    assert lm.sample([[5, 6, 7]], 5, seed=0, greedy=True) == [ids]


@torch.no_grad()
def test_sampled_tokens_follow_the_models_distribution():
    """Temperature 1 without truncation: the frequency of each of the 400 tokens after 4000 draws.

    The total variation distance of n draws over m cells is about sqrt(m / (2 pi n)) at most, here 0.13.
    """
    lm = lm_of("gpt2")
    chances = lm.model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(0)
    chances[2] = 0  # the end of text is never drawn
    drawn = torch.tensor([row[1] for row in lm.sample([[5]] * 4000, 1, seed=0)])
    frequencies = torch.bincount(drawn, minlength=400) / 4000
    assert (frequencies - chances / chances.sum()).abs().sum() / 2 < 0.13
    # With the 50 likeliest tokens only, the default of generate, the frequencies would differ clearly.
    top = chances.topk(50).values.sum() / chances.sum()
    assert 1 - top > 0.2
