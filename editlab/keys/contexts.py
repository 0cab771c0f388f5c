"""Contexts: prefixes of the edit prompt, behind which an edit must hold too: the empty one and a few sampled ones."""

from __future__ import annotations

from dataclasses import dataclass

from editlab.lm.language_model import LanguageModel
from editlab.utils.validation import at_least_one, not_negative

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled prefixes, as in MEMIT's set-up."""


@dataclass
class ContextSettings:
    """Settings of the prefixes, which are sampled from the unedited model once for each run."""

    count: int = 5
    """Number of prefixes, in addition to the empty one."""
    length: int = 10
    """Number of sampled tokens in each prefix."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        not_negative("model.contexts", count=self.count)
        at_least_one("model.contexts", length=self.length)


def sample_contexts(lm: LanguageModel, settings: ContextSettings) -> list[str]:
    """Returns the empty context and the sampled ones.

    Each sampled context ends with a full stop and a space, so that an edit prompt can follow it. The global random
    state does not change.
    """
    contexts = [""]
    for i in range(settings.count):
        opening = lm.encode(OPENINGS[i % len(OPENINGS)]).ids
        ids = lm.sample([opening], settings.length, settings.seed + i)[0]
        text = " ".join(str(lm.tokenizer.decode(ids, skip_special_tokens=True)).split())
        contexts.append(text.rstrip(".") + ". ")
    return contexts
