"""Drawn keys: hand-worked novelty, and lengths, spans and context keys of what is drawn."""

import torch

from editlab.keys.drawn_keys import novelty, with_drawn
from editlab.keys.key_sample import KeySample
from editlab.solver.preservation import Preservation

D_K = 6


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_novelty_by_hand():
    assert abs(novelty(torch.eye(3).double()) - 1) < 1e-12
    # (1, 0) and (3, 4): of each, the part at right angles to the other is sin^2 = (4/5)^2.
    assert abs(novelty(torch.tensor([[1.0, 3.0], [0.0, 4.0]]).double()) - 0.64) < 1e-12
    assert novelty(random(0, 2, 5)) < 1e-6  # more keys than dimensions


def test_drawn_keys_are_as_long_as_those_that_were_read():
    root = random(1, D_K, 20)
    moments = root @ root.T / 20
    sample = KeySample(random(2, D_K, 3), random(3, D_K, 6), torch.tensor([0, 0, 1, 1, 2, 2]))
    found = with_drawn(sample, moments, 4003)
    assert torch.equal(found.keys[:, :3], sample.keys)
    squares = Preservation.from_moments(moments).whiten(found.keys).square().sum(0)
    assert abs(float(squares[3:].mean() / squares[:3].mean()) - 1) < 0.1
    # Outside the span of the three keys lies what the novelty says, up to the D_K - 3 of D_K dimensions of its draw.
    whitened = Preservation.from_moments(moments).whiten(found.keys)
    basis = torch.linalg.qr(whitened[:, :3])[0]
    outside = whitened - basis @ (basis.T @ whitened)
    expected = novelty(whitened[:, :3]) * (D_K - 3) / D_K
    assert abs(float(outside[:, 3:].square().sum() / squares[3:].sum()) - expected) < 0.02


def test_context_keys_are_repeated():
    sample = KeySample(random(2, D_K, 2), random(3, D_K, 3), torch.tensor([0, 1, 1]))
    found = with_drawn(sample, torch.eye(D_K).double(), 5)
    assert found.context_fact.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert torch.equal(found.context_keys[:, 3:6], sample.context_keys)
    assert with_drawn(sample, torch.eye(D_K).double(), 2) is sample
    again = with_drawn(sample, torch.eye(D_K).double(), 5)
    assert torch.equal(again.keys, found.keys)
