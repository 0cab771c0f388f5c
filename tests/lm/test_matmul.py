"""Tests that bfloat16 products differ from float32 products only by rounding, and only in the selected maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import bfloat16_products, multiplies_bfloat16, products
from editlab.lm.probe import linear_maps
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.tensor([[11, 42, 7, 99, 180], [5, 250, 31, 8, 9]])


def make(family):
    return LanguageModel(tiny_model(family), tiny_tokenizer())


def states(lm):
    with torch.no_grad():
        return lm.model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_blocks_round_and_no_other(family):
    lm = make(family)
    exact = states(lm)
    with bfloat16_products(lm.anatomy.blocks[2:], lm.anatomy.edit_path):
        rounded = states(lm)
    for before, after in zip(exact[:3], rounded[:3], strict=True):
        assert torch.equal(before, after)
    gap = (exact[-1] - rounded[-1]).norm() / exact[-1].norm()
    # bfloat16 has 8 significant bits: one rounding has a relative error up to 2^-9, and two blocks round a dozen times.
    assert 1e-5 < gap < 12 * 2**-9
    assert rounded[-1].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_one_map_by_hand(family):
    # Rounded input times rounded weight, summed in float64: only the rounding of the sum remains.
    lm = make(family)
    block = lm.anatomy.blocks[0]
    module = linear_maps(block)[lm.anatomy.edit_path]
    x = torch.randn(3, lm.anatomy.key_size(0), generator=torch.Generator().manual_seed(0))
    weight = module.weight.detach() if lm.anatomy.transposed(0) else module.weight.detach().T
    bias = 0 if module.bias is None else module.bias.detach().bfloat16().double()
    expected = x.bfloat16().double() @ weight.bfloat16().double() + bias
    with bfloat16_products([block], lm.anatomy.edit_path):
        got = module(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=2**-8, atol=2**-8 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_rounds_and_embeddings_tied_to_it_do_not(family):
    lm = make(family)
    lm.model.tie_weights()
    head, embeddings = lm.anatomy.head, lm.model.get_input_embeddings()
    x = torch.randn(3, head.in_features, generator=torch.Generator().manual_seed(0))
    expected = x.bfloat16().double() @ head.weight.detach().bfloat16().double().T
    with bfloat16_products([], lm.anatomy.edit_path, head):
        got, embedded = head(x), embeddings(IDS)
    assert got.dtype == embedded.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=2**-8, atol=2**-8 * float(expected.abs().max()))
    assert torch.equal(embedded, embeddings(IDS))


def test_the_gradient_is_near_the_float32_one():
    lm = make("llama")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mlp = lm.anatomy.blocks[0].mlp
    (exact,) = torch.autograd.grad(mlp(x).square().sum(), x)
    with bfloat16_products(lm.anatomy.blocks[:1], lm.anatomy.edit_path):
        (rounded,) = torch.autograd.grad(mlp(x).square().sum(), x)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.02


def test_the_model_is_restored_even_after_an_error():
    lm = make("gpt2")
    before = {name: (p, p.clone()) for name, p in lm.named_parameters()}
    with pytest.raises(ZeroDivisionError), bfloat16_products(lm.anatomy.blocks, lm.anatomy.edit_path):
        raise ZeroDivisionError
    after = dict(lm.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and torch.equal(p, content) for name, (p, content) in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())


def test_weights_of_another_type_are_not_changed():
    lm = LanguageModel(tiny_model("llama").double(), tiny_tokenizer())
    exact = states(lm)
    with bfloat16_products(lm.anatomy.blocks, lm.anatomy.edit_path):
        assert torch.equal(states(lm)[-1], exact[-1])


def test_cpu_instructions_do_not_count_on_other_devices():
    assert not multiplies_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(
    ("has", "able"),
    [({"amx_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_cpus_with_either_kind_of_instruction_multiply_bfloat16(monkeypatch, has, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert multiplies_bfloat16(torch.device("cpu")) is able


def test_maps_that_read_one_tensor_share_its_rounded_copy(monkeypatch):
    lm = make("llama")
    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.append(x), forward(self, x))[1])
    with bfloat16_products(lm.anatomy.blocks[:1], lm.anatomy.edit_path):
        states(lm)
    query, key, value = seen[:3]
    assert query is key is value
    assert query.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("matmul", "able", "rounds"),
    [("float32", True, False), ("bfloat16", False, True), ("auto", True, True), ("auto", False, False)],
)
def test_products_follow_the_setting(monkeypatch, matmul, able, rounds):
    monkeypatch.setattr("editlab.lm.matmul.multiplies_bfloat16", lambda device: able)
    lm = make("llama")
    exact = states(lm)[-1]
    with products(matmul, lm.anatomy.blocks, lm.anatomy.edit_path, lm.device):
        assert torch.equal(states(lm)[-1], exact) != rounds
