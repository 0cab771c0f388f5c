"""The evaluation of a run: the same metrics before, right after, and long after each edit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from editlab.data.chat import as_evaluated
from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.errors import NonFiniteError, UserError
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import FactScores, score_facts, token_log_probs
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import MATMULS, products, type_of_products
from editlab.lm.text import cut, read_file, read_ids, text_of
from editlab.metrics import EditMetrics, GenerationEntropy, PromptScores, RetentionByAge, TokenPerplexity
from editlab.metrics.names import (
    BEFORE,
    GENERATION_ENTROPY,
    GROUPS,
    IMMEDIATE,
    PERPLEXITY,
    RETAINED,
    add_group,
    age_name,
)
from editlab.utils.progress import progress
from editlab.utils.validation import not_negative, one_of

log = logging.getLogger(__name__)

BUILTIN_TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
"""Prose of our own: no model was trained on it, and no second moments are computed from it."""

OPENING = 12
"""Tokens of the held-out text with which a generated text begins."""

GATHERED: dict[str, Any] = {"sync_on_compute": False}
"""Arguments of our torchmetrics objects: every rank already holds all scores (see :class:`Evaluation`)."""

CHUNK = 128
"""Facts scored at a time: enough that repeated prompts are run once, and few enough that the progress bar moves."""

SAVED_GROUPS = (BEFORE, IMMEDIATE)
"""Groups whose scores are in a checkpoint: a resumed run cannot measure them again."""


@dataclass
class EvaluationSettings:
    """Settings of what a run measures."""

    heldout: str = "builtin"
    """Text of the held-out perplexity: ``builtin`` (prose that ships with editlab) or the path of a text file."""
    heldout_tokens: int = 4096
    """Number of tokens of that text, from its start; 0 turns perplexity and generation entropy off."""
    generated_texts: int = 8
    """Number of texts that the model generates for the generation entropy; 0 turns it off."""
    generated_tokens: int = 48
    """Number of tokens sampled for each of them."""
    immediate: str = "all"
    """Prompts that are scored right after each batch: ``all`` prompts of its facts, or ``edits`` for the edit prompts
    alone (PS and NS are then measured by the forgetting curve and at the end)."""
    neighbors: int | None = None
    """Number of neighbor prompts scored for each fact; default: all. In CounterFact most prompts are neighbors."""
    matmul: str = "float32"
    """Type of the matrix products of all blocks and of the head while measuring, before and after edits alike:
    ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on CPUs with instructions for it). bfloat16 is faster, but prompts
    whose two answers are almost equally likely may be judged differently. For models with float32 weights."""
    age_bins: int = 4
    """Number of bins by age for which the retained accuracy is given at the end of a run; 0 for none."""

    def __post_init__(self) -> None:
        counts = ("heldout_tokens", "generated_texts", "generated_tokens", "age_bins", "neighbors")
        not_negative("model.evaluation", **{name: getattr(self, name) for name in counts})
        if self.heldout_tokens == 1:
            raise UserError(
                "model.evaluation.heldout_tokens is 1, and the first token has no context to be predicted from: set "
                "at least 2, or 0 for none."
            )
        one_of("model.evaluation", ("all", "edits"), immediate=self.immediate)
        one_of("model.evaluation", MATMULS, matmul=self.matmul)


class Evaluation:
    """Measures facts in groups (``before``, ``immediate``, ``retained``, ``bystanders``).

    Each group has one :class:`EditMetrics` collection in ``collections``, a module that the editor holds, so Lightning
    moves the states to its device.

    Synchronisation by torchmetrics is switched off (``sync_on_compute=False``), for two reasons. The ranks share the
    forward passes, and a pass has prompts of several facts, so that results do not depend on the number of ranks; every
    rank therefore gets the scores of all facts from the scoring itself, and to synchronise would count each of them
    once per rank. And a checkpoint holds the scores so far: if each rank kept only its part, saving one would need all
    ranks, and the batch that was finished when another rank was killed would be lost.

    Args:
        settings: what is measured.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.collections = nn.ModuleDict({group: EditMetrics(f"{group}/", **GATHERED) for group in GROUPS})
        self.language_before: dict[str, float] = {}
        self.retained: dict[str, float] = {}
        self._part = EditMetrics(**GATHERED)
        self._series: dict[str, dict[int, dict[str, float]]] = {}
        self._measured_at = -1
        self._heldout: list[int] = []
        self.seconds = 0.0
        self._started = time.monotonic()

    def start_clock(self) -> None:
        """Starts to count the run's seconds."""
        self._started = time.monotonic() - self.seconds

    def stop_clock(self) -> float:
        """Seconds since the start, including those before a resume."""
        self.seconds = time.monotonic() - self._started
        return self.seconds

    # ---- facts ------------------------------------------------------------------------------------------------

    def measure(self, lm: LanguageModel, facts: Sequence[Fact], title: str = "") -> dict[str, float]:
        """ES, PS, NS, S, accuracies and magnitudes of facts on the weights as they are, without a group; not kept."""
        return self._measure(self._score(lm, facts, 0, title))

    def update(
        self, group: str, lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None
    ) -> dict[str, float]:
        """Measures facts on the weights as they are and adds them to a group.

        Args:
            group: one of :data:`editlab.metrics.names.GROUPS`.
            lm: the model.
            facts: facts to score.
            cache: cache of the unedited model's scores; only for the unedited weights.

        Returns:
            ``group/metric`` -> value over these facts alone.
        """
        series = self._series.setdefault(group, {})
        first = max(series, default=0)
        every_prompt = group != IMMEDIATE or self.settings.immediate == "all"
        scores = self._score(lm, facts, first, every_prompt=every_prompt, cache=cache)
        found = add_group(group, self._measure(scores))
        if scores:
            self._add(group, scores)
            series[first + len(facts)] = found
        return found

    def begin(self, group: str) -> None:
        """Empties a group."""
        self._collection(group).reset()
        self._series.pop(group, None)

    def compute(self, group: str) -> dict[str, float]:
        """``group/metric`` -> value over all facts of a group; {} for an empty group."""
        return self._collection(group).measured()

    def scores(self, group: str) -> FactScores | None:
        """The scores of all prompts of a group; None for an empty group. Records are numbered in the facts' order."""
        found = self._collection(group).scores()
        return FactScores(**found) if found else None

    def series(self, group: str) -> dict[int, dict[str, float]]:
        """The results of each :meth:`update` of a group, by the number of facts up to and including it."""
        return dict(self._series.get(group, {}))

    def results(self) -> dict[str, float]:
        """``group/metric`` -> value of all that a run has measured of its edits; what was not measured is absent."""
        return self.compute(BEFORE) | self.language_before | self.compute(IMMEDIATE) | self.retained

    def cache(self, lm: LanguageModel, key: str) -> ScoreCache:
        """The cache of the scores of the model with this key, with the matrix products of the settings."""
        return ScoreCache(key, type_of_products(self.settings.matmul, lm.device), lm.device)

    def _collection(self, group: str) -> EditMetrics:
        collection = self.collections[group]
        assert isinstance(collection, EditMetrics)
        return collection

    def _measure(self, scores: Sequence[FactScores]) -> dict[str, float]:
        self._part.reset()
        for some in scores:
            self._part.update(edit=some.edit, paraphrases=some.paraphrases, neighbors=some.neighbors)
        return self._part.measured()

    def _add(self, group: str, scores: Sequence[FactScores]) -> None:
        for some in scores:
            self._collection(group).update(edit=some.edit, paraphrases=some.paraphrases, neighbors=some.neighbors)

    def _score(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        first: int,
        title: str = "",
        every_prompt: bool = True,
        cache: ScoreCache | None = None,
    ) -> list[FactScores]:
        facts = as_evaluated(facts, lm.chat)
        neighbors = self.settings.neighbors if every_prompt else 0
        starts = range(0, len(facts), CHUNK)
        bar = progress(starts, desc=title, unit="chunk", disable=not title or len(facts) <= CHUNK)
        with self.products(lm):
            return [
                score_facts(
                    lm,
                    facts[i : i + CHUNK],
                    paraphrases=every_prompt,
                    neighbors=neighbors,
                    first_record=first + i,
                    cache=cache,
                )
                for i in bar
            ]

    def products(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """A context in which the model's matrix products have the type of the settings."""
        anatomy = lm.anatomy
        return products(self.settings.matmul, list(anatomy.blocks), anatomy.edit_path, lm.device, anatomy.head)

    # ---- the model as a whole ---------------------------------------------------------------------------------

    def language(self, lm: LanguageModel) -> dict[str, float]:
        """Metrics of the model's language with the weights as they are, without a group.

        Returns:
            ``perplexity`` and ``generation_entropy``, unless they are turned off. A model whose outputs are not finite
            has no generation entropy, and a perplexity that is NaN or infinite.

        Raises:
            UserError: if the text cannot be read or is too short.
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
        found = {PERPLEXITY: float(perplexity.compute())}
        width = min(OPENING, len(self._heldout) // max(1, settings.generated_texts))
        openings = cut(lm, self._heldout[: width * settings.generated_texts], width) if width else []
        if openings and settings.generated_tokens >= 3 and width:
            texts = ranks.on_first(lambda: _sampled(lm, openings, settings.generated_tokens))
            if texts is not None:
                entropy = GenerationEntropy(**GATHERED)
                entropy.update(text_of(lm, text)[width:] for text in texts)
                found[GENERATION_ENTROPY] = float(entropy.compute())
        return found

    def measure_unedited(self, lm: LanguageModel) -> None:
        """Measures the unedited model's language, once; the original weights must be in place."""
        if not self.language_before:
            self.language_before = add_group(BEFORE, self.language(lm))

    def measure_retained(
        self, lm: LanguageModel, facts: Sequence[Fact], edits: int, loggers: Iterable[Logger]
    ) -> dict[str, float]:
        """Measures all kept edits and the language on the weights as they are; logged, and once per number of edits.

        Args:
            lm: the model.
            facts: the kept edits, in the order in which they were made.
            edits: number of facts that have gone through a step, the x-axis of the logs.
            loggers: loggers that get the numbers.

        Returns:
            ``retained/metric`` -> value, also ``retained/accuracy_age_1`` and so on, from the newest edits to the
            oldest.
        """
        if self._measured_at != edits:
            scores = self._score(lm, facts, 0, "All edits")
            self.begin(RETAINED)
            self._add(RETAINED, scores)
            self.retained = self.compute(RETAINED) | add_group(RETAINED, self.language(lm) | self._by_age(scores))
            self._measured_at = edits
            for logger in loggers:
                logger.log_metrics(self.retained, step=edits)
        return self.retained

    def _by_age(self, scores: Sequence[FactScores]) -> dict[str, float]:
        if not self.settings.age_bins or not scores:
            return {}
        by_age = RetentionByAge(self.settings.age_bins, "accuracy", **GATHERED)
        facts = sum(len(some.edit) for some in scores)
        for some in scores:
            by_age.update(some.edit, facts - some.edit.record)
        values = by_age.compute().reshape(-1).tolist()  # torchmetrics makes a scalar of a single value
        return {age_name(i): value for i, value in enumerate(values, start=1)}

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors, numbers and dicts: ``scores`` is group -> prompts -> column."""
        scores = {
            group: {prompts: some.to("cpu").columns() for prompts, some in self._collection(group).scores().items()}
            for group in SAVED_GROUPS
        }
        return {
            "scores": scores,
            "series": {group: self.series(group) for group in SAVED_GROUPS},
            "language_before": self.language_before,
            "seconds": self.stop_clock(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned.

        Raises:
            UserError: if it was written by a version of editlab with another layout.
        """
        if "series" not in state:
            raise UserError(
                "The checkpoint's scores were written by another version of editlab: start a new run without "
                "--ckpt_path."
            )
        for group in SAVED_GROUPS:
            self.begin(group)
            saved: dict[str, dict[str, Tensor]] = state["scores"][group]
            if saved:
                self._add(group, [FactScores(**{name: PromptScores(**columns) for name, columns in saved.items()})])
                self._series[group] = {int(facts): dict(row) for facts, row in state["series"][group].items()}
        self.language_before = dict(state["language_before"])
        self.seconds = state["seconds"]


def _sampled(lm: LanguageModel, openings: Sequence[Sequence[int]], tokens: int) -> list[list[int]] | None:
    """Texts that begin with the openings; None if the outputs are not finite, so that the run can still finish."""
    try:
        return lm.sample(openings, tokens, seed=0)
    except NonFiniteError as error:
        log.warning("The generation entropy is left out. %s", error)
        return None
