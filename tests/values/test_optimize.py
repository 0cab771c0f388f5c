"""The batched values against the plain oracle (one fact at a time, whole model, whole prompt, full logits)."""

from dataclasses import asdict

import pytest
import torch

from editlab.data.fact import Fact
from editlab.errors import EditLabError, UserError
from editlab.experiments.reference import plain_value
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values import optimize as values
from editlab.values.optimize import optimize_values, turns_of
from editlab.values.settings import DEFAULT_LR, PUBLISHED_SEARCH, ValueSettings
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),  # in the middle
    Fact("Danielle Darrieux", "{} speaks", "Swedish and Portuguese"),  # at the start; several target tokens
    Fact("Oslo", "Norway, and also {}", "Lima"),  # at the end: the target follows the subject
    Fact("Japan", "Japan is Japan; the currency of {} is", "rupee"),  # repeated: the place in the template counts
    Fact("São Tomé", "{} lies in", "Peru"),  # several bytes a letter
]
CONTEXTS = ["", "The currency of India. ", "Oslo lies in Norway, and. "]

FALLS = {"steps": 4, "lr": 0.2, "lr_end": 0.25, "betas": (0.5, 0.9), "clamp": 50.0, "loss_threshold": 0.0}


def make(family, *, bos=False, layer=1):
    lm = LanguageModel(tiny_model(family), tiny_tokenizer(bos=bos))
    return lm, Site.of(lm, layer)


def exact(**settings):
    """The published search, with products that are float32 on every machine, as the oracle's are."""
    return ValueSettings(**{"matmul": "float32", **PUBLISHED_SEARCH, **settings})


def check(lm, site, settings):
    ours = optimize_values(lm, FACTS, site, CONTEXTS, settings)
    for i, fact in enumerate(FACTS):
        target, loss, steps = plain_value(lm, fact, site, CONTEXTS, settings)
        # Adam divides by the root of the squared gradient, so float32 rounding grows over the steps; 1e-3 of the norm
        # is ten times what was seen, and a hundredth of what one missing term of the loss changes.
        assert (ours.target[i] - target).norm() <= 1e-3 * target.norm(), fact
        assert float(ours.loss[i]) == pytest.approx(loss, rel=1e-3, abs=1e-4)
        assert int(ours.steps[i]) == steps


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "opt", "gpt_neox", "phi", "qwen3"])
def test_equal_to_the_oracle_on_every_kind_of_block(family):
    # gptj's blocks return tuples, gpt2 and opt add positions, gemma2 has a norm after the MLP (site in the module).
    lm, site = make(family)
    assert site.in_stream == (family != "gemma2")
    check(lm, site, exact(steps=6, lr=0.1, clamp=2.0, weight_decay=0.1))


@pytest.mark.parametrize("settings", [
    {"steps": 7, "contexts_a_step": 1},
    {"steps": 7, "contexts_a_step": 2},  # a turn of two contexts and one of the third
    {"steps": 12, "contexts_a_step": 2, "loss_threshold": 4.0},  # facts leave at different steps
    {"steps": 12, "contexts_a_step": 1, "lr": 1.0, "early_stop": 1},
])  # fmt: skip
def test_equal_with_contexts_that_take_turns(settings):
    check(*make("llama"), exact(**{"lr": 0.1, "clamp": 2.0, "weight_decay": 0.1} | settings))


@pytest.mark.parametrize("settings", [
    {**asdict(ValueSettings()), "matmul": "float32"},  # the defaults
    {"steps": 8, "lr_end": 0.1},
    {"steps": 12, "lr_end": 0.2, "betas": (0.5, 0.9), "contexts_a_step": 2, "loss_threshold": 4.0},
])  # fmt: skip
def test_equal_with_steps_that_fall_and_other_decay_rates(settings):
    check(*make("llama"), exact(**{"lr": 0.2, "clamp": 2.0, "weight_decay": 0.1} | settings))


def test_adam_by_hand_with_a_step_size_that_falls():
    """Three updates in float64, transcribed from Adam's paper (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""
    lm, site = make("llama")
    found = [optimize_values(lm, FACTS[:1], site, CONTEXTS, exact(**FALLS | {"steps": steps})) for steps in (1, 4)]
    origin, last = (one.target[0].double() for one in found)
    rows = [values.rows_of(lm, 0, FACTS[0], CONTEXTS)]
    group = values.ValueGroup(lm, site, rows)
    delta, mean, square = torch.zeros_like(origin), torch.zeros_like(origin), torch.zeros_like(origin)
    group.losses(torch.zeros(1, len(origin)))  # what the KL compares with
    for update, size in enumerate((0.2, 0.125, 0.05), 1):  # from 0.2 to a quarter of it in two equal falls
        point = delta.float()[None].requires_grad_()
        loss, _ = values.loss_of(group, point, origin.norm()[None].float(), exact(**FALLS))
        gradient = torch.autograd.grad(loss.sum(), point)[0][0].double()
        mean, square = 0.5 * mean + 0.5 * gradient, 0.9 * square + 0.1 * gradient**2
        delta = delta - size * (mean / (1 - 0.5**update)) / ((square / (1 - 0.9**update)).sqrt() + 1e-8)
    assert (origin + delta - last).norm() <= 1e-4 * delta.norm()


def test_contexts_of_turns_are_all_of_them_where_a_step_has_room():
    every = ValueSettings(contexts_a_step=None)
    assert turns_of(6, every) == turns_of(6, ValueSettings(contexts_a_step=9)) == [range(6)]
    assert [list(turn) for turn in turns_of(5, ValueSettings(contexts_a_step=2))] == [[0, 3], [1, 4], [2]]


def test_turns_errors():
    with pytest.raises(UserError, match=r"values\.steps is 2, and 3 contexts take 3 turns: set at least 3 steps"):
        turns_of(3, ValueSettings(steps=2, contexts_a_step=1))
    with pytest.raises(UserError, match="contexts_a_step"):
        ValueSettings(contexts_a_step=0)


def test_default_step_sizes():
    assert ValueSettings().step_size == DEFAULT_LR["optimize"]
    assert ValueSettings(source="gradient").step_size == DEFAULT_LR["gradient"]
    assert ValueSettings(source="gradient", lr=0.1).step_size == 0.1


def test_equal_with_a_tokenizer_that_puts_a_token_first():
    check(*make("llama", bos=True), exact(steps=5, lr=0.1))


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equal_at_the_first_and_the_last_layer(family, layer):
    check(*make(family, layer=layer), exact(steps=4, lr=0.1))


def test_equal_to_the_reference_with_the_divergence_after_the_subject():
    check(*make("llama", bos=True), exact(steps=5, lr=0.1, kl_factor=2.0, kl_at="subject"))


def test_equal_to_the_reference_if_the_ball_binds():
    check(*make("llama"), exact(steps=6, lr=0.5, clamp=0.1))


def test_facts_that_are_done_leave_at_the_same_step():
    # A threshold that some facts reach early: every fact must stop where the oracle stops it.
    lm, site = make("llama")
    settings = exact(steps=25, lr=0.5, clamp=20.0, loss_threshold=3.0)
    check(lm, site, settings)
    steps = optimize_values(lm, FACTS, site, CONTEXTS, settings).steps
    assert steps.min() < steps.max()


@pytest.mark.parametrize("patience", [1, 3])
def test_facts_leave_after_enough_consecutive_hits(patience):
    lm, site = make("llama")
    settings = {"steps": 25, "lr": 0.5, "clamp": 20.0, "loss_threshold": 0.0}
    check(lm, site, exact(early_stop=patience, **settings))
    steps = optimize_values(lm, FACTS, site, CONTEXTS, exact(early_stop=patience, **settings)).steps
    assert patience <= steps.min() < 25
    assert bool((optimize_values(lm, FACTS, site, CONTEXTS, exact(**settings)).steps == 25).all())


def test_grouping_changes_only_rounding():
    lm, site = make("llama")
    together = optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=5, lr=0.1))
    alone = optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=5, lr=0.1, batch_tokens=1))
    assert torch.allclose(together.target, alone.target, rtol=1e-3, atol=1e-4)


def test_the_value_makes_the_target_likelier():
    lm, site = make("llama")
    first = optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=1))
    last = optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=25, clamp=5.0))
    assert (last.loss < first.loss).all()


def test_nothing_is_left_behind():
    lm, site = make("gpt2")
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    state = torch.get_rng_state()
    optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in lm.named_parameters())
    assert not any("forward" in vars(module) for module in lm.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())
    assert all(p.grad is None for p in lm.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bfloat16_products_reach_the_same_loss(family):
    lm, site = make(family)
    settings = {"steps": 6, "lr": 0.1, "clamp": 2.0}
    plain = optimize_values(lm, FACTS, site, CONTEXTS, exact(**settings))
    rounded = optimize_values(lm, FACTS, site, CONTEXTS, exact(**settings | {"matmul": "bfloat16"}))
    # 8 significant bits against the loss's float32: 1% is what the benchmark promises on the real model.
    assert torch.allclose(rounded.loss, plain.loss, rtol=0.01)
    assert not torch.equal(rounded.loss, plain.loss)
    nothing = optimize_values(lm, FACTS, site, CONTEXTS, exact(matmul="bfloat16", steps=1))
    # v0 is read below the blocks that round, so a value that was not moved is exact.
    assert torch.equal(nothing.target, optimize_values(lm, FACTS, site, CONTEXTS, exact(steps=1)).target)


def test_progress_counts_every_fact():
    lm, site = make("llama")
    counts = []
    optimize_values(lm, FACTS, site, [""], ValueSettings(steps=2, batch_tokens=30), progress=counts.append)
    assert sum(counts) == len(FACTS)
    assert len(counts) > 1


def test_bad_inputs():
    lm, site = make("llama")
    with pytest.raises(UserError, match=r"steps is 0"):
        ValueSettings(steps=0)
    with pytest.raises(UserError, match=r"kl_factor is -1"):
        ValueSettings(kl_factor=-1)
    with pytest.raises(UserError, match=r"one of current, original"):
        ValueSettings(reference="base")
    with pytest.raises(UserError, match=r"one of optimize, gradient"):
        ValueSettings(source="sgd")
    with pytest.raises(UserError, match="one of auto, float32, bfloat16"):
        ValueSettings(matmul="float16")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(EditLabError, match="not finite"):
        optimize_values(lm, FACTS[:1], site, [""], ValueSettings(steps=2))


def test_a_group_that_memory_does_not_hold_is_halved(monkeypatch):
    lm, site = make("llama")
    settings = exact(steps=5, lr=0.1, batch_tokens=10**6)
    whole = optimize_values(lm, FACTS[:5], site, CONTEXTS, settings)
    plain, sizes = values._optimize, []

    def scarce(parts, settings):
        sizes.append(len(parts[0].origin))
        if len(parts[0].origin) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(parts, settings)

    monkeypatch.setattr(values, "_optimize", scarce)
    counts = []
    halved = optimize_values(lm, FACTS[:5], site, CONTEXTS, settings, progress=counts.append)
    assert sorted(sizes) == [1, 2, 2, 3, 5]
    assert sum(counts) == 5
    torch.testing.assert_close(halved.target, whole.target, rtol=1e-4, atol=1e-5)


def test_tokens_together_by_hand(monkeypatch):
    lm, site = make("llama")  # 4 blocks, states of 32, an MLP of 48, a vocabulary of 400, float32
    each = (10 * 32 + 4 * 48) * (4 - site.layer) * 4 + 4 * 4 * 400
    for room, tokens in ((None, 512), (2 * each * 1000, 1000), (2 * each * 100, 512), (2 * each * 10**6, 4096)):
        monkeypatch.setattr(values, "spare_gpu_memory", lambda model, reserved, room=room: room)
        assert values.tokens_together(lm, site) == tokens
