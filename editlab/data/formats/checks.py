"""Checks of a whole fact, whatever the schema of its file: its texts show something, and its prompt has one ``{}``."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from editlab.data.fact import Fact, Neighbor, Question
from editlab.errors import UserError

_SURROGATE = re.compile("[\\ud800-\\udfff]")
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode categories of characters that show nothing: controls, formats such as the zero width space, separators."""
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Characters of other categories that show nothing: fillers, the blank Braille pattern, variation selectors."""

_FIELDS = tuple(field.name for field in fields(Fact))


def checked(fact: Fact) -> Fact:
    """Return the fact with its subject in place of each ``{}`` of its other prompts, after checking it.

    Raises:
        UserError: The prompt has no ``{}`` or several, a text contains half of a UTF-16 surrogate pair, or a text shows
            nothing, such as a target that is a zero width space.
    """
    for name in _FIELDS:
        for one in _texts(getattr(fact, name)):
            # JSON can contain a lone half of a UTF-16 surrogate pair (\\ud83d), which no tokenizer accepts.
            half = _SURROGATE.search(one)
            if half:
                raise UserError(
                    f"has {half[0]!a} in its {name}, which is half a character: write the whole character, or none"
                )
            if name not in ("prompt", "id") and not is_visible(one):
                codes = ", ".join(dict.fromkeys(f"U+{ord(character):04X}" for character in one)) or "it is empty"
                raise UserError(f"has a {name} in which nothing is visible ({codes}): write it out")
    if fact.prompt.count("{}") != 1:
        raise UserError(
            f"has a prompt with {fact.prompt.count('{}')} times {{}}: write {{}} once, in place of the subject"
        )
    return _with_subject(fact)


def is_visible(text: str) -> bool:
    r"""Return whether a text has a character that shows something.

    >>> is_visible("Peru"), is_visible("\u200b \ufeff"), is_visible("")
    (True, False, False)
    """
    if text.isascii():
        return any(one.isprintable() and one != " " for one in text)  # the same, and faster
    return any(unicodedata.category(one) not in _INVISIBLE for one in _FILLERS.sub("", text))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in the value of a field."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _with_subject(fact: Fact) -> Fact:
    if not any("{}" in one for one in further_prompts(fact)):
        return fact
    return replace(
        fact,
        paraphrases=tuple(one.replace("{}", fact.subject) for one in fact.paraphrases),
        neighbors=tuple(Neighbor(n.prompt.replace("{}", fact.subject), n.truth) for n in fact.neighbors),
        portability=tuple(Question(q.group, q.prompt.replace("{}", fact.subject), q.answers) for q in fact.portability),
    )


def further_prompts(fact: Fact) -> Iterator[str]:
    """Yield the prompts of a fact other than its edit prompt."""
    yield from fact.paraphrases
    yield from (neighbor.prompt for neighbor in fact.neighbors)
    yield from (question.prompt for question in fact.portability)
