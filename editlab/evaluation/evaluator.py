"""The evaluation of a run: the same metrics before, right after, and long after each edit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.evaluation.bystanders import bystander_accuracy, prompts_of_bystanders
from editlab.evaluation.generation import (
    Generated,
    fixed_sample,
    generate_answers,
    generation_metrics,
    prompts_of_edits,
)
from editlab.evaluation.language import GATHERED, LanguageMeter
from editlab.evaluation.portability import portability_accuracy, questions
from editlab.evaluation.retrieval import FactMemory, as_read
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import FactScores, score_facts
from editlab.evaluation.settings import TWO_STAGE, EvaluationSettings
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import products, type_of_products
from editlab.metrics import EditMetrics, PromptScores, RetentionByAge
from editlab.metrics.names import BEFORE, GROUPS, IMMEDIATE, RETAINED, add_group, age_name
from editlab.utils.progress import progress

CHUNK = 128
"""Facts scored at a time: enough that repeated prompts are run once, and few enough that the progress bar moves."""

SAVED_GROUPS = (BEFORE, IMMEDIATE)
"""Groups whose scores are in a checkpoint: a resumed run cannot measure them again."""


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
        self.asked_before: dict[str, float] = {}
        self.retained: dict[str, float] = {}
        self.bystanders: list[Fact] = []
        self.generated: dict[str, list[Generated]] = {}
        """what the model said freely, by group: ``before`` and ``retained``"""
        self.memory: FactMemory | None = None
        """edits that are put before the prompts of all groups but ``before``; None for methods that change weights"""
        self.costs: dict[str, float] = {}
        """seconds that were spent on each part of the measuring"""
        self._part = EditMetrics(**GATHERED)
        self._series: dict[str, dict[int, dict[str, float]]] = {}
        self._measured_at = -1
        self._meter = LanguageMeter(settings)
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
        return self._measure(self._score(lm, as_read(lm, facts, self.memory), 0, title))

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
        facts = as_read(lm, facts, None if group == BEFORE else self.memory)
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
        before = self.compute(BEFORE) | self.language_before | self.asked_before
        return before | self.compute(IMMEDIATE) | self.retained

    def cache(self, lm: LanguageModel, key: str) -> ScoreCache:
        """The cache of the scores of the model with this key, with the matrix products of the settings."""
        return ScoreCache(key, type_of_products(self._matmul, lm.device), lm.device)

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
                    two_stage=self.settings.matmul == TWO_STAGE,
                )
                for i in bar
            ]

    def products(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """A context in which the model's matrix products have the type of the settings (two stages: of the last)."""
        anatomy = lm.anatomy
        return products(self._matmul, list(anatomy.blocks), anatomy.edit_path, lm.device, anatomy.head)

    @property
    def _matmul(self) -> str:
        """Type of products of all that is not scored in two stages."""
        return "float32" if self.settings.matmul == TWO_STAGE else self.settings.matmul

    # ---- the model as a whole, and what it says freely ----------------------------------------------------------

    def language(self, lm: LanguageModel, snapshot: bool = False) -> dict[str, float]:
        """Perplexity and generation entropy on the weights as they are, without a group.

        See :meth:`editlab.evaluation.language.LanguageMeter.measure`.
        """
        return self._language(lm, snapshot)

    def snapshot(self, lm: LanguageModel, facts: Sequence[Fact]) -> dict[str, float]:
        """A point of a forgetting curve: scores of facts, answers for some of them, and the language; not kept."""
        found = self.measure(lm, facts) if facts else {}
        answered = self.settings.answered
        count = self.settings.snapshot_generation
        with self._timed("generation"), self.products(lm):
            sample = fixed_sample(as_read(lm, facts), count if answered is None else min(count, answered))
            facts = as_read(lm, facts, self.memory)
            answers = generate_answers(lm, prompts_of_edits(facts, sample, self.settings.neighbors))
        return found | generation_metrics(answers, **GATHERED) | self.language(lm, snapshot=True)

    def measure_unedited(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact] = (),
        others: Sequence[Fact] = (),
        cache: ScoreCache | None = None,
    ) -> None:
        """Measures, once, what the unedited model says and how it writes; the original weights must be in place.

        Args:
            lm: the model.
            facts: the facts that will be edited, in the order of their edits.
            others: the bystanders, which :meth:`measure_retained` measures again.
            cache: cache of the unedited model's scores.
        """
        self.bystanders = list(others)
        if not self.language_before:
            self.language_before = add_group(BEFORE, self._language(lm, cache=cache))
        if not self.asked_before:
            self.asked_before = add_group(BEFORE, self._asked(BEFORE, lm, facts, cache))

    def measure_retained(
        self, lm: LanguageModel, facts: Sequence[Fact], edits: int, loggers: Iterable[Logger]
    ) -> dict[str, float]:
        """Measures all kept edits and the model as a whole on the weights as they are; once per number of edits.

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
            scores = self._score(lm, as_read(lm, facts, self.memory), 0, "All edits")
            self.begin(RETAINED)
            self._add(RETAINED, scores)
            others = self._asked(RETAINED, lm, facts) | self.language(lm) | self._by_age(scores)
            self.retained = self.compute(RETAINED) | add_group(RETAINED, others)
            self._measured_at = edits
            for logger in loggers:
                logger.log_metrics(self.retained, step=edits)
        return self.retained

    def _language(self, lm: LanguageModel, snapshot: bool = False, cache: ScoreCache | None = None) -> dict[str, float]:
        with self._timed("language"), self.products(lm):
            return self._meter.measure(lm, snapshot, cache)

    def _asked(
        self, group: str, lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None
    ) -> dict[str, float]:
        """Free answers, portability and bystanders; the answers are kept in :attr:`generated`."""
        settings, memory = self.settings, None if group == BEFORE else self.memory
        sample = fixed_sample(as_read(lm, facts), settings.answered)
        facts, others = as_read(lm, facts, memory), as_read(lm, self.bystanders, memory)
        found: dict[str, float] = {}
        with self._timed("portability"), self.products(lm):
            found |= portability_accuracy(lm, facts, cache, **GATHERED)
        with self._timed("bystanders"), self.products(lm):
            found |= bystander_accuracy(lm, others, cache)
        with self._timed("generation"), self.products(lm):
            asked = [*prompts_of_edits(facts, sample, settings.neighbors), *questions(facts, sample)]
            if settings.generation:
                asked += prompts_of_bystanders(others)
            self.generated[group] = generate_answers(lm, asked, settings.judge, cache)
        return found | generation_metrics(self.generated[group], **GATHERED)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.costs[what] = self.costs.get(what, 0.0) + time.monotonic() - started

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
            "asked_before": self.asked_before,
            "generated_before": [one.to_dict() for one in self.generated.get(BEFORE, [])],
            "costs": dict(self.costs),
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
        self.asked_before = dict(state.get("asked_before", {}))  # checkpoints of older versions have none
        self.generated = {BEFORE: [Generated(**one) for one in state.get("generated_before", [])]}
        self.costs = dict(state.get("costs", {}))
        self.seconds = state["seconds"]
