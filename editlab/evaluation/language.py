"""The model's language as a whole: perplexity of held-out texts, and how varied its own texts are."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editlab.distributed import ranks
from editlab.errors import NonFiniteError, UserError
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import window_log_probs
from editlab.evaluation.settings import EvaluationSettings
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import cut, first_ids, read_file, scored, text_of, window_size
from editlab.metrics import GenerationEntropy, TokenPerplexity
from editlab.metrics.functional.perplexity import perplexity_interval
from editlab.metrics.names import (
    GENERATION_ENTROPY,
    PERPLEXITY,
    PERPLEXITY_HIGH,
    PERPLEXITY_LOW,
    PERPLEXITY_START,
    perplexity_name,
)

log = logging.getLogger(__name__)

BUILTIN_TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
"""Prose of our own: no model was trained on it, and no second moments are computed from it."""

OPENING = 12
"""Tokens of the held-out text with which a generated text begins."""

WINDOW = 256
"""Tokens of text in a window of the perplexity."""

GATHERED: dict[str, Any] = {"sync_on_compute": False}
"""Arguments of our torchmetrics objects: every rank already holds all scores (see
:class:`editlab.evaluation.evaluator.Evaluation`)."""


class LanguageMeter:
    """Measures perplexity of the held-out texts and generation entropy, on the weights as they are.

    Args:
        settings: which texts, and how many tokens.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self._ids: dict[str, list[int]] = {}

    def measure(self, lm: LanguageModel, snapshot: bool = False, cache: ScoreCache | None = None) -> dict[str, float]:
        """Perplexity and generation entropy.

        Args:
            lm: the model.
            snapshot: measure the first ``snapshot_tokens`` of the first text alone, as for a point of a curve.
            cache: cache of the unedited model's scores; only for the unedited weights.

        Returns:
            ``perplexity`` of the first text, with its 95% interval over windows (``perplexity_low`` and
            ``perplexity_high``), ``perplexity_NAME`` of each text that has a name, ``perplexity_start`` of the first
            ``snapshot_tokens`` of the first text if these are not all, and ``generation_entropy``. What is turned off
            is absent. A snapshot has ``perplexity_start`` in place of ``perplexity`` if the text is longer. A model
            whose outputs are not finite has no generation entropy and no interval, and a perplexity that is NaN or
            infinite.

        Raises:
            UserError: if a text cannot be read or has fewer than two tokens.
        """
        settings = self.settings
        if not settings.heldout_tokens or (snapshot and not settings.snapshot_tokens):
            return {}
        if not self._ids:
            self._ids = {name: self._read(lm, name) for name in settings.texts}
        first = next(iter(self._ids.values()))
        start = first[: settings.snapshot_tokens]
        if snapshot:
            name = PERPLEXITY if len(start) == len(first) else PERPLEXITY_START
            found = {name: _perplexity(torch.cat(window_log_probs(lm, start, WINDOW)))}
        else:
            found = {}
            for name, ids in self._ids.items():
                found |= self._of_text(lm, name, ids, cache, is_first=ids is first)
        return found | self._entropy(lm, first)

    def _read(self, lm: LanguageModel, name: str) -> list[int]:
        given = self.settings.texts[name]
        ids = first_ids(lm, read_file(str(BUILTIN_TEXT) if given == "builtin" else given), self.settings.heldout_tokens)
        if len(ids) < 2:
            raise UserError(
                f"The held-out text {given} has {len(ids)} tokens, and the perplexity needs two: give a longer text in "
                "model.evaluation.heldout, or set model.evaluation.heldout_tokens to 0."
            )
        if len(ids) < self.settings.heldout_tokens:
            log.info("The perplexity is measured on all %d tokens of the held-out text %s", len(ids), given)
        return ids

    def _of_text(
        self, lm: LanguageModel, name: str, ids: Sequence[int], cache: ScoreCache | None, is_first: bool
    ) -> dict[str, float]:
        def compute() -> Tensor:
            return torch.cat(window_log_probs(lm, ids, WINDOW))

        logps = (
            cache.token_scores(ids, compute, lm.beginning, window_size(lm, WINDOW)) if cache is not None else compute()
        )
        named = {perplexity_name(name): _perplexity(logps)} if name else {}
        if not is_first:
            return named
        found = {PERPLEXITY: _perplexity(logps)}
        sizes = [len(scored(lm, window)) for window in cut(lm, ids, WINDOW)]
        whole = [window.mean() for window in logps.split(sizes) if len(window) == max(sizes)]
        low, high = perplexity_interval(torch.stack(whole))
        if not math.isnan(low):
            found |= {PERPLEXITY_LOW: low, PERPLEXITY_HIGH: high}
        start = self.settings.snapshot_tokens
        if 0 < start < len(ids):
            # In a causal model the tokens that follow change nothing.
            count = sum(len(scored(lm, window)) for window in cut(lm, ids[:start], WINDOW))
            found[PERPLEXITY_START] = _perplexity(logps[:count])
        return found | named

    def _entropy(self, lm: LanguageModel, ids: Sequence[int]) -> dict[str, float]:
        settings = self.settings
        width = min(OPENING, len(ids) // max(1, settings.generated_texts))
        openings = cut(lm, ids[: width * settings.generated_texts], width) if width else []
        if not openings or settings.generated_tokens < 3:
            return {}
        texts = ranks.on_first(lambda: _sampled(lm, openings, settings.generated_tokens))
        if texts is None:
            return {}
        entropy = GenerationEntropy(**GATHERED)
        entropy.update(text_of(lm, text)[width:] for text in texts)
        return {GENERATION_ENTROPY: float(entropy.compute())}


def _perplexity(log_probs: Tensor) -> float:
    metric = TokenPerplexity(**GATHERED)
    metric.update(log_probs)
    return float(metric.compute())


def _sampled(lm: LanguageModel, openings: Sequence[Sequence[int]], tokens: int) -> list[list[int]] | None:
    """Texts that begin with the openings; None if the outputs are not finite, so that the run can still finish."""
    try:
        return lm.sample(openings, tokens, seed=0)
    except NonFiniteError as error:
        log.warning("The generation entropy is left out. %s", error)
        return None


def block_perplexities(lm: LanguageModel, text: str, blocks: int = 8, tokens: int = 4096) -> list[float]:
    """Perplexity of each of several consecutive blocks of one text, which shows how much it depends on the block.

    Args:
        lm: the model, with its current weights.
        text: the text.
        blocks: number of blocks, from the text's start.
        tokens: tokens of a block.

    Raises:
        UserError: if the text is too short.
    """
    ids = first_ids(lm, text, blocks * tokens)
    if len(ids) < blocks * tokens:
        raise UserError(
            f"The text has {len(ids)} tokens, and {blocks} blocks of {tokens} need {blocks * tokens}: give a longer "
            "text, or smaller blocks."
        )
    starts = range(0, blocks * tokens, tokens)
    return [_perplexity(torch.cat(window_log_probs(lm, ids[start : start + tokens], WINDOW))) for start in starts]
