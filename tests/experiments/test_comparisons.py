"""Comparisons of cases by the outcomes of their edits, from made-up runs."""

import pytest

from editlab.errors import UserError
from editlab.experiments.comparisons import differences, values_of_runs, with_comparison
from editlab.experiments.csv_files import read_rows
from editlab.experiments.plan import finished, planned
from editlab.experiments.spec import CompareSpec, load_experiment
from editlab.experiments.statistics import holm, paired_bootstrap
from editlab.experiments.writing import Results
from tests.experiments.made_up import SCORES, finish, options, outcomes, run

FACTS = [f"s{i}" for i in range(40)]


def held(count, total=40):
    """The first ``count`` facts are held."""
    return {subject: i < count for i, subject in enumerate(FACTS[:total])}


def test_values_are_read_from_the_outcomes(tmp_path):
    runs = [run(tmp_path, case, seed) for case in ("a", "b") for seed in (1, 2)]
    outcomes(runs[0].folder, {"x": True, "y": None, "z": False})
    outcomes(runs[3].folder, held(1, 2), group="immediate")
    found = values_of_runs(runs, "accuracy", "retained")
    assert {key[1]: value for key, value in found["a"][1].items()} == {"x": 1.0, "z": 0.0}  # y is not in the weights
    assert list(found) == ["a"]
    assert list(found["a"]) == [1]
    assert list(values_of_runs(runs, "accuracy", "immediate")) == ["b"]
    assert values_of_runs(runs, "NS", "retained") == {}


def test_the_p_values_of_a_table_are_one_family():
    values = {
        case: {seed: {i: float(i < count) for i in range(40)} for seed in (1, 2)}
        for case, count in (("base", 20), ("better", 32), ("alike", 20), ("worse", 17))
    }
    found = differences(values, "base", ["base", "better", "alike", "worse", "absent"])
    assert list(found) == ["better", "alike", "worse"]
    alone = [paired_bootstrap(values[case], values["base"]) for case in found]
    assert [difference for difference, _ in found.values()] == alone
    assert [p for _, p in found.values()] == holm([one.p for one in alone])
    assert [one.difference for one in alone] == pytest.approx([0.3, 0.0, -0.075])
    assert found["alike"][1] == 1.0


def test_columns_of_a_comparison(tmp_path, caplog):
    runs = {case: run(tmp_path, case, 1) for case in ("base", "better", "alike", "old")}
    for case, count in (("base", 20), ("better", 32), ("alike", 20)):
        outcomes(runs[case].folder, held(count))
    rows = [{"case": case, "seeds": seeds} for case, seeds in [*((name, 1) for name in runs), ("not run", 0)]]
    base, better, alike, old, absent = with_comparison(rows, list(runs.values()), CompareSpec("base"))
    assert base == {"case": "base", "seeds": 1}
    assert better["retained/accuracy_difference"] == 0.3
    assert 0 < better["retained/accuracy_difference_low"] < 0.3 < better["retained/accuracy_difference_high"]
    assert better["retained/accuracy_p_holm"] < 0.05
    assert [row["retained/accuracy_survives"] for row in (better, alike)] == ["yes", "no"]
    assert (better["compared_with"], better["compared_seeds"], better["compared_facts"]) == ("base", 1, 40)
    assert old == {"case": "old", "seeds": 1}
    assert absent == {"case": "not run", "seeds": 0}
    assert "old cannot be compared with base by accuracy" in caplog.text


TABLES = "tables: [{file: each.csv, rows: runs}, {file: means.csv, rows: means, against: a, compare: %s}]\n"


def load(folder, compare):
    (folder / "recipe.yaml").write_text("")
    (folder / "my.yaml").write_text("recipe: recipe.yaml\ncases: {a: {}, b: {}}\n" + TABLES % compare)
    return load_experiment(folder / "my.yaml")


def test_a_table_of_means_marks_what_survives(tmp_path):
    experiment, given = load(tmp_path, "{baseline: a}"), options(tmp_path, seeds=[1, 2])
    for case, count in (("a", 10), ("b", 30)):
        for seed in (1, 2):
            outcomes(finish(given.work / case / f"version_{seed}", SCORES), held(count))
    runs = planned(experiment, given)
    Results(experiment, given, runs, finished(experiment, given)).write()
    a, b = read_rows(given.out / "results" / "means.csv")
    assert (b["retained/accuracy_difference"], b["retained/accuracy_survives"]) == ("0.5", "yes")
    assert (b["compared_seeds"], b["compared_facts"], b["revision"]) == ("2", "80", "abc1234")
    assert "compared_with" not in a


@pytest.mark.parametrize(("compare", "message"), [
    ("{baseline: c}", r"the comparison of the table means\.csv names the case 'c': there are a, b"),
    ("{baseline: a, metric: perplexity}", r"means\.csv compares 'perplexity': it must be one of ES, accuracy"),
    ("{baseline: a, group: later}", "group must be one of before, immediate, retained"),
    ("{metric: accuracy}", "compare lacks the key 'baseline'"),
])  # fmt: skip
def test_wrong_comparisons_are_one_sentence(tmp_path, compare, message):
    with pytest.raises(UserError, match=message):
        planned(load(tmp_path, compare), options(tmp_path))


def test_only_means_are_compared(tmp_path):
    load(tmp_path, "{baseline: a}")
    text = (tmp_path / "my.yaml").read_text().replace("rows: means, against: a", "rows: snapshots")
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match="has rows 'snapshots' and 'compare', which is of means alone"):
        planned(load_experiment(tmp_path / "my.yaml"), options(tmp_path))
