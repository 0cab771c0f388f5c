"""Turning points of made-up curves, by hand."""

from editlab.experiments import turning


def curve(*points):
    return [
        {"case": "a", "seed": "1", "edits": str(200 * i), "retained/ES": str(es), "retained/accuracy": str(accuracy),
         "retained/perplexity": str(perplexity), "delta_norm": str(i), "gram_condition": "10", "largest_update": update,
         "measured": "128", "torch": "2"}
        for i, (es, accuracy, perplexity, update) in enumerate(points, 1)
    ]  # fmt: skip


def test_a_curve_that_breaks():
    # The unedited perplexity is 20: 30 is 1.5 times it, 400 twenty times. Falls between snapshots: 20, 70 points.
    rows = curve((1.0, 0.95, 22, "0.5"), (0.9, 0.75, 30, "0.6"), (0.3, 0.05, 400, "3.0"))
    (row,) = turning.turns(rows, [{"case": "a", "seed": 1, "before/perplexity": "20"}])
    assert {name: row[name] for name in turning.MARKS} == {
        "accuracy_under_80": 400, "accuracy_under_50": 600, "ES_under_50": 600,
        "perplexity_over_1.4": 400, "perplexity_over_2": 600, "perplexity_over_10": 600,
    }  # fmt: skip
    assert (row["steepest_fall"], row["median_fall"], row["fall_at"]) == (70.0, 45.0, 600)
    # Rises: 22/20, 30/22, 400/30.
    assert (row["steepest_rise"], row["median_rise"], row["rise_at"]) == (13.333, 1.364, 600)
    for what in ("fall", "rise"):
        assert row[f"{what}_edits_a_key_dimension"] == 0.39  # 600 / 1536
        assert row[f"{what}_update_over_median"] == 5.0  # 3.0 / 0.6
        assert (row[f"{what}_delta_norm"], row[f"{what}_gram_condition"]) == ("3", "10")
    assert row["torch"] == "2"


def test_edits_and_language_may_break_at_different_numbers_of_edits():
    rows = curve((1.0, 0.9, 21, "0.3"), (1.0, 0.4, 22, "0.9"), (1.0, 0.38, 80, "0.3"), (0.9, 0.36, 90, "0.3"))
    (row,) = turning.turns(rows, [{"case": "a", "seed": 1, "before/perplexity": "20"}])
    assert (row["fall_at"], row["fall_update_over_median"]) == (400, 3.0)
    assert (row["rise_at"], row["rise_update_over_median"]) == (600, 1.0)


def test_edits_that_never_took_and_another_sample_are_no_fall():
    # 40 of 100 do not take; 5 points are lost on the way; the last snapshot asks for all edits, and not for a sample.
    rows = curve((1.0, 0.6, 20, "0.3"), (1.0, 0.55, 20, "0.3"), (1.0, 0.3, 20, "0.3"))
    rows[-1]["measured"] = "600"
    (row,) = turning.turns(rows, [{"case": "a", "seed": 1, "before/perplexity": "20"}])
    assert (row["steepest_fall"], row["median_fall"], row["fall_at"]) == (5.0, 5.0, 400)
    (row,) = turning.turns(rows[1:], [{"case": "a", "seed": 1, "before/perplexity": "20"}])
    assert "steepest_fall" not in row
    assert row["rise_at"] == 400


def test_an_unmeasured_column_is_past_no_mark():
    rows = curve((1.0, 0.9, 21, "0.3"), (1.0, 0.4, 22, "0.9"))
    for row in rows:
        del row["retained/ES"], row["retained/perplexity"]
    for runs in ([{"case": "a", "seed": 1}], []):
        (row,) = turning.turns(rows, runs)
        assert (row["accuracy_under_50"], row["ES_under_50"], row["perplexity_over_1.4"]) == (400, "", "")
        assert row["fall_at"] == 400
        assert "rise_at" not in row


def test_a_curve_that_holds_passes_no_mark():
    rows = curve((1.0, 0.97, 20.5, "0.5"), (1.0, 0.93, 21, "0.5"))
    (row,) = turning.turns(rows, [{"case": "a", "seed": "1", "before/perplexity": 20.0}])
    assert not any(row[name] for name in turning.MARKS)
    assert (row["steepest_fall"], row["fall_at"]) == (4.0, 400)
    assert (row["steepest_rise"], row["rise_at"]) == (1.025, 200)  # 20.5 / 20, above 21 / 20.5


def test_a_run_without_snapshots_on_the_way_has_no_turn():
    rows = curve((1.0, 0.9, 22, ""))
    assert turning.turns(rows, [{"case": "a", "seed": 1, "before/perplexity": "20"}]) == []
