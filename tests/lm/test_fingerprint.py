"""Tests that the fingerprint changes with every change of a weight, and with nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editlab.lm.fingerprint import architecture, fingerprint, model_key
from tests.tiny import tiny_model


class Bag(nn.Module):
    """A module that holds the given tensors as parameters, or as buffers if they are integers."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def test_same_weights_same_digest_whatever_the_threads():
    before = torch.get_num_threads()
    first = fingerprint(tiny_model("llama"))
    try:
        torch.set_num_threads(1)
        assert fingerprint(tiny_model("llama")) == first
    finally:
        torch.set_num_threads(before)
    assert len(first) == 64
    assert first != fingerprint(tiny_model("llama", seed=1))


def test_the_digest_is_a_fixed_function():
    """The digest is compared with stored values, because it is part of the names of files on disk."""
    import hashlib

    # XXH3 (128 bits) of the 24 bytes of 3, -5 and 2^62 as little-endian integers of 8 bytes.
    content = bytes.fromhex("d37fd9e5bd992620d3edeb860a4220b7")
    expected = hashlib.sha256(b"x|(3,)|torch.int64|" + content).hexdigest()
    assert fingerprint(Bag(x=torch.tensor([3, -5, 2**62]))) == expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.int64])
@pytest.mark.parametrize("size", [1, 7, 8, 1001])
def test_any_single_changed_element_changes_the_digest(dtype, size):
    weights = (noise(size) * 50).to(dtype)
    seen = {fingerprint(Bag(w=weights))}
    places = sorted({0, size // 2, size - 1})
    for index in places:
        changed = weights.clone()
        changed.view(torch.uint8)[index * weights.element_size()] ^= 1  # the lowest bit of that element
        seen.add(fingerprint(Bag(w=changed)))
    assert len(seen) == 1 + len(places)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_changed_signs_change_the_digest(dtype):
    """Also at the tops of words, where each moves a sum by half of what it is taken modulo of."""
    weights = noise(16, dtype=dtype)
    seen = {fingerprint(Bag(w=weights))}
    for one, other in ((0, 1), (1, 3), (3, 7), (7, 15), (0, 15)):
        changed = weights.clone()
        for index in (one, other):
            changed.view(torch.uint8)[(index + 1) * weights.element_size() - 1] ^= 0x80
        seen.add(fingerprint(Bag(w=changed)))
    assert len(seen) == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_elements_change_the_digest(dtype):
    weights = noise(40, dtype=dtype)
    weights[0] = 0
    seen = {fingerprint(Bag(w=weights))}
    for other in (1, 4, 8, 39):  # within a word of 8 bytes, and across words
        swapped = weights.clone()
        assert weights[0].float() != weights[other].float()
        swapped[0], swapped[other] = weights[other].clone(), weights[0].clone()
        seen.add(fingerprint(Bag(w=swapped)))
    assert len(seen) == 5


def test_swapped_blocks_change_the_digest():
    weights = torch.zeros(1 << 16, dtype=torch.int64)
    weights[5] = 9
    assert fingerprint(Bag(w=weights)) != fingerprint(Bag(w=weights.roll(1 << 15)))


def test_an_empty_tensor_and_a_number_have_digests():
    assert fingerprint(Bag(w=torch.zeros(0))) != fingerprint(Bag(w=torch.tensor(0.0)))


def test_name_shape_and_dtype_count():
    flat = torch.zeros(6)
    digests = {
        fingerprint(Bag(a=flat)),
        fingerprint(Bag(b=flat)),
        fingerprint(Bag(a=flat.view(2, 3))),
        fingerprint(Bag(a=flat.half())),
        fingerprint(Bag(a=flat.bfloat16())),
        fingerprint(Bag(a=torch.zeros(0))),
    }
    assert len(digests) == 6


def test_layout_in_memory_does_not_count():
    square = noise(5, 5)
    slanted = square.t().contiguous().t()
    assert not slanted.is_contiguous()
    assert fingerprint(Bag(w=slanted)) == fingerprint(Bag(w=square))
    shifted = torch.cat([torch.zeros(1), square.flatten()])[1:].view(5, 5)
    assert shifted.storage_offset() == 1
    assert fingerprint(Bag(w=shifted)) == fingerprint(Bag(w=square))


def test_buffers_count_if_they_are_persistent():
    model = Bag(w=noise(4))
    plain = fingerprint(model)
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == plain
    model.register_buffer("kept", torch.ones(3))
    assert fingerprint(model) != plain


def test_tied_weights_count_under_both_names():
    tied = tiny_model("llama", tie_word_embeddings=True)
    before = fingerprint(tied)
    tied.lm_head.weight.data[3, 3] += 1
    assert tied.model.embed_tokens.weight is tied.lm_head.weight
    assert fingerprint(tied) != before


def test_equal_weights_in_another_architecture_have_another_key():
    def key(**changes):
        model = tiny_model("llama")
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model_key(fingerprint(model), model)

    assert key(rms_norm_eps=0.5) != key()
    assert key(_name_or_path="elsewhere", transformers_version="0", use_cache=False) == key()
    assert model_key("other weights", tiny_model("llama")) != key()
    assert architecture(tiny_model("llama"))["rms_norm_eps"] == tiny_model("llama").config.rms_norm_eps
    assert architecture(Bag(w=noise(4))) == {}


def test_the_model_is_left_unchanged():
    model = tiny_model("gpt2")
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    fingerprint(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
