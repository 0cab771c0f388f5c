"""Checking a recipe without a run: what is valid, each mistake in fit's sentence, and nothing loaded or written."""

import logging
import re

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from callbacks import DownstreamEval, ForgettingCurve, LoRAAdjust, MemoryReplay, TrustRollback
from editlab.cli.main import main
from editlab.cli.validation import check, validate
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.errors import UserError
from editlab.evaluation.retrieval import Retrieval
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import BetaEdit

WITH_FACTS = "model: {language_model: x}\ndata: {path: facts.csv, keep: all}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder: empty, and with no way to load a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LanguageModel, "from_name", None)
    return tmp_path


def test_a_valid_recipe_says_what_it_would_do_and_leaves_nothing_behind(folder, capsys):
    assert main(["validate-config", "emmet_replay", "gpt2-xl", "--data.limit", "5", "--data.keep=known"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "valid: edits at most 5 facts of worldfacts that the model knows in batches of 16, in "
        "openai-community/gpt2-xl, layers 13, 14, 15, 16, 17, by EMMET, with MemoryReplay and ForgettingCurve; the run "
        "would go to lightning_logs/emmet_replay"
    )
    assert list(folder.iterdir()) == []


def test_own_facts_are_not_read(folder):
    (folder / "mine.yaml").write_text(WITH_FACTS)
    (folder / "facts.csv").write_text("no,facts\n")
    said = validate(["mine"], ["--model.layers", "auto", "--trainer.logger", "false"])
    assert said.startswith("edits all facts of facts.csv in batches of 16, in x, layers found by trying, by EMMET; ")
    assert said.endswith("lightning_logs/mine")
    assert sorted(path.name for path in folder.iterdir()) == ["facts.csv", "mine.yaml"]


def test_a_mistake_is_one_sentence_and_an_exit_code(folder, capsys):
    before = logging.getLogger("lightning.pytorch").level
    for arguments, sentence in (
        (["rme"], "does not exist: check --config; did you mean rome"),
        (["rome", "--model.pases", "2"], "There is no setting 'model.pases'"),
        (["rome", "--data.batch_size", "4"], "ROME edits 1 fact a step: set data.batch_size to 1."),
        ([], "--help after the verb shows more"),
    ):
        assert main(["validate-config", *arguments]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("editlab: ")
        assert sentence in said
    assert list(folder.iterdir()) == []
    assert logging.getLogger("lightning.pytorch").level == before


def editor(**settings):
    return SequentialEditor(language_model="x", **settings)


INDEPENDENT = {"restore_between_batches": True}
WRONG = {
    "past keys": ({"method": BetaEdit()}, {}, [], "add the callback MemoryReplay with memory: consolidated"),
    "replay": (INDEPENDENT, {}, [MemoryReplay()], "MemoryReplay has nothing to remember"),
    "keys that change": ({}, {}, [MemoryReplay(cache_keys=True)], "MemoryReplay.cache_keys cannot be used with layers"),
    "trust": ({"method": Retrieval()}, {}, [TrustRollback()], "it judges changes of weights"),
    "a budget": (INDEPENDENT, {}, [TrustRollback(perplexity_budget=1.1)], "is for the edits of a sequence"),
    "LoRA": (INDEPENDENT, {}, [LoRAAdjust()], "LoRAAdjust has nothing to adjust"),
    "tasks": ({"method": Retrieval()}, {}, [DownstreamEval(["mmlu"])], "its tasks measure the weights"),
    "a number": ({}, {}, [EarlyStopping("ES")], "EarlyStopping watches 'ES', which no run logs"),
    "facts": ({}, {"path": "none.csv"}, [], "The fact file none.csv does not exist: check the path."),
    "text": ({"moments": MomentSettings(text="none.txt")}, {}, [], "The text 'none.txt' does not exist"),
    "held-out text": ({"evaluation": EvaluationSettings(heldout="none.txt")}, {}, [], "The text 'none.txt' does not"),
}


@pytest.mark.parametrize(("settings", "data", "callbacks", "sentence"), WRONG.values(), ids=WRONG)
def test_the_parts_of_a_run_fit_each_other(settings, data, callbacks, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        check(editor(**settings), EditDataModule(**data), callbacks)


def test_texts_that_are_not_read_may_be_missing():
    unread = {"evaluation": EvaluationSettings(heldout="none.txt", heldout_tokens=0)}
    check(editor(**unread), EditDataModule(), [])
    check(editor(method=Retrieval(), moments=MomentSettings(text="none.txt")), EditDataModule(), [])
    check(editor(moments=MomentSettings(text="hub:a:b")), EditDataModule(), [ForgettingCurve()])
