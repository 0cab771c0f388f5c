"""Events as JSON lines: whole lines only, continued without gap or repeat."""

import json

import pytest

from editlab.errors import UserError
from editlab.runs.event_log import EventLog


def test_events_are_read_as_they_were_written(tmp_path):
    events = EventLog(tmp_path / "run" / "events.jsonl")
    assert events.read() == []
    events.resume(0)  # no file is no trouble
    for step in range(3):
        events.append({"step": step, "what": "Zürich\nand on"})
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert events.read()[1] == {"step": 1, "what": "Zürich\nand on"}


def test_a_resumed_run_drops_the_events_that_it_writes_again(tmp_path):
    events = EventLog(tmp_path / "events.jsonl")
    for step in (0, 0, 1, 2, 2):
        events.append({"step": step})
    with events.path.open("a") as file:
        file.write('{"step": 3, "sc')  # killed here
    events.resume(2)
    events.append({"step": 2, "new": True})
    assert events.read() == [{"step": 0}, {"step": 0}, {"step": 1}, {"step": 2, "new": True}]


def test_lines_of_other_programs_are_skipped(tmp_path):
    events = EventLog(tmp_path / "events.jsonl")
    events.append({"step": 0})
    with events.path.open("ab") as file:
        file.write(b'[1]\n{"a": 1}\n\xff\n{"step": "x"}\n{"step": 1, "what": "Z\xc3')  # killed within a character
    assert events.read() == [{"step": 0}]
    events.resume(5)
    assert events.path.read_bytes() == b'{"step": 0}\n'


def test_an_event_that_json_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    events = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        events.append({"step": 0, "score": float("nan")})
    assert not events.path.exists()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        EventLog(tmp_path / "file" / "events.jsonl").append({"step": 0})
