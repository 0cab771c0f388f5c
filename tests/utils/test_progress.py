"""Tests that all progress bars, including those of transformers and of a whole run, are shown or hidden together."""

import pytest
from transformers.utils import logging as transformers_logging

from editlab import edit_model
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.utils.progress import bars, progress
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


def test_a_bar_counts_whether_it_is_shown_or_not(capsys):
    assert list(progress(range(3), desc="Steps")) == [0, 1, 2]
    assert "Steps" in capsys.readouterr().err
    with bars(False):
        assert list(progress(range(3), desc="Steps")) == [0, 1, 2]
        with bars(True):
            list(progress(range(1), desc="Inner"))
        list(progress(range(1), desc="Outer"))
    said = capsys.readouterr().err
    assert "Inner" in said
    assert "Steps" not in said
    assert "Outer" not in said


def test_the_bars_of_transformers_are_restored_after_an_error():
    def fail():
        with bars(False):
            assert not transformers_logging.is_progress_bar_enabled()
            raise ZeroDivisionError

    transformers_logging.enable_progress_bar()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_without_bars_shows_none(wanted, capfd):
    edit_model(
        tiny_model("llama"), tiny_tokenizer(), FACTS[:2], layers=[1], progress=wanted, values=ValueSettings(steps=2),
        moments=MomentSettings(tokens=256), contexts=ContextSettings(count=1, length=3),
        evaluation=EvaluationSettings(heldout_tokens=64, generation=0, bystanders=0, generated_texts=1),
    )  # fmt: skip
    said = capfd.readouterr().err
    assert ("edits 2/2" in said) == wanted
