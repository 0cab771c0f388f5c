"""Functions that read the names of an answer, and the questions whose answers follow from an edit (portability)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from editlab.data.fact import Question
from editlab.data.formats.fields import ANSWERS, PROMPTS, found_name, leave_out, texts_with_gaps, unpacked
from editlab.errors import UserError

PORTABILITY = "portability"
"""Group of questions that a file does not put into a named group."""
_PROMPTS = (*PROMPTS, "question", "New Question")
_ANSWERS = (*ANSWERS, "answers", "New Answer")
_ALIASES = ("aliases", "answer_alias")


def names_in(value: Any, name: str) -> tuple[str, ...]:
    """Return all names in a text, an object with ``str`` or with ``value`` and ``aliases``, or nested lists of these.

    Each name is returned once, without the spaces around it; empty ones are dropped.

    Args:
        value: the content of the field.
        name: name of the field, for the message of an error.

    Raises:
        UserError: The value is of another kind, such as a number.
    """
    return tuple(dict.fromkeys(one for one in _names(value, name) if one))


def _names(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, list):
        for one in value:
            yield from _names(one, name)
    elif isinstance(value, dict) and ("str" in value or "value" in value):
        yield from _names(value["str"] if "str" in value else value["value"], name)
        yield from _names(value.get("aliases"), name)
    elif value is not None:
        raise UserError(f"has a {name!r} that is not a text: make it a text in quotes, or a list of texts")


def aliases_of(record: dict[str, Any], fields: Iterable[str], own: str) -> tuple[str, ...]:
    """Return the names after the first of the first field that has any, and the texts of the field ``own``.

    Args:
        record: the record.
        fields: names of the fields that may hold the target, a text or a list of synonyms.
        own: name of the field that holds aliases alone.

    Raises:
        UserError: A field is of another kind.
    """
    main = next(filter(None, (names_in(unpacked(record, field), field) for field in fields)), ())
    found = dict.fromkeys((*main[1:], *names_in(unpacked(record, own, strict=True), own)))
    return tuple(one for one in found if one not in main[:1])


def questions_of(record: dict[str, Any], own: str = PORTABILITY) -> tuple[Question, ...]:
    """Return the portability questions of a record, in any of the forms that data sets have.

    ``own`` is a list of objects, each with a prompt, an answer or ``answers``, and possibly a ``group`` and
    ``aliases``; or an object of named groups, each such an object or a list of them; a group may also have parallel
    lists of prompts and answers, and several answers of one prompt are names of the same thing. An object may have
    ``New Question`` and ``New Answer`` (Yao et al. 2023). ``portability_prompt`` with ``portability_ground_truth`` are
    read too. Questions without an answer are left out.

    Raises:
        UserError: A field is of another kind, or has more prompts than answers.
    """
    return tuple(_questions(record, own))


def _questions(record: dict[str, Any], own: str) -> Iterator[Question]:
    if record.get("portability_prompt"):
        yield from asked(record, PORTABILITY, "portability_prompt", "portability_ground_truth")
    found = unpacked(record, own) or []
    if not isinstance(found, dict | list):
        raise UserError(f'has a {own!r} that is no list: write [{{"group": "...", "prompt": "...", "answers": [...]}}]')
    groups: Iterable[tuple[Any, Any]] = [(PORTABILITY, found)]
    if isinstance(found, dict) and not any(name in found for name in _PROMPTS):
        groups = found.items()
    for group, part in groups:
        for one in part if isinstance(part, list) else [part or {}]:
            if not isinstance(one, dict):
                raise UserError(f"has a {own!r} with a part that is not an object: give it prompt and answers")
            named = str(one.get("group") or group)
            yield from asked(one, named, found_name(one, _PROMPTS), found_name(one, _ANSWERS), _ALIASES)


def asked(
    record: dict[str, Any], group: str, prompts: str, answers: str, aliases: Iterable[str] = ()
) -> Iterator[Question]:
    """Yield questions from a prompt and the names of its answer, or from parallel lists of prompts and answers.

    Args:
        record: the object that has the fields.
        group: name of the questions' group.
        prompts: name of the field with the prompt or prompts; if it is absent, there is no question.
        answers: name of the field with the answer or answers.
        aliases: names of fields with further names of the answer.

    Raises:
        UserError: A field is of another kind, or there are more prompts than answers.
    """
    given, questions = unpacked(record, answers), texts_with_gaps(record, prompts)
    several = given if isinstance(given, list) else [] if given is None else [given]
    several = [given] if len(questions) == 1 else several
    if len(questions) != len(several):
        raise UserError(f"has {len(questions)} {prompts} but {len(several)} {answers}: give as many of each")
    further = tuple(name for field in aliases for name in names_in(unpacked(record, field), field))
    for question, answer in zip(questions, several, strict=True):
        names = names_in(answer, answers)
        if question and names:
            yield Question(group, question, tuple(dict.fromkeys((*names, *further))))
        elif question:
            leave_out(record, prompts)
