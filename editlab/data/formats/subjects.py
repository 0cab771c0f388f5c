"""Facts without a subject: inferring it from the texts of the fact, or editing at the prompt's last token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.checks import checked, further_prompts
from editlab.data.formats.fields import as_template
from editlab.data.formats.record import Record
from editlab.errors import UserError
from editlab.utils.validation import one_of

FIELD = "field"
INFER = "infer"
LAST_TOKEN = "last_token"
SUBJECTS = (FIELD, INFER, LAST_TOKEN)
"""Settings of ``data.subject``: the file names the subject, it is inferred where absent, or it is the whole prompt."""

SHARED = "the words that prompt and paraphrases share"
CAPITALS = "the last capitalised words of the prompt"

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff"
"""Characters of scripts without spaces between words; each counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_FUNCTION_WORDS = """
a about after all also am an and are as at be been before by called can could did do does during each for from had has
have he her his how if in into is it its know known like may me my name named names no not of on or our s she should so
than that the their them then there these they this those to under up was we were what when where which who whom whose
why will with would you your
"""
_STOP = frozenset(_FUNCTION_WORDS.split())
_PARTICLES = "al bin da de del den der di do dos du el ibn la le les of the van von y"
_INSIDE = frozenset(_PARTICLES.split())
"""Words in lower case that may stand inside a name."""
_GAP = re.compile(r"\s+|[-'’]|\s*&\s*")
"""What may stand between two words of one name; after an initial also a full stop."""


class Subjects:
    """Gives facts their subject by one rule, and counts how.

    Args:
        rule: ``field`` (records without a subject are errors), ``infer`` (the words of a prompt that its paraphrases
            share, else the last capitalised words of the prompt) or ``last_token`` (the whole prompt is the subject of
            each fact, so that the edit acts at its last token).

    Raises:
        UserError: The rule is unknown.
    """

    def __init__(self, rule: str = FIELD) -> None:
        one_of("data", SUBJECTS, subject=rule)
        self.rule = rule
        self.counts: Counter[str] = Counter()
        """how the subject was found -> number of facts; "" where the file names it"""

    def record(self, content: Mapping[str, Any]) -> Record:
        """Return a record with these fields, which may lack a subject if the rule is not ``field``."""
        return Record(content, needs_subject=self.rule == FIELD)

    def settle(self, fact: Fact) -> Fact:
        """Return a fact with its subject, checked; the subject is "" and the prompt complete if the record has none.

        Raises:
            UserError: No subject can be inferred, or :func:`~editlab.data.formats.checks.checked` refuses the fact; the
                message is a predicate.
        """
        way = ""
        if not fact.subject and self.rule != FIELD:
            if any("{}" in one for one in (fact.prompt, *further_prompts(fact))):
                raise UserError("has {} in a prompt but no subject for it: add 'subject', or write the prompt out")
            if self.rule == INFER:
                subject, way = inferred(fact.prompt, fact.paraphrases)
                fact = replace(fact, subject=subject, prompt=as_template(fact.prompt, subject))
            else:
                fact = replace(fact, subject=fact.prompt, prompt="{}")
        fact = checked(fact)
        self.counts[way] += 1
        return replace(fact, subject=fact.question, prompt="{}") if self.rule == LAST_TOKEN else fact

    def sentence(self, source: str) -> str | None:
        """Return a sentence that counts how the subjects of ``source`` were found; None if the file names them all."""
        total = self.counts.total()
        if self.rule == LAST_TOKEN and total:
            return f"The edits of {source} act at the last token of the prompt (data.subject), for all {total} facts."
        guessed = [f"{way} for {count}" for way, count in sorted(self.counts.items(), reverse=True) if way]
        if not guessed:
            return None
        return (
            f"{total - self.counts['']} of {total} facts in {source} name no subject that is in their prompt, so it is "
            f"inferred: {', '.join(guessed)}."
        )


def inferred(prompt: str, paraphrases: Iterable[str]) -> tuple[str, str]:
    """Return a subject for a prompt that has none, and how it was found: :data:`SHARED` or :data:`CAPITALS`.

    Raises:
        UserError: Neither way finds one; the message is a predicate.
    """
    found = shared_words(prompt, paraphrases)
    if found:
        return found, SHARED
    found = last_capitals(prompt)
    if found:
        return found, CAPITALS
    raise UserError(
        "has no subject, and none can be inferred from its prompt: add it, or set data.subject to last_token"
    )


def shared_words(prompt: str, others: Iterable[str]) -> str | None:
    """Return the longest span of a prompt, in whole words, that occurs in all other texts, whatever its case.

    Spans of capitalised words (:func:`last_capitals`) come first, because most subjects are names. A span neither
    begins nor ends with a function word such as "of" or "is". Among spans of equally many words the one with most
    characters is taken, then the last one. None if there is no other text or no such span.

    >>> shared_words("The capital of New Zealand is", ["In New Zealand, the capital is"])
    'New Zealand'
    >>> shared_words("who won the first world cup final", ["name the winner of the first world cup final"])
    'first world cup final'
    """
    texts = [f" {' '.join(word.casefold() for word in _WORD.findall(one))} " for one in others]
    if not texts:
        return None
    words = list(_WORD.finditer(prompt))
    names = [[word for word in words if start <= word.start() < end] for start, end in _capitals(prompt)]
    best = max((_longest(run, texts) for run in names), default=(0, 0, 0))
    _, length, start = best if best[0] else _longest(words, texts)
    return prompt[start : start + length] or None


def _longest(words: Sequence[re.Match[str]], texts: Sequence[str]) -> tuple[int, int, int]:
    """Return the number of words, the length and the start of the best span of adjacent words that all texts have."""
    best = (0, 0, 0)
    for first, word in enumerate(words):
        for last in range(first, first if _is_function_word(word) else len(words)):
            span = f" {' '.join(one[0].casefold() for one in words[first : last + 1])} "
            if not all(span in text for text in texts):
                break  # a longer span from here is in no more of the texts
            if not _is_function_word(words[last]):
                best = max(best, (last + 1 - first, words[last].end() - word.start(), word.start()))
    return best


def _is_function_word(word: re.Match[str]) -> bool:
    """Return whether a word is one of :data:`_STOP`; AT and IT in capitals are abbreviations."""
    return word[0].casefold() in _STOP and not (len(word[0]) > 1 and word[0].isupper())


def last_capitals(prompt: str) -> str | None:
    """Return the last run of capitalised words of a prompt, with numbers and short words such as "of" inside it.

    A function word at its beginning, such as the "What" of a question, does not belong to it. None if there is none.

    >>> last_capitals("Which university did Watts S. Humphrey of Battle Creek attend?")
    'Watts S. Humphrey of Battle Creek'
    """
    runs = _capitals(prompt)
    return prompt[runs[-1][0] : runs[-1][1]] if runs else None


def _capitals(prompt: str) -> list[tuple[int, int]]:
    """Return start and end (exclusive) of each run of capitalised words."""
    runs: dict[int, int] = {}
    start = -1  # of the run that may go on; -1 if there is none
    before: re.Match[str] | None = None
    for word in _WORD.finditer(prompt):
        joined = before is not None and start >= 0 and _one_name(before, prompt[before.end() : word.start()])
        capital = word[0][0].isupper() or (word[0][0].isdigit() and joined)
        if capital and not joined:
            start = -1 if _is_function_word(word) else word.start()
        elif not capital and not (joined and word[0] in _INSIDE):
            start = -1
        if capital and start >= 0:
            runs[start] = word.end()
        before = word
    return list(runs.items())


def _one_name(before: re.Match[str], gap: str) -> bool:
    """Return whether a name may continue over the text between two words."""
    return _GAP.fullmatch(gap) is not None or (len(before[0]) == 1 and before[0].isupper() and gap in (".", ". "))
