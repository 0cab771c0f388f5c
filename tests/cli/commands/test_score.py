"""``editlab score``: the numbers of a run's end from the exported weights alone, and bad input."""

import json
import shutil

import pytest

from editlab.cli.main import main
from tests.recipes import write_recipe

MEASURED = ["--evaluation.heldout_tokens", "64", "--evaluation.generation", "0", "--evaluation.bystanders", "0"]


@pytest.fixture
def edited(tiny_folder, tmp_path, monkeypatch):
    """A run of four facts on a tiny model, and its model exported as any program would load it."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, tiny_folder, data={"limit": None, "batch_size": 4})
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = tmp_path / "lightning_logs/tiny/version_0"
    assert main(["export", "--ckpt_path", str(run), "--out", "exported"]) == 0
    (tmp_path / "exported/edits.json").unlink()
    return json.loads((run / "summary.json").read_text())["metrics"]


def score(*arguments):
    return main(["score", "--model", "exported", "--path", "facts.json", *MEASURED, *map(str, arguments)])


def test_the_numbers_are_those_of_the_run_that_edited_the_model(edited, tiny_folder, capsys):
    capsys.readouterr()
    assert score("--base", tiny_folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = {name: value for name, value in edited.items() if name.startswith(("before/", "retained/"))}
    expected = {name: value for name, value in expected.items() if "_age_" not in name}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)  # the exported weights are rounded once
    assert found["retained/perplexity"] != found["before/perplexity"]
    assert score() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model"] in lines
    assert ["ES", f"{edited['retained/ES']:.3f}"] in lines


def test_fewer_facts_and_one_half(edited, capsys):
    capsys.readouterr()
    assert score("--limit", 2, "--split", "dev", "--json") == 0
    assert json.loads(capsys.readouterr().out)["retained/accuracy"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "./nowhere"], "nowhere"),
    (["--path", "nowhere.json"], "nowhere.json"),
    (["--limit", "0"], "limit is 0"),
    (["--evaluation.neighbors", "-1"], "neighbors is -1"),
    (["--device", "tpu"], "tpu"),
])  # fmt: skip
def test_bad_input_is_one_sentence(arguments, message, edited, capsys):
    capsys.readouterr()
    assert score(*arguments) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("editlab: ")
    assert message in said


def test_a_damaged_model_is_one_sentence(edited, tmp_path, capsys):
    shutil.copytree("exported", "damaged")
    (tmp_path / "damaged/config.json").write_text("{")
    assert main(["score", "--model", "damaged", "--path", "facts.json", *MEASURED]) in (1, 2)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("editlab: ")
