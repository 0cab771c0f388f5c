"""Every signal against a hand-worked case or a plain forward pass of a tiny model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from callbacks.trust.probes import (
    BatchAnswers,
    HeldOut,
    Measured,
    Probes,
    Sentence,
    attribution_focus,
    flip_rate,
    largest_singular_value,
    measure_batch,
    measure_heldout,
    sentences_of_facts,
    sentences_of_text,
)
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.lm.language_model import LanguageModel
from editlab.values.spread import Targets
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


def ids_of(lm, text):
    return lm.tokenizer(text)["input_ids"]


def table(lm, ids):
    """log-probabilities of every next token, by a whole forward in float64: [tokens, vocabulary]."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)


def test_heldout_perplexity_and_confidence_by_a_plain_forward(lm):
    sentences = sentences_of_facts(lm, FACTS[:3], 2)
    texts = [f"{fact.question} {fact.target_true}" for fact in FACTS[:2]]
    assert [list(s.ids) for s in sentences] == [ids_of(lm, text) for text in texts]
    found = measure_heldout(lm, sentences)
    logps, tops = [], []
    for text, fact in zip(texts, FACTS, strict=False):
        ids, asked = ids_of(lm, text), len(ids_of(lm, fact.question))
        logp = table(lm, ids)
        logps += [float(logp[i - 1, ids[i]]) for i in range(1, len(ids))]
        tops.append(float(logp[asked - 1].max().exp()))
    assert found.nll == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
    assert found.confidence == pytest.approx(sum(tops) / 2, abs=1e-6)


def test_sentences_of_a_text_are_windows_whose_confidence_is_at_the_last_token(lm):
    text = "The capital of France is Paris. " * 30
    ids = ids_of(lm, text)
    sentences = sentences_of_text(lm, text, 3)
    assert [list(s.ids) for s in sentences] == [ids[:32], ids[32:64], ids[64:96]]
    assert {s.confidence_index for s in sentences} == {31}
    assert sentences_of_text(lm, "The", 3) == []  # one token predicts nothing


def test_the_batch_by_a_plain_forward(lm):
    facts = [FACTS[0], FACTS[7], FACTS[1], FACTS[2]]  # FACTS[7] has no neighbors
    found = measure_batch(lm, facts, 2)

    def mean_logp(prompt, target):
        start, ids = len(ids_of(lm, prompt)), ids_of(lm, f"{prompt} {target}")
        logp = table(lm, ids)
        return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)

    expected = [mean_logp(fact.question, fact.target_new) for fact in facts]
    assert found.target.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.neighbor_of.tolist() == [0, 2]
    right = [
        mean_logp(f.neighbors[-1].prompt, f.neighbors[-1].truth) > mean_logp(f.neighbors[-1].prompt, f.target_new)
        for f in (FACTS[0], FACTS[1])
    ]
    assert found.neighbor_right.tolist() == right


def answers(right, target=(0.0,)):
    return BatchAnswers(torch.tensor(target), torch.tensor(right, dtype=torch.bool), torch.arange(len(right)))


def test_the_flip_rate_by_hand():
    # Of three that were right one is wrong now; that a wrong one came right does not make up for it.
    assert flip_rate(answers([1, 1, 1, 0]), answers([1, 0, 1, 1])) == pytest.approx(1 / 3)
    assert flip_rate(answers([0, 0]), answers([0, 0])) == 0
    assert flip_rate(answers([]), answers([])) == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_the_largest_singular_value_is_that_of_a_full_decomposition(transposed):
    torch.manual_seed(0)
    module = torch.nn.Linear(9, 5, bias=False)
    if transposed:
        module.weight = torch.nn.Parameter(torch.randn(9, 5))
    layer = EditedLayer(module, transposed)
    layer.add(torch.randn(5, 9))
    weight = layer.weight.detach().T if transposed else layer.weight.detach()
    value, vector = largest_singular_value(layer, torch.ones(9), 200)
    assert value == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-5)
    again, _ = largest_singular_value(layer, vector, 1)  # from where it ended nothing is left to do
    assert again == pytest.approx(value, rel=1e-5)


def test_attribution_by_finite_differences(lm):
    # The share of |g . x| on the subject's last token, with g . x as the slope along a scaling of that token's input.
    fact, layer = FACTS[0], 1
    module = lm.anatomy.edit_module(layer)
    ids = ids_of(lm, fact.question)
    target = ids_of(lm, f"{fact.question} {fact.target_new}")[len(ids)]
    last = len(ids_of(lm, "The capital of France")) - 1

    def logp(token, scale):
        def hook(module, args):
            x = args[0].clone()
            x[0, token] *= scale
            return (x,)

        handle = module.register_forward_pre_hook(hook)
        value = float(table(lm, ids)[-1, target])
        handle.remove()
        return value

    lm.model.double()
    step = 1e-2  # smaller ones drown in the norms, which are float32 whatever the model is
    slopes = [abs(logp(t, 1 + step) - logp(t, 1 - step)) for t in range(len(ids))]
    found = attribution_focus(lm, [fact], layer)
    assert float(found[0]) == pytest.approx(slopes[last] / sum(slopes), rel=1e-3)
    assert all(p.grad is None for p in lm.model.parameters())


def edited(lm, layers=(1,)):
    """An object with the attributes of an editor that the probes use."""
    found = [EditedLayer(lm.anatomy.edit_module(n), lm.anatomy.transposed(n)) for n in layers]
    return SimpleNamespace(lm=lm, layer_numbers=list(layers), layers=found, changed_layers=found)


def outcome_of(facts, **diagnostics):
    plan = EditPlan(0, facts, Targets(facts, {1: torch.zeros(len(facts), 4)}))
    return EditOutcome(plan, {}, {f"layer_1/{k}": v for k, v in diagnostics.items()})


COMMON = {"update_norm": 0.25, "gram_condition": 1000.0, "effective_weight": 7.0}


def test_signals_of_a_batch_before_and_after(lm):
    editor, sentences = edited(lm), sentences_of_facts(lm, FACTS[3:6], 3)
    probes = Probes(sentences, neighbors=3, attribution=True)
    facts = FACTS[:3]
    probes.measure_before(editor, facts)
    before, held = measure_batch(lm, facts, 3), measure_heldout(lm, sentences)
    focus = attribution_focus(lm, facts, 1).mean()
    torch.manual_seed(1)
    editor.layers[0].add(0.3 * torch.randn_like(editor.layers[0].total))
    metrics = probes.measure_after(editor, outcome_of(facts, **COMMON))
    after, held_after = measure_batch(lm, facts, 3), measure_heldout(lm, sentences)
    assert metrics.edit_success_gain == pytest.approx(float((after.target - before.target).mean()))
    assert metrics.certainty == pytest.approx(float(after.target.exp().mean()))
    assert metrics.heldout_ppl_delta == pytest.approx(math.exp(held_after.nll) / math.exp(held.nll) - 1)
    assert metrics.neighbor_flip_rate == flip_rate(before, after)
    assert metrics.confidence_shift == pytest.approx(held_after.confidence - held.confidence)
    assert (metrics.update_norm, metrics.gram_condition, metrics.effective_weight) == (0.25, pytest.approx(3.0), 7.0)
    original, now = (torch.linalg.svdvals(w)[0] for w in (editor.layers[0].original, editor.layers[0].weight.detach()))
    assert metrics.singular_growth == pytest.approx(float(now / original) - 1, rel=0.05)  # it is an iteration
    assert metrics.attribution_focus_delta == pytest.approx(float(focus - attribution_focus(lm, facts, 1).mean()))


def test_gain_is_that_of_the_facts_that_stay(lm):
    editor = edited(lm)
    probes = Probes([Sentence((5, 6, 7), 2)], 1, False)
    probes.measure_before(editor, FACTS[:3])
    outcome = outcome_of(FACTS[:3], **COMMON)
    outcome.drop({1}, "no gain")
    editor.layers[0].add(0.1 * torch.ones_like(editor.layers[0].total))
    metrics = probes.measure_after(editor, outcome)
    change = (probes.latest.answers.target - probes._before.target).tolist()
    assert metrics.edit_success_gain == pytest.approx((change[0] + change[2]) / 2)


def test_signals_of_facts_by_hand(lm):
    probes = Probes([Sentence((5, 6, 7), 2)], 2, False)
    probes._before = BatchAnswers(torch.tensor([-3.0, -2.0, -1.0]), torch.tensor([True, True]), torch.tensor([0, 2]))
    after = BatchAnswers(torch.tensor([-1.0, -2.5, 0.0]), torch.tensor([True, False]), torch.tensor([0, 2]))
    probes.latest = Measured(after, HeldOut(1.0, 0.5), [])
    plan = EditPlan(0, FACTS[:3], Targets(FACTS[:3], {1: torch.zeros(3, 2)}))
    outcome = EditOutcome(plan, {}, {}, residual_norm=torch.tensor([2.0, 1, 10]))
    first, second, third = probes.measure_facts(outcome)
    # Residuals 2, 1, 10: their median is 2.
    assert (first.edit_success_gain, first.neighbor_flip_rate, first.update_norm) == (2.0, 0.0, 1.0)
    assert (second.edit_success_gain, second.neighbor_flip_rate, second.update_norm) == (-0.5, 0.0, 0.5)
    assert (third.edit_success_gain, third.neighbor_flip_rate, third.update_norm) == (1.0, 1.0, 5.0)
    assert third.certainty == 1.0


def test_held_out_sentences_are_measured_again_only_if_the_weights_changed(lm, monkeypatch):
    from callbacks.trust import probes as module

    asked = []
    plain = module.measure_heldout
    monkeypatch.setattr(module, "measure_heldout", lambda *a: asked.append(1) or plain(*a))
    editor, probes = edited(lm), Probes([Sentence((5, 6, 7), 2)], 1, False)
    probes.measure_before(editor, FACTS[:1])
    probes.measure_before(editor, FACTS[:1])
    assert len(asked) == 1
    editor.layers[0].add(torch.ones_like(editor.layers[0].total))
    probes.measure_after(editor, outcome_of(FACTS[:1], **COMMON))
    assert len(asked) == 2
    probes.reuse_heldout()
    probes.measure_before(editor, FACTS[:1])
    assert len(asked) == 2
    editor.layers[0].restore(torch.zeros_like(editor.layers[0].total))
    probes.measure_before(editor, FACTS[:1])
    assert len(asked) == 3


def test_infinite_conditions_can_be_written_and_nan_is_refused(lm):
    editor, probes = edited(lm), Probes([Sentence((5, 6, 7), 2)], 1, False)
    probes.measure_before(editor, FACTS[:1])
    metrics = probes.measure_after(editor, outcome_of(FACTS[:1], **{**COMMON, "gram_condition": math.inf}))
    json.dumps(metrics.gram_condition, allow_nan=False)
    with pytest.raises(ValueError, match="update_norm is nan"):
        probes.measure_after(editor, outcome_of(FACTS[:1], **{**COMMON, "update_norm": math.nan}))


def test_a_model_that_is_not_finite_after_a_batch_has_no_signals(lm):
    # That is harm and no failure of the probe; a model that was not finite before it is the probe's failure.
    editor, probes = edited(lm), Probes([Sentence((5, 6, 7), 2)], 1, False)
    probes.measure_before(editor, FACTS[:1])
    editor.layers[0].add(torch.full_like(editor.layers[0].total, math.inf))
    assert probes.measure_after(editor, outcome_of(FACTS[:1], **COMMON)) is None
    probes.measure_before(editor, FACTS[:1])
    with pytest.raises(ValueError, match="is nan"):
        probes.measure_after(editor, outcome_of(FACTS[:1], **COMMON))
