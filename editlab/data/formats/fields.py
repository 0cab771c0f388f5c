"""Functions that read the fields of a record; each error is a predicate that names the field and the fix."""

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
    """Return a required field of type ``kind``, which is ``str`` or ``dict``.

    Raises:
        UserError: The field is missing or of another type.
    """
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"lacks {name!r}: add it")
    if not isinstance(record[name], kind):
        wanted = "an object" if kind is dict else "a text in quotes"
        raise UserError(f"has a {name!r} that is not {'an object' if kind is dict else 'a text'}: make it {wanted}")
    return record[name]


def trimmed_prompt(text: str) -> str:
    """Return a prompt without the spaces around it; line breaks at its end stay, as a chat prompt needs them."""
    end = text[len(text.rstrip()) :]
    return text.strip() + (end.rstrip(" ") if text.strip() and "\n" in end else "")


def text(record: Any, name: str, *, prompt: bool = False) -> str:
    """Return a required non-empty text without the spaces around it, or as :func:`trimmed_prompt` leaves a ``prompt``.

    Raises:
        UserError: The field is missing, not a text, or empty.
    """
    given = field(record, name, str)
    found = trimmed_prompt(given) if prompt else given.strip()
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
    """Return the texts of :func:`texts` including empty ones, so that indices match those of another field.

    Raises:
        UserError: It is of another kind.
    """
    value = record.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f'has a {name!r} that is not a list of texts: write it as ["...", "..."]')
    return [trimmed_prompt(v) for v in values]


def first_text(record: dict[str, Any], name: str) -> str | None:
    """Return the first text of a field that is a text, a list of synonyms, or absent; None if it is empty or absent.

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
    """Return the value of a field; a text that begins with ``[`` is parsed as JSON, and an empty field is None.

    Raises:
        UserError: The text is not valid JSON.
    """
    value = record.get(name) or None
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"has a {name!r} that is not valid JSON ({error}): correct it") from error


def paired(record: dict[str, Any], prompts: str, truths: str) -> Iterable[Neighbor]:
    """Yield neighbors from two parallel lists; pairs with an empty text are dropped.

    If one prompt has several truths, they are names of the same thing, and the first is used.

    Raises:
        UserError: The lists differ in length.
    """
    questions, answers = texts_with_gaps(record, prompts), texts_with_gaps(record, truths)
    if isinstance(record.get(prompts), str):
        answers = answers[:1]
    if len(questions) != len(answers):
        raise UserError(f"has {len(questions)} {prompts} but {len(answers)} {truths}: give as many of each")
    yield from (Neighbor(p, t.strip()) for p, t in zip(questions, answers, strict=True) if p and t)


def as_template(prompt: str, subject: str) -> str:
    """Return the prompt with ``{}`` in place of the subject's last occurrence, which attends to the most context.

    An occurrence inside another word, such as Niger in Nigeria, is used only if there is no other. A prompt that
    already contains ``{}`` is returned unchanged.

    Raises:
        UserError: The subject does not occur in the prompt.
    """
    if "{}" in prompt:
        return prompt
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    start = whole[-1].start() if whole else prompt.rfind(subject)
    if start < 0:
        raise UserError(f"has a prompt in which its subject {subject!r} does not occur: write {{}} where it belongs")
    return prompt[:start] + "{}" + prompt[start + len(subject) :]


def checked(fact: Fact) -> Fact:
    """Return the fact unchanged, after checking that its prompt has one ``{}`` and that its texts can be encoded.

    Raises:
        UserError: The prompt has no ``{}`` or several, or a text contains half of a UTF-16 surrogate pair.
    """
    for name, value in asdict(fact).items():
        # JSON can contain a lone half of a UTF-16 surrogate pair (\\ud83d), which no tokenizer accepts.
        half = _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))
        if half:
            raise UserError(
                f"has {half[0]!a} in its {name}, which is half a character: write the whole character, or none"
            )
    if fact.prompt.count("{}") != 1:
        raise UserError(
            f"has a prompt with {fact.prompt.count('{}')} times {{}}: write {{}} once, in place of the subject"
        )
    return fact
