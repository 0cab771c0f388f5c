"""Counting facts that got no update: across a resume, too. The count itself: tests/cli/test_run_folders.py."""

from editlab.edits.unmoved import UnmovedFacts


def test_the_counts_go_on_after_a_resume(caplog):
    before = UnmovedFacts()
    before.facts, before.of = 3, 10
    after = UnmovedFacts()
    after.load_state_dict(before.state_dict())
    after.conclude()
    assert "In all: 3 of 10 facts got no update" in caplog.text
    after.load_state_dict({})  # of a checkpoint of an older version
    assert (after.facts, after.of) == (0, 0)
