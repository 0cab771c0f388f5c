"""Settings of what a run measures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from editlab.errors import UserError
from editlab.evaluation.judge import JudgeSettings
from editlab.lm.matmul import MATMULS
from editlab.utils.validation import not_negative, one_of

ALL = "all"

TWO_STAGE = "two_stage"
"""Value of :attr:`EvaluationSettings.matmul` for scores in two stages."""


@dataclass
class EvaluationSettings:
    """Settings of what a run measures."""

    heldout: str | dict[str, str] = "builtin"
    """Text of the held-out perplexity: ``builtin`` (prose that ships with editlab) or the path of a text file; or
    several, as a map from a name to a text, such as ``{wikitext: wiki.txt, prose: builtin}``. The first is measured on
    the way too."""
    heldout_tokens: int = 65536
    """Number of tokens of each of these texts, from its start, that the perplexity is measured on before any edit and
    at the end; of a shorter text all. 0 turns perplexity and generation entropy off."""
    snapshot_tokens: int = 4096
    """Number of tokens of the first text that each point of a forgetting curve is measured on."""
    generated_texts: int = 8
    """Number of texts that the model generates for the generation entropy; 0 turns it off."""
    generated_tokens: int = 48
    """Number of tokens sampled for each of them."""
    generation: int | str = 64
    """Number of facts, or ``all``, for which the model answers freely before any edit and at the end: it continues the
    edit prompt, a paraphrase and a neighbor greedily up to the end of its first sentence. 0 turns it off."""
    snapshot_generation: int = 16
    """Number of these facts that each point of a forgetting curve is measured on."""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    """A server that judges the free answers to the edit prompts, before any edit and at the end; none by default."""
    bystanders: int = 64
    """Number of facts about other subjects that are never edited and are measured before any edit and at the end (see
    :meth:`editlab.data.EditDataModule.other_facts`); 0 turns it off."""
    immediate: str = "all"
    """Prompts that are scored right after each batch: ``all`` prompts of its facts, or ``edits`` for the edit prompts
    alone (PS and NS are then measured by the forgetting curve and at the end)."""
    neighbors: int | None = None
    """Number of neighbor prompts scored for each fact; default: all. In CounterFact most prompts are neighbors."""
    matmul: str = TWO_STAGE
    """Type of the matrix products of all blocks and of the head while measuring, before and after edits alike.
    ``two_stage``: on CPUs with bfloat16 instructions prompts are scored in bfloat16 first, and those near a tie again
    in float32 (:mod:`editlab.evaluation.two_stage`). ES, PS, NS and accuracies are then those of float32, and
    log-probabilities and magnitudes may differ by bfloat16's rounding (0.3 nats at most on SmolLM2-135M). Perplexity,
    free answers, portability and bystanders are computed in float32, and everything on other devices.
    ``float32``: everything is. ``bfloat16``: faster, but prompts whose two answers are almost equally likely may be
    judged differently. ``auto``: bfloat16 on CPUs with instructions for it. For models with float32 weights."""
    age_bins: int = 4
    """Number of bins by age for which the retained accuracy is given at the end of a run; 0 for none."""

    def __post_init__(self) -> None:
        where = "model.evaluation"
        counts = (
            "heldout_tokens", "snapshot_tokens", "generated_texts", "generated_tokens", "snapshot_generation",
            "bystanders", "age_bins", "neighbors",
        )  # fmt: skip
        not_negative(where, **{name: getattr(self, name) for name in counts})
        for name in ("heldout_tokens", "snapshot_tokens"):
            if getattr(self, name) == 1:
                raise UserError(
                    f"{where}.{name} is 1, and the first token has no context to be predicted from: set at least 2, or "
                    "0 for none."
                )
        if self.generation != ALL and not (isinstance(self.generation, int) and self.generation >= 0):
            raise UserError(f"{where}.generation is {self.generation!r}: set a number of facts, 0 for none, or all.")
        one_of(where, ("all", "edits"), immediate=self.immediate)
        one_of(where, (TWO_STAGE, *MATMULS), matmul=self.matmul)
        if isinstance(self.heldout, dict):
            self._check_names()

    def _check_names(self) -> None:
        if not self.heldout:
            raise UserError("model.evaluation.heldout is empty: name a text, or set heldout_tokens to 0 for none.")
        for name in self.texts:
            if not re.fullmatch(r"\w[\w.-]*", name) or name in RESERVED:
                raise UserError(
                    f"model.evaluation.heldout has the name {name!r}: use letters, digits, '_', '-' and '.', and none "
                    f"of {', '.join(RESERVED)}."
                )

    @property
    def texts(self) -> Mapping[str, str]:
        """Name -> ``builtin`` or path of each text; the name of a single text is empty."""
        return self.heldout if isinstance(self.heldout, dict) else {"": self.heldout}

    @property
    def answered(self) -> int | None:
        """Number of facts for which the model answers freely; None for all."""
        return None if isinstance(self.generation, str) else self.generation


RESERVED = ("start", "low", "high")
"""Names that a text may not have: ``perplexity_NAME`` would be another number's."""
