"""The choice of settings for N edits: candidates are forecast, and the strongest within a budget of harm is taken.

The harm of a setting falls as lambda rises, so for each choice of layers, context-key weight and memory the least
lambda of :data:`WEIGHTS` within the budget is found by halving, and the next larger one is forecast, too. Context-key
weight and memory are chosen at the widest set of layers, and the sets are then compared with these. The strongest
forecast is the one with the highest accuracy by the law of the calibration, in whole points, as smaller differences say
nothing; of equal ones it is that with the least harm. For another model than the calibrated one the law is a guess,
which is only used to put the candidates in an order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from editlab.edits.calibration import Calibration
from editlab.edits.forecast import Candidate, FactSample, Forecast
from editlab.errors import UserError

WEIGHTS = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Values of lambda that are tried."""
CONTEXT_WEIGHTS = (0.0, 0.1, 1.0)
"""Weights of the context keys that are tried."""
WIDTHS = (5, 3, 1)
"""Numbers of layers that are tried, up to the same highest layer."""


def layer_sets(editable: Sequence[int], own: Sequence[int], additive: bool) -> list[tuple[int, ...]]:
    """The sets of layers to try, the widest first: the recipe's own, and others with the same highest layer.

    Args:
        editable: numbers of the layers that can be edited.
        own: the recipe's layers.
        additive: whether several layers can share an edit (:class:`~editlab.lm.anatomy.Anatomy`).

    Raises:
        UserError: The model has no such layer.
    """
    missing = [layer for layer in own if layer not in editable]
    if missing:
        raise UserError(
            f"model.layers names {missing[0]}, and the layers that can be edited are {editable[0]} to {editable[-1]}: "
            "name one of these."
        )
    last = list(editable).index(max(own)) + 1
    widths = [min(width, last) for width in WIDTHS] if additive else [1]
    found = {tuple(sorted(own)), *(tuple(editable[last - width : last]) for width in widths)}
    return sorted(found, key=lambda layers: (-len(layers), layers))


@dataclass
class Search:
    """The candidates that were forecast for one choice, and the choice."""

    sample: FactSample
    laws: Calibration
    batch_size: int
    limit: float
    """largest acceptable harm"""
    tick: Callable[[Forecast], object] = lambda forecast: None
    """called with each new forecast"""
    found: dict[Candidate, Forecast] = field(default_factory=dict)

    def choose(self, sets: Sequence[tuple[int, ...]]) -> Forecast:
        """The strongest forecast within the limit; if there is none, the one with the least harm.

        Args:
            sets: sets of layers, as :func:`layer_sets` returns them.
        """
        widest, *others = sets
        for memory in (True, False):
            for context_weight in CONTEXT_WEIGHTS:
                self._try(widest, context_weight, memory)
        best = self.best.candidate
        for layers in others:
            self._try(layers, best.context_weight, best.memory)
        return self.best

    @property
    def best(self) -> Forecast:
        """The best of the forecasts so far."""
        within = [forecast for forecast in self.found.values() if forecast.harm <= self.limit]
        if within:
            return max(within, key=lambda forecast: (round(self.laws.accuracy(forecast), 2), -forecast.harm))
        return min(self.found.values(), key=lambda forecast: forecast.harm)

    def _try(self, layers: tuple[int, ...], context_weight: float, memory: bool) -> None:
        """Forecasts the least lambda within the limit and the next one; if none is within, the largest."""

        def harm(index: int) -> float:
            return self._forecast(Candidate(layers, WEIGHTS[index], context_weight, memory)).harm

        low, high = 0, len(WEIGHTS) - 1  # the least index within the limit lies in low ... high, if there is one
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if harm(middle) <= self.limit else (middle + 1, high)
        harm(low)
        harm(min(low + 1, len(WEIGHTS) - 1))

    def _forecast(self, candidate: Candidate) -> Forecast:
        if candidate not in self.found:
            (self.found[candidate],) = self.sample.forecast(candidate, self.batch_size)
            self.tick(self.found[candidate])
        return self.found[candidate]


MOST_FORECASTS = 4 * (len(CONTEXT_WEIGHTS) * 2 + len(WIDTHS))
"""Largest number of forecasts of a search, for a progress bar."""
