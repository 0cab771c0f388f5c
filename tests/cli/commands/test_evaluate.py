"""``editlab evaluate``: which weights are evaluated, what is shown, and bad arguments."""

import json

import pytest

from editlab.cli.main import main
from editlab.runs.checkpoint import find_checkpoint
from editlab.runs.delta import Delta
from tests.harness import StandIn, stand_in, write_task


def accuracy(model):
    """The stand-in's accuracy of a model."""
    tasks = {"tasks": {"known": None}}
    found = StandIn().evaluate(model, tasks, limit=None, bootstrap_iters=0, log_samples=False)
    return found["results"]["known"]["acc,none"]


def evaluate(run, *arguments):
    return main(["evaluate", "--ckpt_path", str(run.folder), *map(str, arguments)])


def test_the_edited_and_the_unedited_model(runs, monkeypatch, capsys):
    run = runs("llama")
    harness = stand_in(monkeypatch)
    assert evaluate(run, "--tasks", "known", "--unedited", "--json", "--limit", "5", "--batch_size", "2") == 0
    found = json.loads(capsys.readouterr().out)
    delta = Delta.from_checkpoint(find_checkpoint(str(run.folder)))
    model, _ = delta.base()
    before = accuracy(model)
    delta.put_on(model)
    expected = {"unedited": before, "edited": accuracy(model)}
    assert {name: row["known"]["acc"]["value"] for name, row in found.items()} == expected
    assert before != expected["edited"]
    assert found["edited"]["known"]["acc"]["stderr"] == 0.125
    assert (harness.given["limit"], harness.given["batch_size"]) == (5, 2)
    assert evaluate(run, "--tasks", "known") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[-2:] == [
        ["task", "metric", "edited"], ["known", "acc", f"{expected['edited']:.4f}", "[0.1250]"],
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_real_harness_on_a_local_task(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'editlab[lm-eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert evaluate(runs("llama"), "--tasks", write_task(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 3 * found["edited"]["capitals"]["acc"]["value"] == pytest.approx(
        round(3 * found["edited"]["capitals"]["acc"]["value"])
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "known"], "ckpt_path"),
    (["--ckpt_path", "nowhere"], "tasks"),
    (["--ckpt_path", "nowhere", "--tasks", "known"], "The checkpoint 'nowhere' does not exist"),
    (["--ckpt_path", "nowhere", "--tasks", "unknown"], "There is no task 'unknown'"),
    (["--ckpt_path", "nowhere", "--tasks", "no.yaml"], "There is no task file 'no.yaml'"),
    (["--ckpt_path", "nowhere", "--tasks", "known", "--limit", "0"], "evaluate.limit is 0: it must be at least 1"),
    (["--ckpt_path", "nowhere", "--tasks", "known", "--device", "gpu9"], "gpu9"),
])  # fmt: skip
def test_bad_arguments_are_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_without_the_extra_the_sentence_has_the_command(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--ckpt_path", "nowhere", "--tasks", "mmlu"]) == 2
    assert "pip install 'editlab[lm-eval]'" in capsys.readouterr().err
