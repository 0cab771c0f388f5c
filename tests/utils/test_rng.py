"""Random states: there and back through a file, for each of the generators."""

import random

import numpy as np
import torch

from editlab.utils.rng import private_draws, rng_state, set_rng_state


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()]


def test_every_generator_goes_on_where_it_was(tmp_path):
    before = rng_state()
    draws()  # leaves half of a pair of Gaussian numbers behind, which is part of the state
    torch.save(rng_state(), tmp_path / "state")
    expected = [draws() for _ in range(3)]
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draws() for _ in range(3)] == expected
    set_rng_state(before)


def test_private_draws_follow_their_seed_and_leave_the_global_state():
    before = torch.get_rng_state()
    with private_draws(3):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    with private_draws(3):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(3)))
