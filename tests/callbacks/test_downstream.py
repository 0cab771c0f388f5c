"""Curves of downstream tasks: when they are measured, what is logged, and a run that was stopped and resumed."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import DownstreamEval
from editlab.cli.main import main
from editlab.errors import UserError
from editlab.runs.run_table import read_table
from tests.harness import stand_in, write_task
from tests.recipes import write_recipe
from tests.test_editor import editor, fit

NAME = "downstream/known/acc"


def test_points_are_logged_before_on_the_way_and_at_the_end(tiny_folder, tmp_path, monkeypatch):
    harness = stand_in(monkeypatch)
    curve = DownstreamEval(["known"], every_n_edits=4, limit=3, batch_size=2)
    fit(tmp_path, editor(tiny_folder), callbacks=[curve], limit=6, batch_size=2)
    assert sorted(curve.curve) == [0, 4, 6]
    assert len({point[NAME] for point in curve.curve.values()}) == 3  # each of other weights
    # The task is loaded before the first edit; then each point loads it, wraps the model and evaluates it.
    assert harness.calls == ["manager, defaults True", "load", *["load", "wrap", "evaluate"] * 3]
    assert (harness.given["limit"], harness.given["batch_size"], harness.given["bootstrap_iters"]) == (3, 2, 0)
    run = tmp_path / "logs" / "run" / "version_0"
    events = [(e.step, e.value) for e in EventAccumulator(str(run)).Reload().Scalars(NAME)]
    assert events == [(step, pytest.approx(point[NAME])) for step, point in sorted(curve.curve.items())]
    table = read_table(run / "metrics.csv")
    assert {step: row[NAME] for step, row in table.items() if NAME in row} == {
        step: point[NAME] for step, point in curve.curve.items()
    }


def test_a_second_run_forgets_the_first(tiny_folder, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    curve = DownstreamEval(["known"])
    for name in ("first", "second"):
        fit(tmp_path, editor(tiny_folder), callbacks=[curve], limit=2, batch_size=2, name=name)
        assert sorted(curve.curve) == [0, 2]


def test_a_stopped_and_resumed_run_has_the_same_curve(tiny_folder, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    tables = {}
    for name, commands in (("whole", [[]]), ("stopped", [["--trainer.max_steps", "2"], ["--ckpt_path", "last"]])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        callback = {"class_path": "DownstreamEval", "init_args": {"tasks": ["known"], "every_n_edits": 2}}
        write_recipe(tmp_path / name, tiny_folder, data={"limit": 6}, trainer={"callbacks": [callback]})
        for more in commands:
            assert main(["fit", "--config", "tiny.yaml", *more]) == 0
        tables[name] = read_table(tmp_path / name / "lightning_logs" / "tiny" / "version_0" / "metrics.csv")
    assert [step for step, row in tables["whole"].items() if NAME in row] == [0, 2, 4, 6]
    assert tables["stopped"] == tables["whole"]
    # A finished run that is resumed measures its end again, which no checkpoint holds.
    assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"]) == 0
    assert read_table(tmp_path / "stopped" / "lightning_logs" / "tiny" / "version_0" / "metrics.csv") == tables["whole"]


@pytest.mark.parametrize(("settings", "message"), [
    ({"tasks": []}, r"DownstreamEval\.tasks is empty: name at least one"),
    ({"tasks": ["a"], "every_n_edits": 0}, r"DownstreamEval\.every_n_edits is 0: it must be at least 1"),
    ({"tasks": ["a"], "limit": 0}, r"DownstreamEval\.limit is 0: it must be at least 1"),
    ({"tasks": ["a"], "batch_size": 0}, r"DownstreamEval\.batch_size is 0: it must be at least 1"),
])  # fmt: skip
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DownstreamEval(**settings)


def test_an_unknown_task_ends_the_run_before_its_first_edit(tiny_folder, tmp_path, monkeypatch):
    harness = stand_in(monkeypatch)
    with pytest.raises(UserError, match="There is no task 'unknown'"):
        fit(tmp_path, editor(tiny_folder), callbacks=[DownstreamEval(["unknown"])], limit=2)
    assert "evaluate" not in harness.calls


@pytest.mark.filterwarnings("ignore")
def test_a_curve_of_the_real_harness(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'editlab[lm-eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    curve = DownstreamEval([write_task(tmp_path)], every_n_edits=2)
    plain, measured = editor(tiny_folder), editor(tiny_folder)
    fit(tmp_path, plain, limit=4, batch_size=2, name="plain")
    fit(tmp_path, measured, callbacks=[curve], limit=4, batch_size=2, name="measured")
    run = tmp_path / "logs" / "measured" / "version_0"
    events = EventAccumulator(str(run)).Reload().Scalars("downstream/capitals/acc")
    assert [e.step for e in events] == [0, 2, 4]
    assert all(e.value * 3 == pytest.approx(round(e.value * 3), abs=1e-5) for e in events)  # of three documents
    for one, other in zip(plain.layers, measured.layers, strict=True):
        assert (one.total == other.total).all()  # measuring changes no bit of the edits
