"""Breadth-first training against plain loops of torch and PEFT, which are written out here."""

import random

import peft
import pytest
import torch

from editlab.errors import NonFiniteError, UserError
from editlab.lm.language_model import LanguageModel
from editlab.training import breadth_first
from editlab.training.breadth_first import train
from editlab.training.methods import FineTune, LoRAOnly
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

END = 2
"""Id of the tiny tokenizer's end token."""
PLAIN = {"matmul": "float32", "mini_batch": 2, "epochs": 3, "stop_loss": 0.0}


def language_model():
    return LanguageModel(tiny_model("llama").requires_grad_(False), tiny_tokenizer())


def plain_loss(model, tokenizer, fact):
    """Mean cross-entropy over the target's tokens and the end token, by the model's own forward pass on one text."""
    prompt = tokenizer(fact.question)["input_ids"]
    ids = [*tokenizer(f"{fact.question} {fact.target_new}")["input_ids"], END]
    logits = model(torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :]))


def plain_training(model, tokenizer, facts, parameters, lr, after=lambda: None):
    """Three epochs over mini-batches of two facts, in the documented order of the seed 0 in batch 4."""
    draw = random.Random("0:4")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(3):
        order = draw.sample(range(len(facts)), len(facts))
        for start in range(0, len(facts), 2):
            some = [facts[i] for i in order[start : start + 2]]
            optimizer.zero_grad()
            torch.stack([plain_loss(model, tokenizer, fact) for fact in some]).mean().backward()
            optimizer.step()
            after()


@pytest.mark.parametrize("limit", [None, 2e-3])
def test_fine_tuning_is_a_plain_loop_over_the_weights(limit):
    facts, lr = FACTS[:5], 1e-3
    trained = train(FineTune(lr=lr, norm_constraint=limit, **PLAIN), language_model(), [1, 2], facts, [1.0] * 5, 4)
    model = tiny_model("llama").requires_grad_(False)
    weights = [model.model.layers[layer].mlp.down_proj.weight.requires_grad_() for layer in (1, 2)]
    before = [weight.detach().clone() for weight in weights]

    def clamp():  # of ROME's FT+L: each entry stays within the limit around its value before the batch
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                if limit is not None:
                    weight.clamp_(old - limit, old + limit)

    plain_training(model, tiny_tokenizer(), facts, weights, lr, clamp)
    for layer, weight, old in zip((1, 2), weights, before, strict=True):
        torch.testing.assert_close(trained.updates[layer], weight.detach() - old, rtol=1e-3, atol=2e-6)
        if limit is not None:
            assert trained.updates[layer].abs().max() == torch.tensor(limit)
    assert trained.epochs == 3


def test_lora_only_is_a_plain_loop_over_an_adapter_of_peft():
    facts, lr, rank = FACTS[:5], 1e-2, 2
    method = LoRAOnly(lr=lr, rank=rank, alpha=6.0, **PLAIN)
    trained = train(method, language_model(), [1, 2], facts, [1.0] * 5, 4)
    model = tiny_model("llama").requires_grad_(False)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    before = [model.get_submodule(name).weight.clone() for name in names]
    torch.manual_seed(4)  # 1000 times the seed 0, plus the batch
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=6.0, target_modules=names))
    plain_training(adapted, tiny_tokenizer(), facts, [p for p in adapted.parameters() if p.requires_grad], lr)
    merged = adapted.merge_and_unload()
    for layer, name, old in zip((1, 2), names, before, strict=True):
        update = trained.updates[layer]
        torch.testing.assert_close(update, merged.get_submodule(name).weight - old, rtol=1e-3, atol=1e-5)
        values = torch.linalg.svdvals(update.double())
        assert values[rank - 1] > 1e-4
        assert values[rank] < 1e-6 * values[0]  # a product of factors of rank 2 has no third singular value


def test_every_epoch_goes_over_all_facts_in_a_new_order(monkeypatch):
    seen = []
    plain = breadth_first.losses_of
    monkeypatch.setattr(breadth_first, "losses_of", lambda lm, rows: seen.append(rows) or plain(lm, rows))
    lm = language_model()

    def orders(step, seed=0):
        seen.clear()
        train(FineTune(seed=seed, **PLAIN), lm, [1], FACTS[:5], [1.0] * 5, step)
        assert [len(rows) for rows in seen] == [2, 2, 1] * 3
        return [[row.ids for rows in seen[i : i + 3] for row in rows] for i in (0, 3, 6)]

    first = orders(0)
    assert sorted(first[0]) == sorted(first[1]) == sorted(first[2])
    assert len(set(first[0])) == 5
    assert first[0] != first[1]
    assert orders(0) == first
    assert orders(1) != first
    assert orders(0, seed=1) != first


def test_the_end_token_is_the_last_of_a_target(monkeypatch):
    seen = []
    plain = breadth_first.losses_of
    monkeypatch.setattr(breadth_first, "losses_of", lambda lm, rows: seen.extend(rows) or plain(lm, rows))
    lm = language_model()
    for with_end in (True, False):
        train(FineTune(end_token=with_end, epochs=1), lm, [1], FACTS[:1], [1.0], 0)
    with_end, without = seen
    assert with_end.following == (*without.following, END)
    assert lm.tokenizer.decode(without.following) == f" {FACTS[0].target_new}"


def test_a_training_stops_where_the_loss_is_low():
    # A limit above any loss: no mini-batch takes a step, and the first epoch ends the training.
    trained = train(FineTune(stop_loss=1e3, matmul="float32"), language_model(), [1], FACTS[:3], [1.0] * 3, 0)
    assert trained.epochs == 1
    assert not trained.updates[1].any()
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        plain = sum(float(plain_loss(model, tokenizer, fact)) for fact in FACTS[:3]) / 3
    assert trained.loss == pytest.approx(plain, rel=1e-5)


def test_a_fact_of_little_weight_has_little_effect():
    # Adam does not depend on the scale of the loss, so next to a weight of 1e-9 only the other fact counts.
    method = FineTune(epochs=2, matmul="float32", stop_loss=0.0)
    lm = language_model()
    both = train(method, lm, [1], FACTS[:2], [1.0, 1e-9], 0)
    alone = train(method, lm, [1], FACTS[:1], [1.0], 0)
    torch.testing.assert_close(both.updates[1], alone.updates[1], rtol=0, atol=1e-4)
    equal = train(method, lm, [1], FACTS[:2], [1.0, 1.0], 0)
    assert (equal.updates[1] - alone.updates[1]).abs().max() > 1e-3


def test_errors_of_a_training_that_diverges_or_has_no_end_token():
    lm = language_model()
    with pytest.raises(NonFiniteError, match=r"of batch 7 gave numbers that are not finite in epoch .: lower"):
        train(FineTune(lr=3e37, epochs=4), lm, [1], FACTS[:2], [1.0] * 2, 7)
    assert torch.isfinite(lm.run(torch.tensor([[3, 4]])).logits).all()  # the weights are what they were
    lm.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no end token.*set model\.method\.end_token to false"):
        train(FineTune(), lm, [1], FACTS[:2], [1.0] * 2, 0)
