"""A callback that keeps one batch whole, scales the next, and rolls back the third: every fate a ledger knows."""

from editlab.callback import EditCallback


class Verdicts(EditCallback):
    """Half of the second batch stays, and nothing of the third."""

    def on_edit_applied(self, trainer, editor, outcome):
        if outcome.plan.step == 1:
            outcome.scale(0.5, "a test")
        if outcome.plan.step == 2:
            outcome.roll_back("a test")
