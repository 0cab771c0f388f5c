"""Which facts the unedited model holds: those whose truth it prefers, and those that it knows.

A fact is *preferred* if the model finds its truth likelier than the new target, P(true) > P(new); the model itself may
say neither. A fact is *known* if the model's own greedy continuation of the edit prompt begins with the truth or one of
its aliases.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from editlab.data.chat import as_evaluated
from editlab.data.datamodule import KNOWN
from editlab.data.fact import Fact
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import prefers_truth
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.generate import greedy_texts
from editlab.lm.joints import unspaced
from editlab.lm.language_model import LanguageModel
from editlab.utils.progress import progress

MOST_TOKENS = 32
"""Largest number of tokens of a continuation in which the truth is looked for."""

CHUNK = 256
"""Facts measured between two steps of the progress bar."""

_ARTICLES = ("a", "an", "the")
_WORD = re.compile(r"\w+")


def holds_truth(lm: LanguageModel, facts: Sequence[Fact], keep: str, cache: ScoreCache | None = None) -> list[bool]:
    """Whether the model prefers or knows each fact's truth, at the prompts at which facts are scored.

    Args:
        lm: the model, with its original weights.
        facts: the facts of a run.
        keep: ``preferred`` or ``known``.
        cache: cache of the scores of these weights.
    """
    facts = as_evaluated(facts, lm.chat)
    return knows_truth(lm, facts) if keep == KNOWN else prefers_truth(lm, facts, cache)


def knows_truth(lm: LanguageModel, facts: Sequence[Fact], tick: Callable[[int], Any] | None = None) -> list[bool]:
    """Whether the model knows each fact: its greedy continuation of the edit prompt begins with the truth.

    The model is given neither the length nor the beginning of an answer. A continuation ends early where further tokens
    cannot change the result.

    Args:
        lm: the model, with its current weights.
        facts: the facts; one without a true target is not known.
        tick: called with the number of facts that were continued together.
    """
    asked = [index for index, fact in enumerate(facts) if fact.target_true is not None]
    answers = [truths_of(facts[index]) for index in asked]

    def decided(index: int, text: str) -> bool:
        # The last word may go on in the next token, and an article alone is not dropped.
        whole = normalized(text[: _last_word(text)])
        return (
            bool(whole)
            and whole not in _ARTICLES
            and not any(answer.startswith(whole) and answer != whole for answer in answers[index])
        )

    texts = greedy_texts(lm, [facts[index].question for index in asked], MOST_TOKENS, decided, tick)
    known = [False] * len(facts)
    for index, text, right in zip(asked, texts, answers, strict=True):
        known[index] = any(begins_with(normalized(text), answer) for answer in right)
    return known


class Held(NamedTuple):
    """Number of facts with a truth, of those among them that a model prefers, and of those that it knows."""

    facts: int
    preferred: int
    known: int

    def __str__(self) -> str:
        """The two counts with their percentages."""
        return (
            f"prefers the truth of {self.preferred} of {self.facts} facts ({self.preferred / self.facts:.1%}) and "
            f"knows {self.known} ({self.known / self.facts:.1%})"
        )


def count_held(lm: LanguageModel, facts: Sequence[Fact], title: str = "Facts") -> Held:
    """Count the facts whose truth an unedited model prefers, and those that it knows.

    The scores are read from the cache folder where they are, and stored there.

    Args:
        lm: the model, with its original weights.
        facts: the facts; those without a true target do not count.
        title: title of the progress bar.
    """
    cache = ScoreCache(model_key(fingerprint(lm.model), lm.model), device=lm.device)
    some = [fact for fact in facts if fact.target_true is not None]
    preferred = known = 0
    with progress(total=len(some), desc=title, unit="fact") as bar:
        for start in range(0, len(some), CHUNK):
            chunk = some[start : start + CHUNK]
            preferred += sum(prefers_truth(lm, chunk, cache))
            known += sum(knows_truth(lm, chunk, bar.update))
    return Held(len(some), preferred, known)


def truths_of(fact: Fact) -> list[str]:
    """Return the normalized truth of a fact and its aliases, without those that have no letter or digit."""
    truths = (fact.target_true, *fact.truth_aliases)
    return [text for text in map(normalized, filter(None, truths)) if text]


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation and a leading article, its words separated by one space.

    >>> normalized(" The U.S. dollar,  or ")
    'u s dollar or'
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) > 1 and words[0] in _ARTICLES:
        del words[0]
    return " ".join(words)


def begins_with(text: str, answer: str) -> bool:
    """Tell whether a normalized text begins with a normalized answer that ends at the end of a word.

    Scripts without spaces between words, such as Chinese, have no visible end of a word, so none is required.
    """
    if not text.startswith(answer):
        return False
    after = text[len(answer) : len(answer) + 1]
    return after in ("", " ") or unspaced(after) or unspaced(answer[-1:])


def _last_word(text: str) -> int:
    """Return the index at which the last word of a text begins, if the text ends in it; otherwise the text's length."""
    words = list(_WORD.finditer(text))
    return words[-1].start() if words and words[-1].end() == len(text) else len(text)
