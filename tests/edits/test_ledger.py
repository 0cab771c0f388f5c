"""The ledger: what stands, what was rolled back, what was superseded."""

from dataclasses import replace

from editlab.edits.ledger import Ledger
from tests.facts import FACTS

A, B = FACTS[:2]
AGAIN = replace(A, target_new="Lima")


def test_a_later_kept_edit_supersedes():
    ledger = Ledger()
    ledger.add([A, B], 0, [1.0, 1.0])
    ledger.add([AGAIN], 1, [0.5])
    assert (len(ledger), ledger.kept, ledger.superseded) == (3, 3, 1)
    assert ledger.standing == [B, AGAIN]


def test_an_edit_that_was_rolled_back_supersedes_nothing():
    ledger = Ledger()
    ledger.add([A, B], 0, [1.0, 1.0])
    ledger.add([AGAIN], 1, [0.0])
    assert (len(ledger), ledger.kept, ledger.superseded) == (3, 2, 0)
    assert ledger.standing == [A, B]


def test_fates_in_words():
    ledger = Ledger()
    ledger.add([A, B], 0, [1.0, 0.5])
    ledger.add([AGAIN, A], 1, [0.25, 0.0])
    assert ledger.fates == ["superseded by edit 3", "scaled to 0.5", "scaled to 0.25", "rolled back"]
    assert Ledger().fates == []


def test_of_independent_batches_only_the_last_is_in_the_weights():
    ledger = Ledger(independent=True)
    assert (ledger.standing, ledger.fates) == ([], [])
    ledger.add([A, B], 0, [1.0, 0.0])
    assert ledger.standing == [A]
    ledger.add([AGAIN, AGAIN], 1, [1.0, 0.5])
    assert ledger.standing == [AGAIN]
    out = "taken out before the next batch"
    assert ledger.fates == [out, "rolled back", "superseded by edit 4", "scaled to 0.5"]
    assert (ledger.kept, ledger.superseded) == (3, 1)
    saved = {"ledger": ledger.state_dict(), "independent": True}
    assert Ledger.of(saved).fates == ledger.fates


def test_its_state_goes_round():
    ledger, other = Ledger(), Ledger()
    ledger.add([A, B], 0, [0.25, 0.0])
    other.load_state_dict(ledger.state_dict())
    assert [(e.fact, e.batch, e.factor, e.kept) for e in other] == [(A, 0, 0.25, True), (B, 0, 0.0, False)]
