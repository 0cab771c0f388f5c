"""The trust experiment's parts: faults as described, forks that do not change the run, labels and areas by hand."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks import TrustRollback
from callbacks.trust import labels as trust_labels
from callbacks.trust import tables as trust_tables
from callbacks.trust.fork import ForkLabels
from editlab.data.fact import Neighbor
from editlab.edits.plan import EditPlan
from editlab.errors import UserError
from editlab.experiments.csv_files import read_rows
from editlab.experiments.drawing import draw_all
from editlab.experiments.faults import GRADED, KINDS, InjectFaults, about_last_word, inject, one_token_off
from editlab.experiments.plan import finished as finished_runs
from editlab.experiments.plan import planned
from editlab.experiments.spec import load_experiment
from editlab.experiments.writing import Results
from editlab.lm.language_model import LanguageModel
from editlab.runs.event_log import EventLog
from editlab.values.spread import Targets
from tests.experiments.made_up import finish, options
from tests.facts import FACTS, write_counterfact
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer


def plan():
    values = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [5.0, 12.0]])
    return EditPlan(2, FACTS[:4], Targets(FACTS[:4], {1: values}))


def test_faults_by_hand():
    plain = plan().targets.first
    noise, norm, shuffle, twice, key = (plan() for _ in KINDS)
    for each, kind in zip((noise, norm, shuffle, twice, key), KINDS, strict=True):
        inject(each, kind, seed=1)
    assert torch.allclose((noise.targets.first - plain).norm(dim=1), plain.norm(dim=1))  # noise as long as the value
    longer = norm.targets.first.norm(dim=1) / plain.norm(dim=1)
    assert bool(((longer >= 10) & (longer <= 50)).all())
    assert torch.equal(shuffle.targets.first, plain[[3, 0, 1, 2]])
    assert [f.slot for f in twice.facts] == [f.slot for f in [*FACTS[:2], *FACTS[:2]]]
    assert [f.target_new for f in twice.facts] == [f.target_new for f in FACTS[:4]]
    assert [f.question for f in key.facts] == [f.question for f in FACTS[:4]]
    assert {f.subject for f in key.facts} == {"is"}
    assert about_last_word(FACTS[7]).subject_span == (len(FACTS[7].question) - 2, len(FACTS[7].question))
    with pytest.raises(ValueError, match="not a kind of fault"):
        inject(plan(), "typo", 0)


def test_graded_faults_by_hand():
    plain, lm = plan().targets.first, LanguageModel(tiny_model("llama"), tiny_tokenizer())
    for kind in GRADED[:5]:
        noisy = plan()
        inject(noisy, kind, seed=1)
        fraction = (noisy.targets.first - plain).norm(dim=1) / plain.norm(dim=1)
        assert fraction.tolist() == pytest.approx([float(kind[-3:])] * 4)
    wrong, twice, span = plan(), plan(), plan()
    for each, kind in ((wrong, "wrong_fact"), (twice, "duplicate"), (span, "wrong_span")):
        inject(each, kind, seed=1, lm=lm)
    (moved,) = [i for i in range(4) if not torch.equal(wrong.targets.first[i], plain[i])]
    assert any(torch.equal(wrong.targets.first[moved], plain[i]) for i in range(4) if i != moved)
    # The second edit of a fact has another fact's target and stands where that fact stood, so its value is that one's.
    assert len({fact.slot for fact in twice.facts}) == 3
    assert [fact.target_new for fact in twice.facts] == [fact.target_new for fact in FACTS[:4]]
    assert torch.equal(twice.targets.first, plain)
    assert [fact.question for fact in span.facts] == [fact.question for fact in FACTS[:4]]
    # "France" is one token, so its key is read one token late; "Fr|ance and Norway" ends one token early.
    assert span.facts[0].subject == "France is"
    assert one_token_off(lm, FACTS[7]).subject == "France and"
    alone = replace(FACTS[0], subject="is", prompt="{}")
    assert one_token_off(lm, alone) == alone  # its question has no other token


def test_errors_of_faults():
    with pytest.raises(UserError, match="kinds has 'typo': the kinds are noise, norm"):
        InjectFaults(kinds=["noise", "typo"])
    with pytest.raises(ValueError, match="not a kind of fault"):
        inject(plan(), "wrong_span", 0)  # it needs the model


def run(tmp_path, tiny_folder, name, *callbacks, text=None):
    module = editor(tiny_folder)
    near = (Neighbor("Danielle Darrieux speaks", "Paris"), Neighbor("Marie Curie speaks", "Paris"))
    rich = [replace(f, neighbors=near) for f in FACTS]
    path = write_counterfact(tmp_path / "many.json", rich)

    class Few(InjectFaults):
        def on_fit_start(self, trainer, pl_module):
            trainer.datamodule.bystanders = 2

    faults = Few(share=0.5, seed=3, every_n_batches=2)
    fit(tmp_path, module, callbacks=[faults, *callbacks], limit=8, path=path, name=name)
    return module, tmp_path / "logs" / name / "version_0"


def test_forks_measure_both_branches_and_leave_the_run_alone(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. Oslo lies in Norway. " * 20)
    gate = {"heldout": str(text), "threshold": 0.0, "budget": None, "matmul": "float32"}
    plain, _ = run(tmp_path, tiny_folder, "plain", TrustRollback(**gate))
    fork = ForkLabels(str(text), tokens=64, past=4, neighbors=2, later=1, later_every=1, matmul="float32")
    watched, folder = run(tmp_path, tiny_folder, "forked", TrustRollback(**gate), fork)
    assert all(torch.equal(a.total, b.total) for a, b in zip(plain.layers, watched.layers, strict=True))
    events = EventLog(folder / "fork.jsonl").read()
    assert [(e["step"], e["later"]) for e in events] == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (3, 0), (2, 1)]
    now = {e["step"]: e for e in events if e["later"] == 0}
    # All batches stay, so what a batch is accepted into is what the next one is held against.
    for step in range(3):
        assert now[step]["accept"]["nll"] == pytest.approx(now[step + 1]["reject"]["nll"], rel=1e-5)
    # One batch later, the accepting branch is the run itself.
    later = {e["step"]: e for e in events if e["later"] == 1}
    assert later[0]["accept"]["nll"] == pytest.approx(now[1]["accept"]["nll"], rel=1e-4)
    assert now[3]["accept"]["past_asked"] == 4
    found = json.loads((folder / "faults.json").read_text())
    assert len(found["faults"]) == 2
    assert sorted(map(int, found["curve"])) == [4, 8]
    batches = trust_labels.read_batches(folder)
    assert [b.fault for b in batches] == [found["faults"].get(str(step)) for step in range(4)]
    assert batches[0].suspicion["trust"] == pytest.approx(
        1 - EventLog(folder / "trust_events.jsonl").read()[0]["score"]
    )


def event(step, accept, reject):
    names = ("own", "past", "past_asked", "NS", "nll", "own_asked")
    accept, reject = (*accept, 10), (*reject, 10)
    return {
        "step": step,
        "edited": 10 * step,
        "accept": dict(zip(names, accept, strict=True)),
        "reject": dict(zip(names, reject, strict=True)),
    }


def test_losses_by_hand():
    # 40 facts were edited before batch 4; of 20 asked for 2 are lost, which stands for 4; 3 of its own 10 are won.
    found = trust_labels.losses(event(4, (3, 16, 20, 0.75, 3.2), (0, 18, 20, 0.80, 3.0)))
    assert found == {"facts": pytest.approx((4 - 3) / 50), "NS": pytest.approx(0.05), "nll": pytest.approx(0.2)}
    # A branch that gives no number any more has lost all.
    broken = trust_labels.losses(event(0, (0, 0, 0, None, None), (0, 0, 0, 0.8, 3.0)))
    assert broken == {"facts": 0, "NS": pytest.approx(0.8), "nll": pytest.approx(97.0)}


def batch(facts, ns=0.0, nll=0.0):
    return trust_labels.Batch("run", 0, {}, None, {0: {"facts": facts, "NS": ns, "nll": nll}})


def test_tau_and_bad_by_hand():
    # Each tau is the largest loss among the ordinary ones; as much as that is not bad yet.
    ordinary = [batch(-0.02, ns=0.03), batch(0.01, nll=0.005), batch(-0.9)]
    tau = trust_labels.taus(ordinary, 0)
    assert tau == {"facts": 0.01, "NS": 0.03, "nll": 0.005}
    assert not any(trust_labels.is_bad(b, tau, 0) for b in ordinary)
    assert trust_labels.is_bad(batch(0.02), tau, 0)
    assert trust_labels.is_bad(batch(-0.9, ns=0.1), tau, 0)
    assert trust_labels.is_bad(batch(-0.9, nll=0.01), tau, 0)


def test_rates_and_areas_by_hand():
    suspicion, bad = [0.9, 0.8, 0.7, 0.2, 0.1], [True, False, True, False, False]
    found = trust_labels.rates(suspicion, bad, 0.75)
    # Rejected: the first two, of which one is bad; one bad is missed, one of three good ones is lost.
    assert found["false_positive_rate"] == pytest.approx(1 / 3)
    assert found["false_negative_rate"] == 0.5
    assert found["balanced_accuracy"] == pytest.approx(1 - (1 / 3 + 0.5) / 2)
    assert (found["rollback_rate"], found["precision"], found["recall"]) == (0.4, 0.5, 0.5)
    areas = trust_labels.areas(3 * suspicion, 3 * bad, resamples=50)  # equal ones change no area
    # Of the six pairs of a bad and a good one, five are the right way round; precision is 1 at the first, 2/3 at the
    # second bad one.
    assert areas["ROC_AUC"] == pytest.approx(5 / 6)
    assert areas["PR_AUC"] == pytest.approx((1 + 2 / 3) / 2)
    assert areas["base_rate"] == pytest.approx(0.4)
    assert areas["ROC_AUC_low"] <= areas["ROC_AUC"] <= areas["ROC_AUC_high"]
    many = trust_labels.areas(20 * suspicion, 20 * bad, resamples=20)
    assert (areas["ROC_AUC_interval"], many["ROC_AUC_interval"]) == ("exact", "bootstrap")
    assert many["ROC_AUC_high"] - many["ROC_AUC_low"] < areas["ROC_AUC_high"] - areas["ROC_AUC_low"]
    never = trust_labels.rates([0.0] * 5, bad, 1.0)
    assert (never["rollback_rate"], never["balanced_accuracy"]) == (0, 0.5)


def test_few_bad_batches_have_an_exact_interval_and_no_fork_later_no_label():
    found = trust_labels.areas([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [True, False, False, False, False, False])
    assert found["ROC_AUC"] == 1.0
    # One bad batch above five good ones: as one hit of one, whose exact interval is from 2.5%.
    assert (found["ROC_AUC_low"], found["ROC_AUC_high"]) == (pytest.approx(0.025), 1.0)
    assert found["ROC_AUC_interval"] == "exact"
    assert "PR_AUC_low" not in found
    ordinary = [trust_labels.Batch("a", 0, {}, None, {0: dict.fromkeys(trust_labels.LOSSES, 0.5)})]
    assert set(trust_labels.taus(ordinary, 1).values()) == {math.inf}


def test_the_points_of_a_curve_have_its_area():
    suspicion, bad = [0.9, 0.8, 0.7, 0.2, 0.1], [True, False, True, False, False]
    batches = [trust_labels.Batch("run", i, dict.fromkeys(trust_labels.GATES, s), None, {})
               for i, s in enumerate(suspicion)]  # fmt: skip
    rows = [r for r in trust_tables.points_of_labels({"injected": (batches, bad)}) if r["gate"] == "trust"]
    assert rows[0] == {"labels": "injected", "gate": "trust", "false_positive_rate": 0, "recall": 0, "precision": 0}
    assert (rows[-1]["false_positive_rate"], rows[-1]["recall"], rows[-1]["precision"]) == (1, 1, 0.4)
    area = sum((b["false_positive_rate"] - a["false_positive_rate"]) * (a["recall"] + b["recall"]) / 2
               for a, b in pairwise(rows))  # fmt: skip
    assert area == pytest.approx(trust_labels.areas(suspicion, bad, resamples=5)["ROC_AUC"], abs=1e-3)
    # Kinds of labels that are not drawn have no points.
    assert trust_tables.points_of_labels({"beyond capacity, fork": (batches, bad)}) == []


def test_the_table_gives_baselines_as_many_rejections():
    batches = [
        trust_labels.Batch("run", i, {**dict.fromkeys(trust_labels.GATES, 0.0), "trust": t, "norm only": n}, None, {})
        for i, (t, n) in enumerate([(0.9, 1.0), (0.1, 9.0), (0.2, 2.0), (0.05, 3.0)])
    ]
    rows = trust_tables.rates_of_labels({"injected": (batches, [True, False, False, False])})
    at = {row["gate"]: row for row in rows if row.get("threshold") == 0.4}
    assert at["trust"]["balanced_accuracy"] == 1  # only the first is under .4
    assert at["norm only"]["rollback_rate"] == 0.25  # the longest one, which is the wrong one
    assert at["norm only"]["recall"] == 0
    assert math.isclose(next(row for row in rows if row["gate"] == "always accept")["balanced_accuracy"], 0.5)


def test_the_paired_difference_of_two_gates_by_hand():
    # Gate a ranks the bad batches first, gate b last, so PR-AUC is 1 and what ranking them last gives; in both runs the
    # same, so every draw shows a difference.
    bad = [True] * 3 + [False] * 3
    scores = [0.9, 0.8, 0.7, 0.3, 0.2, 0.1]
    batches = [trust_labels.Batch(run, i, {"a": s, "b": -s, "c": s}, None, {})
               for run in ("one", "two") for i, s in enumerate(scores)]  # fmt: skip
    found = trust_labels.paired_difference(batches, bad * 2, "a", "b", resamples=200)
    # Under b the bad ones come last, each twice: 2 of 8, 4 of 10 and 6 of 12.
    assert found.difference == pytest.approx(1 - (2 / 8 + 4 / 10 + 6 / 12) / 3, abs=1e-6)
    assert 0 < found.low < found.difference < found.high
    assert found.p == pytest.approx(2 / 201)
    same = trust_labels.paired_difference(batches, bad * 2, "a", "c", resamples=20)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert trust_labels.paired_difference(batches[:6], bad, "a", "b") is None  # too few bad ones


def test_labelled_batches_by_hand(tmp_path):
    finished(tmp_path / "v", {"1": "noise"})
    case = SimpleNamespace(name="faulty_gate")
    run = SimpleNamespace(folder=tmp_path / "v", case=case, seed=3, recipe="r", summary={})
    rows = trust_tables.labelled_batches([run])
    # Only the batch with a fault loses neighbors, .6 of them; the others lose nothing, which is the limit.
    assert [(row["step"], row["fault"], row["bad"], row["loss_NS"]) for row in rows] == [
        (0, "", 0, 0.0), (1, "noise", 1, 0.6), (2, "", 0, 0.0), (3, "", 0, 0.0)
    ]  # fmt: skip
    assert rows[2]["update_norm"] == 0.2


def finished(folder, faults):
    """A made-up run of four batches with the gate: those with faults score low and lose much."""
    finish(folder, {"before/perplexity": 20.0}, edits=4, seconds=60.0)
    found = {"faults": faults, "kept": [0, 2, 3], "batches": 4, "good": {"accuracy": 0.5, "ES": 0.75},
             "curve": {"4": {"accuracy": 0.5, "perplexity": 22.0}}}  # fmt: skip
    (folder / "faults.json").write_text(json.dumps(found))
    gate, forks = [], []
    for step in range(4):
        bad = str(step) in faults
        gate.append({"kind": "batch", "step": step, "score": 0.1 if bad else 0.9, "seconds": 1.5,
                     "signals": {"update_norm": 0.1 * step, "heldout_ppl_delta": 0.0}})  # fmt: skip
        reject = {"own": 0, "past": 5, "past_asked": 10, "NS": 0.8, "nll": 3.0, "own_asked": 10}
        forks.append({"step": step, "later": 0, "edited": 10 * step, "reject": reject,
                      "accept": {**reject, "NS": 0.2 if bad else 0.8}})  # fmt: skip
        forks.append({**forks[-1], "later": 3})
    for name, events in (("trust_events.jsonl", gate), ("fork.jsonl", forks)):
        (folder / name).write_text("".join(json.dumps(event) + "\n" for event in events))


def test_tables_and_figures_of_finished_runs(tmp_path):
    experiment = load_experiment(Path(__file__).parents[3] / "configs" / "experiments" / "trust_eval.yaml")
    finished(tmp_path / "runs" / "faulty_gate" / "version_1", {"1": "noise"})
    finished(tmp_path / "runs" / "clean_gate" / "version_1", {})
    results = tmp_path / "out" / "results"

    def write(**values):
        given = options(tmp_path, seeds=[1], **values)
        runs = [run for run in planned(experiment, given) if run.summary is not None]
        every = finished_runs(experiment, given)
        Results(experiment, given, runs, every).write()
        draw_all(experiment, given.out, every)
        return {name: read_rows(results / f"{name}.csv") for name in ("trust_eval", "trust_roc", "trust_effect")}

    tables = write()
    for rows in tables.values():
        assert {(row["recipe"], row["torch"]) for row in rows} == {("configs/memit_trust.yaml", "2")}
    faulty = tables["trust_effect"][0]
    # Of the three batches without a fault none was rejected; 22 over 20 is a rise of a tenth; four batches took 6 s.
    assert (faulty["good_batches_rejected"], faulty["faulty_batches_kept"]) == ("0.0", "0")
    assert (faulty["mean_perplexity_rise"], faulty["gate_seconds"], faulty["good/ES"]) == ("0.1", "6.0", "0.75")
    # A call for one case alone keeps what the other runs' folders, and the table, have.
    assert write(only=["faulty_gate"]) == tables
    whole = {(r["labels"], r["gate"]): r["ROC_AUC"] for r in tables["trust_eval"] if r["gate"] != "always accept"}
    assert whole["injected", "trust"] == whole["fork", "trust"] == "1.0"
    assert {(row["labels"], row["gate"]) for row in tables["trust_roc"]} == {
        (kind, gate) for kind in ("injected", "fork") for gate in trust_labels.GATES
    }
    assert len(EventLog(results / "trust_events.jsonl").read()) == 4
    figures = {path.name for path in (tmp_path / "out" / "figs").iterdir()}
    assert figures == {f"{name}.{kind}" for name in ("trust_roc", "rollback_effect_curve") for kind in ("png", "pdf")}
