"""Batches of edits that are trained in place of solved, or only remembered, with the interface of a batch solver."""

from __future__ import annotations

import torch

from editlab.distributed import ranks
from editlab.edits.batch import BatchSolver
from editlab.edits.plan import EditOutcome
from editlab.solver.base import EditMethod
from editlab.training.breadth_first import train
from editlab.training.methods import TrainedMethod


class BatchTrainer(BatchSolver):
    """Trains batches of edits by the method :class:`~editlab.training.methods.TrainedMethod` of its settings.

    Verdicts are carried out as for solved batches: the update of a batch is scaled or removed, and without dropped
    facts the batch is trained again from the weights before it.
    """

    def solve(self, outcome: EditOutcome) -> None:
        """Trains the outcome's facts, and the facts of its additions with their weights, and adds the updates.

        With several ranks each of them trains, and the first rank's updates are added.

        Args:
            outcome: its plan is trained; it gets the updates and the numbers of the training.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
        """
        method, plan = self.settings.method, outcome.plan
        assert isinstance(method, TrainedMethod)
        facts = [*plan.facts, *(addition.fact for addition in plan.additions)]
        weights = [1.0] * len(plan.facts) + [addition.weight for addition in plan.additions]
        trained = train(method, self.lm, list(self.layers), facts, weights, plan.step)
        outcome.diagnostics |= {"loss": trained.loss, "epochs": float(trained.epochs)}
        with torch.no_grad():
            for number, layer in self.layers.items():
                update = ranks.broadcast(trained.updates[number].to(layer.total))
                layer.add(update)
                outcome.updates[number] = outcome.last_updates[number] = update
                norm = float(update.norm() / layer.original.float().norm())
                outcome.diagnostics[f"layer_{number}/update_norm"] = norm


class BatchKeeper(BatchSolver):
    """Leaves the weights as they are: the facts of a batch are only put into the ledger."""

    def solve(self, outcome: EditOutcome) -> None:
        """Does nothing; the outcome has no updates."""


def solver_of(method: EditMethod) -> type[BatchSolver]:
    """The kind of solver of batches that a method asks for."""
    return BatchSolver if method.solves else BatchTrainer if isinstance(method, TrainedMethod) else BatchKeeper
