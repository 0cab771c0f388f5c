"""Names of metrics: ``group/metric``, such as ``retained/ES``, in logs, tables, ``summary.json``, reports and figures.

This module is the only list of them: their groups, order, titles, and which direction is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

V = TypeVar("V")

BEFORE, IMMEDIATE, RETAINED, BYSTANDERS = "before", "immediate", "retained", "bystanders"

GROUPS: Mapping[str, str] = {
    BEFORE: "the edited facts on the unedited model",
    IMMEDIATE: "each batch's facts right after its own step",
    RETAINED: "all edits that the weights should hold, on the weights as they are",
    BYSTANDERS: "facts that were never edited",
}
"""group -> what is measured in it"""

TABLE_GROUPS = (BEFORE, IMMEDIATE, RETAINED)
"""Columns of the metric table of one run."""


@dataclass(frozen=True)
class MetricName:
    """One metric: how it is named and shown.

    Attributes:
        name: the part after the group in ``group/metric``.
        title: what tables and figures call it.
        better: ``higher`` or ``lower``.
        digits: decimals in a table.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 3

    @property
    def best(self) -> Callable[..., float]:
        """``max`` or ``min``: the function that picks the best of several values."""
        return max if self.better == "higher" else min


METRICS = (
    MetricName("ES", "ES"),
    MetricName("PS", "PS"),
    MetricName("NS", "NS"),
    MetricName("S", "S"),
    MetricName("accuracy", "accuracy"),
    MetricName("paraphrase_accuracy", "paraphrase accuracy"),
    MetricName("neighbor_accuracy", "neighbor accuracy"),
    MetricName("perplexity", "held-out perplexity", "lower", 2),
    MetricName("generation_entropy", "generation entropy", "higher", 2),
)
"""Rows of the metric table of one run, in their order."""

PERPLEXITY, GENERATION_ENTROPY = LANGUAGE = ("perplexity", "generation_entropy")
"""Metrics of the model's language; the others are metrics of facts."""

MAGNITUDES = ("ES_magnitude", "PS_magnitude", "NS_magnitude")
"""Mean differences of probabilities: logged and in ``summary.json``, but not in the table."""


def full_name(group: str, name: str) -> str:
    """The name of a metric in a group.

    >>> full_name("retained", "ES")
    'retained/ES'
    """
    return f"{group}/{name}"


def age_name(number: int) -> str:
    """The name of the accuracy of the edits in age bin ``number``, from 1 (the newest).

    >>> full_name("retained", age_name(1))
    'retained/accuracy_age_1'
    """
    return f"accuracy_age_{number}"


def add_group(group: str, values: Mapping[str, V]) -> dict[str, V]:
    """The same values under their full names.

    >>> add_group("before", {"ES": 0.5})
    {'before/ES': 0.5}
    """
    return {full_name(group, name): value for name, value in values.items()}


def of_group(metrics: Mapping[str, V], group: str) -> dict[str, V]:
    """The values of one group, without the group in their names.

    >>> of_group({"before/ES": 0.5, "retained/ES": 1.0}, "before")
    {'ES': 0.5}
    """
    start = full_name(group, "")
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
