"""The progress bar of a run: one line of at most 80 columns that counts edits, and nothing after it is removed."""

import logging
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from editlab.cli.main import configure_messages
from editlab.runs.progress_bar import EditProgressBar, with_progress_bar
from editlab.utils.progress import progress


class Screen:
    """The error stream so far, as of a terminal of 80 columns."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def getvalue(self):
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "81")  # tqdm takes one off
    monkeypatch.setenv("LINES", "24")
    return Screen(capsys)


METRICS = {"immediate/ES": 1.0, "immediate/accuracy": 0.96875, "other": 3.0}


def trainer(facts=10_000):
    data = SimpleNamespace(facts=[None] * facts)
    return SimpleNamespace(datamodule=data, loggers=[], progress_bar_metrics=dict(METRICS))


def ran(bar, run, edits):
    """Show the bar of a run in which batches end at these numbers of edits."""
    module = SimpleNamespace(edits=edits[0])
    bar.on_train_start(run, module)
    bar.on_train_epoch_start(run, module)
    for index, number in enumerate(edits[1:]):
        values = progress(total=16, desc="Values", unit="fact")
        values.update(3)
        values.close()
        module.edits = number
        bar.on_train_batch_end(run, module, None, None, index)
    bar.on_train_epoch_end(run, module)
    return module


def drawn(screen):
    return [part for part in re.split(r"[\r\n]", screen.getvalue()) if part.strip()]


def test_one_line_counts_edits_and_shows_the_time_left(screen):
    bar, run = EditProgressBar(), trainer()
    ran(bar, run, [0, 5000, 10_000])
    assert all(len(part) <= 80 for part in drawn(screen))
    assert "\n" not in screen.getvalue()
    assert "Epoch" not in screen.getvalue()
    assert any(part.startswith("values 3/16 0/10000 |") for part in drawn(screen))
    last = drawn(screen)[-1]
    assert last.startswith("edits 10000/10000 |")
    assert re.search(r"\| \d\d:\d\d, \d\d:\d\d left, ES 1.00, accuracy 0.97$", last)


def test_nothing_is_drawn_after_the_bar_is_removed(screen):
    bar, run = EditProgressBar(), trainer()
    ran(bar, run, [0, 16])
    bar.on_train_end(run, None)
    before = screen.getvalue()
    assert before.rpartition("\r")[2] == ""  # the line is empty, and the cursor at its beginning
    configure_messages()
    logging.getLogger("editlab").info("the summary")
    assert screen.getvalue() == before
    # Bars of what follows are bars of their own again.
    list(progress(range(2), desc="All edits"))
    assert "All edits" in screen.getvalue()


def test_an_error_removes_the_bar(screen):
    bar, run = EditProgressBar(), trainer()
    ran(bar, run, [0, 16])
    bar.on_exception(run, None, KeyboardInterrupt())
    assert bar.bar is None
    assert screen.getvalue().endswith("\r")


def test_a_resumed_run_starts_at_its_edits(screen):
    bar, run = EditProgressBar(), trainer(32)
    ran(bar, run, [16])
    assert drawn(screen)[-1].startswith("edits 16/32 |")
    assert bar.bar.initial == 16
    bar.on_train_end(run, None)


def test_no_bar_where_none_is_wanted(screen):
    bar, run = EditProgressBar(refresh_rate=0), trainer(32)
    ran(bar, run, [0])
    bar.on_train_end(run, None)
    assert "edits" not in screen.getvalue()
    own = TQDMProgressBar()
    assert with_progress_bar([own], True) == [own]
    assert with_progress_bar([], False) == []
    (made,) = with_progress_bar([], True)
    assert isinstance(made, EditProgressBar)
