"""Edited weights against sums made by hand, for both orientations and for 16-bit weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editlab.edits.edited_layer import ClosedFormOptimizer, EditedLayer, unedited

D_K, D_V = 6, 4
KINDS = ["linear", "conv1d"]


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, EditedLayer]:
    """Build a module of d_k = 6 inputs and d_v = 4 outputs, and its edited layer."""
    torch.manual_seed(0)
    module = nn.Linear(D_K, D_V) if kind == "linear" else Conv1D(D_V, D_K)
    module = module.to(dtype)
    nn.init.normal_(module.weight)  # in the dtype: float64 weights are no rounded float32 ones
    return module, EditedLayer(module, transposed=kind == "conv1d")


def update(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(D_V, D_K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_moves_the_modules_output_by_update_times_key(kind):
    """The definition of the orientation: (W + U) k = W k + U k, whatever way round the weight is stored."""
    module, layer = make(kind)
    key = torch.randn(D_K)
    before = module(key)
    layer.add(update(1))
    torch.testing.assert_close(module(key), before + update(1).float() @ key)
    assert layer.total.shape == (D_V, D_K)
    assert layer.weight is module.weight


@pytest.mark.parametrize("kind", KINDS)
def test_small_updates_are_not_rounded_away_in_bfloat16(kind):
    """1000 updates of about 1e-4 of the weight: the weight is the exact sum rounded once.

    bfloat16 keeps 8 bits, so an update below 2^-9 of a weight is lost where it is added to the weight itself.
    """
    module, layer = make(kind, torch.bfloat16)
    original = module.weight.detach().clone()
    naive = original.clone()
    exact = torch.zeros(D_V, D_K, dtype=torch.float64)
    for i in range(1000):
        change = (update(7) + 0.1 * update(100 + i)) * 1e-4  # a common direction, so that the sum matters
        layer.add(change)
        exact += change
        naive += (change.T if kind == "conv1d" else change).to(torch.bfloat16)
    torch.testing.assert_close(layer.total.double(), exact, rtol=1e-4, atol=1e-6)  # float32, 1000 roundings
    exact = exact.T if kind == "conv1d" else exact
    expected = (original.double() + exact).to(torch.bfloat16)
    # The sum in float32 is off by 1e-5 at most, which rarely tips a number to the next of bfloat16.
    assert (module.weight == expected).float().mean() > 0.9
    torch.testing.assert_close(module.weight, expected, rtol=2**-7, atol=1e-4)
    achieved = (module.weight.detach().double() - original.double()).flatten()
    assert (achieved - exact.flatten()).norm() < 0.1 * exact.norm()
    assert ((naive - original).double() - exact).norm() > 0.3 * exact.norm()


def test_the_sum_is_float32_and_exactly_what_is_written():
    module, layer = make("linear", torch.bfloat16)
    original = module.weight.detach().clone()
    for i in range(5):
        layer.add(update(i, 1e-2))
    assert layer.total.dtype == torch.float32
    assert torch.equal(module.weight, (original.float() + layer.total).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_restore_is_bit_for_bit(kind, dtype):
    module, layer = make(kind, dtype)
    original = module.weight.detach().clone()
    layer.add(update(1, 1e-3))
    weight, total = module.weight.detach().clone(), layer.total.clone()
    layer.add(update(2))
    assert not torch.equal(module.weight, weight)
    layer.restore(total)
    assert torch.equal(module.weight, weight)
    assert torch.equal(layer.total, total)
    layer.restore(torch.zeros_like(total))
    assert torch.equal(module.weight, original)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unedited_gives_the_original_and_then_the_edited_weight(kind, dtype):
    module, layer = make(kind, dtype)
    original = module.weight.detach().clone()
    layer.add(update(1))
    edited, total = module.weight.detach().clone(), layer.total.clone()
    with unedited([layer]):
        assert torch.equal(module.weight, original)
        assert torch.equal(layer.total, total)
    assert torch.equal(module.weight, edited)


def test_unedited_puts_the_edit_back_after_an_exception():
    module, layer = make("linear")
    layer.add(update(1))
    edited = module.weight.detach().clone()
    with (
        pytest.raises(ZeroDivisionError),
        unedited(iter([layer])),
    ):  # an iterator can be gone through only once
        raise ZeroDivisionError
    assert torch.equal(module.weight, edited)


def test_unedited_covers_all_layers_even_if_only_one_was_edited():
    (a, layer_a), (b, layer_b) = make("linear"), make("conv1d")
    originals = [m.weight.detach().clone() for m in (a, b)]
    layer_b.add(update(1))
    with unedited([layer_a, layer_b]):
        assert torch.equal(a.weight, originals[0])
        assert torch.equal(b.weight, originals[1])
    assert not torch.equal(b.weight, originals[1])


def test_nested_unedited_blocks_keep_the_edits_out():
    """The inner one must not bring the edits back early, nor layers that only it was given stay as they were."""
    (a, layer_a), (b, layer_b) = make("linear"), make("conv1d")
    originals = [m.weight.detach().clone() for m in (a, b)]
    for layer in (layer_a, layer_b):
        layer.add(update(1))
    edited = [m.weight.detach().clone() for m in (a, b)]
    with unedited([layer_a]):
        with unedited([layer_a, layer_b]):
            assert torch.equal(a.weight, originals[0])
            assert torch.equal(b.weight, originals[1])
        assert torch.equal(a.weight, originals[0])
        assert torch.equal(b.weight, edited[1])
        layer_a.add(update(2))  # summed, and seen where the original is no longer asked for
        assert torch.equal(a.weight, originals[0])
    assert torch.equal(a.weight, originals[0] + layer_a.total)
    assert not torch.equal(a.weight, edited[0])


def test_the_original_comes_back_to_the_sign_of_its_zeros():
    """-0.0 + 0.0 is 0.0, and their fingerprints differ."""
    module, layer = make("linear")
    with torch.no_grad():
        layer.original.fill_(-0.0)
    layer.add(update(1))
    with unedited([layer]):
        assert bool(torch.signbit(module.weight).all())
    layer.restore(torch.zeros(D_V, D_K))
    assert bool(torch.signbit(module.weight).all())


def test_unedited_writes_nothing_if_nothing_was_edited():
    """A weight is as large as a layer: its version counter shows that it was not written."""
    module, layer = make("linear")
    version = module.weight._version
    with unedited([layer]):
        pass
    assert module.weight._version == version


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_sum_alone_and_loading_it_writes_the_weight(kind):
    module, layer = make(kind, torch.bfloat16)
    layer.add(update(1))
    layer.add(update(2))
    state = layer.state_dict()
    assert list(state) == ["total"]
    assert state["total"].dtype == torch.float32
    fresh_module, fresh = make(kind, torch.bfloat16)
    assert not torch.equal(fresh_module.weight, module.weight)
    fresh.load_state_dict(state)
    assert torch.equal(fresh_module.weight, module.weight)
    assert torch.equal(fresh.total, layer.total)


def test_the_state_is_written_inside_a_larger_module_too():
    """A checkpoint is loaded through the module that owns the layers."""
    module, layer = make("linear")
    layer.add(update(1))
    fresh_module, fresh = make("linear")
    nn.ModuleList([fresh]).load_state_dict(nn.ModuleList([layer]).state_dict())
    assert torch.equal(fresh_module.weight, module.weight)


def test_the_weight_is_not_registered_twice():
    _, layer = make("linear")
    assert not list(layer.parameters())
    assert {name for name, _ in layer.named_buffers()} == {"total", "original"}


def test_relative_norm_by_hand():
    module, layer = make("linear")
    layer.add(torch.full((D_V, D_K), 0.5))
    # The Frobenius norm of 24 halves is sqrt(24) / 2; the original weight is what the sum is taken off.
    original = module.weight.detach() - 0.5
    assert layer.relative_norm() == pytest.approx(24**0.5 / 2 / float(original.norm()), rel=1e-5)


# ClosedFormOptimizer


def test_a_step_runs_its_closure_once_and_without_gradients():
    module, layer = make("linear")
    before, calls = module.weight.detach().clone(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        layer.add(update(1))

    assert ClosedFormOptimizer(iter([layer])).step(closure) is None
    assert calls == [False]
    torch.testing.assert_close(module.weight.detach(), before + update(1).float())


def test_step_without_a_closure_is_refused():
    module, layer = make("linear")
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="needs a closure"):
        ClosedFormOptimizer([layer]).step()
    assert torch.equal(module.weight, before)


def test_the_optimizer_holds_the_weights_and_no_state():
    """A checkpoint of it is small: the sums are the layers' own."""
    module, layer = make("linear")
    optimizer = ClosedFormOptimizer([layer])
    optimizer.step(lambda: layer.add(update(1)))
    assert optimizer.param_groups[0]["params"] == [module.weight]
    assert not optimizer.state_dict()["state"]


def test_a_step_works_on_weights_without_gradients():
    module, layer = make("linear")
    module.requires_grad_(False)
    before = module.weight.clone()
    ClosedFormOptimizer([layer]).step(lambda: layer.add(update(1)))
    torch.testing.assert_close(module.weight, before + update(1).float())
    assert not module.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_separate_from_the_sum(kind):
    """W = W0 + sum + adapter; switched off the weight is that of the sum alone, and unedited that of neither."""
    module, layer = make(kind)
    original = module.weight.detach().clone()
    layer.add(update(1))
    edited = module.weight.detach().clone()
    layer.set_adapter(update(2).float())
    oriented = (update(1) + update(2)).float()
    torch.testing.assert_close(module.weight.detach(), original + (oriented.T if kind == "conv1d" else oriented))
    with_adapter = module.weight.detach().clone()
    with unedited([layer]):
        assert torch.equal(module.weight, original)
    assert torch.equal(module.weight, with_adapter)
    layer.restore(torch.zeros(D_V, D_K))  # the sum goes, the adapter stays, and alone it is an edit too
    with unedited([layer]):
        assert torch.equal(module.weight, original)
    assert not torch.equal(module.weight, original)
    layer.restore(update(1).float())
    layer.set_adapter(None)
    assert torch.equal(module.weight, edited)


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.double()])
def test_the_sum_stays_float32_whatever_the_model_is_converted_to(convert):
    _, layer = make("linear")
    layer.add(update(3, 1e-4))
    before = layer.total.clone()
    assert convert(layer).total.dtype == torch.float32
    assert torch.equal(layer.total, before)
