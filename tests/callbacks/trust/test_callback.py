"""The gate in real runs of a tiny model: its decisions, the weights after them, and its events."""

import json
import math
import sys

import pytest
import torch

from callbacks import MemoryReplay, TrustRollback
from callbacks.trust.callback import EVENTS
from callbacks.trust.probes import Probes
from callbacks.trust.score import TrustMetrics
from editlab.callback import EditCallback
from editlab.distributed import ranks
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.errors import EditLabError, UserError
from editlab.values.optimize import ValueSettings
from editlab.values.spread import Targets
from tests import ranked
from tests.facts import FACTS, write_counterfact
from tests.test_editor import Spy, editor, fit

TEXT = "The capital of France is Paris. The capital of Japan is Tokyo. Oslo lies in Norway. " * 20


@pytest.fixture
def heldout(tmp_path):
    path = tmp_path / "heldout.txt"
    path.write_text(TEXT)
    return str(path)


class Spoil(EditCallback):
    """Replaces the targets of one batch (or of one fact in it) by long vectors in random directions."""

    def __init__(self, step, place=slice(None)):
        self.step, self.place = step, place

    def on_edit_planned(self, trainer, editor, plan):
        if plan.step == self.step:
            plan.targets = plan.targets.changed(self.spoilt)

    def spoilt(self, values):
        noise, values = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)), values.clone()
        values[self.place] = 60 * noise[self.place]
        return values


def run(tmp_path, tiny_folder, heldout, *others, name="run", layers=(1, 2), **settings):
    """Makes a run with a gate that measures the text; returns its module, its gate and its events."""
    # In a random model targets hardly become likelier, and updates are as large as weights, so the scales are wide.
    scales = {"edit_success_gain": [-1.0, 0.2], "neighbor_flip_rate": [1.0, 1.0], "heldout_ppl_delta": [0.3, 0.3],
              "update_norm": [5.0, 1.0]}  # fmt: skip
    gate = TrustRollback(**{"heldout": heldout, "scales": scales, "calibrate": 0, "budget": None,
                            "matmul": "float32", **settings})  # fmt: skip
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original")
    module = editor(tiny_folder, layers=list(layers), values=values)
    fit(tmp_path, module, callbacks=[gate, *others], name=name)
    path = tmp_path / "logs" / name / "version_0" / EVENTS
    return module, gate, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_a_spoilt_batch_is_rolled_back_and_other_batches_stay(tiny_folder, tmp_path, heldout, layers):
    spy = Spy()
    module, gate, events = run(tmp_path, tiny_folder, heldout, Spoil(1), spy, layers=layers)
    assert [e["decision"] for e in events] == ["keep", "rollback", "keep"]
    assert [entry.factor for entry in module.ledger] == [1, 1, 0, 0, 1, 1]
    assert events[1]["score"] < events[1]["threshold"] == 0.5 <= min(events[0]["score"], events[2]["score"])
    assert "under 0.50" in events[1]["reason"]
    assert [(e["step"], e["edits"], e["kind"]) for e in events] == [(0, 2, "batch"), (1, 4, "batch"), (2, 6, "batch")]
    # What is in the weights is the sum of the kept batches' updates.
    for number, layer in zip(layers, module.layers, strict=True):
        kept = [spy.outcomes[i].updates[number] for i in (0, 2)]
        assert torch.equal(layer.total, kept[0] + kept[1])
    rows = (tmp_path / "logs" / "run" / "version_0" / "metrics.csv").read_text()
    assert "trust/score" in rows.splitlines()[0]
    assert "seconds" not in rows.splitlines()[0]
    assert gate.decisions == {"keep": 2, "rollback": 1}


def test_a_gate_that_keeps_all_changes_nothing(tiny_folder, tmp_path, heldout):
    watched, _, events = run(tmp_path, tiny_folder, heldout, threshold=0.0, attribution=True)
    plain, _, none = run(tmp_path, tiny_folder, heldout, name="plain", enable=False)
    assert len(events) == 3
    assert none == []
    assert all(torch.equal(a.total, b.total) for a, b in zip(watched.layers, plain.layers, strict=True))
    assert events[0]["signals"]["attribution_focus_delta"] != 0
    assert plain.evaluation.compute("immediate") == watched.evaluation.compute("immediate")


def test_a_low_score_may_scale(tiny_folder, tmp_path, heldout):
    # Half of a score's way from threshold / 2 to the threshold is half of the update.
    _, _, events = run(tmp_path, tiny_folder, heldout, threshold=0.0)
    score = events[1]["score"]
    assert 0 < score < 1
    spy = Spy()
    module, gate, events = run(
        tmp_path, tiny_folder, heldout, spy, name="scaled", threshold=min(1.0, score / 0.75), action="scale"
    )
    first = next(e for e in events if e["decision"] == "scale")
    expected = 2 * first["score"] / first["threshold"] - 1
    assert first["factor"] == pytest.approx(expected)
    assert module.ledger.kept > 0
    assert gate.decisions["scale"] >= 1


@pytest.mark.parametrize(("bearable", "expected"), [(0.9, 0.5), (0.3, 0.25), (0.13, 0.125), (0.1, 0.0)])
def test_a_search_takes_the_largest_fraction_that_scores_high_enough(
    tiny_folder, tmp_path, heldout, monkeypatch, bearable, expected
):
    # The probe tells which share of the update is applied; above ``bearable`` the score falls from 1 to 0.
    before = []

    class Watch(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            before[:] = [editor.layers[0].total.clone()]

    def measure_after(self, editor, outcome):
        applied = (editor.layers[0].total - before[0]).norm() / outcome.updates[editor.layer_numbers[0]].norm()
        return TrustMetrics(certainty=1.0, heldout_ppl_delta=float(applied))

    monkeypatch.setattr(Probes, "measure_after", measure_after)
    scales = {"heldout_ppl_delta": [bearable, 1e-3]}
    module, _, events = run(tmp_path, tiny_folder, heldout, Watch(), action="search", scales=scales)
    assert [event["factor"] for event in events] == [expected] * 3
    assert [entry.factor for entry in module.ledger] == [expected] * 6
    assert {event["decision"] for event in events} == {"scale" if expected else "rollback"}


def test_a_search_spends_the_harm_that_stays(tiny_folder, tmp_path, heldout, monkeypatch):
    # Harm falls as the square of the share: a half of the update does a quarter of it.
    before = []

    class Watch(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            before[:] = [editor.layers[0].total.clone()]

    def measure_after(self, editor, outcome):
        share = (editor.layers[0].total - before[0]).norm() / outcome.updates[editor.layer_numbers[0]].norm()
        return TrustMetrics(certainty=1.0, heldout_ppl_delta=float((0.4 * share.square()).expm1()))

    monkeypatch.setattr(Probes, "measure_after", measure_after)
    scales = {"heldout_ppl_delta": [0.2, 1e-3]}
    _, _, events = run(tmp_path, tiny_folder, heldout, Watch(), action="search", scales=scales, budget=[1e-9, 9.0])
    assert [event["factor"] for event in events] == [0.5] * 3
    assert [event["budget_queue"] for event in events] == pytest.approx([0.1, 0.2, 0.3], rel=1e-3)


def test_a_model_that_a_batch_leaves_without_an_answer_is_rolled_back(tiny_folder, tmp_path, heldout):
    class Break(EditCallback):
        def on_edit_applied(self, trainer, editor, outcome):
            if outcome.plan.step == 1:
                editor.layers[0].add(torch.full_like(editor.layers[0].total, float("inf")))

    module, _, events = run(tmp_path, tiny_folder, heldout, Break(), layers=[1], threshold=0.0)
    assert [event["decision"] for event in events] == ["keep", "rollback", "keep"]
    assert events[1]["reason"] == "the model's log-probabilities are not finite after the batch"
    assert bool(torch.isfinite(module.layers[0].weight).all())


def test_a_spoilt_fact_is_left_out_and_its_batch_solved_again(tiny_folder, tmp_path, heldout):
    spy, replay = Spy(), MemoryReplay(rate=1.0)
    module, _, events = run(tmp_path, tiny_folder, heldout, Spoil(1, 0), spy, replay, granularity="edit")
    facts = [e for e in events if e["kind"] == "fact" and e["step"] == 1]
    assert [e["decision"] for e in facts] == ["drop", "keep"]
    assert facts[0]["fact"] == {"subject": FACTS[2].subject, "prompt": FACTS[2].prompt, "target_new": "Lima"}
    batch = next(e for e in events if e["kind"] == "batch" and e["step"] == 1)
    assert (batch["dropped"], batch["factor"]) == ([0], 1.0)
    assert [entry.factor for entry in module.ledger] == [1, 1, 0, 1, 1, 1]
    kept = [fact.slot for fact in [*FACTS[:2], *FACTS[3:6]]]
    assert [fact.slot for outcome in spy.outcomes for fact in outcome.plan.facts] == kept
    assert [m.fact.slot for m in replay.buffer.memories] == kept


def test_a_batch_of_which_every_fact_is_low_is_rolled_back(tiny_folder, tmp_path, heldout):
    module, _, events = run(
        tmp_path, tiny_folder, heldout, granularity="edit", threshold=1.0, scales={"edit_success_gain": [90.0, 1.0]}
    )
    assert module.ledger.kept == 0
    assert all(float(layer.total.abs().max()) == 0 for layer in module.layers)
    assert {e["decision"] for e in events if e["kind"] == "batch"} == {"rollback"}


def test_a_batch_that_cannot_be_measured_is_kept_and_reported(tiny_folder, tmp_path, heldout, monkeypatch, caplog):
    from callbacks.trust import probes

    plain, calls = probes.measure_heldout, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return plain(*arguments)

    monkeypatch.setattr(probes, "measure_heldout", fails)
    module, _, events = run(tmp_path, tiny_folder, heldout, threshold=0.0)
    assert [(e["decision"], e["score"] is None) for e in events] == [("keep", True), ("keep", False), ("keep", False)]
    assert events[0]["reason"] == "not measured: RuntimeError: out of memory"
    assert events[0]["signals"] is None
    assert module.ledger.kept == 6
    assert "could not measure" in caplog.text


def test_an_error_that_ends_the_run_is_not_treated_as_a_failed_probe(tiny_folder, tmp_path, heldout, monkeypatch):
    from callbacks.trust import probes

    def lost(*arguments):
        raise EditLabError("The ranks made different calls.")

    monkeypatch.setattr(probes, "measure_heldout", lost)
    with pytest.raises(EditLabError, match="made different calls"):
        run(tmp_path, tiny_folder, heldout)


class Asked:
    """Probes that judge a batch to be bad, or fail on one rank."""

    def __init__(self, fails, shared):
        self.fails, self.shared, self.forgot = fails, shared, False

    def measure_before(self, editor, facts):
        pass

    def measure_after(self, editor, outcome):
        def work(mine):
            if ranks.number() == self.fails:
                raise MemoryError("none is left")
            return mine

        ranks.each([[0], [1]], work) if self.shared else work([])
        return TrustMetrics(heldout_ppl_delta=1e9)

    def clear(self):
        self.forgot = True


def judged(fails, shared=False):
    gate = TrustRollback(threshold=1.0)
    gate.probes = Asked(fails, shared)
    plan = EditPlan(0, FACTS[:2], Targets(FACTS[:2], {1: torch.zeros(2, 3)}))
    outcome = EditOutcome(plan, {}, {})
    gate.on_edit_planned(None, None, plan)
    gate.on_edit_applied(None, None, outcome)
    return outcome.factor, gate._error, gate.probes.forgot


@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_all_ranks_keep_a_batch_that_one_rank_cannot_measure(tmp_path):
    assert ranked.together(2, tmp_path / "none", judged, -1) == [(0.0, None, False)] * 2
    for fails in (0, 1):
        found = ranked.together(2, tmp_path / str(fails), judged, fails)
        assert found == [(1.0, "MemoryError: none is left", True)] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_a_failure_in_work_that_was_dealt_out_ends_all_ranks(tmp_path):
    errors = ranked.together(2, tmp_path / "ranks", judged, 1, True)
    assert [type(error) for error in errors] == [EditLabError, MemoryError]
    assert str(errors[0]) == "Rank 1 failed with MemoryError: none is left"


def test_a_batch_with_signals_that_are_not_finite_is_kept_and_reported(tiny_folder, tmp_path, heldout, monkeypatch):
    from callbacks.trust import probes

    monkeypatch.setattr(probes, "flip_rate", lambda before, after: float("nan"))
    module, _, events = run(tmp_path, tiny_folder, heldout)
    assert [e["reason"] for e in events] == ["not measured: ValueError: neighbor_flip_rate is nan"] * 3
    assert module.ledger.kept == 6


def test_an_update_that_is_not_finite_never_stays(tiny_folder, tmp_path, heldout):
    class Break(EditCallback):
        def on_edit_applied(self, trainer, editor, outcome):
            if outcome.plan.step == 1:
                outcome.updates[1][0, 0] = float("nan")
                editor.layers[0].add(outcome.updates[1])

    module, _, events = run(tmp_path, tiny_folder, heldout, Break(), layers=[1], threshold=0.0)
    assert [e["decision"] for e in events] == ["keep", "rollback", "keep"]
    assert events[1]["reason"] == "the update is not finite"
    assert bool(torch.isfinite(module.layers[0].total).all())


def test_harm_that_adds_up_trips_the_budget(tiny_folder, tmp_path, heldout):
    # No batch scores low, but the first one spends more than the limit, and each later one that harms is refused.
    _, _, events = run(tmp_path, tiny_folder, heldout, Spoil(0), threshold=0.0, budget=[1e-6, 1e-3])
    harms = [torch.log1p(torch.tensor(e["signals"]["heldout_ppl_delta"])).item() for e in events]
    assert harms[0] > 1e-3
    for event, harm in zip(events[1:], harms[1:], strict=True):
        assert event["decision"] == ("rollback" if harm > 1e-6 else "keep")
    assert events[0]["budget_queue"] == pytest.approx(harms[0] - 1e-6, rel=1e-4)


def test_another_callback_that_scales_lower_spends_that_fraction_of_the_harm(
    tiny_folder, tmp_path, heldout, monkeypatch
):
    # Trust keeps every batch, whose harm is 0.4 nats; a quarter of each stays, and a quarter of its harm is spent.
    metrics = TrustMetrics(certainty=1.0, heldout_ppl_delta=math.expm1(0.4))
    monkeypatch.setattr(Probes, "measure_after", lambda *_: metrics)
    quarter = Spy({0: 0.25, 1: 0.25, 2: 0.25})
    scales = {"heldout_ppl_delta": [9.0, 1.0]}
    module, _, events = run(tmp_path, tiny_folder, heldout, quarter, scales=scales, budget=[1e-9, 9.0])
    assert [(event["decision"], event["factor"]) for event in events] == [("keep", 0.25)] * 3
    assert [event["budget_queue"] for event in events] == pytest.approx([0.1, 0.2, 0.3], rel=1e-6)
    assert [entry.factor for entry in module.ledger] == [0.25] * 6


def test_the_recorded_threshold_is_the_one_that_was_applied(tiny_folder, tmp_path, heldout):
    _, _, events = run(tmp_path, tiny_folder, heldout, threshold=0.9, quantile=0.0, window=5)
    scores = [e["score"] for e in events]
    # The lowest of the scores before, once there are two of them.
    assert [e["threshold"] for e in events] == [0.9, 0.9, min(0.9, *scores[:2])]
    assert [e["decision"] == "keep" for e in events] == [e["score"] >= e["threshold"] for e in events]


def test_facts_of_the_file_are_the_held_out_sentences_without_a_text(tiny_folder, tmp_path):
    gate = TrustRollback(heldout_samples=4, threshold=0.0)
    module = editor(tiny_folder)
    path = write_counterfact(tmp_path / "many.json", FACTS)

    class Few(EditCallback):
        def on_fit_start(self, trainer, pl_module):
            trainer.datamodule.bystanders = 5

    fit(tmp_path, module, callbacks=[gate, Few()], path=path)
    others = [fact for fact in reversed(FACTS) if fact.subject not in {f.subject for f in module.edited_facts}]
    tokenizer = module.lm.tokenizer
    expected = [tokenizer(f"{f.question} {f.target_true}")["input_ids"] for f in others[5:9]]
    assert [list(s.ids) for s in gate.probes.sentences] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "token"}, "granularity is 'token': it must be one of batch, edit"),
        ({"action": "pray"}, "action is 'pray'"),
        ({"matmul": "int4"}, "matmul is 'int4'"),
        ({"heldout_samples": 0}, "heldout_samples is 0"),
        ({"neighbor_samples": 0}, "neighbor_samples is 0"),
        ({"budget": [1.0]}, "give .allowance, limit., or null"),
        ({"threshold": 2.0}, "threshold is 2.0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        TrustRollback(**arguments)


def test_facts_of_one_gradient_are_not_dropped_one_by_one(tiny_folder, tmp_path, heldout):
    module = editor(tiny_folder, layers=[1], values=ValueSettings(source="gradient", lr=0.1))
    with pytest.raises(UserError, match="already changed the targets of the others: set granularity to batch"):
        fit(tmp_path, module, callbacks=[TrustRollback(heldout=heldout, granularity="edit")])


def test_nothing_to_hold_out(tiny_folder, tmp_path):
    # All six are edited; then two are edited, and the other four are bystanders.
    path = write_counterfact(tmp_path / "six.json", FACTS[:6])
    for name, limit in (("all", 6), ("bystanders", 2)):
        with pytest.raises(UserError, match=r"name a text file .*, lower data\.limit or data\.bystanders"):
            fit(tmp_path, editor(tiny_folder), callbacks=[TrustRollback()], path=path, limit=limit, name=name)
