"""The summary's table: measured values, dashes for those that were not measured, and a height of one screen."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from editlab.cli.main import main
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.ledger import Ledger
from editlab.evaluation.scoring import FactScores
from editlab.metrics import PromptScores
from editlab.metrics.names import METRICS, TABLE_GROUPS
from editlab.runs.logger import RunLogger
from editlab.runs.outcomes import read_outcomes
from editlab.runs.summary import peak_memory_mb, render, save_outcomes, selected, versions
from tests.facts import FACTS
from tests.recipes import write_recipe


def test_the_table():
    summary = {
        "edits": 6, "rolled_back": 2, "superseded": 1, "batches": 4,
        "metrics": {"before/ES": 0.0, "immediate/ES": 1.0, "retained/ES": 0.875, "retained/NS": 0.5,
                    "before/perplexity": 27.6, "retained/perplexity": 28.25},
        "delta_norm": {"5": 0.25}, "seconds": 61.0, "peak_memory_mb": 900.0,
    }  # fmt: skip
    trainer = SimpleNamespace(loggers=[RunLogger()], fast_dev_run=False)
    title = "tiny, layers 5, EMMET"
    text = render(summary, title, trainer, Path("lightning_logs/r/version_0"), "x.ckpt")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["ES"] == ["0.000", "1.000", "0.875"]
    assert rows["NS"] == ["-", "-", "0.500"]
    assert "PS" not in rows
    assert "held-out perplexity   27.60          -     28.25" in text
    assert "generation" not in text
    assert "6 facts edited, 2 rolled back, 1 superseded in 4 batches: tiny, layers 5, EMMET" in text
    assert "tensorboard --logdir lightning_logs/r" in text
    assert (
        "edited model x.ckpt\nto use it    editlab export --ckpt_path lightning_logs/r/version_0 --out edited" in text
    )
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100
    assert "tables       metrics.csv, outcomes.csv, summary.json in lightning_logs/r/version_0\n" in text
    trainer.loggers = []
    text = render({**summary, "batches": 1}, title, trainer, Path("r"), None)
    assert "tables       outcomes.csv, summary.json in r\n" in text
    assert "in 1 batch: tiny" in text
    assert "none was written (see trainer.enable_checkpointing)\n" in text
    assert "to use it" not in text


def test_the_summary_of_a_whole_recipe_is_one_screen():
    names = [metric.name for metric in METRICS]
    numbers = {
        f"{group}/{name}": 0.5 for group in TABLE_GROUPS for name in (*names, "perplexity_low", "perplexity_high")
    }
    summary = {
        "edits": 128, "rolled_back": 0, "superseded": 0, "batches": 8, "metrics": numbers, "delta_norm": {"5": 0.25},
        "seconds": 502.0, "evaluation_seconds": {"generation": 41.2}, "peak_memory_mb": 2288.0,
    }  # fmt: skip
    trainer = SimpleNamespace(loggers=[RunLogger()], fast_dev_run=False)
    folder = Path("lightning_logs/r/version_0")
    lines = render(summary, "smollm2-135m, layers 4, 5, 6, MEMIT", trainer, folder, "x.ckpt").splitlines()
    assert len(lines) <= 24
    assert max(len(line) for line in lines if not line.startswith(("tables", "to use it"))) <= 80  # these have paths
    assert "502 s (41 s of them free generation), peak memory 2288 MiB" in lines


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_broke_its_model_comes_to_its_end(tiny_folder, tmp_path, monkeypatch, capsys):
    """Its update is not finite, so no score is: no edit holds, and the summary is valid JSON."""
    monkeypatch.chdir(tmp_path)
    add = EditedLayer.add
    monkeypatch.setattr(EditedLayer, "add", lambda layer, update: add(layer, update * math.nan))
    write_recipe(tmp_path, tiny_folder, model={"layers": [1]}, data={"limit": 2, "shuffle": False})
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    summary = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    names = ("ES", "PS", "NS", "S", "accuracy")
    metrics = summary["metrics"]
    assert [metrics[f"retained/{name}"] for name in names] == [0.0] * 5
    assert metrics["before/perplexity"] > 1
    assert metrics["retained/perplexity"] is None
    assert summary["delta_norm"] == {"1": None}
    assert {name for name in metrics if "entropy" in name} == {"before/generation_entropy"}
    (run / "summary.json").unlink()
    for command in (["fit", "--config", "tiny.yaml", "--ckpt_path", "last"], ["report", str(run), "--no_answers"]):
        assert main(command) == 0
    assert main(["compare", "lightning_logs"]) == 0
    assert "This should not happen" not in capsys.readouterr().err
    for command in (["export", "--ckpt_path", str(run), "--out", "out"], ["report", str(run)]):
        assert main(command) == 2
        assert "holds NaN or infinity, so the edited model cannot answer" in capsys.readouterr().err


def test_the_selection_in_words():
    facts = {"path": "f.json", "keep": "known", "split": "all", "checked": 80, "known": 20, "neighbors": 40,
             "neighbors_left_out": 0}  # fmt: skip
    assert selected(facts) == ["the unedited model knows 20 of the 80 facts of f.json that were checked (25.0%)"]
    facts = {"path": "f.json", "split": "dev", "checked": 8, "preferred": 6, "neighbors": 40, "neighbors_left_out": 3}
    assert selected(facts) == [
        "the unedited model prefers the truth of 6 of the 8 facts of f.json (dev half) that were checked (75.0%)",
        "NS leaves out 3 of 40 neighbors, whose subjects are edited",
    ]
    own = {"path": "my.csv", "split": "all", "facts": 5, "checked": 5, "preferred": 4}
    assert selected(own)[1] == "the others are not edited: --data.keep all edits every fact"
    assert len(selected({**own, "preferred": 5})) == len(selected({**own, "facts": 9})) == 1
    assert selected({}) == selected({"path": "f.json", "keep": "all", "split": "all", "neighbors_left_out": 0}) == []


def test_facts_about_the_process():
    assert 10 < peak_memory_mb() < 10**6
    assert {"editlab", "python", "torch", "lightning", "transformers"} <= set(versions())


def saved(folder, fn, measured, edits=2, loggers=True):
    """The outcomes in a folder after two edits, of which ``measured`` were measured at the end, were saved."""
    ledger = Ledger()
    ledger.add(FACTS[:edits], 0, [1.0] * edits)
    column = torch.zeros(measured)
    edit = PromptScores(column, column, column > 0, column > 0, torch.arange(measured))
    evaluation = SimpleNamespace(scores={"retained": FactScores(edit)}.get, generated={})
    state = SimpleNamespace(fn=fn)
    named = [RunLogger()] if loggers else []
    trainer = SimpleNamespace(log_dir=str(folder), is_global_zero=True, state=state, loggers=named, fast_dev_run=False)
    save_outcomes(trainer, ledger, evaluation)
    path = folder / "outcomes.csv"
    return len(read_outcomes(path)) if path.exists() else None


def test_a_validation_writes_outcomes_only_if_it_measured_all_edits_of_the_finished_run(tmp_path):
    assert saved(tmp_path, "validate", measured=1) is None  # a fact does not fit the model
    assert saved(tmp_path, "validate", measured=2, loggers=False) is None  # the folder is the user's
    assert saved(tmp_path, "validate", measured=2) == 2  # the run has not finished
    assert saved(tmp_path, "fit", measured=3, edits=3) == 3
    (tmp_path / "summary.json").write_text(json.dumps({"edits": 2, "rolled_back": 1}))
    assert saved(tmp_path, "validate", measured=2) == 3  # an earlier checkpoint of it
    (tmp_path / "summary.json").write_text(json.dumps({"edits": 1, "rolled_back": 1}))
    assert saved(tmp_path, "validate", measured=2) == 2
