"""The learned trust score: a logistic regression on a batch's signals, fitted on forks.

The regression is fitted once by ``scripts/train_trust_score.py`` on batches of the dev half whose harm is known, since
each was both accepted and rejected (:mod:`callbacks.trust.fork`). Its numbers ship in ``learned_score.json``; a run
needs no library for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.trust.score import GAIN, PENALTIES, SCALES, TrustMetrics, TrustScorer
from editlab.errors import EditLabError

SHIPPED = Path(__file__).with_name("learned_score.json")
FEATURES = (GAIN, "certainty", *PENALTIES)
LIMIT = 6.0
"""Largest absolute value of a feature, so that one signal far off does not hide all others."""


def features(metrics: TrustMetrics, scales: Mapping[str, Any]) -> dict[str, float]:
    """The signals of a batch in units of what is usual in the run, within ``-LIMIT`` to ``LIMIT``.

    A penalty is its distance from the median of the calibration batches, over the width of its scale; the gain is a
    fraction of their median; the certainty is a probability as it is.
    """
    found = {"certainty": metrics.certainty, GAIN: metrics.edit_success_gain / (2 * scales[GAIN].half)}
    for name in PENALTIES:
        found[name] = (getattr(metrics, name) - scales[name].free) / scales[name].half + 1
    return {name: max(-LIMIT, min(LIMIT, value)) for name, value in found.items()}


class LearnedScorer(TrustScorer):
    """Trust = the probability that accepting the batch does no harm, ``1 / (1 + exp(intercept + sum w_i x_i))``.

    The features x are :func:`features`. No weight of a penalty is negative and none of the gain or certainty positive,
    so trust does not fall where more is learnt, nor rise where more is harmed. Harmful and harmless batches weigh the
    same in the fit, so 0.5 is the threshold at which both kinds of error count alike.

    Args:
        path: the file with the fit.
        scales: as for :class:`~callbacks.trust.score.TrustScorer`.
        calibrate: number of batches after which the scales are fixed; 0 keeps the built-in ones.

    Raises:
        EditLabError: The file cannot be read, or does not hold a fit.
        UserError: A scale is bad.
    """

    def __init__(
        self,
        path: Path = SHIPPED,
        scales: Mapping[str, Sequence[float]] | None = None,
        calibrate: int = 4,
    ) -> None:
        super().__init__(None, scales, calibrate)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.intercept = float(content["intercept"])
            self.coefficients = {name: float(weight) for name, weight in content["weights"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EditLabError(f"{path} holds no learned trust score ({error}): install editlab again.") from error
        if not self.coefficients.keys() <= set(FEATURES):
            raise EditLabError(f"{path} has weights of unknown signals: install editlab again.")

    def score(self, metrics: TrustMetrics) -> float:
        """Trust in a batch, 0 to 1."""
        return self._trust(features(metrics, self.scales))

    def _trust(self, found: Mapping[str, float]) -> float:
        exponent = self.intercept + sum(weight * found[name] for name, weight in self.coefficients.items())
        return 1 / (1 + math.exp(min(700.0, exponent)))

    def ceiling(self, metrics: TrustMetrics) -> float:
        """The score that a batch which learns as much would have if its penalties were at most the usual ones."""
        found = features(metrics, self.scales)
        return self._trust({name: min(0.0, x) if name in PENALTIES else x for name, x in found.items()})

    def costliest(self, metrics: TrustMetrics) -> str:
        """The signal that lowers a batch's score the most, against what is usual in the run."""
        usual = {**dict.fromkeys(PENALTIES, 0.0), "certainty": 1.0, GAIN: 1.0}
        found = features(metrics, self.scales)
        return max(self.coefficients, key=lambda name: self.coefficients[name] * (found[name] - usual[name]))


def replayed(events: Sequence[Mapping[str, Any]], scorer: TrustScorer) -> list[float | None]:
    """The score of each batch of a run's event log, by a scorer that sees them in order and calibrates as in the run.

    Args:
        events: a run's events of kind ``batch``; those without signals get None.
        scorer: a scorer that has seen no batch.
    """
    scores: list[float | None] = []
    for event in events:
        if not event["signals"]:
            scores.append(None)
            continue
        metrics = TrustMetrics(**{name: event["signals"].get(name, 0.0) for name in (*SCALES, "certainty")})
        scores.append(scorer.score(metrics))
        scorer.observe(metrics)
    return scores
