"""Runs whose layers have targets of their own: memories, an adjustment, resume, and the cache of values."""

import pytest
import torch

from callbacks import LoRAAdjust, MemoryReplay
from editlab.solver.methods import EMMET
from editlab.values import sources
from editlab.values.optimize import ValueSettings
from editlab.values.spread import EACH, FORWARD
from tests.test_editor import Spy, editor, fit


def settings(spread, reference="current"):
    return ValueSettings(steps=4, lr=0.5, clamp=3.0, spread=spread, reference=reference)


def exact(folder, spread):
    return editor(folder, method=EMMET(gram_ridge=0.0), values=settings(spread))


@pytest.mark.parametrize("spread", [EACH, FORWARD])
def test_replayed_equalities_hold_at_every_site(spread, tiny_folder, tmp_path):
    # All earlier edits are replayed, and each layer's solve reaches its own targets exactly, so at the end both sites
    # hold the values of all facts.
    module, replay = exact(tiny_folder, spread), MemoryReplay(rate=10.0, weight=float("inf"))
    spy = Spy()
    fit(tmp_path, module, callbacks=[replay, spy], limit=4)
    memories = replay.buffer.memories
    values = torch.stack([memory.value for memory in memories])
    assert values.shape == (4, 2, 32)
    assert torch.equal(values, torch.cat([plan.targets.stacked() for plan in spy.plans]))
    assert [addition.target.shape for addition in spy.plans[1].additions] == [(2, 32)] * 2
    now = module.solver.read_outputs([memory.fact for memory in memories]).float()
    assert torch.allclose(now, values, atol=5e-3)
    replay._weigh(module, 0)  # random sampling has no use for drift
    replay.buffer.sampling = "priority"
    replay._weigh(module, 0)
    assert max(memory.importance for memory in memories) < 1e-3
    assert all(memory.weighed for memory in memories)


def test_memories_follow_an_adjustment_at_every_site(tiny_folder, tmp_path):
    # One exact batch holds its values; LoRA moves the outputs, and the memories' values with them.
    module, replay = exact(tiny_folder, EACH), MemoryReplay()
    lora = LoRAAdjust(steps=2, every_n_batches=1, text_tokens=64, tolerance=1e9)
    spy = Spy()
    fit(tmp_path, module, callbacks=[replay, lora, spy], limit=2)
    now = module.solver.read_outputs([memory.fact for memory in replay.buffer.memories]).float()
    values = torch.stack([memory.value for memory in replay.buffer.memories])
    assert torch.allclose(values, now, atol=2e-3)
    assert (values - spy.plans[0].targets.stacked()).norm(dim=2).min() > 1e-2


@pytest.mark.parametrize("spread", [EACH, FORWARD])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_in_the_same_bits(spread, tiny_folder, tmp_path):
    def replay():
        return MemoryReplay(rate=1.0, memory="both", sampling="priority", refresh_every=1, refresh="values")

    whole, part, rest = (editor(tiny_folder, values=settings(spread), passes=2) for _ in range(3))
    fit(tmp_path, whole, callbacks=[replay()], limit=4, name="whole")
    fit(tmp_path, part, callbacks=[replay()], limit=4, max_steps=1, save=True, name="part")
    path = next(tmp_path.rglob("last.ckpt"))
    fit(tmp_path, rest, callbacks=[replay()], limit=4, save=True, ckpt_path=path, name="part")
    assert all(torch.equal(a.total, b.total) for a, b in zip(whole.layers, rest.layers, strict=True))
    assert all(layer.total.any() for layer in rest.layers)


def test_values_of_the_original_weights_are_cached_by_site(tiny_folder, tmp_path, monkeypatch):
    found = []
    plain = sources.optimize_values

    def noting(lm, facts, site, *rest, **named):
        found.append((site.layer, len(facts)))
        return plain(lm, facts, site, *rest, **named)

    monkeypatch.setattr(sources, "optimize_values", noting)
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    for spread, expected in ((EACH, [(1, 2), (2, 2)]), (FORWARD, []), ("residual", [])):
        found.clear()
        fit(tmp_path, editor(tiny_folder, values=settings(spread, "original")), limit=2, name=spread)
        assert found == expected
