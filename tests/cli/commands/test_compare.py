"""``editlab compare``: the table on the screen, the CSV, the figure, and bad arguments."""

import csv
import json

import pytest
import yaml

from editlab.cli.main import main
from tests.runs.test_folders import write_run


@pytest.fixture
def logs(tmp_path):
    write_run(tmp_path / "logs" / "none" / "version_1", accuracy=0.5)
    write_run(tmp_path / "logs" / "none" / "version_2", accuracy=0.75, seed=2)
    write_run(tmp_path / "logs" / "replay" / "version_1", accuracy=0.875, rate=0.3)
    write_run(tmp_path / "logs" / "slow" / "version_1", rate=0.5, finished=False)
    return tmp_path / "logs"


def test_the_table_shows_what_differs_and_marks_the_best(logs, capsys):
    assert main(["compare", str(logs)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells.pop(0) == ["retained/", "retained/", "immediate/", "retained/", "perplexity_"]
    assert cells[0][:5] == ["run", "MemoryReplay", "MemoryReplay.rate", "ES", "accuracy"]
    # Mean 0.625, half the range 0.125; 0.875 is the best accuracy of those that have finished or are on their way.
    assert cells[1][:5] == ["none (2 runs)", "-", "-", "1.000*", "0.625 [0.125]"]
    assert cells[2][:3] == ["replay/version_1", "MemoryReplay", "0.3"]
    assert "0.875*" in cells[2]
    assert cells[3][0] == "slow/version_1 [1 unfinished]"


def test_each_column_is_explained(logs, capsys):
    assert main(["compare", str(logs)]) == 0
    _, below = capsys.readouterr().out.strip().split("\n\n")
    explained = {line[:22].strip() for line in below.splitlines()}
    columns = {"ES", "accuracy", "perplexity", "perplexity_ratio", "edits", "seconds"}
    assert explained == columns | {"retained/", "immediate/", "[0.012]", "*"}
    assert all(len(line) <= 120 for line in below.splitlines())


def changed(folder, **settings):
    """Change settings of a run's config.yaml by their dotted names."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in settings.items():
        inner = config
        *path, last = name.split("__")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("settings", "starred", "why"),
    [
        ({}, {"accuracy", "ratio"}, None),
        ({"data__path": "b.json"}, {"ratio"}, "data.path"),
        ({"model__evaluation__heldout": "b.txt"}, {"accuracy"}, "model.evaluation.heldout"),
        ({"model__evaluation__heldout_tokens": 9}, {"accuracy"}, "model.evaluation.heldout_tokens"),
        ({"model__language_model": "b"}, {"accuracy"}, "model.language_model"),
    ],
)
def test_no_star_among_runs_of_different_texts(tmp_path, capsys, settings, starred, why):
    same = {"data__path": "a.json", "model__evaluation__heldout": "a.txt", "model__evaluation__heldout_tokens": 8,
            "model__language_model": "a"}  # fmt: skip
    for number, (name, accuracy, own) in enumerate((("one", 0.5, {}), ("two", 0.75, settings))):
        changed(write_run(tmp_path / name, accuracy=accuracy, layers=(number,)), **same | own)
    assert main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("0.750*" in out, "1.250*" in out) == ("accuracy" in starred, "ratio" in starred)
    assert (f"different values of {why}" in out) == (why is not None)


def test_no_star_among_runs_of_different_numbers_of_edits(tmp_path, capsys):
    for name, edits in (("one", 4), ("two", 8)):
        folder = write_run(tmp_path / name, accuracy=1 / edits, layers=(edits,))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "edits": edits}))
    assert main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "*" not in out.replace("no *", "")
    assert "the runs have different numbers of edits" in out


def test_the_csv_has_a_row_a_run(logs, tmp_path):
    assert main(["compare", str(logs), "--csv", str(tmp_path / "out" / "runs.csv")]) == 0
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [
        (row["group"], row["seed"], row["MemoryReplay.rate"], row["retained/accuracy"], row["finished"]) for row in rows
    ]
    assert found == [
        ("none", "1", "", "0.5", "True"), ("none", "2", "", "0.75", "True"),
        ("replay/version_1", "1", "0.3", "0.875", "True"), ("slow/version_1", "1", "0.5", "0.5", "False"),
    ]  # fmt: skip


def test_the_figure_comes_as_png_and_pdf(logs, tmp_path):
    assert main(["compare", str(logs), "--figure", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "curves.pdf").read_bytes()[:4] == b"%PDF"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        ([".", "--csv", "table.txt"], "--csv is table.txt: its name must end in .csv"),
        ([".", "--figure", "curves.gif"], "its name must end in .png"),
        ([], "runs is missing"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_groups_than_lines_are_refused(tmp_path, capsys):
    for number in range(22):
        write_run(tmp_path / "logs" / f"r{number}" / "version_1", rate=number / 100)
    assert main(["compare", str(tmp_path / "logs"), "--figure", str(tmp_path / "curves.png")]) == 2
    assert "A figure shows at most 21 groups of runs, and these are 22" in capsys.readouterr().err
