"""What a run measures: the same few numbers before, right after, and long after each edit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.errors import NotFiniteError, UserError
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import FactScores, prefers_truth, score_facts, token_log_probs
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import MATMULS, products, type_of_products
from editlab.lm.text import read_file, read_ids
from editlab.metrics import EditMetrics, GenerationEntropy, PromptScores, Retention, TokenPerplexity
from editlab.utils.progress import progress
from editlab.utils.validation import not_negative, one_of

log = logging.getLogger(__name__)

BUILTIN_TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
"""Prose of our own, which no model was trained on and no second moments are taken over."""

OPENING = 12
"""Tokens of the held-out text that a generated text begins with."""

GATHERED: dict[str, Any] = {"sync_on_compute": False}
"""For torchmetrics: every rank has all scores, and they must not be gathered once more."""

CHUNK = 128
"""Facts scored at a time: the progress bar moves, and prompts that repeat are still run once."""


@dataclass
class EvaluationSettings:
    """What is measured beside the edits themselves."""

    heldout: str = "builtin"
    """Text of the held-out perplexity: ``builtin`` (prose that ships with editlab) or a text file."""
    heldout_tokens: int = 4096
    """Its first tokens that are used; 0 leaves perplexity and generation entropy out."""
    generated_texts: int = 8
    """Beginnings of the held-out text that the model continues for the generation entropy; 0 leaves it out."""
    generated_tokens: int = 48
    """Sampled tokens in each of them."""
    immediate: str = "all"
    """What is scored right after each batch: ``all`` prompts of its facts, or ``edits`` alone (PS and NS then come from
    the curve and the end)."""
    neighbors: int | None = None
    """Neighbor prompts scored of each fact, the first ones; all where not given. In CounterFact most prompts are."""
    matmul: str = "float32"
    """``float32``; ``bfloat16``: matrix products of all blocks and of the head, for prompts and the held-out text,
    before and after alike; ``auto``: bfloat16 on CPUs with instructions for it. It is faster, and answers that are
    close to even may come out the other way. For float32 weights."""
    age_bins: int = 4
    """Parts by age in which retained accuracy is given at the end of a run."""

    def __post_init__(self) -> None:
        counts = ("heldout_tokens", "generated_texts", "generated_tokens", "age_bins", "neighbors")
        not_negative("model.evaluation", **{name: getattr(self, name) for name in counts})
        if self.heldout_tokens == 1:
            raise UserError(
                "model.evaluation.heldout_tokens is 1: the first token has nothing before it to be predicted from, so "
                "give at least 2, or 0 for none."
            )
        one_of("model.evaluation", ("all", "edits"), immediate=self.immediate)
        one_of("model.evaluation", MATMULS, matmul=self.matmul)


class Evaluation:
    """Measures facts in groups (``before``, ``immediate``, ``retained``, ...) and keeps their scores.

    Args:
        settings: what is measured beside the edits.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.scores: dict[str, list[FactScores]] = {}
        self._ends: dict[str, list[int]] = {}
        self.retained: dict[str, float] = {}
        self.language_before: dict[str, float] = {}
        self.language_after: dict[str, float] = {}
        self._measured_at = -1
        self._heldout: list[int] = []
        self.seconds = 0.0
        self._started = time.monotonic()

    def start_clock(self) -> None:
        """Time is counted from here on."""
        self._started = time.monotonic() - self.seconds

    def stop_clock(self) -> float:
        """Seconds since the start, those before a resume included."""
        self.seconds = time.monotonic() - self._started
        return self.seconds

    # ---- facts ------------------------------------------------------------------------------------------------

    def measure(self, lm: LanguageModel, facts: Sequence[Fact], title: str = "") -> dict[str, float]:
        """ES, PS, NS, S and accuracies of facts on the weights as they are; nothing is kept."""
        return _summarize(self._score(lm, facts, 0, title))

    def update(
        self, group: str, lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None
    ) -> dict[str, float]:
        """The same, kept in a group; gives the numbers of these facts alone. ``cache`` is for the unedited model."""
        kept = self.scores.setdefault(group, [])
        first = int(kept[-1].edit.record[-1]) + 1 if kept else 0
        others = group != "immediate" or self.settings.immediate == "all"
        new = self._score(lm, facts, first, others=others, cache=cache)
        kept += new
        self._ends.setdefault(group, []).append(len(kept))
        return _summarize(new)

    def begin(self, group: str) -> None:
        """Forgets what a group has, for it to be measured anew."""
        self.scores.pop(group, None)
        self._ends.pop(group, None)

    def compute(self, group: str) -> dict[str, float]:
        """A group's numbers over all its facts; {} where it has none."""
        return _summarize(self.scores.get(group, []))

    def series(self, group: str) -> dict[int, dict[str, float]]:
        """A group's numbers for each of its updates, by the number of facts up to and with it."""
        found: dict[int, dict[str, float]] = {}
        facts = start = 0
        for end in self._ends.get(group, []):
            scores, start = self.scores[group][start:end], end
            facts += sum(len(some.edit.record.unique()) for some in scores)
            found[facts] = _summarize(scores)
        return found

    def known(self, lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None) -> list[bool]:
        """:func:`editlab.evaluation.scoring.prefers_truth`, measured as everything else is."""
        with self.products(lm):
            return prefers_truth(lm, facts, cache)

    def cache(self, lm: LanguageModel, key: str) -> ScoreCache:
        """Of the scores that are measured so of the model with this key."""
        return ScoreCache(key, type_of_products(self.settings.matmul, lm.device), lm.device)

    def _score(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        first: int,
        title: str = "",
        others: bool = True,
        cache: ScoreCache | None = None,
    ) -> list[FactScores]:
        neighbors = self.settings.neighbors if others else 0
        starts = range(0, len(facts), CHUNK)
        bar = progress(starts, desc=title, unit="chunk", disable=not title or len(facts) <= CHUNK)
        with self.products(lm):
            return [
                score_facts(
                    lm,
                    facts[i : i + CHUNK],
                    paraphrases=others,
                    neighbors=neighbors,
                    first_record=first + i,
                    cache=cache,
                )
                for i in bar
            ]

    def products(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Within it, the model's matrix products are those that are measured with."""
        anatomy = lm.anatomy
        return products(self.settings.matmul, list(anatomy.blocks), anatomy.edit_path, lm.device, anatomy.head)

    # ---- the model as a whole ---------------------------------------------------------------------------------

    def language(self, lm: LanguageModel) -> dict[str, float]:
        """How well the model still speaks, with the weights as they are.

        Returns:
            ``perplexity/heldout`` and ``generation/entropy``, as far as they were asked for. A model whose answers are
            not finite has no entropy, and a perplexity that is none (NaN or infinite).

        Raises:
            UserError: where the text can not be read or is too short.
        """
        settings = self.settings
        if not settings.heldout_tokens:
            return {}
        if not self._heldout:
            path = str(BUILTIN_TEXT) if settings.heldout == "builtin" else settings.heldout
            self._heldout = read_ids(lm, read_file(path), settings.heldout_tokens)
        perplexity = TokenPerplexity(**GATHERED)
        with self.products(lm):
            perplexity.update(token_log_probs(lm, self._heldout))
        found = {"perplexity/heldout": float(perplexity.compute())}
        width = min(OPENING, len(self._heldout) // max(1, settings.generated_texts))
        openings = [self._heldout[i * width : (i + 1) * width] for i in range(settings.generated_texts)]
        if openings and settings.generated_tokens >= 3 and width:
            texts = ranks.on_first(lambda: _sampled(lm, openings, settings.generated_tokens))
            if texts is not None:
                entropy = GenerationEntropy(**GATHERED)
                entropy.update(text[width:] for text in texts)
                found["generation/entropy"] = float(entropy.compute())
        return found

    def measure_unedited(self, lm: LanguageModel) -> None:
        """The unedited model's language; call it with the original weights in place."""
        if not self.language_before:
            self.language_before = self.language(lm)

    def measure_retained(
        self, lm: LanguageModel, facts: Sequence[Fact], edits: int, loggers: Iterable[Logger]
    ) -> dict[str, float]:
        """All kept edits on the weights as they are, also by age, and the language; logged, once for a state.

        Args:
            lm: the model.
            facts: the kept edits, in the order in which they were made.
            edits: facts that have gone through a step: the x-axis.
            loggers: where the numbers go.
        """
        if self._measured_at != edits:
            scores = self._score(lm, facts, 0, "All edits")
            self.retained = _summarize(scores)
            self.language_after = self.language(lm)
            self._measured_at = edits
            rows = {f"retained/{k}": v for k, v in self.retained.items()} | self.language_after
            by_age = Retention("accuracy", self.settings.age_bins, **GATHERED)
            for some in scores:
                by_age.update(some.edit, len(facts) - some.edit.record)
            rows |= {f"retention/accuracy_age_{i}": float(v) for i, v in enumerate(by_age.by_age(), start=1)}
            for logger in loggers:
                logger.log_metrics(rows, step=edits)
        return self.retained

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scores and counters as tensors and numbers."""
        return {
            "scores": {group: [_to_tensors(s) for s in some] for group, some in self.scores.items()},
            "ends": {group: list(ends) for group, ends in self._ends.items()},
            "language_before": self.language_before,
            "seconds": self.stop_clock(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.scores = {group: [_from_tensors(s) for s in some] for group, some in state["scores"].items()}
        self._ends = {group: list(ends) for group, ends in state["ends"].items()}
        self.language_before = dict(state["language_before"])
        self.seconds = state["seconds"]


def _sampled(lm: LanguageModel, openings: Sequence[Sequence[int]], tokens: int) -> list[list[int]] | None:
    """Texts that begin so; None of a model that edits have broken: its run has to come to its end, and to say so."""
    try:
        return lm.sample(openings, tokens, seed=0)
    except NotFiniteError as error:
        log.warning("The generation entropy is left out. %s", error)
        return None


def _summarize(scores: Sequence[FactScores]) -> dict[str, float]:
    if not scores:
        return {}
    metrics = EditMetrics(**GATHERED)
    for some in scores:
        metrics.update(some.edit, some.paraphrases, some.neighbors)
    return {name: float(value) for name, value in metrics.compute().items()}


_GROUPS = [field.name for field in fields(FactScores)]
_COLUMNS = [field.name for field in fields(PromptScores)]


def _to_tensors(scores: FactScores) -> dict[str, dict[str, Tensor]]:
    present = {group: getattr(scores, group) for group in _GROUPS if getattr(scores, group) is not None}
    return {group: {column: getattr(s, column) for column in _COLUMNS} for group, s in present.items()}


def _from_tensors(tensors: dict[str, dict[str, Tensor]]) -> FactScores:
    return FactScores(**{group: PromptScores(**columns) for group, columns in tensors.items()})
