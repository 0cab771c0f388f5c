"""The help of the Trainer's verbs: short by default, everything on demand, each own setting explained; completion."""

import io
import re
import subprocess
from argparse import SUPPRESS
from contextlib import redirect_stdout

import pytest

from editlab.cli.commands import TRAINER_VERBS, VERBS, completion
from editlab.cli.help import SHOWN, TEXTS, VERB_TEXTS
from editlab.cli.main import main
from editlab.runs.trainer import TRAINER_DEFAULTS


def shown(*arguments):
    """What a command writes before it exits."""
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def helps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        return {"short": shown("fit", "--help"), "all": shown("fit", "--help=all")}


@pytest.fixture(scope="module")
def parsers():
    from editlab.cli.training import trainer_parsers

    return trainer_parsers()


OWN = ["values.steps", "moments.tokens", "contexts.count", "evaluation.heldout", "method", "layers", "passes"]


def test_the_short_help_has_our_settings_and_the_most_used_ones_of_the_trainer(helps):
    named = set(re.findall(r"^  (?:-\w, )?--([\w.]+)", helps["short"], re.MULTILINE))
    assert {f"model.{name}" for name in OWN} | {"data.path", "ckpt_path", "seed_everything"} <= named
    assert {name for name in named if name.startswith("trainer.")} == set(SHOWN)
    assert "--help=all" in helps["short"]
    assert helps["short"].startswith("usage: editlab fit ")
    assert len(helps["short"].splitlines()) < 300


def test_the_whole_help_has_everything(helps):
    named = {kind: set(re.findall(r"^  (?:-\w, )?--([\w.]+)", text, re.MULTILINE)) for kind, text in helps.items()}
    assert named["short"] < named["all"]
    assert {"trainer.gradient_clip_val", "trainer.max_epochs", "model.method.help"} <= named["all"]
    assert shown("fit", "--help", "all") == shown("fit", "--help=all")


def test_one_sentence_in_the_short_help_and_all_of_them_in_the_other(helps):
    first, second = "optimization of a fact ends too", "gives values closer to the original"
    flat = {kind: " ".join(text.split()) for kind, text in helps.items()}
    assert (first in flat["short"], second in flat["short"]) == (True, False)
    assert (first in flat["all"], second in flat["all"]) == (True, True)


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_every_own_setting_is_explained(parsers, verb):
    own = [action for action in parsers[verb]._actions if re.match(r"(model|data)\.\w", action.dest)]
    assert len(own) > 50
    silent = [action.dest for action in own if not action.help or action.help == SUPPRESS]
    assert silent == []


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_no_text_contradicts_a_default(parsers, verb):
    dests = {action.dest: action for action in parsers[verb]._actions}
    ours = {f"trainer.{name}" for name in (*TRAINER_DEFAULTS, "logger")}
    assert ours <= set(TEXTS)
    assert set(TEXTS) - {"weights_only"} <= set(dests)
    assert set(VERB_TEXTS[verb]) <= set(dests)
    for name, text in (TEXTS | VERB_TEXTS[verb]).items():
        assert name not in dests or dests[name].help == text
    for name, action in dests.items():
        stated = re.findall(r"[Dd]efaults?(?: to)?:? ``([\w.-]+)``", action.help or "")
        assert not stated or str(action.default) in stated or action.default is None, name


def test_the_help_names_the_strategy_that_exists():
    from editlab.distributed.strategy import NAME

    assert NAME in TEXTS["trainer.strategy"].split()


def test_the_settings_of_a_class_are_explained():
    text = shown("fit", "--model.method.help", "EMMET")
    assert "gram_ridge" in text
    assert "covariance_weight" in text


# ---- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shell", [pytest.param(s, marks=() if s == "bash" else pytest.mark.thorough) for s in completion.SHELLS]
)
def test_the_completion_of_a_shell_has_all_verbs_and_settings(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (*TRAINER_VERBS, *VERBS, "check", "--model.values.steps", "--no_answers"):
        assert word in text
    if shell == "bash":
        (tmp_path / "script").write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True)


def test_errors_of_completion(capsys, monkeypatch):
    assert main(["completion", "fish"]) == 2
    assert "fish" in capsys.readouterr().err
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "needs the package shtab: pip install 'editlab[completion]'" in capsys.readouterr().err
