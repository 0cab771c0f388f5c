"""What every metric class is tested for, after torchmetrics' MetricTester; a new metric is one more entry of CASES.

Each case has a class and its arguments, the function that is its twin, the arguments of some updates, and the value
that an implementation of its own, in plain Python, gives for all of them together.
"""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torchmetrics import Metric

from editlab.distributed import ranks
from editlab.metrics import (
    AnswerScore,
    CaseScore,
    EfficacyScore,
    GenerationEntropy,
    NeighborhoodScore,
    ParaphraseScore,
    PromptScores,
    RetentionByAge,
    TokenPerplexity,
)
from editlab.metrics.functional import (
    answer_score,
    case_score,
    efficacy_score,
    generation_entropy,
    neighborhood_score,
    paraphrase_score,
    retention_by_age,
    token_perplexity,
)

NAN = float("nan")


def scores(rows):
    """Rows of (record, P(new), P(true), hit_new, hit_true) as PromptScores."""
    record, new, true, hit_new, hit_true = zip(*rows, strict=True) if rows else ((),) * 5
    return PromptScores(
        torch.tensor(new).log(), torch.tensor(true).log(), torch.tensor(hit_new, dtype=torch.bool),
        torch.tensor(hit_true, dtype=torch.bool), torch.tensor(record, dtype=torch.long),
    )  # fmt: skip


# Several prompts of a record, a record without a truth, ties, and records that do not come in order.
FIRST = [
    (0, 0.6, 0.2, True, False),
    (0, 0.1, 0.5, False, True),
    (1, 0.2, 0.3, False, False),
    (4, 0.4, NAN, True, False),
]
SECOND = [(7, 0.9, 0.1, True, False), (6, 0.25, 0.25, False, True), (6, 0.3, 0.1, True, True)]


def by_record(rows, value):
    """Mean over records of the mean over a record's rows; rows whose value is None do not count."""
    records = defaultdict(list)
    for row in rows:
        if value(*row[1:]) is not None:
            records[row[0]].append(value(*row[1:]))
    return [mean(records[number]) for number in sorted(records)]


def preference(new, true, hit_new, hit_true):
    """Whether the new target is more likely."""
    return None if math.isnan(true) else float(new > true)


def opposite(new, true, hit_new, hit_true):
    """Whether the true target is more likely."""
    return None if math.isnan(true) else float(true > new)


def entropy(text):
    """(2/3 H2 + 4/3 H3) / 2, in bits."""
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        total += weight * sum(-math.log2(grams.count(gram) / len(grams)) for gram in grams) / len(grams) / 2
    return total


@dataclass
class Case:
    """A metric, some updates, and the value that they should give."""

    metric: type[Metric]
    function: Callable[..., Any]
    updates: list[tuple[Any, ...]]
    expected: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def new(self, **kwargs: Any) -> Metric:
        return self.metric(**self.arguments, **kwargs)


PAIR = [(scores(FIRST),), (scores(SECOND),)]
TEXTS = [[[1, 2, 1, 2, 3], [5, 5, 5, 5], [1]], [[4, 2, 4, 2, 4, 4, 2]]]
PROBABILITIES = [[0.5, 0.25], [0.125, 0.75, 0.1]]
AGED = [(scores(FIRST[:1] + FIRST[2:]), torch.tensor([9, 5, 4])), (scores(SECOND[:2]), torch.tensor([1, 2]))]

ANSWERS = [
    (["Rome.", "Paris"], [["Rome"], ["Oslo", "Paris"]], torch.tensor([0, 0])),
    (["the river Po", "Lima is in Peru"], [["Po"], ["Peru"]], torch.tensor([4, 2])),
]

CASES = {
    "ES": Case(EfficacyScore, efficacy_score, PAIR, mean(by_record(FIRST + SECOND, preference))),
    "PS": Case(ParaphraseScore, paraphrase_score, PAIR, mean(by_record(FIRST + SECOND, preference))),
    "NS": Case(NeighborhoodScore, neighborhood_score, PAIR, mean(by_record(FIRST + SECOND, opposite))),
    "accuracy": Case(
        EfficacyScore, partial(efficacy_score, kind="accuracy"), PAIR,
        mean(by_record(FIRST + SECOND, lambda n, t, hit, ht: float(hit))), {"kind": "accuracy"},
    ),
    "neighbor accuracy": Case(
        NeighborhoodScore, partial(neighborhood_score, kind="accuracy"), PAIR,
        mean(by_record(FIRST + SECOND, lambda n, t, hit, ht: None if math.isnan(t) else float(ht))),
        {"kind": "accuracy"},
    ),
    "magnitude": Case(
        ParaphraseScore, partial(paraphrase_score, kind="magnitude"), PAIR,
        mean(by_record(FIRST + SECOND, lambda n, t, hit, ht: None if math.isnan(t) else n - t)), {"kind": "magnitude"},
    ),
    "generation entropy": Case(
        GenerationEntropy, generation_entropy, [(texts,) for texts in TEXTS],
        mean(entropy(text) for texts in TEXTS for text in texts if len(text) > 2),
    ),
    "perplexity": Case(
        TokenPerplexity, token_perplexity, [(torch.tensor(p).log(),) for p in PROBABILITIES],
        math.exp(-mean(math.log(p) for some in PROBABILITIES for p in some)),
    ),
    # Record 0: two exact names; 4: of two words one, 2 * (1/2) / (3/2); 2: of four words one, 2 * (1/4) / (5/4).
    "answers": Case(AnswerScore, partial(answer_score, kind="f1"), ANSWERS, mean([1.0, 2 / 3, 2 / 5]), {"kind": "f1"}),
    "cases": Case(
        CaseScore, partial(case_score, any_prompt=True),
        [(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])), (torch.tensor([0.0, 0.0]), torch.tensor([4, 2]))],
        mean([1.0, 0.0, 0.0]), {"any_prompt": True},
    ),
    # Ages 1, 2, 4 and 5, 9: the newest three of five edits, then the oldest two.
    "retention by age": Case(
        RetentionByAge, partial(retention_by_age, bins=2), AGED, [mean([1.0, 0.0, 1.0]), mean([0.0, 1.0])],
        {"bins": 2},
    ),
}  # fmt: skip


def together(updates):
    """The arguments of several updates as those of one."""
    columns = []
    for parts in zip(*updates, strict=True):
        if isinstance(parts[0], PromptScores):
            names = parts[0].columns()
            columns.append(PromptScores(**{n: torch.cat([part.columns()[n] for part in parts]) for n in names}))
        else:
            columns.append(torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [x for p in parts for x in p])
    return tuple(columns)


def on_one_rank() -> dict[str, Any]:
    """Every metric on this rank, which gets its own update of each case; rank 0 alone also gets an empty one."""
    found = {}
    for name, case in CASES.items():
        metric = case.new()
        if name == "ES" and ranks.number() == 0:
            metric.update(None)
        metric.update(*case.updates[ranks.number()])
        own = state(metric)
        found[name] = metric.compute().tolist()
        found[f"{name}, own"] = all(torch.equal(a, b) for a, b in zip(state(metric), own, strict=True))
    # A rank without any prompts has to update as well.
    sparse = EfficacyScore()
    sparse.update(scores(FIRST) if ranks.number() == 0 else None)
    found["sparse"] = sparse.compute().tolist()
    return found


def state(metric: Metric) -> list[torch.Tensor]:
    """The tensors of a metric's state, with numbers in place of NaN."""
    values = metric.metric_state.values()
    return [t.nan_to_num(7.0) for value in values for t in (value if isinstance(value, list) else [value])]


def pickled(metric):
    """The metric after a round trip through pickle."""
    return pickle.loads(pickle.dumps(metric))
