"""Tables by hand: rows of runs, intervals, gains paired by seed, and what becomes of rows whose runs are gone."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import run_all_baselines as baselines
import sweep
import tables


def test_intervals_by_hand():
    # 1, 2, 3: standard deviation 1, 4.303 / sqrt(3) = 2.484.
    assert tables.interval([1.0, 2.0, 3.0]) == (
        2.0,
        pytest.approx(2 - 2.4844, abs=1e-3),
        pytest.approx(4.4844, abs=1e-3),
    )
    for some, mean in (([5.0], 5.0), ([5.0, math.inf], math.inf)):
        found = tables.interval(some)
        assert found[0] == mean
        assert math.isnan(found[1])
        assert math.isnan(found[2])
    assert math.isnan(tables.interval([5.0, math.nan])[0])


def test_quantiles_of_t():
    # From tables of Student's t, to the three digits that they give.
    for freedom, quantile in (
        (1, 12.706),
        (9, 2.262),
        (10, 2.228),
        (12, 2.179),
        (20, 2.086),
        (30, 2.042),
        (120, 1.980),
    ):
        assert tables.t_975(freedom) == pytest.approx(quantile, abs=6e-4)


def test_a_case_has_the_measures_of_its_own_runs():
    rows = [{"case": case, "seed": 1, "retained_accuracy": 0.5} for case in ("a", "b")]
    rows[0]["perplexity_ratio"] = 1.25
    a, b = tables.means(rows, {}, "a")
    assert (a["perplexity_ratio"], a["perplexity_ratio_gain"]) == (1.25, 0.0)
    assert "perplexity_ratio" not in b
    assert b["accuracy_gain"] == 0.0


def test_what_several_rows_were_made_with_names_each_way_once():
    rows = [{"torch": "a"}, {"torch": "a | b"}, {"machine": "m"}, {"torch": "b | c", "recipe": ""}]
    assert tables.provenance_of_all(rows) == {"torch": "a | b | c", "machine": "m"}


def test_differences_are_paired_by_seed(tmp_path):
    runs = []
    for case, accuracies in (("none", {1: 0.5, 2: 0.9}), ("more", {1: 0.6, 2: 1.0, 3: 0.1})):
        for seed, accuracy in accuracies.items():
            folder = tmp_path / case / f"version_{seed}"
            folder.mkdir(parents=True)
            summary = {"edits": 8, "retained": {"accuracy": accuracy, "ES": 1.0, "NS": 0.7}, "before": {"NS": 0.8},
                       "immediate": {}, "perplexity": {"before": 20.0, "after": 22.0}}  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
            runs.append(sweep.Run(sweep.Case(case, {}), seed, folder))
    rows = tables.table_rows(runs)
    none, more = tables.means(rows, {}, "none")
    assert (more["accuracy_gain"], more["accuracy_gain_low"], more["accuracy_gain_high"]) == (0.1, 0.1, 0.1)
    assert (none["accuracy_gain"], none["accuracy"], more["seeds"]) == (0.0, 0.7, 3)
    # 12.706 (t at one degree of freedom) times the standard error, 0.2828 / 2 ** 0.5 = 0.2, either way
    assert (none["accuracy_low"], none["accuracy_high"]) == (pytest.approx(-1.8412), pytest.approx(3.2412))
    assert (more["NS"], more["perplexity_ratio"]) == (-0.1, 1.1)
    assert (more["NS_gain"], more["ES_gain"], more["perplexity_ratio_gain"]) == (0.0, 0.0, 0.0)
    _, more = tables.means(rows, {"more": "more"}, "none")
    assert (more["against"], more["accuracy_gain"]) == ("more", 0.0)


def test_snapshots_say_what_was_retained_and_how_large_the_update_had_grown(tmp_path):
    folder = tmp_path / "emmet" / "version_1"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "edits,retained/accuracy,perplexity/heldout,weights/layer_2/delta_norm,weights/layer_3/delta_norm,"
        "solve/layer_2/gram_condition,solve/layer_3/gram_condition,solve/layer_2/update_norm\n"
        "32,,,0.1,0.2,5,6,0.2\n"
        "200,0.75,40.25,0.3,0.25,70,12345.678,0.1\n"
        "300,0.5,41,0.3,0.25,70,80,0.05\n"
    )
    (folder / "summary.json").write_text(
        '{"edits": 280, "superseded": 30, "immediate": {}, "retained": {}}'
    )  # of 300, 20 were rolled back
    curve = {"class_path": "callbacks.ForgettingCurve", "init_args": {"sample": 100}}
    row, last = tables.snapshots([sweep.Run(sweep.Case("emmet", {}, [curve]), 1, folder)])
    assert (row["edits"], row["retained_accuracy"], row["perplexity_heldout"]) == (200, 0.75, 40.25)
    assert (row["delta_norm"], row["gram_condition"]) == (0.3, 12350.0)
    assert (row["largest_update"], last["largest_update"]) == (0.2, 0.05)  # since the point before
    # The last point is of all edits that stand, those before of the sample; 64 is ForgettingCurve's own.
    assert (row["measured"], last["measured"]) == (100, 250)
    assert (row["retained_accuracy_low"], row["retained_accuracy_high"]) == tuple(
        round(x, 4) for x in tables.wilson(0.75, 100)
    )
    plain = sweep.Run(sweep.Case("emmet", {}, [{"class_path": "ForgettingCurve"}]), 1, folder)
    assert [row["measured"] for row in tables.snapshots([plain])] == [64, 250]


def test_the_interval_of_a_share_by_hand():
    # Wilson's interval ends at the shares p that the observed one is 1.96 of their standard errors away from.
    for share, count in ((0.75, 100), (1.0, 128), (0.0, 8)):
        for p in tables.wilson(share, count):
            assert abs(share - p) == pytest.approx(1.95996 * (p * (1 - p) / count) ** 0.5, abs=1e-9)
    assert tables.wilson(1.0, 128)[0] < 1.0 == pytest.approx(tables.wilson(1.0, 128)[1])


def test_a_baseline_s_row_has_its_effective_weight_and_its_time(tmp_path):
    folder = tmp_path / "memit" / "version_1"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("edits,solve/layer_6/effective_weight\n32,300.0\n64,300.0\n")
    summary = {"edits": 64, "retained": {}, "immediate": {"ES": 1.0, "accuracy": 0.5}, "before": {"NS": 0.8},
               "perplexity": {"before": 20.0}, "delta_norm": {"6": 0.25}, "seconds": 96.0,
               "peak_memory_mb": 1500.4, "versions": {"torch": "2"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (row,) = tables.table_rows([sweep.Run(sweep.Case("memit", {}), 1, folder)], baselines.measured)
    assert (row["effective_weight"], row["seconds_an_edit"], row["peak_memory_mb"]) == (300.0, 1.5, 1500)
    assert (row["immediate_ES"], row["before_NS"], row["perplexity_before"]) == (1.0, 0.8, 20.0)
    assert "perplexity_ratio" not in row
    broken = summary | {
        "immediate": {"ES": None},
        "perplexity": {"before": 20.0, "after": None},
        "delta_norm": {"6": None},
    }
    (folder / "summary.json").write_text(json.dumps(broken))
    (row,) = tables.table_rows([sweep.Run(sweep.Case("memit", {}), 1, folder)], baselines.measured)
    assert (row["perplexity_before"], row["delta_norm"]) == (20.0, "")
    assert {"perplexity_after", "perplexity_ratio", "immediate_ES"}.isdisjoint(row)


def test_rows_whose_runs_are_gone_stay_and_those_made_anew_take_their_place(tmp_path):
    path = tmp_path / "results" / "table.csv"
    made = {"recipe": "a.yaml", "torch": "2"}
    first = [{"case": case, "seed": seed, "retained_ES": 0.5, **made} for case in ("b", "gone") for seed in (1, 2)]
    tables.update_table(path, first, ["gone", "b"])
    again = {"case": "b", "seed": 2, "retained_ES": 0.75, "rank": 8, **made}
    before = {"case": "a", "seed": 1, "retained_ES": 1.0, **made}
    found = tables.update_table(path, [again, before], ["a", "b"])  # no case is called "gone" any more
    assert [(row["case"], int(row["seed"]), float(row["retained_ES"])) for row in found] == [
        ("a", 1, 1.0), ("b", 1, 0.5), ("b", 2, 0.75),
    ]  # fmt: skip
    assert [row["case"] for row in tables.read_rows(path)] == ["a", "b", "b"]
    assert tables.read_rows(path)[2] == {k: str(v) for k, v in again.items()}
    assert path.read_text().splitlines()[0] == "case,seed,retained_ES,rank,recipe,torch"


def test_what_no_run_has_measured_is_left_out_of_the_means():
    rows = [{"case": "a", "seed": seed, "retained_accuracy": 0.5, "retained_ES": 1.0} for seed in (1, 2)]
    (found,) = tables.means(rows, {}, "a")
    assert {name for name in found if not name.endswith(("_gain", "_low", "_high"))} == {
        "case", "seeds", "accuracy", "ES", "against",
    }  # fmt: skip


def test_the_curves_need_no_runs(tmp_path):
    rows = [
        {"case": "a", "seed": str(seed), "edits": str(n), "retained_accuracy": str(n / 10 + seed / 100)}
        for seed in (1, 3)
        for n in (2, 4)
    ]
    shown = {"a": ("A", "#000000", "-"), "b": ("B", "#000000", ":")}
    figure = tables.curves_figure(rows, [shown, {"b": ("B", "#000000", ":")}])
    assert len(figure.axes) == 4  # the second row has nothing to draw, so there is one
    lines = [line for ax in figure.axes for line in ax.get_lines()]
    # Only the accuracy is there; its mean over the seeds is n / 10 + 0.02.
    (line,) = lines
    assert list(line.get_xdata()) == [2, 4]
    assert list(line.get_ydata()) == [pytest.approx(0.22), pytest.approx(0.42)]
    assert line.get_label() == "A"
    assert tables.curves_figure(rows, [{"b": ("B", "#000000", ":")}]) is None
