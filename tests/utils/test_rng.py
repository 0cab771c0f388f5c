"""Tests that the state of each random generator survives being saved to a file and loaded."""

import random

import numpy as np
import pytest
import torch

from editlab.utils.rng import private_draws, restored_draws, rng_state, set_rng_state


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()]


def test_every_generator_resumes_from_its_saved_state(tmp_path):
    before = rng_state()
    draws()  # leaves a cached second Gaussian number, which is part of the state
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


def test_a_gpu_that_is_not_in_use_is_not_initialized(monkeypatch):
    def touched(*arguments):
        raise AssertionError("CUDA would have begun")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_rng_state_all", "set_rng_state_all", "manual_seed_all", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    set_rng_state(rng_state())
    with private_draws(3):
        torch.rand(1)


def test_private_draws_leave_the_generators_of_gpus_in_use_as_they_were(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["first", "second"])
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append(seed))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: calls.append(states))
    with private_draws(3):
        pass
    assert calls == [3, ["first", "second"]]


def test_draws_of_other_programs_are_undone():
    before = rng_state()

    def other():
        random.seed(3)
        np.random.rand(2)
        torch.manual_seed(1)
        raise RuntimeError

    with pytest.raises(RuntimeError), restored_draws():
        other()
    after = rng_state()
    assert after["python"] == before["python"]
    assert after["numpy"] == before["numpy"]
    assert torch.equal(after["torch"], before["torch"])
