"""Numbers of the report: each is the cell that the source names, in the format that it names."""

import pytest

from editlab.errors import UserError
from editlab.experiments.latex import Results, numbers, table_specs, tabular

CSV = """case,seed,accuracy,accuracy_low,accuracy_high,seeds,gate
plain,1,0.7153,0.65,0.78,1,trust
memory,1,0.9333,0.9,0.97,1,norm
memory,2,0.95,nan,nan,1,norm
later,,,,,0,
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "runs.csv").write_text(CSV)
    return Results(tmp_path)


def value(results, row, form, column="accuracy", kind="val"):
    source = rf"\{kind}{{runs}}{{{row}}}{{{column}}}{{{form}}}"
    line = numbers([f"text {source} text"], results).splitlines()[1]
    name, text = line.split(r"\endcsname")
    assert name == rf"\expandafter\def\csname editlab:{kind}:runs:{row}:{column}:{form}"
    return text[1:-1]


@pytest.mark.parametrize(
    ("row", "form", "text"),
    [
        ("plain", "3", "0.715"),
        ("plain", "0", "1"),
        ("plain", "percent", r"71.5\%"),
        ("plain", "times", r"0.72$\times$"),
        ("memory@2", "2", "0.95"),
        ("gate=trust", "1", "0.7"),
        ("case=memory,seed=1", "3", "0.933"),
        ("memory@mean", "4", "0.9417"),  # (0.9333 + 0.95) / 2 = 0.94165, rounded up
        ("memory@1|plain", "points", "$+$21.8"),  # 0.9333 - 0.7153
        ("plain|memory@1", "points", "$-$21.8"),
        ("memory@1|plain", "gain", "21.8"),
        ("plain|plain", "points", "0.0"),
    ],
)
def test_a_number_is_the_cell_that_the_source_names(results, row, form, text):
    assert value(results, row, form) == text


def test_an_interval_comes_from_the_columns_of_its_bounds(results):
    assert value(results, "plain", "2", kind="ci") == "[0.65, 0.78]"


def test_an_interval_of_a_difference_is_paired_by_seed(tmp_path):
    rows = ["a,1,0.5", "a,2,0.6", "a,3,0.7", "b,2,0.5", "b,1,0.45", "b,3,0.5"]
    (tmp_path / "runs.csv").write_text("\n".join(["case,seed,accuracy", *rows]))
    low, high = Results(tmp_path).interval("runs", "a@mean|b@mean", "accuracy")
    # Differences .05, .1 and .2: mean .11667, standard deviation .07638, t(2) 4.3027, over the root of 3.
    assert (low, high) == pytest.approx((0.11667 - 0.18973, 0.11667 + 0.18973), abs=1e-4)


def test_a_number_that_is_named_twice_is_defined_once(results):
    source = r"\val{runs}{plain}{accuracy}{3}"
    assert numbers([source + source, source], results).count("csname editlab") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (r"\val{absent}{plain}{accuracy}{3}", "absent.csv does not exist"),
        (r"\val{runs}{other}{accuracy}{3}", "has 0 rows 'other'"),
        (r"\val{runs}{memory}{accuracy}{3}", "has 2 rows 'memory'"),
        (r"\val{runs}{plain}{speed}{3}", "no number 'speed'"),
        (r"\val{runs}{plain}{gate}{3}", "no number 'gate'"),
        (r"\val{runs}{plain}{accuracy}{stars}", "unknown format 'stars'"),
        (r"\ci{runs}{plain}{seeds}{3}", "no number 'seeds_low'"),
    ],
)
def test_a_number_that_does_not_exist_is_named(results, source, message):
    with pytest.raises(UserError, match=message):
        numbers([source], results)


def test_a_table_has_a_row_for_each_case_and_says_which_were_not_run(results):
    spec = table_specs(
        {
            "t": {
                "file": "runs",
                "head": "run",
                "columns": [{"column": "accuracy", "head": "acc.", "interval": True}],
                "groups": [
                    {"rows": {"plain": "plain", "memory@2": "with memory"}},
                    {"title": "more", "rows": {"later": "later", "never": "never"}},
                ],
            }
        }
    )["t"]
    assert tabular(spec, results).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"run & acc. \\",
        r"\midrule",
        r"plain & 0.715~\interval{[0.650, 0.780]} \\",
        r"with memory & 0.950 \\",
        r"\midrule",
        r"\multicolumn{2}{l}{\textit{more}} \\",
        r"later & \multicolumn{1}{c}{not run} \\",
        r"never & \multicolumn{1}{c}{not run} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_a_wrong_key_of_a_table_is_named():
    with pytest.raises(UserError, match="table t has an unknown key 'colums'"):
        table_specs({"t": {"file": "runs", "colums": [], "groups": []}})
    with pytest.raises(UserError, match="must be a mapping"):
        table_specs([])


def test_a_gain_over_itself_is_no_number_and_a_column_may_be_a_mean_over_runs(results, tmp_path):
    (tmp_path / "means.csv").write_text("case,against,accuracy_gain\nplain,plain,0.0\nmemory,plain,0.2\n")
    columns = [{"column": "accuracy_gain", "head": "gain", "form": "gain"},
               {"column": "accuracy", "head": "acc.", "form": "3", "mean_of": "runs"}]  # fmt: skip
    spec = {"file": "means", "columns": columns, "groups": [{"rows": {"plain": "plain", "memory": "memory"}}]}
    assert tabular(table_specs({"t": spec})["t"], results).splitlines()[4:6] == [
        r"plain & -- & 0.715 \\",
        r"memory & 20.0 & 0.942 \\",
    ]
