"""Replay through real runs of a tiny model: drift repaired, keys cached exactly, past keys as one joint batch."""

import math

import pytest
import torch

from callbacks.replay.buffer import Memory
from callbacks.replay.callback import MemoryReplay
from editlab.callback import EditCallback
from editlab.errors import UserError
from editlab.keys.subject_keys import read_keys
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT
from editlab.solver.preservation import Preservation
from editlab.values.optimize import ValueSettings
from tests.facts import CITIES, FACTS, capital, write_counterfact
from tests.test_editor import Spy, editor, fit, site_now


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": -0.1}, "rate is -0.1"),
        ({"capacity": 0}, "capacity is 0"),
        ({"weight": 0}, "weight is 0"),
        ({"repair": 1.5}, "repair is 1.5"),
        ({"age_decay": 1.5}, "age_decay is 1.5"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"memory": "long"}, "memory is 'long': it must be one of sampled, consolidated, both"),
        ({"refresh": "keys"}, "refresh is 'keys'"),
        ({"past_weight": -1.0}, "past_weight is -1.0"),
        ({"forget": 0.0}, "forget is 0.0"),
        ({"sampling": "best"}, "sampling is 'best'"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        MemoryReplay(**arguments)


@pytest.mark.parametrize(
    ("replay", "settings", "message"),
    [
        ({"cache_keys": True}, {"layers": [1, 2]}, "an edit of a lower layer changes the keys"),
        ({"cache_keys": True}, {"layers": [1], "keys": "mean"}, "model.keys is mean: set it to bare"),
        ({}, {"restore_between_batches": True}, "nothing to remember"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(tiny_folder, tmp_path, replay, settings, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, editor(tiny_folder, **settings), callbacks=[MemoryReplay(**replay)])


def test_replay_repairs_drift(tiny_folder, tmp_path):
    # With a rate that replays all and equalities, the first batch's sites hold their values after the last batch.
    spy = Spy()
    module = editor(tiny_folder, layers=[1])
    fit(tmp_path, module, callbacks=[MemoryReplay(rate=10.0, weight=math.inf), spy])
    for fact, target in zip(spy.plans[0].facts, spy.plans[0].targets.first, strict=True):
        assert torch.allclose(site_now(module, fact), target, atol=2e-3)
    assert [len(plan.additions) for plan in spy.plans] == [0, 2, 4]
    plain = editor(tiny_folder, layers=[1])
    fit(tmp_path, plain, name="plain")
    drift = (site_now(plain, spy.plans[0].facts[0]) - spy.plans[0].targets.first[0]).norm()
    assert drift > 0.05  # which is what there was to repair


@pytest.mark.parametrize("repair", [0.0, 0.5])
def test_replay_may_spare_and_not_repair(tiny_folder, tmp_path, repair):
    # As equalities with all replayed: of the distance from its value at planning, a fact goes back the share asked for.
    far = {}

    class Watch(Spy):
        def on_edit_planned(self, trainer, editor, plan):
            super().on_edit_planned(trainer, editor, plan)
            if plan.step == 1:
                with torch.no_grad():
                    editor.layers[0].add(0.05 * torch.ones_like(editor.layers[0].total))  # something has drifted
                far["before"] = self.plans[0].targets.first[0] - site_now(editor, FACTS[0])

        def on_edit_applied(self, trainer, editor, outcome):
            if outcome.plan.step == 1:
                far["after"] = self.plans[0].targets.first[0] - site_now(editor, FACTS[0])

    replay = MemoryReplay(rate=10.0, weight=math.inf, repair=repair)
    fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[replay, Watch()], limit=4)
    assert far["before"].norm() > 0.1
    assert torch.allclose(far["after"], (1 - repair) * far["before"], atol=2e-3)


def test_edits_that_were_rolled_back_are_not_remembered(tiny_folder, tmp_path):
    replay = MemoryReplay(memory="both")
    fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[replay, Spy({0: 0.0, 1: 0.0, 2: 0.0})])
    assert replay.buffer.memories == []
    assert replay.past.moments == {}
    replay = MemoryReplay()
    fit(tmp_path, editor(tiny_folder), callbacks=[replay, Spy({1: 0.0})], name="second")
    assert [m.step for m in replay.buffer.memories] == [0, 0, 2, 2]


@pytest.mark.parametrize(("preserve", "passes"), [(0.0, 1), (0.5, 1), (0.0, 2)])
def test_cached_keys_change_only_rounding(tiny_folder, tmp_path, preserve, passes):
    totals = []
    # On the weights as they are, the search for values would make more of rounding.
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original")
    for cache in (False, True):
        module = editor(tiny_folder, layers=[1], preserve_prompt_tokens=preserve, passes=passes, values=values)
        fit(tmp_path, module, callbacks=[MemoryReplay(rate=10.0, cache_keys=cache)], name=str(cache))
        totals.append(module.layers[0].total)
    # float32 forward passes of different batches agree to about 1e-6.
    assert torch.allclose(*totals, rtol=1e-3, atol=1e-5 * float(totals[0].abs().max()))
    assert totals[0].norm() > 0.01


@pytest.mark.parametrize("passes", [1, 2])
def test_drift_without_a_forward_pass_is_the_measured_drift(tiny_folder, tmp_path, monkeypatch, passes):
    replay = MemoryReplay(rate=1.0, sampling="priority")
    module = editor(tiny_folder, layers=[1], passes=passes)
    fit(tmp_path, module, callbacks=[replay, Spy({1: 0.5})])  # also where a half of the update stays
    monkeypatch.setattr(type(module.solver), "read_keys", lambda *a: pytest.fail("a forward pass was run"))
    replay._weigh(module, 99)
    for memory in replay.buffer.memories:
        now = site_now(module, memory.fact)
        expected = float((memory.value - now).norm() / memory.value.norm())
        assert memory.importance == pytest.approx(expected, abs=1e-4)


def test_importance_with_several_layers_is_measured_every_so_often(tiny_folder, tmp_path):
    replay = MemoryReplay(rate=1.0, sampling="priority", refresh_every=2)
    module = editor(tiny_folder, layers=[1, 2])
    fit(tmp_path, module, callbacks=[replay])
    replay._weigh(module, 4)
    memory = replay.buffer.memories[0]
    now = site_now(module, memory.fact)
    assert memory.importance == pytest.approx(float((memory.value - now).norm() / memory.value.norm()), abs=1e-4)
    memory.importance = -1.0
    replay._weigh(module, 5)
    assert memory.importance == -1.0


def test_loss_is_minus_the_targets_log_probability(tiny_folder, tmp_path):
    replay = MemoryReplay(rate=0.5, sampling="loss", refresh_every=1)
    module = editor(tiny_folder, layers=[1])
    fit(tmp_path, module, callbacks=[replay])
    replay._weigh(module, 0)
    for memory in replay.buffer.memories:
        module.evaluation.begin("bystanders")
        assert module.evaluation.update("bystanders", module.lm, [memory.fact])
        logp = module.evaluation.scores("bystanders").edit.logp_new
        assert memory.importance == pytest.approx(-float(logp), abs=1e-4)


def test_weights_decay_with_age_and_values_may_be_recomputed(tiny_folder, tmp_path):
    spy = Spy()
    replay = MemoryReplay(rate=10.0, weight=8.0, age_decay=0.5, refresh="values")
    fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[replay, spy])
    assert [a.weight for a in spy.plans[2].additions] == [2.0, 2.0, 4.0, 4.0]  # 8 x 0.5 for each batch since
    old = spy.plans[0].targets.first[0]
    assert not torch.equal(spy.plans[2].additions[0].target, old)


def joint_by_hand(module, facts, targets):
    """The joint update of all facts on the unedited weights, by the closed form of the plain reference."""
    with module.unedited():
        keys = read_keys(module.lm, facts, 1, module.site, module.contexts, "bare")
    metric = Preservation.from_moments(module.c0, module.method.weight, module.method.ridge)
    residuals = targets.double().T - keys.current
    return solve(Constraints(keys.keys, residuals, torch.full((len(facts),), module.method.slack)), metric).delta


def test_past_keys_make_the_sequence_one_joint_batch(tiny_folder, tmp_path, monkeypatch):
    # Recursive least squares: with soft constraints, one layer and the same targets, batch after batch with all past
    # keys in the metric lands where one solve over all facts does.
    from editlab.edits import batch as module_under_test

    plain = module_under_test.second_moments
    seen = {}
    monkeypatch.setattr(module_under_test, "second_moments", lambda *a: dict(seen.setdefault("c0", plain(*a))))
    spy = Spy()
    module = editor(tiny_folder, layers=[1], method=MEMIT(covariance_weight=5.0))
    fit(tmp_path, module, callbacks=[MemoryReplay(memory="consolidated"), spy])
    module.c0 = seen["c0"][1]
    facts = [fact for plan in spy.plans for fact in plan.facts]
    joint = joint_by_hand(module, facts, torch.cat([plan.targets.first for plan in spy.plans]))
    gap = (module.layers[0].total - joint).norm() / joint.norm()
    assert gap < 1e-4  # float32 forward passes and sums
    # Without the memory, the same targets land elsewhere.
    other = editor(tiny_folder, layers=[1], method=MEMIT(covariance_weight=5.0))
    fit(tmp_path, other, name="plain")
    assert (other.layers[0].total - joint).norm() / joint.norm() > 100 * gap


def test_later_batches_complete_a_scaled_one(tiny_folder, tmp_path, monkeypatch):
    # Half of the first batch stays, while the memory preserves its outputs as if they were its values. Without
    # compensation it never gets further; with it the second batch ends at the joint solve of all four facts.
    from editlab.edits import batch as module_under_test

    plain = module_under_test.second_moments
    seen = {}
    monkeypatch.setattr(module_under_test, "second_moments", lambda *a: dict(seen.setdefault("c0", plain(*a))))
    values, gaps, reached = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original"), {}, {}
    for compensate in (False, True):
        spy = Spy({0: 0.5})
        settings = {"layers": [1], "method": MEMIT(covariance_weight=5.0), "values": values, "compensate": compensate}
        module = editor(tiny_folder, **settings)
        replay = MemoryReplay(memory="consolidated")
        fit(tmp_path, module, callbacks=[replay, spy], limit=4, name=f"compensate_{compensate}")
        module.c0 = seen["c0"][1]
        targets = torch.cat([plan.targets.first for plan in spy.plans])
        joint = joint_by_hand(module, FACTS[:4], targets)
        gaps[compensate] = float((module.layers[0].total - joint).norm() / joint.norm())
        with module.unedited():
            before = site_now(module, FACTS[0])
        wanted, got = targets[0] - before, site_now(module, FACTS[0]) - before
        reached[compensate] = float(got @ wanted / wanted.square().sum())
        assert module.carried.parts == {}  # the second batch is kept whole
    assert gaps[True] < 1e-4 < 0.1 < gaps[False]
    assert reached[False] < 0.7 * reached[True]


def test_a_changed_mind_takes_the_old_fact_out_of_the_memory(tiny_folder, tmp_path):
    # The last batch edits the first batch's facts anew, with other targets: the metric must not hold them back.
    again = [capital(f.subject, CITIES[0], "Lima", number=90 + i) for i, f in enumerate(FACTS[:2])]
    path = write_counterfact(tmp_path / "again.json", [*FACTS[:4], *again])
    replay, spy = MemoryReplay(memory="both", rate=10.0), Spy()
    module = editor(tiny_folder, layers=[1], method=MEMIT(covariance_weight=5.0))
    fit(tmp_path, module, callbacks=[replay, spy], path=path, keep_repeats=True)
    assert module.edited_facts == [*FACTS[2:4], *again]
    assert module.ledger.superseded == 2
    assert replay.buffer.replaced == 2
    assert [a.fact for a in spy.plans[2].additions] == FACTS[2:4]
    keys = read_keys(module.lm, module.edited_facts, 1, module.site, module.contexts, "bare").keys
    expected = replay.past.weight * keys @ keys.T
    assert torch.allclose(replay.past.moments[1], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def twice(tmp_path, *others):
    """Four facts, and the first two again with other targets."""
    again = [capital(f.subject, CITIES[0], "Lima", number=90 + i) for i, f in enumerate(FACTS[:2])]
    return write_counterfact(tmp_path / "again.json", [*FACTS[:4], *others, *again])


def past_of(module, facts, weights, replay):
    """The past keys' part of the metric by hand, from the keys of facts in the run's contexts."""
    read = read_keys(module.lm, facts, 1, module.site, module.contexts, module.solve_settings.key_mode)
    each = torch.tensor(weights, dtype=torch.float64)[read.fact]
    return replay.past.weight * (read.keys * each) @ read.keys.T


def test_a_fact_dropped_when_edited_again_is_preserved_as_before(tiny_folder, tmp_path):
    class LeaveOut(EditCallback):
        def on_edit_applied(self, trainer, editor, outcome):
            if outcome.plan.step == 2 and not outcome.dropped:
                outcome.drop([0], "so says the test")

    replay, module = MemoryReplay(memory="consolidated"), editor(tiny_folder, layers=[1], method=MEMIT(5.0))
    fit(tmp_path, module, callbacks=[replay, LeaveOut()], path=twice(tmp_path), keep_repeats=True)
    expected = past_of(module, FACTS[:4], [1.0] * 4, replay)  # the second's new edit has the key of its old one
    assert torch.allclose(replay.past.moments[1], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_past_fades_with_batches_that_were_kept(tiny_folder, tmp_path):
    # Batches 1 and 2 are rolled back; the first batch's keys have faded once when the fourth edits it anew: not at all.
    replay, module = MemoryReplay(memory="consolidated", forget=0.5), editor(tiny_folder, layers=[1], method=MEMIT(5.0))
    path = twice(tmp_path, *FACTS[4:6])
    fit(tmp_path, module, callbacks=[replay, Spy({1: 0.0, 2: 0.0})], path=path, keep_repeats=True, limit=8)
    expected = past_of(module, FACTS[:2], [1.0, 1.0], replay)
    assert torch.allclose(replay.past.moments[1], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_facts_edited_again_at_several_layers(tiny_folder, tmp_path):
    replay, module = MemoryReplay(memory="consolidated"), editor(tiny_folder, method=MEMIT(5.0))
    fit(tmp_path, module, callbacks=[replay], path=twice(tmp_path), keep_repeats=True)
    assert module.ledger.superseded == 2  # keys of the upper layer have moved since, and go as far as they can
    for past in replay.past.moments.values():
        values = torch.linalg.eigvalsh(past)
        assert float(values[0]) > -1e-9 * float(values[-1])


def test_memories_that_have_decayed_are_not_replayed(tiny_folder, tmp_path):
    spy = Spy()
    fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[MemoryReplay(rate=9.0, age_decay=1e-4), spy])
    replayed = [[a.fact.slot for a in plan.additions] for plan in spy.plans]
    assert replayed == [[fact.slot for fact in facts] for facts in ([], FACTS[:2], FACTS[2:4])]


def test_a_memory_counts_until_it_has_decayed_to_a_millionth():
    replay = MemoryReplay(weight=8.0, age_decay=0.1)
    memory = Memory(FACTS[0], torch.zeros(1, 2), torch.zeros(2), torch.zeros(2), step=0)
    assert [replay._weight(memory, step) for step in (0, 5)] == pytest.approx([8.0, 8e-5])
    assert replay._weight(memory, 7) == 0


def test_a_rate_that_rounds_to_no_fact_is_named(tiny_folder, tmp_path, caplog):
    import logging

    logging.getLogger("callbacks").propagate = True
    fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[MemoryReplay(rate=0.3)], batch_size=1, limit=2)
    assert "MemoryReplay.rate 0.3 of a batch of 1 rounds to no fact" in caplog.text
    assert "set it to 0.5 or more" in caplog.text


def test_the_size_of_the_memory_is_logged(tiny_folder, tmp_path, caplog):
    import logging

    logging.getLogger("callbacks").propagate = True
    with caplog.at_level(logging.INFO, logger="callbacks"):
        trainer = fit(tmp_path, editor(tiny_folder, layers=[1]), callbacks=[MemoryReplay(memory="both")])
    assert "Replay buffer: at most 200 edits" in caplog.text
    assert "Replay buffer: 6 of at most 200 edits" in caplog.text
    assert "Past keys" in caplog.text
    assert [row["replay/buffer"] for row in trainer.logger.rows.values()] == [2, 4, 6]
