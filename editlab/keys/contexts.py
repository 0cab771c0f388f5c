"""Contexts: the empty one and a few prefixes sampled from the model, in which an edit must hold as well."""

from __future__ import annotations

from dataclasses import dataclass

from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import encode
from editlab.utils.validation import at_least_one, not_negative

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled prefixes, as in MEMIT's set-up."""


@dataclass
class ContextSettings:
    """The prefixes that are sampled once a run."""

    count: int = 5
    """Prefixes beside the bare prompt; 0 for none."""
    length: int = 10
    """Sampled tokens in each."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        not_negative("model.contexts", count=self.count)
        at_least_one("model.contexts", length=self.length)


def sample_contexts(lm: LanguageModel, settings: ContextSettings) -> list[str]:
    """The empty context and the sampled ones, each ended as a sentence; the global random state is untouched."""
    contexts = [""]
    for i in range(settings.count):
        opening = encode(lm.tokenizer, OPENINGS[i % len(OPENINGS)]).ids
        ids = lm.sample([opening], settings.length, settings.seed + i)[0]
        text = " ".join(str(lm.tokenizer.decode(ids, skip_special_tokens=True)).split())
        contexts.append(text.rstrip(".") + ". ")
    return contexts
