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
        ("memory@mean", "4", "0.9416"),  # (0.9333 + 0.95) / 2, which float64 rounds down
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
