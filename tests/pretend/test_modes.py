"""Tests that all modes of the callbacks, model families and data types give the results of the CPU."""

import pytest
import torch

from callbacks import LoRAAdjust, MemoryReplay, TrustRollback
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import ROME
from editlab.solver.preservation import Preservation
from tests.facts import FACTS
from tests.pretend.device import pretend
from tests.pretend.editing import difference, edited, on_device
from tests.tiny import FAMILIES

pytestmark = on_device
FLOAT32 = 1e-4
"""Largest relative difference of the updates' sums that float32 rounding may cause."""
AMPLIFIED = 5e-2
"""The same where a step amplifies rounding; with float64 weights such runs are the same to the last digits."""
FLOAT64 = 1e-9


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_families(family):
    layers = {"layers": [1]} if family.startswith("gemma") else {}
    cpu, cuda = (edited(kind, family, facts=FACTS[:2], **layers) for kind in ("cpu", "cuda"))
    assert difference(cuda, cpu) < FLOAT32


def test_bfloat16_weights():
    cpu, cuda = (edited(kind, dtype=torch.bfloat16) for kind in ("cpu", "cuda"))
    assert difference(cuda, cpu) < 0.1


def test_keys_of_several_contexts():
    cpu, mps = (edited(kind, facts=FACTS[:2], keys="mean") for kind in ("cpu", "mps"))
    assert difference(mps, cpu) < FLOAT32


def test_published_conventions():
    settings = {"layers": [1], "batch_size": 1, "method": ROME(), "conventions": "published"}
    cpu, mps = (edited(k, facts=FACTS[:1], **settings) for k in ("cpu", "mps"))
    assert difference(mps, cpu) < FLOAT32


REPLAY = {
    "sampled": {"rate": 1.0},
    "by drift": {"rate": 1.0, "sampling": "priority", "eviction": "least_important", "refresh": "values"},
    "consolidated": {"memory": "consolidated"},
    "both, by loss": {"memory": "both", "rate": 1.0, "sampling": "loss", "refresh_every": 1},
}


@pytest.mark.parametrize("mode", REPLAY)
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_replay(kind, mode):
    facts = [*FACTS[:3], FACTS[0]]  # the last one is edited again, so its keys are removed from the past keys
    cpu, there = (edited(k, facts=facts, callbacks=[MemoryReplay(**REPLAY[mode])]) for k in ("cpu", kind))
    assert difference(there, cpu) < FLOAT32


def test_cached_keys():
    settings = {"layers": [1], "preserve_prompt_tokens": 1.0}
    cpu, mps = (edited(k, callbacks=[MemoryReplay(rate=1.0, cache_keys=True)], **settings) for k in ("cpu", "mps"))
    assert difference(mps, cpu) < FLOAT32


def assert_same(kind, callbacks):
    """On CUDA in float64, which leaves no rounding to amplify; on MPS, which has none, in float32."""
    dtype, bound = (torch.float64, FLOAT64) if kind == "cuda" else (torch.float32, AMPLIFIED)
    cpu, there = (edited(k, callbacks=callbacks(), dtype=dtype) for k in ("cpu", kind))
    assert difference(there, cpu) < bound


@pytest.mark.parametrize("mode", ["merge", "adapter"])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_lora(kind, mode):
    def callbacks():
        lora = LoRAAdjust(steps=2, text_tokens=32, prompts=0, every_n_batches=1, tolerance=9.0, mode=mode)
        return [MemoryReplay(rate=1.0), lora] if mode == "merge" else [lora]

    # Adam divides by the gradient's size, so rounding of a tiny gradient can change a whole step.
    assert_same(kind, callbacks)


@pytest.mark.parametrize(("action", "granularity"), [("rollback", "batch"), ("scale", "edit"), ("search", "batch")])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_trust(kind, action, granularity, tmp_path):
    (tmp_path / "heldout.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 9)

    def gate():
        return TrustRollback(
            heldout=str(tmp_path / "heldout.txt"), heldout_samples=2, action=action, granularity=granularity,
            scales={"edit_success_gain": [-0.1, 0.2], "update_norm": [3.0, 1.0]}, calibrate=1, attribution=True,
        )  # fmt: skip

    # The score of a batch is divided by the spread of few earlier ones, which may be tiny.
    assert_same(kind, lambda: [gate()])


def test_layers_are_found():
    cpu, cuda = (edited(k, layers="auto", facts=FACTS[:2]) for k in ("cpu", "cuda"))
    assert difference(cuda, cpu) < FLOAT32


def test_solving_on_another_device_than_that_of_the_model():
    cpu, cuda = edited("cpu"), edited("cuda", solver_device="cpu")
    assert difference(cuda, cpu) < FLOAT32


def test_a_metric_that_does_not_fit_on_the_device_is_computed_on_the_cpu(caplog):
    a = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = a @ a.T
    keys, residuals = moments[:, :2].clone(), moments[:3, :2].clone()
    expected = solve(Constraints(keys, residuals, torch.ones(2).double()), Preservation.from_moments(moments)).delta

    def short(call):
        if call.name.startswith("linalg_cholesky"):
            raise RuntimeError("CUDA error: out of memory")

    with pretend() as device:
        device.short_of_memory = short
        metric = Preservation.from_moments(moments, device=device.name)
        device.short_of_memory = None
        assert metric.device.type == "cpu"
        constraints = Constraints(keys.cuda(), residuals.cuda(), torch.ones(2, dtype=torch.float64).cuda())
        assert torch.equal(solve(constraints, metric).delta, expected)
    assert "solved on the CPU" in caplog.text
