"""Main effects: an additive truth is found exactly, and one factor of two levels is the t-test of textbooks."""

import math

import pytest
from scipy import stats

from editlab.experiments.effects import main_effects
from tests.experiments.made_up import run

EFFECTS = {"memory": {"none": 0.0, "all": 0.2}, "layers": {"6": 0.0, "2 to 6": 0.1, "4 to 6": -0.05}}
SEEDS = {1: 0.0, 2: 0.03, 3: -0.01}


def runs_of(tmp_path, accuracy, designs=None):
    every = [(memory, layers) for memory in EFFECTS["memory"] for layers in EFFECTS["layers"]]
    found = []
    for memory, layers in designs or every:
        for seed in SEEDS:
            value = accuracy(memory, layers, seed)
            metrics = {"retained/ES": value, "retained/accuracy": value, "retained/paraphrase_accuracy": value,
                       "before/NS": 0.8, "retained/NS": 0.8 - value / 10, "before/perplexity": 30.0,
                       "retained/perplexity": 30.0 * math.exp(value)}  # fmt: skip
            labels = {"memory": memory, "layers": layers, "always": "same"}
            found.append(run(tmp_path, f"{memory}_{layers}", seed, metrics, labels=labels))
    return found


def additive(memory, layers, seed):
    return 0.5 + EFFECTS["memory"][memory] + EFFECTS["layers"][layers] + SEEDS[seed]


def effects(rows, measure):
    return {(row["factor"], row["level"]): row for row in rows if row["measure"] == measure}


def test_additive_effects_are_found_and_a_label_that_never_differs_is_no_factor(tmp_path):
    rows = main_effects(runs_of(tmp_path, additive))
    found = effects(rows, "retained/accuracy")
    assert {key: row["effect"] for key, row in found.items()} == {
        ("memory", "all"): pytest.approx(0.2, abs=2e-4),
        ("layers", "2 to 6"): pytest.approx(0.1, abs=2e-4),
        ("layers", "4 to 6"): pytest.approx(-0.05, abs=2e-4),
    }
    assert all(row["effect_low"] <= row["effect"] <= row["effect_high"] for row in rows)
    assert found["memory", "all"]["against"] == "none"
    # NS falls by a tenth of it, and the logarithm of the perplexity ratio is it.
    assert effects(rows, "NS_change")["memory", "all"]["effect"] == pytest.approx(-0.02, abs=2e-4)
    assert effects(rows, "log_perplexity_ratio")["memory", "all"]["effect"] == pytest.approx(0.2, abs=2e-4)


def test_a_fraction_of_the_combinations_is_enough(tmp_path):
    some = [("none", "6"), ("all", "2 to 6"), ("all", "4 to 6"), ("none", "2 to 6")]
    found = effects(main_effects(runs_of(tmp_path, additive, some)), "retained/accuracy")
    assert found["memory", "all"]["effect"] == pytest.approx(0.2, abs=2e-4)


def test_one_factor_without_blocks_is_the_two_sample_t_test(tmp_path):
    left, right = [0.50, 0.52, 0.57], [0.61, 0.60, 0.66]
    found = [
        run(tmp_path, name, 1, {"retained/ES": v, "retained/accuracy": v, "retained/paraphrase_accuracy": v,
                                "before/NS": 0.8, "retained/NS": 0.8, "before/perplexity": 30.0,
                                "retained/perplexity": 30.0}, labels={"memory": level})
        for level, values in (("none", left), ("all", right)) for name, v in ((f"{level}{v}", v) for v in values)
    ]  # fmt: skip
    row = effects(main_effects(found), "retained/accuracy")["memory", "all"]
    test = stats.ttest_ind(right, left)
    assert row["effect"] == pytest.approx(sum(right) / 3 - sum(left) / 3, abs=1e-4)
    assert (row["effect_low"], row["effect_high"]) == pytest.approx(tuple(test.confidence_interval()), abs=1e-4)
    assert row["p_holm"] == pytest.approx(test.pvalue, rel=0.05)


def test_too_few_runs_have_no_effects(tmp_path, caplog):
    caplog.set_level("INFO")
    assert main_effects(runs_of(tmp_path, additive, [("none", "6"), ("all", "2 to 6")])) == []
    assert "need more finished runs than these 6" in caplog.text
    assert main_effects([]) == []


def test_a_measure_that_never_differs_has_no_effects(tmp_path):
    rows = main_effects(runs_of(tmp_path, lambda memory, layers, seed: 0.5))
    assert {(row["effect"], row["p_holm"]) for row in rows} == {(0.0, 1.0)}


def test_a_measure_that_a_run_lacks_is_left_out_by_name(tmp_path, caplog):
    runs = runs_of(tmp_path, additive)
    path = runs[0].folder / "summary.json"
    path.write_text(path.read_text().replace('"retained/perplexity"', '"retained/other"'))
    measures = {row["measure"] for row in main_effects(runs)}
    assert measures == {"retained/ES", "retained/accuracy", "retained/paraphrase_accuracy", "NS_change"}
    assert "no main effects on log_perplexity_ratio" in caplog.text
