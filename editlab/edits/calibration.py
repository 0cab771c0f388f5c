"""What a forecast means: accuracy and perplexity of runs of one model, fitted on measured runs.

Two laws, each with its reason, turn a :class:`~editlab.edits.forecast.Forecast` into what a run measures:

- An edit is lost if too little of it is held, if too much of others is added, or if the other tokens of its prompt,
  which the model reads too, have drifted: the odds that it stands are ``exp(a - c crosstalk - d drift) held^b`` with b,
  c and d not negative, and the retained accuracy is the mean chance over the edits.
- The loss on ordinary text is nearly at a minimum in the unedited model, so a small change of the outputs raises it in
  second order: ``log(perplexity after / before) = s harm^p`` with p near 1, where the harm is a mean square.

``scripts/calibrate_plan.py`` fits the six numbers (:mod:`editlab.experiments.plan_calibration`). They ship in
``plan_calibration.json`` together with the measured rows, and hold for that model, text and data set alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from editlab.edits.forecast import Candidate, Forecast
from editlab.errors import EditLabError

SHIPPED = Path(__file__).with_name("plan_calibration.json")
LEAST = 0.01
"""Least fraction held whose logarithm is taken; the others of a batch may even turn an edit's own part around."""

FLOOR = 0.01
"""Logarithm of a perplexity ratio that counts as 0 where errors are relative."""


@dataclass(frozen=True)
class AccuracyLaw:
    """Retained accuracy of a forecast."""

    intercept: float
    held: float
    """power of the fraction that is held"""
    crosstalk: float
    """weight of the crosstalk"""
    drift: float
    """weight of the drift"""
    error: float
    """largest absolute error of nine in ten predictions of configurations that the fit has not seen"""

    def __call__(self, forecast: Forecast) -> float:
        """The mean over the edits of the chance that an edit still stands."""
        held = forecast.held.clamp_min(LEAST).log()
        logits = self.intercept + self.held * held - self.crosstalk * forecast.crosstalk - self.drift * forecast.drift
        return float(torch.sigmoid(logits).mean())

    def range(self, forecast: Forecast) -> tuple[float, float]:
        """The prediction minus and plus the error, within 0 to 1."""
        accuracy = self(forecast)
        return max(0.0, accuracy - self.error), min(1.0, accuracy + self.error)


@dataclass(frozen=True)
class PerplexityLaw:
    """Perplexity after a run over that before, of a forecast."""

    slope: float
    power: float
    error: float
    """largest error of nine in ten such predictions, as a fraction of the predicted logarithm plus :data:`FLOOR`"""

    def __call__(self, harm: float) -> float:
        """The ratio at some harm."""
        return math.exp(min(700.0, self.slope * harm**self.power))

    def range(self, harm: float) -> tuple[float, float]:
        """The ratio with a logarithm that is smaller and larger by the error."""
        log = math.log(self(harm))
        half = self.error * (log + FLOOR)
        return math.exp(max(0.0, log - half)), math.exp(min(700.0, log + half))

    def harm(self, ratio: float) -> float:
        """The harm at which a ratio above 1 is expected."""
        return float((math.log(ratio) / self.slope) ** (1 / self.power))


@dataclass(frozen=True)
class MeasuredRow:
    """A run that was measured (the mean over its seeds), and its forecast."""

    source: str
    """table and case, such as ``replay_ablation.csv: none``"""
    seeds: int
    candidate: Candidate
    edits: int
    batch_size: int
    accuracy: float
    """retained accuracy"""
    ratio: float | None
    """perplexity after over before; None if it was not measured"""
    held: float
    crosstalk: float
    drift: float
    harm: float

    def distance(self, forecast: Forecast) -> float:
        """How far its settings are from those of a forecast: factors count by their logarithms to base 2."""
        one, other = self.candidate, forecast.candidate
        apart = abs(math.log2(self.edits / forecast.edits)) + abs(math.log2(one.weight / other.weight)) / 2
        apart += abs(math.log2((one.context_weight + 0.03) / (other.context_weight + 0.03))) / 4
        same = set(one.layers) & set(other.layers)
        apart += 1 - len(same) / len(set(one.layers) | set(other.layers))
        return apart + 2 * (one.memory != other.memory)


@dataclass(frozen=True)
class Calibration:
    """The laws of one model, the rows behind them, and what those were made with."""

    model: str
    """name of the model"""
    fingerprint: str
    """fingerprint of its unedited weights (:func:`editlab.lm.fingerprint.fingerprint`)"""
    accuracy: AccuracyLaw
    perplexity: PerplexityLaw
    rows: tuple[MeasuredRow, ...]
    provenance: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path = SHIPPED) -> Calibration:
        """Reads a file that :meth:`save` wrote; default: the one that ships.

        Raises:
            EditLabError: The file cannot be read, or holds no calibration.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            laws = AccuracyLaw(**content["accuracy"]), PerplexityLaw(**content["perplexity"])
            rows = tuple(MeasuredRow(**{**row, "candidate": _candidate(row["candidate"])}) for row in content["rows"])
            return cls(content["model"], content["fingerprint"], *laws, rows, content["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EditLabError(f"{path} holds no calibration of plans ({error}): install editlab again.") from error

    def text(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def nearest(self, forecast: Forecast, count: int = 3) -> list[MeasuredRow]:
        """The measured rows with the most similar settings, the nearest first."""
        return sorted(self.rows, key=lambda row: row.distance(forecast))[:count]

    def outside(self, forecast: Forecast) -> list[str]:
        """How a forecast lies outside of what was measured, as phrases; empty if it does not."""
        found = []
        for name, value, measured in (
            ("edits", forecast.edits, [row.edits for row in self.rows]),
            ("batch size", forecast.batch_size, [row.batch_size for row in self.rows]),
            ("lambda", forecast.candidate.weight, [row.candidate.weight for row in self.rows]),
            ("layers", len(forecast.candidate.layers), [len(row.candidate.layers) for row in self.rows]),
            ("lowest layer", min(forecast.candidate.layers), [min(row.candidate.layers) for row in self.rows]),
            ("highest layer", max(forecast.candidate.layers), [max(row.candidate.layers) for row in self.rows]),
            ("context-key weight", forecast.candidate.context_weight, [r.candidate.context_weight for r in self.rows]),
        ):
            low, high = min(measured), max(measured)
            if not low <= value <= high:
                span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                found.append(f"{name} {value:g} (measured: {span})")
        return found


def _candidate(content: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**content, "layers": tuple(content["layers"])})
