"""Reading the fields of a record; every error is a predicate that names the field and says how to correct it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.errors import UserError

_SURROGATE = re.compile("[\\ud800-\\udfff]")


def field(record: Any, name: str, kind: type) -> Any:
    """Return a field that must be there and be of ``kind``, ``str`` or ``dict``.

    Raises:
        UserError: It is missing or of another kind.
    """
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"lacks {name!r}: add it")
    if not isinstance(record[name], kind):
        wanted = "an object" if kind is dict else "a text in quotes"
        raise UserError(f"has a {name!r} that is no {'object' if kind is dict else 'text'}: make it {wanted}")
    return record[name]


def text(record: Any, name: str) -> str:
    """Return a text that must be there and not be empty, without spaces around it.

    Raises:
        UserError: It is missing, no text, or empty.
    """
    found = field(record, name, str).strip()
    if not found:
        raise UserError(f"has an empty {name!r}: fill it in")
    return str(found)


def texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the texts of a field that is a text, a list of texts, or absent; empty texts are dropped.

    Raises:
        UserError: It is of another kind.
    """
    return tuple(one for one in texts_with_gaps(record, name) if one)


def texts_with_gaps(record: dict[str, Any], name: str) -> list[str]:
    """Return the same as :func:`texts` with empty texts kept, so that indices match those of another field.

    Raises:
        UserError: It is of another kind.
    """
    value = record.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f'has a {name!r} that is no list of texts: write it as ["...", "..."]')
    return [v.strip() for v in values]


def first_text(record: dict[str, Any], name: str) -> str | None:
    """Return the first text of a field that is a text, a list of synonyms, or absent; None where it is empty or absent.

    Raises:
        UserError: It is of another kind.
    """
    value = record.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    return field({name: value}, name, str).strip() or None


def unpacked(record: dict[str, Any], name: str) -> Any:
    """Return a field that may be a list, or text that begins like one and is then read as JSON; None where empty.

    Raises:
        UserError: The text is not valid JSON.
    """
    value = record.get(name) or None
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"has a {name!r} that is no valid JSON ({error}): correct it") from error


def paired(record: dict[str, Any], prompts: str, truths: str) -> Iterable[Neighbor]:
    """Yield neighbors from two parallel lists, without pairs of which one text is empty.

    Several truths of one prompt are names of the same thing, and the first is taken.

    Raises:
        UserError: The lists differ in length.
    """
    asked, answers = texts_with_gaps(record, prompts), texts_with_gaps(record, truths)
    if isinstance(record.get(prompts), str):
        answers = answers[:1]
    if len(asked) != len(answers):
        raise UserError(f"has {len(asked)} {prompts} but {len(answers)} {truths}: give as many")
    yield from (Neighbor(p, t) for p, t in zip(asked, answers, strict=True) if p and t)


def as_template(prompt: str, subject: str) -> str:
    """Return the prompt with ``{}`` in the place of the subject's last occurrence, which has seen most of the prompt.

    An occurrence inside another word, as of Niger in Nigeria, is taken only if there is no other. A prompt that
    already has ``{}`` is returned as it is.

    Raises:
        UserError: The subject does not occur.
    """
    if "{}" in prompt:
        return prompt
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    start = whole[-1].start() if whole else prompt.rfind(subject)
    if start < 0:
        raise UserError(f"has a prompt in which its subject {subject!r} does not occur: write {{}} where it belongs")
    return prompt[:start] + "{}" + prompt[start + len(subject) :]


def checked(fact: Fact) -> Fact:
    """Return the fact itself, if its prompt has exactly one ``{}`` and all of its texts can be encoded.

    Raises:
        UserError: The prompt has none or several, or a text holds half of a UTF-16 pair.
    """
    for name, value in asdict(fact).items():
        # JSON can spell one half of a pair that UTF-16 makes a character of (\\ud83d); no tokenizer takes it.
        half = _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))
        if half:
            raise UserError(f"has {half[0]!a} in its {name}, which is half a character: write the whole one, or none")
    if fact.prompt.count("{}") != 1:
        raise UserError(
            f"has a prompt with {fact.prompt.count('{}')} places for the subject: write {{}} once, where it stands"
        )
    return fact
