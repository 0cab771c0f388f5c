"""BetaEdit's projector computed again in a run, and a run with post-steps, scaled batches and BetaEdit resumed."""

import pytest
import torch

from callbacks.replay.callback import MemoryReplay
from callbacks.replay.refresh import Refresh
from editlab.edits import batch as module_under_test
from editlab.solver.methods import BetaEdit
from editlab.solver.post_steps import RECT, SPHERE
from editlab.values.optimize import ValueSettings
from tests.test_editor import Spy, editor, fit

METHOD = BetaEdit(covariance_weight=5.0, threshold=0.5, l2=0.1, refresh_every=4)  # of keys of the tiny model's scale


def make(folder, **changes):
    values = ValueSettings(steps=4, lr=0.5, clamp=3.0, reference="original")
    return editor(folder, layers=[1], method=METHOD, values=values, **changes)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_has_the_same_bits(tiny_folder, tmp_path, monkeypatch):
    # Batches of two: the first is scaled, and the projector is computed again after the second, where the run stops.
    plain, seen = module_under_test.second_moments, {}
    monkeypatch.setattr(module_under_test, "second_moments", lambda *a: dict(seen.setdefault("c0", plain(*a))))
    runs = {}
    for name, extra in {"whole": {}, "part": {"max_steps": 2, "save": True}, "rest": {"save": True}}.items():
        module = make(tiny_folder, post_steps=[SPHERE(), RECT(0.5)])
        replay, spy = MemoryReplay(memory="consolidated"), Spy({0: 0.5})
        if name == "rest":
            extra = {**extra, "ckpt_path": next(tmp_path.rglob("last.ckpt"))}
        fit(tmp_path, module, callbacks=[replay, spy], name=name, **extra)
        runs[name] = module, replay, spy
    (whole, memory, spy), (rest, resumed, _) = runs["whole"], runs["rest"]
    assert torch.equal(whole.layers[0].total, rest.layers[0].total)
    assert torch.equal(whole.carried.parts[1], rest.carried.parts[1])
    assert whole.carried.parts[1].norm() > 0
    assert torch.equal(memory.refreshed.past[1], resumed.refreshed.past[1])
    # By hand: the metric of the end, and that the refresh did change the null space.
    assert (memory.refreshed.kept, memory.refreshed.standing) == (4, 4)
    bare = METHOD.refreshed(seen["c0"][1], memory.refreshed.past[1], 4)
    for module in (whole, rest):
        assert torch.equal(module.solver.preservation[1].factor, bare.plus_moments(memory.past.moments[1]).factor)
    assert 0 < bare.factor.shape[1] < METHOD.preservation(seen["c0"][1]).factor.shape[1]
    # What was applied has half of its elements at most, and the step logs how much was cut off.
    assert spy.outcomes[2].updates[1].count_nonzero() <= 0.5 * whole.layers[0].total.numel() + 1
    assert 0 < spy.outcomes[2].diagnostics["layer_1/cut_off"] < 1


def test_state_before_any_refresh():
    refresh = Refresh()
    refresh.load_state_dict(Refresh().state_dict())
    assert (refresh.kept, refresh.standing, refresh.past) == (0, 0, {})
