"""The firm action: the search against exhaustive ones, the least firm update of a tiny model, budgets and resume."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from callbacks import MemoryReplay, TrustRollback
from callbacks.trust.budget import HEAD_START, PerplexityBudget
from callbacks.trust.firm import LEVELS, Finding, firmness, least_firm
from callbacks.trust.probes import measure_heldout
from callbacks.trust.score import Threshold, TrustMetrics, TrustScorer
from callbacks.trust.verdict import Judge
from editlab.callback import EditCallback
from editlab.edits.batch import BatchSolver
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.runs.event_log import EventLog
from editlab.solver.methods import EMMET, MEMIT
from editlab.values.optimize import ValueSettings
from editlab.values.spread import Targets
from tests import ranked
from tests.callbacks.trust.test_callback import TEXT, Spoil
from tests.facts import FACTS
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_search_finds_the_least_firm_level():
    # Levels up to ``loose`` do too much harm, and those above ``good`` learn too little; all such limits, all starts.
    longest = 0
    for start in range(LEVELS + 1):
        for loose in range(-1, LEVELS + 1):
            for good in range(loose, LEVELS + 1):
                asked = []

                def measure(level, loose=loose, good=good, asked=asked):
                    asked.append(level)
                    return Finding.TOO_LOOSE if level <= loose else Finding(-1) if level > good else Finding.GOOD

                expected = next((level for level in range(LEVELS + 1) if loose < level <= good), None)
                assert least_firm(start, measure) == expected
                assert len(set(asked)) == len(asked)
                longest = max(longest, len(asked))
    assert longest <= 8  # doubling, then halving


def test_a_search_that_starts_where_it_ends_measures_two_levels():
    asked = []
    assert least_firm(5, lambda level: asked.append(level) or Finding(int(level < 5))) == 5
    assert asked == [5, 4]
    assert least_firm(0, lambda level: asked.append(level) or Finding.GOOD) == 0
    assert asked[2:] == [0]


def test_firmness_doubles_from_level_to_level():
    assert [firmness(level) for level in (0, 1, LEVELS)] == [0.0, 1 / 64, 1024.0]


def test_the_room_of_a_perplexity_budget_by_hand():
    budget = PerplexityBudget(1.1)
    budget.edits, budget.unedited = 100, 3.0
    whole = math.log(1.1)
    # After 50 of 100 edits .1 + .9 / 2 of the budget may be used; .02 nats of it are.
    assert budget.room(3.02, 50) == pytest.approx(whole * (HEAD_START + 0.9 * 0.5) - 0.02)
    assert budget.room(3.0, 100) == budget.room(3.0, 130) == pytest.approx(whole)
    assert budget.room(2.9, 100) == pytest.approx(whole + 0.1)  # a model that has improved has more room
    assert budget.room(3.2, 100) == 0


@pytest.mark.parametrize("ratio", [1.0, 0.9, math.inf, math.nan])
def test_errors_of_a_perplexity_budget(ratio):
    with pytest.raises(UserError, match=r"perplexity_budget is .*: give the largest perplexity .* such as 1\.1"):
        TrustRollback(perplexity_budget=ratio)


# ---- a judge with probes whose harm is made up, on real solves of a tiny model ------------------------------------


class MadeUp:
    """Probes whose harm is the norm of what is applied to the lowest layer over ``unit``."""

    def __init__(self, unit=1.0, certainty=1.0):
        self.unit, self.certainty, self.latest, self.nll, self.measured = unit, certainty, None, 1.0, 0

    def measure_after(self, editor, outcome):
        self.measured += 1
        self.latest = outcome.plan.firmness
        harm = float(editor.layers[0].total.norm()) / self.unit
        return TrustMetrics(certainty=self.certainty, heldout_ppl_delta=math.expm1(harm))


def solved():
    """A solver of a tiny model, and a batch of three facts that it has solved on the original weights."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    solver = BatchSolver.at(lm, [1, 2], [""], SolveSettings(MEMIT(covariance_weight=2.0)))
    solver.set_moments({layer: torch.eye(48, dtype=torch.float64) for layer in (1, 2)})
    before = Snapshot(list(solver.layers.values()))
    targets = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    outcome = EditOutcome(EditPlan(0, FACTS[:3], Targets(FACTS[:3], {2: targets})))
    solver.solve(outcome)
    layers = list(solver.layers.values())
    return SimpleNamespace(solver=solver, layers=layers, layer_numbers=[1, 2], edits=0), outcome, before


def judge(before, level=0, room=math.inf, **settings):
    scorer = TrustScorer(calibrate=0, scales={"heldout_ppl_delta": [1e9, 1.0]})
    return Judge(scorer, Threshold(0.5), None, "batch", "firm", before=before, level=level, room=room, **settings)


def decide_firmly(start=0):
    """The norms at all levels, by solving at each, and what the judge finds in the room that level 6 just keeps."""
    world, outcome, before = solved()
    norms = []
    for level in range(LEVELS + 1):
        world.solver.solve_again(outcome, before, firmness(level))
        norms.append(float(world.layers[0].total.norm()))
    world.solver.solve_again(outcome, before, firmness(start))
    one = judge(before, start, room=norms[6])
    verdict = one.decide(MadeUp(), world, outcome)
    return norms, verdict, one.level, [layer.total for layer in world.layers], outcome


@pytest.mark.parametrize("start", [0, 6, LEVELS])
def test_the_judge_takes_the_least_firm_update_within_the_room(start):
    norms, verdict, level, totals, outcome = decide_firmly(start)
    assert all(norms[i] > norms[i + 1] for i in range(LEVELS))  # a firmer update is a shorter one
    assert (level, verdict.firmness, verdict.factor, verdict.decision) == (6, firmness(6), 1.0, "firm")
    assert verdict.harm == pytest.approx(norms[6])
    assert "nats that the perplexity budget leaves" in verdict.reason
    assert outcome.plan.firmness == firmness(6)
    assert float(totals[0].norm()) == norms[6]  # the update in the weights is the one that was measured
    assert all(torch.equal(total, outcome.updates[n]) for n, total in zip((1, 2), totals, strict=True))


def test_it_loosens_again_where_there_is_room():
    world, outcome, before = solved()
    plain = [layer.total.clone() for layer in world.layers]
    world.solver.solve_again(outcome, before, firmness(9))
    one = judge(before, level=9)
    verdict = one.decide(MadeUp(), world, outcome)
    assert (one.level, verdict.decision, verdict.reason) == (0, "keep", "")
    assert all(torch.equal(a.total, b) for a, b in zip(world.layers, plain, strict=True))


@pytest.mark.parametrize(("certainty", "room", "trials"), [(0.2, math.inf, 1), (1.0, 0.0, 6)])
def test_a_batch_that_no_firmness_helps_is_rolled_back(certainty, room, trials):
    # Of a batch that learns too little no firmer one is tried; one with no room at all is tried up to the firmest.
    world, outcome, before = solved()
    one, probes = judge(before, room=room), MadeUp(certainty=certainty)
    verdict = one.decide(probes, world, outcome)
    assert (verdict.factor, verdict.decision, one.level, probes.measured) == (0.0, "rollback", 0, trials)


def test_a_probe_that_fails_leaves_the_update_that_was_solved_first():
    world, outcome, before = solved()
    plain = [layer.total.clone() for layer in world.layers]
    probes = MadeUp()
    measure = probes.measure_after
    probes.measure_after = lambda *a: 1 / 0 if probes.measured else measure(*a)
    with pytest.raises(ZeroDivisionError):
        judge(before, room=0.0).decide(probes, world, outcome)
    assert all(torch.equal(a.total, b) for a, b in zip(world.layers, plain, strict=True))
    assert outcome.plan.firmness == 0


def _found_on_a_rank():
    _, verdict, level, totals, _ = decide_firmly()
    return verdict.firmness, level, totals


@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_two_ranks_find_what_one_process_finds(tmp_path):
    firm, level, totals = _found_on_a_rank()
    for other in ranked.together(2, tmp_path / "ranks", _found_on_a_rank):
        assert other[:2] == (firm, level)
        assert all(torch.equal(a, b) for a, b in zip(other[2], totals, strict=True))


# ---- in runs ------------------------------------------------------------------------------------------------------


class Watch(EditCallback):
    """Records what a memory has to hold: each batch's keys and the number that its firmness added to the slack."""

    priority = 60

    def __init__(self):
        self.batches = []

    def on_edit_settled(self, trainer, editor, outcome):
        count = len(outcome.plan.facts)
        self.batches.append({n: (k.keys[:, k.fact < count], outcome.firm_slack.get(n, 0.0), outcome.factor)
                             for n, k in outcome.keys.items()})  # fmt: skip


def run(tmp_path, tiny_folder, name, *others, **settings):
    path = tmp_path / "heldout.txt"
    path.write_text(TEXT)
    scales = {"edit_success_gain": [-1.0, 0.2], "neighbor_flip_rate": [1.0, 1.0], "heldout_ppl_delta": [9.0, 9.0],
              "update_norm": [90.0, 1.0], "confidence_shift": [1.0, 1.0]}  # fmt: skip
    gate = TrustRollback(heldout=str(path), scales=scales, calibrate=0, matmul="float32", action="firm",
                         perplexity_budget=1.002)  # fmt: skip
    replay = MemoryReplay(memory="both", rate=1.0)
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original")
    module = editor(tiny_folder, method=EMMET(gram_ridge=0.5), values=values)
    fit(tmp_path, module, callbacks=[gate, replay, Spoil(0), *others], name=name, **settings)
    return module, gate, replay


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_budget_is_kept_and_a_resumed_run_has_the_same_bits(tiny_folder, tmp_path):
    watch = Watch()
    whole, gate, replay = run(tmp_path, tiny_folder, "whole", watch)
    events = EventLog(tmp_path / "logs" / "whole" / "version_0" / "trust_events.jsonl").read()
    assert events[0]["decision"] == "firm"  # the spoilt batch is held back
    assert events[0]["firmness"] > 0
    harms = [math.log1p(event["signals"]["heldout_ppl_delta"]) for event in events]
    rooms = [event["room"] for event in events]
    assert all(harm <= room for event, harm, room in zip(events, harms, rooms, strict=True) if event["factor"] == 1)
    # Of 6 edits the first batch has 2, so its room is .1 + .9 / 3 of the budget.
    assert rooms[0] == pytest.approx(math.log(1.002) * (0.1 + 0.9 / 3))
    now = measure_heldout(whole.lm, gate.probes.sentences).nll
    with whole.unedited():
        unedited = measure_heldout(whole.lm, gate.probes.sentences).nll
    assert gate.perplexity.unedited == unedited
    assert math.exp(now - unedited) <= 1.002
    # The memory holds the keys of kept batches, each at the weight 1 / (slack + what its firmness added).
    for layer, past in replay.past.moments.items():
        kept = [batch[layer] for batch in watch.batches if batch[layer][2]]
        expected = sum(keys @ keys.T / (0.5 + slack) for keys, slack, _ in kept)
        assert torch.allclose(past, expected, rtol=1e-9, atol=1e-12)

    run(tmp_path, tiny_folder, "part", max_steps=1, save=True)
    rest, again, _ = run(tmp_path, tiny_folder, "rest", save=True, ckpt_path=next(tmp_path.rglob("last.ckpt")))
    assert again.judge.level == gate.judge.level
    assert all(torch.equal(a.total, b.total) for a, b in zip(whole.layers, rest.layers, strict=True))


def test_errors_of_a_budget_of_independent_batches(tiny_folder, tmp_path):
    module = editor(tiny_folder, restore_between_batches=True)
    with pytest.raises(UserError, match="perplexity_budget is for the edits of a sequence"):
        fit(tmp_path, module, callbacks=[TrustRollback(action="firm", perplexity_budget=1.1)])
