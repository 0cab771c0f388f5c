"""The adapter: the maps that it is added to, the model that it leaves unchanged, and its update by plain arithmetic."""

import pytest
import torch

from callbacks.lora.targets import find_targets
from editlab.lm.language_model import LanguageModel
from editlab.training.adapter import Adapter, parameters
from tests.tiny import tiny_model, tiny_tokenizer


def language_model(family):
    return LanguageModel(tiny_model(family).requires_grad_(False), tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["edited", "mlp", "attention"])
def test_in_place_and_out_again(family, targets):
    lm = language_model(family)
    paths = find_targets(lm.anatomy, targets, [1, 2])
    modules = [lm.model.get_submodule(path) for path in paths]
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    ids = torch.arange(3, 15)[None]
    plain = lm.run(ids).logits
    adapter = Adapter(lm, paths, rank=2, alpha=6.0, dropout=0.0, seed=1)
    with adapter.in_place() as model:
        assert torch.equal(lm.run(ids).logits, plain)  # it starts out adding nothing
        own = parameters(model)
        # A is [rank, d_in] and B [d_out, rank] for each map, and nothing else is trained.
        assert sum(p.numel() for p in own) == 2 * sum(sum(m.weight.shape) for m in modules)
        with torch.no_grad():
            for parameter in own:
                parameter.normal_(std=0.1)
        adapted = lm.run(ids).logits
        updates, factors = adapter.updates(model), adapter.state(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert [lm.model.get_submodule(path) for path in paths] == modules
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # What it adds is B A alpha / rank (Hu et al. 2022, eq. 3), here from PEFT's saved factors.
    for path in paths:
        a, b = (factors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(updates[path], b @ a * 3.0, rtol=1e-5, atol=1e-6)
        weight = lm.model.get_submodule(path).weight
        with torch.no_grad():
            weight.add_(updates[path].T if family == "gpt2" else updates[path])
    torch.testing.assert_close(lm.run(ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_factors_are_taken_up_and_first_ones_follow_the_seed():
    lm = language_model("llama")
    paths = find_targets(lm.anatomy, "edited", [1])

    def first(seed):
        adapter = Adapter(lm, paths, 2, 4.0, 0.0, seed)
        with adapter.in_place() as model:
            return adapter, adapter.state(model)

    state = torch.get_rng_state()
    (adapter, one), (_, again), (_, other) = first(1), first(1), first(2)
    assert torch.equal(torch.get_rng_state(), state)
    a = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[a], again[a])
    assert not torch.equal(one[a], other[a])
    adapter.factors = {name: torch.ones_like(tensor) for name, tensor in one.items()}
    with adapter.in_place() as model:
        assert all((p == 1).all() for p in parameters(model))


def test_the_model_comes_back_from_a_failure():
    lm = language_model("llama")
    paths = find_targets(lm.anatomy, "edited", [1])
    module = lm.model.get_submodule(paths[0])
    with pytest.raises(RuntimeError, match="stop"), Adapter(lm, paths, 2, 4.0, 0.0, 0).in_place():
        raise RuntimeError("stop")
    assert lm.model.get_submodule(paths[0]) is module
