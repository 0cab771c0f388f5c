"""The list of runs: their states, what is read while a run begins, and the table of them."""

import json

import pytest
from filelock import FileLock

from editlab.errors import UserError
from editlab.runs.folder_lock import NAME, is_locked, lock_folder, unlock_folder
from editlab.view.listing import ListedRun, list_runs, require_runs, runs_table, states_of

TABLE = "edits,immediate/accuracy,retained/accuracy,retained/perplexity\n4,0.5,0.75,12.5\n8,1.0,,\n"


def run(folder, *, finished=False, table=TABLE):
    """A run's folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / NAME).touch()
    if table:
        (folder / "metrics.csv").write_text(table)
    if finished:
        (folder / "summary.json").write_text(json.dumps({"edits": 8, "metrics": {"retained/accuracy": 0.625}}))
    return folder


def test_states(tmp_path):
    run(tmp_path / "a" / "version_0", finished=True)
    run(tmp_path / "b" / "version_0")
    begun = run(tmp_path / "c" / "version_0", table="")
    run(tmp_path / "d" / "version_0", table="edits,x\nfour,\n")
    run(tmp_path / "never", table="")  # a failed start: no lock is held, and nothing was measured
    again = run(tmp_path / "e" / "version_0", finished=True)  # a finished run that goes on
    with FileLock(begun / NAME), FileLock(again / NAME):
        found = {one.name: one for one in list_runs(tmp_path)}
        assert [one.state for one in list_runs(tmp_path)][:2] == ["running", "running"]
    states = {name: one.state for name, one in found.items()}
    assert states == {
        "a/version_0": "finished", "b/version_0": "killed", "c/version_0": "running", "d/version_0": "damaged",
        "e/version_0": "running",
    }  # fmt: skip
    assert "metrics.csv is damaged" in found["d/version_0"].problem
    assert found["c/version_0"].edits is None
    # Of a finished run the summary counts; of another one the last value of each metric, at whatever point.
    assert found["a/version_0"].metrics["retained/accuracy"] == 0.625
    assert found["b/version_0"].metrics == {
        "immediate/accuracy": 1.0, "retained/accuracy": 0.75, "retained/perplexity": 12.5,
    }  # fmt: skip
    assert found["b/version_0"].edits == 8


def test_looking_at_a_lock_neither_takes_it_nor_makes_one(tmp_path):
    assert is_locked(tmp_path) is False
    assert not (tmp_path / NAME).exists()
    lock_folder(tmp_path)
    assert is_locked(tmp_path) is True
    unlock_folder(tmp_path)
    assert is_locked(tmp_path) is False
    with FileLock(tmp_path / NAME).acquire(timeout=0):  # it was let go
        assert is_locked(tmp_path) is True


def test_a_lock_that_cannot_be_read_is_not_taken_for_a_killed_run(tmp_path, monkeypatch):
    folder = run(tmp_path / "version_0")
    monkeypatch.setattr("editlab.view.listing.is_locked", lambda path: None)
    assert [one.state for one in list_runs(tmp_path)] == ["unknown"]
    (folder / "summary.json").write_text(json.dumps({"edits": 8, "metrics": {}}))
    assert [one.state for one in list_runs(tmp_path)] == ["finished"]


def test_the_folder_of_one_run(tmp_path):
    folder = run(tmp_path / "version_3", finished=True)
    assert [one.name for one in list_runs(folder)] == ["version_3"]


def test_what_is_no_folder_of_runs(tmp_path):
    with pytest.raises(UserError, match="There is no folder 'nowhere': name the folder of your runs"):
        require_runs("nowhere")
    with pytest.raises(UserError, match="has no run in it: start one with editlab fit"):
        require_runs(str(tmp_path))
    run(tmp_path / "version_0")
    assert require_runs(str(tmp_path)) == tmp_path


def test_the_table():
    runs = [
        ListedRun("a", None, "running", 12, {"retained/accuracy": 0.5, "retained/perplexity": 46.29}, changed=940.0),
        ListedRun("<b>", None, "killed", problem=""),
    ]
    table = runs_table(runs, now=1000.0)
    assert table.header == ["run", "state", "edits", "accuracy now", "perplexity now", "changed"]
    assert table.rows == [["a", "running", "12", "0.500", "46.3", "60 s ago"], ["<b>", "killed", "", "", "", ""]]
    assert table.numbers == [2, 3, 4]
    assert "<b>" not in table.to_html().replace("<bdi>", "")
    assert list(states_of(runs)) == ["running", "killed"]
