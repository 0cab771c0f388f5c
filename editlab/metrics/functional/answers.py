"""Scores of generated answers as functions: contains, exact match and token F1, after SQuAD's normalisation."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from editlab.metrics.functional.editing import record_means

AnswerKind = Literal["contains", "exact", "f1"]

ANSWER_KINDS: tuple[AnswerKind, ...] = ("contains", "exact", "f1")

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class AnswerScores(NamedTuple):
    """The scores of one generated text; each is the best over the names that count as right."""

    contains: bool
    """whether the text contains one of the names as whole words"""
    exact: bool
    """whether the text is one of the names"""
    f1: float
    """harmonic mean of the precision and the recall of the text's words against those of a name"""


def normalized(text: str) -> str:
    """A text in the form in which answers are compared: that of SQuAD (arXiv:1606.05250), for any script.

    Letters are lower case and in Unicode's compatibility form, punctuation and the articles *a*, *an* and *the* are
    removed, and words are separated by one space. Dashes and slashes become spaces, so that *French-speaking* contains
    *French*; SQuAD's own code, which knows ASCII punctuation alone, removes them.

    >>> normalized("The U.S.-born  painter, Ann!")
    'us born painter ann'
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = (" " if _separates(c) else "" if _is_punctuation(c) else c for c in text)
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def _separates(character: str) -> bool:
    return character in "/\\" or unicodedata.category(character) == "Pd"


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _comparable(text: str, name: str) -> tuple[str, str]:
    """The text and a name, normalized; if nothing remains of the name, both only in lower case."""
    short = normalized(name)
    if short:
        return normalized(text), short
    return " ".join(text.lower().split()), " ".join(name.lower().split())


def _contains(text: str, name: str) -> bool:
    """Whether a name stands in a text as whole words."""
    start = text.find(name)
    while name and start >= 0:
        end = start + len(name)
        if not (_one_word(text[start - 1 : start], name[0]) or _one_word(name[-1], text[end : end + 1])):
            return True
        start = text.find(name, start + 1)
    return False


def _one_word(left: str, right: str) -> bool:
    """Whether two adjacent characters belong to one word; letters without case, such as Chinese ones, never do.

    Their scripts write no space between words, or attach particles and articles to them.
    """
    return all(c.isalnum() and unicodedata.category(c) != "Lo" for c in (left, right))


def _f1(text: str, name: str) -> float:
    words, wanted = text.split(), name.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def answer_scores(text: str, names: Sequence[str]) -> AnswerScores:
    """Scores of one generated text: the best over the names that count as right.

    Args:
        text: what the model wrote after the prompt.
        names: the right answer and its aliases; at least one.

    Raises:
        ValueError: if there is no name.

    >>> answer_scores("Rome, the capital of Italy.", ["Rome"])
    AnswerScores(contains=True, exact=False, f1=0.4)
    """
    if not names:
        raise ValueError("There is no name of the answer: give at least one.")
    pairs = [_comparable(text, name) for name in names]
    return AnswerScores(
        contains=any(_contains(*pair) for pair in pairs),
        exact=any(bool(name) and text == name for text, name in pairs),
        f1=max(_f1(*pair) for pair in pairs),
    )


def check_answer_kind(kind: str) -> None:
    """Checks the name of a score of answers.

    Raises:
        ValueError: if ``kind`` is not one of :data:`ANSWER_KINDS`.
    """
    if kind not in ANSWER_KINDS:
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(ANSWER_KINDS)}.")


def record_best(values: Tensor, record: Tensor) -> Tensor:
    """The highest value of each record's rows, sorted by record number.

    Args:
        values: float [n].
        record: long [n], the record of each row.

    Returns:
        float64 [records].

    >>> record_best(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 2])).tolist()
    [0.0, 1.0]
    """
    numbers, index = torch.unique(record, return_inverse=True)
    best = torch.zeros(len(numbers), dtype=torch.float64, device=values.device)
    return best.scatter_reduce(0, index, values.double(), "amax", include_self=False)


def case_score(values: Tensor, record: Tensor, any_prompt: bool = False) -> Tensor:
    """The mean over records of the mean, or of the best, over each record's prompts.

    Args:
        values: float [n], the score of each prompt.
        record: long [n], the record that the prompt belongs to.
        any_prompt: a record counts by its best prompt. This is how MQuAKE (arXiv:2305.14795) counts: its questions ask
            for one fact in several words, and a case is right if any of them is answered.

    Returns:
        float64 scalar; NaN for no prompts.

    >>> float(case_score(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 2]), any_prompt=True))
    0.5
    """
    values, record = values.cpu(), record.cpu()
    return (record_best if any_prompt else record_means)(values, record).mean()


def _answer_score_update(
    texts: Iterable[str], names: Iterable[Sequence[str]], record: Tensor, kind: AnswerKind
) -> tuple[Tensor, Tensor]:
    found = [float(getattr(answer_scores(*pair), kind)) for pair in zip(texts, names, strict=True)]
    if len(found) != len(record):
        raise ValueError(f"There are {len(found)} texts, but {len(record)} record numbers: give one per text.")
    return torch.tensor(found), record


def answer_score(
    texts: Iterable[str],
    names: Iterable[Sequence[str]],
    record: Tensor,
    kind: AnswerKind = "contains",
    any_prompt: bool = False,
) -> Tensor:
    """Score of generated texts against the names that count as right.

    Args:
        texts: what the model wrote after each of ``[n]`` prompts.
        names: for each prompt the right answer and its aliases.
        record: long [n], number of the record that the prompt belongs to.
        kind: ``contains``, ``exact`` or ``f1``, see :class:`AnswerScores`.
        any_prompt: a record counts by its best prompt; otherwise by the mean of its prompts.

    Returns:
        float64 scalar; NaN for no prompts.

    Raises:
        ValueError: for an unknown kind, a prompt without a name, or lengths that differ.

    >>> float(answer_score(["Rome.", "in Paris"], [["Rome"], ["Oslo"]], torch.tensor([0, 1])))
    0.5
    """
    check_answer_kind(kind)
    return case_score(*_answer_score_update(texts, names, record, kind), any_prompt)
