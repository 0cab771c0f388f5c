"""Retrieval: the nearest edits are put before a prompt of the unedited model; no weight changes.

It is the control that shows what editing weights is worth: a memory of the edits next to the model, as in in-context
editing (IKE, Zheng et al. 2023, arXiv:2305.12740) and memory-based editing (SERAC, Mitchell et al. 2022,
arXiv:2206.06520), here without demonstrations and without a trained classifier. An edit is near a prompt if the prompt
contains its subject: with G(t) the set of character trigrams of the words of a text t (:func:`grams`)::

    match(edit, prompt) = |G(subject) & G(prompt)| / |G(subject)|        from 0 to 1

Of edits with equal matches, the one whose subject has more trigrams comes first, then the one whose edit prompt is more
like the prompt (Dice coefficient of their trigrams), then the later one. The match depends on no tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from editlab.data.chat import as_evaluated
from editlab.data.fact import Fact, Neighbor, Question
from editlab.errors import UserError
from editlab.lm.joints import join, unspaced
from editlab.lm.language_model import LanguageModel
from editlab.solver.base import EditMethod
from editlab.utils.validation import at_least_one, fractions

ANSWER_TOKENS = 32
"""Tokens that are left free for an answer after the prompt and the edits before it."""


@dataclass(frozen=True)
class Retrieval(EditMethod):
    """Puts the nearest edits before each prompt of the evaluation, as text; weights do not change.

    Raises:
        UserError: A setting is out of range.
    """

    solves: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False

    k: int = 1
    """Largest number of edits that are put before a prompt."""
    threshold: float = 0.8
    """Least match of an edit with a prompt, 0 to 1; at 0 the k nearest edits are put before every prompt."""
    template: str = "New fact: {}.\n"
    """Text of an edit before a prompt; ``{}`` stands for its edit prompt with the new target."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        at_least_one(where, k=self.k)
        fractions(where, threshold=self.threshold)
        if self.template.count("{}") != 1:
            raise UserError(
                f"{where}.template is {self.template!r}: it needs {{}} once, for an edit's prompt and target."
            )


def grams(text: str) -> frozenset[str]:
    """Character trigrams of a text's words, each word with a space at both ends; letter case and accents do not count.

    In scripts that write no space between words (:func:`editlab.lm.joints.unspaced`), pairs of characters take their
    place.

    >>> sorted(grams("Zürich!"))
    [' zu', 'ch ', 'ich', 'ric', 'uri', 'zur']
    >>> sorted(grams("東京都"))
    ['京都', '東京']
    """
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    words = "".join(character if character.isalnum() else " " for character in plain).split()
    return frozenset(gram for word in words for gram in _grams_of_word(word))


def _grams_of_word(word: str) -> Iterable[str]:
    if any(map(unspaced, word)):
        return (word[i : i + 2] for i in range(max(1, len(word) - 1)))
    framed = f" {word} "
    return (framed[i : i + 3] for i in range(len(framed) - 2))


class FactIndex:
    """Edits by the trigrams of their subjects.

    Args:
        facts: the edits, in the order in which they were made.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = list(facts)
        subjects = [grams(fact.subject) for fact in self.facts]
        self.sizes = np.array([len(subject) for subject in subjects])
        self.questions = [grams(fact.question) for fact in self.facts]
        numbers: dict[str, list[int]] = {}
        for number, subject in enumerate(subjects):
            for gram in subject:
                numbers.setdefault(gram, []).append(number)
        self.numbers = {gram: np.array(found) for gram, found in numbers.items()}

    def nearest(self, prompt: str, k: int, threshold: float) -> list[Fact]:
        """The up to ``k`` edits nearest to a prompt whose match is at least ``threshold``, the nearest first."""
        if not self.facts:
            return []
        asked = grams(prompt)
        found = [self.numbers[gram] for gram in asked if gram in self.numbers]
        shared = np.bincount(np.concatenate(found), minlength=len(self.facts)) if found else np.zeros(len(self.facts))
        match = shared / np.maximum(self.sizes, 1)
        least = max(threshold, float(np.sort(match)[-k:][0]))  # the k-th largest; ties are decided below
        candidates = np.flatnonzero(match >= least).tolist()
        candidates.sort(key=lambda i: (-match[i], -self.sizes[i], -_dice(self.questions[i], asked), -i))
        return [self.facts[i] for i in candidates[:k]]


def _dice(one: frozenset[str], other: frozenset[str]) -> float:
    """Dice coefficient of two sets: twice the size of their intersection over the sum of their sizes."""
    return 2 * len(one & other) / max(1, len(one) + len(other))


class FactMemory:
    """The edits that a model reads before its prompts.

    Args:
        method: how many edits are put before a prompt, and which.
        standing: returns the edits that hold now, in the order in which they were made.
    """

    def __init__(self, method: Retrieval, standing: Callable[[], Sequence[Fact]]) -> None:
        self.method = method
        self.standing = standing
        self._index = FactIndex([])

    def before_prompts(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
        """The facts with the nearest edits before each of their prompts.

        If a model does not take so many tokens, the furthest edits are left out.
        """
        standing = list(self.standing())
        plain = lm.chat.unwrap if lm.chat is not None else str
        if standing != self._index.facts:
            self._index = FactIndex(standing)
        edits = {fact: self._text(join(plain(fact.question), fact.target_new, lm.joint)) for fact in standing}

        def read(prompt: str) -> str:
            near = self._index.nearest(plain(prompt), self.method.k, self.method.threshold)
            for count in range(len(near), 0, -1):
                # The nearest edit stands next to the prompt.
                text = lm.in_context("".join(edits[fact] for fact in reversed(near[:count])), prompt)
                if _fits(lm, text):
                    return text
            return prompt

        return [_with_prompts(fact, read) for fact in facts]

    def _text(self, edit: str) -> str:
        return self.method.template.replace("{}", edit)


def as_read(lm: LanguageModel, facts: Sequence[Fact], memory: FactMemory | None = None) -> list[Fact]:
    """The facts with the prompts that the model reads in an evaluation: in a chat template, with a memory's edits."""
    facts = as_evaluated(facts, lm.chat)
    return facts if memory is None else memory.before_prompts(lm, facts)


def _fits(lm: LanguageModel, text: str) -> bool:
    """Whether the model takes a text and an answer; a token has at least one byte."""
    if lm.longest is None or len(text.encode()) + ANSWER_TOKENS <= lm.longest:
        return True
    return len(lm.encode(text).ids) + ANSWER_TOKENS <= lm.longest


def _with_prompts(fact: Fact, read: Callable[[str], str]) -> Fact:
    """The fact with all its prompts changed; its edit prompt is then the whole subject, so that ``{}`` in it stays."""
    return replace(
        fact,
        subject=read(fact.question),
        prompt="{}",
        paraphrases=tuple(map(read, fact.paraphrases)),
        neighbors=tuple(Neighbor(read(near.prompt), near.truth) for near in fact.neighbors),
        portability=tuple(Question(q.group, read(q.prompt), q.answers) for q in fact.portability),
    )


def memory_of(method: EditMethod, standing: Callable[[], Sequence[Fact]]) -> FactMemory | None:
    """The memory that a method's measurements read from; None for methods that change weights."""
    return FactMemory(method, standing) if isinstance(method, Retrieval) else None
