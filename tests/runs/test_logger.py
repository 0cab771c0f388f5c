"""The table of a run, read back with the csv module, against what was logged."""

from __future__ import annotations

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from editlab.errors import UserError
from editlab.runs.logger import RunLogger
from tests.ranked import together


@pytest.fixture
def logger(tmp_path):
    return open_run(tmp_path)


def open_run(tmp_path):
    return RunLogger(str(tmp_path), name="recipe", version=0)


def table(logger) -> list[dict[str, str]]:
    with logger.table_path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_is_in_the_folder_of_the_run(logger, tmp_path):
    assert logger.table_path == tmp_path / "recipe" / "version_0" / "metrics.csv"


def test_rows_are_by_edits_and_cells_without_a_measurement_are_empty(logger):
    logger.log_metrics({"val/ES": 0.5}, step=64)
    logger.log_metrics({"train/loss": 2.0}, step=32)
    logger.log_metrics({"train/loss": 1.0, "val/NS": 0.25}, step=64)  # merged into the row that stands
    logger.save()
    assert table(logger) == [
        {"edits": "32", "train/loss": "2.0", "val/ES": "", "val/NS": ""},
        {"edits": "64", "train/loss": "1.0", "val/ES": "0.5", "val/NS": "0.25"},
    ]


def test_rows_are_sorted_as_numbers_and_columns_by_name(logger):
    for step in (100, 20, 3):
        logger.log_metrics({"b": 1, "a": 2}, step=step)
    logger.save()
    assert [row["edits"] for row in table(logger)] == ["3", "20", "100"]
    assert list(table(logger)[0]) == ["edits", "a", "b"]


def test_a_later_measurement_at_the_same_edits_wins(logger):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 2.0}, step=1)
    logger.save()
    assert table(logger) == [{"edits": "1", "a": "2.0"}]


def test_numbers_come_back_exactly(logger, tmp_path):
    """Also tiny ones, infinity and not-a-number: what was measured is not the same as an empty cell."""
    values = {"third": 1 / 3, "tiny": 5e-324, "inf": math.inf, "nan": math.nan, "zero": 0.0}
    logger.log_metrics(values, step=5)
    logger.save()
    row = open_run(tmp_path).rows[5]
    assert math.isnan(row.pop("nan"))
    assert row == {k: v for k, v in values.items() if k != "nan"}


def test_tensors_are_numbers_and_epochs_no_measurement(logger):
    logger.log_metrics({"a": torch.tensor(0.5), "epoch": 3}, step=1)
    logger.log_metrics({"epoch": 3}, step=2)
    logger.save()
    assert table(logger) == [{"edits": "1", "a": "0.5"}]


def test_without_a_step_there_is_no_row(logger):
    logger.log_metrics({"a": 1.0})
    logger.save()
    assert not logger.table_path.exists()


def test_nothing_is_written_if_nothing_is_new(logger):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    logger.table_path.write_text("untouched")
    logger.save()
    assert logger.table_path.read_text() == "untouched"


def test_tensorboard_gets_the_same_numbers(logger):
    logger.log_metrics({"val/ES": 0.5}, step=64)
    logger.log_metrics({"val/ES": 0.75}, step=96)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/ES")] == [(64, 0.5), (96, 0.75)]


def scalars(folder, tag):
    """Step and value of each point of a tag in one folder's event files."""
    events = EventAccumulator(str(folder)).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_each_group_of_metrics_is_a_run_of_its_own_in_tensorboard(logger):
    for step, values in ((2, (0.0, 1.0, 0.5)), (4, (0.25, 0.75, 0.5))):
        groups = zip(("before", "immediate", "retained"), values, strict=True)
        logger.log_metrics({**{f"{group}/ES": value for group, value in groups}, "solve/seconds": 1.0}, step=step)
    logger.finalize("success")
    run = Path(logger.log_dir)
    # One name for the plain Scalars page to draw in one chart; the values are those given, not running means.
    assert scalars(run / "before", "scores/ES") == [(2, 0.0), (4, 0.25)]
    assert scalars(run / "immediate", "scores/ES") == [(2, 1.0), (4, 0.75)]
    assert scalars(run / "retained", "scores/ES") == [(2, 0.5), (4, 0.5)]
    assert EventAccumulator(str(run)).Reload().Tags()["scalars"] == ["solve/seconds"]
    # The table keeps its columns.
    assert list(table(logger)[0]) == ["edits", "before/ES", "immediate/ES", "retained/ES", "solve/seconds"]


def test_the_settings_are_on_the_page_of_hyperparameters(logger):
    from tensorboard.plugins.hparams import metadata

    logger.log_settings({"a.b": 1, "c": True, "d": "x", "e": [4, 5], "f": None, "g": 0.5})
    logger.log_metrics({"retained/ES": 1.0}, step=1)
    logger.finalize("success")
    found = EventAccumulator(logger.log_dir).Reload().SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    info = metadata.parse_session_start_info_plugin_data(found.plugin_data.content)
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in info.hparams.items()}
    assert values == {"a.b": 1, "c": True, "d": "x", "e": "[4, 5]", "g": 0.5}
    assert info.group_name == "recipe/0"


def test_a_resumed_run_has_no_point_twice_in_any_group(logger, tmp_path):
    for step in (2, 4, 6):
        logger.log_metrics({"before/ES": 0.0, "retained/ES": step / 10}, step=step)
    logger.save()
    resumed = open_run(tmp_path)
    resumed.resume({2: {"before/ES": 0.0, "retained/ES": 0.2}}, 2)
    resumed.log_metrics({"before/ES": 0.5}, step=4)
    resumed.finalize("success")
    resumed.log_metrics({"bystanders/ES": 0.5}, step=4)  # as by a later test of the same run
    resumed.save()
    run = Path(logger.log_dir)
    assert scalars(run / "before", "scores/ES") == [(2, 0.0), (4, 0.5)]
    # What is not measured again is gone, too: its file is opened, although nothing is written to it.
    assert scalars(run / "retained", "scores/ES") == [(2, pytest.approx(0.2))]


# a folder of its own


def claimed(folder):
    """The version on each rank: Lightning reads the folder of the first rank before the ranks communicate."""
    logger = RunLogger(folder, name="recipe")
    logger.share()
    return logger.version, Path(logger.log_dir).is_dir()


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path):
    loggers = [RunLogger(str(tmp_path), name="recipe") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda logger: logger.version, loggers))
    assert sorted(found) == list(range(8))
    # Both have seen the same folders when they choose.
    late = [RunLogger(str(tmp_path), name="recipe") for _ in range(2)]
    for logger in late:
        logger._get_next_version = lambda: 8
    assert [logger.version for logger in late] == [8, 9]
    assert [logger.version for logger in late] == [8, 9]  # and each keeps its own
    assert RunLogger(str(tmp_path), name="recipe", version=3).version == 3


def test_all_ranks_have_the_first_ones_version(tmp_path):
    (tmp_path / "runs" / "recipe" / "version_4").mkdir(parents=True)
    assert together(2, tmp_path / "ranks", claimed, str(tmp_path / "runs")) == [(5, True)] * 2


@pytest.mark.parametrize("where", ["taken", "taken/below"])
def test_a_file_at_the_path_of_the_runs_folder_is_named(where, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken.* a file is in its way"):
        RunLogger(str(tmp_path / where), name="recipe").version  # noqa: B018


# going on in the same folder


def test_opening_the_same_version_keeps_its_rows(logger, tmp_path):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"b": 2.0}, step=2)
    logger.finalize("success")
    again = open_run(tmp_path)
    again.log_metrics({"c": 3.0}, step=3)
    again.finalize("success")
    assert table(again) == [
        {"edits": "1", "a": "1.0", "b": "", "c": ""},
        {"edits": "2", "a": "", "b": "2.0", "c": ""},
        {"edits": "3", "a": "", "b": "", "c": "3.0"},
    ]


def test_opening_alone_changes_nothing(logger, tmp_path):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    before = logger.table_path.read_bytes()
    open_run(tmp_path).finalize("success")
    assert logger.table_path.read_bytes() == before


def test_a_resumed_run_starts_from_the_table_of_its_checkpoint(logger, tmp_path):
    """A run killed at 96 edits and resumed at 64 makes 96 again, without what it had there."""
    for step in (32, 64, 96):
        logger.log_metrics({"a": float(step), "val": 1.0}, step=step)
        if step == 64:
            saved = {edits: dict(row) for edits, row in logger.rows.items()}
    logger.finalize("failed")
    resumed = open_run(tmp_path)
    resumed.resume(saved, 64)
    resumed.log_metrics({"a": 7.0}, step=96)
    resumed.finalize("success")
    assert [(row["edits"], row["a"], row["val"]) for row in table(resumed)] == [
        ("32", "32.0", "1.0"),
        ("64", "64.0", "1.0"),
        ("96", "7.0", ""),
    ]
    # TensorBoard is told to leave out what the first run had beyond 64.
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(32, 32.0), (64, 64.0), (96, 7.0)]


def test_a_new_run_in_an_old_folder_begins_an_empty_table(logger, tmp_path):
    logger.log_metrics({"m": 1.0}, step=1)
    logger.finalize("failed")
    again = open_run(tmp_path)
    again.resume({}, 0)
    again.save()
    assert table(again) == []


# with a Trainer


class Measured(LightningModule):
    """Log three batches of 32 edits, and fail at the given one."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.automatic_optimization = False

    def training_step(self, batch, index):
        if index == self.fail_at:
            raise ZeroDivisionError
        self.log("step", 32.0 * (index + 1))
        self.log("ES", 0.5 + index)

    def configure_optimizers(self):
        return None

    def train_dataloader(self):
        return DataLoader(torch.zeros(3, 1))


def lightnings_own_warnings(test):
    """Ignore Lightning's warnings about loaders without workers, no optimizer, and trees of torch."""
    for message in (
        "does not have many workers",
        ".configure_optimizers. returned",
        ".isinstance.treespec, LeafSpec",
    ):
        test = pytest.mark.filterwarnings(f"ignore:.*{message}")(test)
    return test


def run(logger, tmp_path, **kwargs):
    trainer = Trainer(
        logger=logger, max_epochs=1, accelerator="cpu", log_every_n_steps=1, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Measured(**kwargs))


@lightnings_own_warnings
def test_a_trainers_run_is_a_row_for_each_number_of_edits(logger, tmp_path):
    run(logger, tmp_path)
    assert [(row["edits"], row["ES"]) for row in table(logger)] == [
        ("32", "0.5"),
        ("64", "1.5"),
        ("96", "2.5"),
    ]


@lightnings_own_warnings
def test_a_run_that_fails_has_written_what_it_measured(logger, tmp_path, monkeypatch):
    """It is written even if only the end of the run writes the table."""
    finalize, ended = RunLogger.finalize, []

    def noted(self, status):
        ended.append(status)
        monkeypatch.undo()  # from here on saving works again
        finalize(self, status)

    monkeypatch.setattr(RunLogger, "save", lambda self: None)
    monkeypatch.setattr(RunLogger, "finalize", noted)
    with pytest.raises(ZeroDivisionError):
        run(logger, tmp_path, fail_at=2)
    assert ended == ["failed"]
    assert [row["edits"] for row in table(logger)] == ["32", "64"]


@lightnings_own_warnings
def test_a_run_that_fails_before_it_has_anything_leaves_no_folder(logger, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(logger, tmp_path, fail_at=0)
    assert list((tmp_path / "recipe").iterdir()) == []
    # What anybody else has put there stays, and so does the folder.
    again = open_run(tmp_path)
    again.experiment.add_text("a", "b")  # makes the folder and an event file
    (tmp_path / "recipe" / "version_0" / "notes.txt").touch()
    again.finalize("failed")
    assert (tmp_path / "recipe" / "version_0" / "notes.txt").exists()


def test_the_table_is_replaced_whole_or_not_at_all(logger, monkeypatch):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    before = logger.table_path.read_bytes()
    logger.log_metrics({"a": 2.0}, step=2)

    def fail(self, row):
        raise ZeroDivisionError

    monkeypatch.setattr(csv.DictWriter, "writerow", fail)
    with pytest.raises(ZeroDivisionError):
        logger.save()
    assert logger.table_path.read_bytes() == before
    assert [p.name for p in logger.table_path.parent.iterdir() if p.suffix in (".csv", ".part")] == ["metrics.csv"]
    monkeypatch.undo()
    logger.save()  # and it is not forgotten that the row is unwritten
    assert [row["edits"] for row in table(logger)] == ["1", "2"]
