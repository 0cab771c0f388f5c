"""One batch: with dropped facts it equals the batch without them, and a rollback restores every bit."""

import hashlib
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from callbacks import MemoryReplay
from editlab.callback import EditCallback
from editlab.edits.batch import BatchSolver
from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.edits.solve_settings import SolveSettings
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET
from editlab.values.optimize import ValueSettings
from editlab.values.spread import Targets
from tests.facts import FACTS, capital, write_counterfact
from tests.test_editor import Spy, editor, fit, site_now
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(("layers", "passes", "reads"), [([2], 1, 0), ([1, 2], 1, 1), ([1, 2], 2, 3)])
def test_a_batch_solved_again_is_that_of_a_plan_with_this_firmness(monkeypatch, layers, passes, reads):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    targets = Targets(FACTS[:3], {max(layers): values})

    def solver():
        found = BatchSolver.at(lm, layers, [""], SolveSettings(EMMET(gram_ridge=0.5), passes=passes))
        found.set_moments({layer: torch.eye(48, dtype=torch.float64) for layer in layers})
        return found

    def bits(found, outcome):
        totals = [layer.total.clone() for layer in found.layers.values()]
        assert all(torch.equal(outcome.updates[n], t) for n, t in zip(layers, totals, strict=True)) or passes > 1
        return totals

    expected = {}
    for firmness in (0.0, 0.5):
        fresh = solver()
        outcome = EditOutcome(EditPlan(0, FACTS[:3], targets, firmness=firmness))
        fresh.solve(outcome)
        expected[firmness] = bits(fresh, outcome)
        for layer in fresh.layers.values():
            layer.restore(torch.zeros_like(layer.total))
    again = solver()
    before, outcome = Snapshot(list(again.layers.values())), EditOutcome(EditPlan(0, FACTS[:3], targets))
    again.solve(outcome)
    calls, plain = [], again.read_keys
    monkeypatch.setattr(again, "read_keys", lambda *a: calls.append(1) or plain(*a))
    for firmness in (0.5, 0.0):
        again.solve_again(outcome, before, firmness)
        assert all(map(torch.equal, bits(again, outcome), expected[firmness]))
        assert (outcome.firm_slack.keys() == set(layers)) == (firmness > 0)
    assert len(calls) == 2 * reads  # the keys of the lowest layer in the first pass are not read again


class Verdict(EditCallback):
    """Makes a request about one batch."""

    def __init__(self, step, ask):
        self.step, self.ask, self.outcome = step, ask, None

    def on_edit_applied(self, trainer, editor, outcome):
        if outcome.plan.step == self.step:
            self.ask(outcome)

    def on_edit_settled(self, trainer, editor, outcome):
        if outcome.plan.step == self.step:
            self.outcome = outcome


@pytest.mark.parametrize(("layers", "passes"), [([1], 1), ([1, 2], 1), ([1, 2], 2)])
def test_without_a_fact_the_batch_is_the_one_never_given_it(tiny_folder, tmp_path, layers, passes):
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original")
    whole = editor(tiny_folder, layers=layers, values=values, passes=passes)
    cut = Verdict(0, lambda outcome: outcome.drop({1}, "no gain"))
    fit(tmp_path, whole, callbacks=[cut, MemoryReplay()], limit=3, batch_size=3)
    alone = editor(tiny_folder, layers=layers, values=values, passes=passes)
    path = write_counterfact(tmp_path / "two.json", [FACTS[0], FACTS[2]])
    fit(tmp_path, alone, limit=2, batch_size=2, path=path, name="alone")
    for layer, other in zip(whole.layers, alone.layers, strict=True):
        # Values are found in groups, whose padding rounds differently: 1e-5 of the update's size.
        assert torch.allclose(layer.total, other.total, rtol=1e-4, atol=1e-5 * float(other.total.abs().max()))
    assert [entry.factor for entry in whole.ledger] == [1, 0, 1]
    assert whole.edited_facts == [FACTS[0], FACTS[2]]
    assert cut.outcome.plan.facts == [FACTS[0], FACTS[2]]
    assert set(cut.outcome.updates) == set(layers)


def test_the_remaining_facts_may_be_scaled(tiny_folder, tmp_path):
    def ask(outcome):
        outcome.drop({0}, "no gain")
        outcome.scale(0.5, "harm")

    half = Verdict(0, ask)
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[half], limit=2)
    for number, layer in zip(module.layer_numbers, module.layers, strict=True):
        assert torch.equal(layer.total, 0.5 * half.outcome.updates[number])
    assert [entry.factor for entry in module.ledger] == [0, 0.5]


@pytest.mark.parametrize("passes", [1, 2])
def test_residual_norms_are_those_before_the_first_pass(tiny_folder, tmp_path, passes):
    # By hand: values less what a whole forward of the unedited model gives; a replayed fact is not among them.
    module, noted = editor(tiny_folder, passes=passes), Verdict(0, lambda outcome: None)

    class Add(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            plan.add([Addition(FACTS[5], plan.targets.first[0])])

    fit(tmp_path, module, callbacks=[noted, Add()], limit=2)
    with module.unedited():
        now = torch.stack([site_now(module, fact) for fact in FACTS[:2]])
    expected = (noted.outcome.plan.targets.first - now).norm(dim=1)
    assert torch.allclose(noted.outcome.residual_norm.float(), expected, rtol=1e-4)


def digest(module, replay):
    """A hash of everything that a step may change."""
    state = {
        "weights": [p.detach().numpy().tobytes() for p in module.lm.model.parameters()],
        "totals": [layer.total.numpy().tobytes() for layer in module.layers],
        "metric": [p.factor.numpy().tobytes() for p in module.solver.preservation.values()],
        "past": {n: m.numpy().tobytes() for n, m in replay.past.moments.items()},
        "buffer": [
            (m.fact, m.value.numpy().tobytes(), m.key.numpy().tobytes(), m.step, m.replayed, m.importance)
            for m in replay.buffer.memories
        ],
        "counters": (replay.buffer.seen, replay.buffer.replaced, module.ledger.kept, module.ledger.superseded),
        "draws": replay.buffer.state_dict()["generator"].numpy().tobytes(),
        "rng": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
    }
    return {name: hashlib.sha256(pickle.dumps(part)).hexdigest() for name, part in state.items()}


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_a_batch_undone_leaves_nothing_behind(tiny_folder, tmp_path, layers):
    # The third batch replays, finds values anew, and edits a fact anew, so that it touches all that a step can.
    repeated = [*FACTS[:4], replace(FACTS[0], target_new="Lima"), FACTS[5], FACTS[6], FACTS[7]]
    replay = MemoryReplay(rate=1.0, sampling="priority", memory="both", refresh="values", refresh_every=1)
    seen = {}

    class Watch(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            if plan.step == 2:
                random.random(), np.random.rand(), torch.rand(1)  # a callback that draws is undone with the rest

        def on_edit_applied(self, trainer, editor, outcome):
            if outcome.plan.step == 2:
                seen["touched"] = digest(module, replay)
                outcome.roll_back("harm")

    class Edges(EditCallback):
        priority = 100  # after MemoryReplay

        def on_edit_settled(self, trainer, editor, outcome):
            if outcome.plan.step in (1, 2):
                seen[outcome.plan.step] = digest(module, replay)

    module = editor(tiny_folder, layers=layers)
    path = write_counterfact(tmp_path / "repeated.json", repeated)
    callbacks = [Watch(), replay, Edges()]
    fit(tmp_path, module, callbacks=callbacks, limit=8, path=path, keep_repeats=True)
    assert seen[2] == seen[1]
    untouched = {name for name, part in seen["touched"].items() if part == seen[1][name]}
    assert untouched == {"counters"}  # the others had changed, so they were restored indeed
    assert module.ledger.kept == 6


TWICE = [FACTS[1], capital("France", "Paris", "Tokyo"), FACTS[2], capital("France", "Paris", "Lima"), *FACTS[3:5]]


def test_of_one_batchs_edits_of_a_fact_the_last_alone_goes_into_the_weights(tiny_folder, tmp_path):
    # As if the earlier one had not been given; but it counts, and the batches are cut as they were.
    modules, replays = {}, {}
    for name, facts, size in (("twice", TWICE, 4), ("once", [TWICE[0], *TWICE[2:4]], 3)):
        path = write_counterfact(tmp_path / f"{name}.json", facts)
        modules[name], replays[name], spy = editor(tiny_folder), MemoryReplay(memory="both"), Spy()
        fit(tmp_path, modules[name], callbacks=[replays[name], spy], path=path, keep_repeats=True, batch_size=size,
            max_steps=1, name=name)  # fmt: skip
        assert [fact.target_new for fact in spy.plans[0].facts] == ["Oslo", "Lima", "Lima"]
    assert all(torch.equal(a.total, b.total) for a, b in zip(*(m.layers for m in modules.values()), strict=True))
    for layer, past in replays["once"].past.moments.items():  # entered once, and so released as a whole
        assert torch.equal(past, replays["twice"].past.moments[layer])
    twice = modules["twice"]
    assert twice.ledger.fates == ["kept", "superseded by edit 4", "kept", "kept"]
    assert (twice.edits, twice.ledger.superseded) == (4, 1)
    assert twice.edited_facts == modules["once"].edited_facts
    assert set(twice.evaluation.series("immediate")) == {4}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_of_repeats_is_gone_on_with(tiny_folder, tmp_path):
    path = write_counterfact(tmp_path / "twice.json", TWICE)
    whole, part, rest = (editor(tiny_folder) for _ in range(3))
    settings = {"path": path, "keep_repeats": True, "batch_size": 4}
    fit(tmp_path, whole, **settings)
    fit(tmp_path, part, **settings, name="part", max_steps=1, save=True)
    fit(tmp_path, rest, **settings, name="rest", save=True, ckpt_path=next(tmp_path.rglob("last.ckpt")))
    assert [(e.fact, e.batch) for e in rest.ledger] == list(zip(TWICE, [0, 0, 0, 0, 1, 1], strict=True))
    assert all(torch.equal(a.total, b.total) for a, b in zip(whole.layers, rest.layers, strict=True))


def test_repeated_facts_of_a_batch_share_the_fate_of_the_last(tiny_folder, tmp_path):
    class LeaveOut(EditCallback):
        def on_edit_applied(self, trainer, editor, outcome):
            if not outcome.dropped:
                outcome.drop([2], "so says the test")  # the third of three: Lima

    path = write_counterfact(tmp_path / "twice.json", TWICE[:4])
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[LeaveOut()], path=path, keep_repeats=True, batch_size=4)
    assert module.ledger.fates == ["kept", "rolled back", "kept", "rolled back"]
