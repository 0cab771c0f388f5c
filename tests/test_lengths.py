"""Texts longer than the context of a model whose positions are learnt: named or skipped before any verb meets them."""

import json
import shutil

import pytest

from editlab.cli.main import main
from tests.recipes import write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

LONG = "Paris is Paris. " * 60
COUNTRIES = ("France", "Japan", "Peru", "Norway")


def capital(country, **changes):
    return {"subject": country, "prompt": "The capital of {} is", "target": "Tokyo", "truth": "Paris", **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny GPT-2 of 128 positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(model, tmp_path, monkeypatch):
    """A working directory with a recipe that edits two facts of facts.jsonl, a file that is still to be written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    settings = {
        "layers": [1],
        "evaluation": {"heldout_tokens": 300, "generated_texts": 0, "generation": 0, "bystanders": 0},
    }
    data = {"path": "facts.jsonl", "limit": 2, "shuffle": False}
    write_recipe(tmp_path, "model", facts=None, model=settings, data=data)
    return tmp_path


def write(folder, *records):
    (folder / "facts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


LONG_TEXTS = {
    "prompt": ({"prompt": LONG + "The capital of {} is"}, "shorten its prompt"),
    "truth": ({"truth": LONG}, "has a truth with "),
    "paraphrase": ({"paraphrases": [LONG + "It is ruled from"]}, "has a paraphrase with "),
    "neighbor": ({"neighbors": [{"prompt": LONG + "Lima is", "truth": "big"}]}, "has a neighbor with "),
}


@pytest.mark.parametrize("keep", ["all", "preferred", "known"])
@pytest.mark.parametrize("case", LONG_TEXTS)
def test_a_long_text_is_named(place, capsys, case, keep):
    changes, message = LONG_TEXTS[case]
    write(place, capital("France", **changes), capital("Japan"))
    assert main(["fit", "--config", "tiny.yaml", f"--data.keep={keep}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("editlab:")]
    assert message in line
    assert "and the model takes 128: shorten" in line
    assert line.endswith("or skip the fact (data.skip_bad).")


def test_facts_with_long_texts_are_left_out_by_every_verb(place, capsys):
    """Of two to edit and two bystanders, one each; the text of the perplexity has more tokens than the model takes."""
    paraphrase, prompt = LONG_TEXTS["paraphrase"][0], LONG_TEXTS["prompt"][0]
    write(place, capital("France", **paraphrase), *map(capital, COUNTRIES[1:]), capital("Brazil", **prompt))
    recipe = ["--config", "tiny.yaml", "--data.skip_bad=true"]
    assert main(["fit", *recipe]) == 0
    assert "Skipped: the fact 'The capital of France is'... has a paraphrase with " in capsys.readouterr().out
    run = place / "lightning_logs" / "tiny" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits"] == 2
    assert {"before/perplexity", "retained/perplexity"} <= summary["metrics"].keys()
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(["validate", *recipe, *checkpoint]) == 0
    capsys.readouterr()
    assert main(["test", *recipe, *checkpoint]) == 0
    assert "Skipped: the fact 'Paris is Paris. " in capsys.readouterr().out
    assert main(["test", "--config", "tiny.yaml", *checkpoint]) == 2
    assert "and the model takes 128: shorten its prompt, or skip" in capsys.readouterr().err


def test_neighbors_that_are_not_measured_may_be_long(place):
    write(place, capital("France", **LONG_TEXTS["neighbor"][0]))
    assert main(["fit", "--config", "tiny.yaml", "--model.evaluation.neighbors=0"]) == 0
