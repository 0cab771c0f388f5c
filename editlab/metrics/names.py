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
        main: whether the summary on the screen shows it; reports show all.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 3
    main: bool = True

    @property
    def best(self) -> Callable[..., float]:
        """``max`` or ``min``: the function that picks the best of several values."""
        return max if self.better == "higher" else min


METRICS = (
    MetricName("ES", "ES"),
    MetricName("accuracy", "accuracy"),
    MetricName("generation", "generation"),
    MetricName("PS", "PS"),
    MetricName("paraphrase_accuracy", "paraphrase accuracy"),
    MetricName("paraphrase_generation", "paraphrase generation", main=False),
    MetricName("NS", "NS"),
    MetricName("neighbor_accuracy", "neighbor accuracy"),
    MetricName("neighbor_generation", "neighbor generation", main=False),
    MetricName("S", "S", main=False),
    MetricName("perplexity", "held-out perplexity", "lower", 2),
    MetricName("generation_entropy", "generation entropy", "higher", 2, main=False),
    MetricName("bystander_accuracy", "bystander accuracy"),
    MetricName("bystander_generation", "bystander generation"),
)
"""Rows of the metric table of one run, in their order."""

PERPLEXITY, GENERATION_ENTROPY = LANGUAGE = ("perplexity", "generation_entropy")
"""Metrics of the model's language; the others are metrics of facts."""

PERPLEXITY_START, PERPLEXITY_LOW, PERPLEXITY_HIGH = ("perplexity_start", "perplexity_low", "perplexity_high")
"""Perplexity of the first tokens of the text, as measured on the way, and the 95% interval of that of the whole."""

MAGNITUDES = ("ES_magnitude", "PS_magnitude", "NS_magnitude")
"""Mean differences of probabilities: logged and in ``summary.json``, but not in the table."""

SCORED = ("ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy", *MAGNITUDES)
"""Metrics of the probabilities of given targets, in the order in which a step logs them."""

EDIT, PARAPHRASE, NEIGHBOR, BYSTANDER = PROMPTS = ("edit", "paraphrase", "neighbor", "bystander")
"""Kinds of prompts that the model answers freely; the questions of a portability group are a kind of
their own (:func:`portability_name`)."""

BYSTANDER_ACCURACY = "bystander_accuracy"
"""Fraction of the bystanders where the argmax is right at every token of the truth."""

PORTABILITY = "portability"
"""First part of the names of the metrics of a portability group."""


GENERATION_JUDGED = "generation_judged"
"""Fraction of the free answers to edit prompts that a judge accepts, of those with a verdict."""


def generation_name(prompts: str, kind: str = "contains") -> str:
    """The name of a score of the answers to a kind of prompt; ``contains`` is the one that tables show.

    Args:
        prompts: one of :data:`PROMPTS`, or a portability group as ``portability/GROUP``.
        kind: ``contains``, ``exact`` or ``f1``.

    >>> generation_name("edit"), generation_name("neighbor", "f1"), generation_name("portability/reasoning")
    ('generation', 'neighbor_generation_f1', 'portability/reasoning/generation')
    """
    start = "" if prompts == EDIT else f"{prompts}_" if prompts in PROMPTS else f"{prompts}/"
    return f"{start}generation" + ("" if kind == "contains" else f"_{kind}")


def portability_name(group: str) -> str:
    """The name of a portability group as a kind of prompts, and the first part of the names of its metrics.

    >>> full_name("retained", portability_name("reasoning") + "/accuracy")
    'retained/portability/reasoning/accuracy'
    """
    return f"{PORTABILITY}/{group.replace('/', '_')}"


def perplexity_name(text: str) -> str:
    """The name of the perplexity of a text that has a name.

    >>> perplexity_name("wikitext")
    'perplexity_wikitext'
    """
    return f"{PERPLEXITY}_{text}"


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
