"""The base of all editing methods, whether they solve a closed form, train, or leave the weights as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from editlab.errors import UserError


@dataclass(frozen=True)
class EditMethod(ABC):
    """A way of getting a batch of facts into a model: the setting ``model.method``.

    :class:`editlab.solver.methods.Method` is the base of methods that solve the closed form,
    :class:`editlab.training.methods.TrainedMethod` of those that train, and
    :class:`editlab.evaluation.retrieval.Retrieval` changes no weight.
    """

    changes_weights: ClassVar[bool] = True
    """Whether an edit changes weights of the model."""

    @property
    @abstractmethod
    def solves(self) -> bool:
        """Whether the method solves the closed form, so that it needs keys, values v* and second moments."""

    @property
    def needs_moments(self) -> bool:
        """Whether second moments C0 have to be computed; without, a metric gets a tensor without data."""
        return self.solves

    @property
    def edits_between_refreshes(self) -> int:
        """Number of edits after which the metric has to be computed again; 0 if it never changes."""
        return 0

    @property
    def largest_batch(self) -> int | None:
        """Largest number of facts that one step of this method may edit; None for no limit."""
        return None

    def require_closed_form(self, what: str, why: str) -> None:
        """Make sure that the method solves the closed form, which a setting needs.

        Args:
            what: the setting, as a recipe writes it.
            why: what the setting needs, as a clause.

        Raises:
            UserError: The method does not solve the closed form.
        """
        if not self.solves:
            raise UserError(
                f"{what} cannot be used with the method {type(self).__name__}, because {why}: remove it, or set "
                "model.method to a method that solves the closed form, such as MEMIT."
            )

    def require_changed_weights(self, what: str, why: str) -> None:
        """Make sure that the method changes weights, which a callback or a command needs.

        Args:
            what: the callback or command.
            why: what it needs, as a clause.

        Raises:
            UserError: The method changes no weight.
        """
        if not self.changes_weights:
            raise UserError(
                f"{what} cannot be used with the method {type(self).__name__}, because {why}: remove it, or set "
                "model.method to a method that changes weights, such as MEMIT."
            )
