"""Functions that read the fields of a record; each error is a predicate that names the field and the fix.

Fact files differ in how they write the same thing: a text may be ``"Peru"``, ``{"str": "Peru"}`` or the first of a list
of synonyms; paraphrases, truths and neighbors have several usual names. The functions here accept all of them, so that
every format does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from editlab.data.fact import Neighbor, composed
from editlab.data.formats.record import Cell, Record
from editlab.errors import UserError

PARAPHRASES = ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase", "queries")
"""Names under which fact files have paraphrases of the edit prompt."""
TRUTHS = ("truth", "target_true", "ground_truth", "target_old")
"""Names under which fact files have the target that was right before the edit."""
ANSWERS = ("ground_truth", "truth", "answer", "loc_ans")
"""Names under which a neighbor has its answer."""
PROMPTS = ("prompt", "loc")
"""Names under which a neighbor has its prompt."""
_TEXTS = ("str", "prompt", "question", "text")
"""Names under which an object in a list of texts has its text."""


def field(record: Any, name: str, kind: type) -> Any:
    """Return a required field of type ``kind``, which is ``str`` or ``dict``.

    Raises:
        UserError: The field is missing or of another type.
    """
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"lacks {name!r}: add it")
    found = record[name]
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a text in quotes"
        raise UserError(f"has a {name!r} that is not {'an object' if kind is dict else 'a text'}: make it {wanted}")
    return found


def trimmed_prompt(text: str) -> str:
    """Return a prompt without the spaces around it; line breaks at its end stay, as a chat prompt needs them."""
    end = text[len(text.rstrip()) :]
    return text.strip() + (end.rstrip(" ") if text.strip() and "\n" in end else "")


def text(record: Any, name: str, *, prompt: bool = False) -> str:
    """Return a required non-empty text without the spaces around it; it may be the ``str`` of an object.

    Args:
        record: the record.
        name: the field.
        prompt: whether it is a prompt, whose line breaks at the end are kept (:func:`trimmed_prompt`).

    Raises:
        UserError: The field is missing, not a text, or empty.
    """
    found = _required(record, name)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, list):
        raise UserError(f"has a {name!r} that is a list of {len(found)}: give a record for each")
    return _filled(_one(found, name, trimmed_prompt if prompt else str.strip), name)


def first_of(record: Any, name: str) -> str:
    """Return a required non-empty text, or the first of a list of synonyms.

    Raises:
        UserError: The field is missing, holds no text, or is empty.
    """
    return _filled(_one(_required(record, name), name), name)


def first_text(record: dict[str, Any], *names: str) -> str | None:
    """Return the first text of the first of these fields that has one; None if all are empty or absent.

    A field is a text, an object with ``str``, or a list of synonyms, which may be lists of synonyms themselves.

    Raises:
        UserError: A field is of another kind.
    """
    for name in names:
        value = unpacked(record, name)
        if value is not None and (found := _one(value, name)):
            return found
    return None


def texts(record: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Return the texts of fields that are each a text, a list of texts, or absent; empty texts are dropped.

    A text that several of the fields have is returned once.

    Raises:
        UserError: A field is of another kind.
    """
    found: list[str] = []
    for name in names:
        own = [one for one in texts_with_gaps(record, name) if one]
        found += [one for one in own if one not in found] if found else own
    return tuple(found)


def texts_with_gaps(record: dict[str, Any], name: str) -> list[str]:
    """Return the texts of one field of :func:`texts` including empty ones, so that indices match another field's.

    Raises:
        UserError: It is of another kind.
    """
    value = unpacked(record, name, strict=True)
    values = [] if value is None else value if isinstance(value, list) else [value]
    found = [_text_of_object(one) for one in values]
    if not all(isinstance(one, str) for one in found):
        raise UserError(f'has a {name!r} that is not a list of texts: write it as ["...", "..."]')
    return [trimmed_prompt(str(one)) for one in found]


def neighbors_of(record: dict[str, Any], truth: str | None, own: str = "neighbors") -> tuple[Neighbor, ...]:
    """Return the neighbors of a record, under any of their usual names.

    These are ``own`` (a list of objects with ``prompt`` and ``truth``), ``neighborhood_prompts`` (whose answer is the
    fact's truth), ``locality_prompt`` with ``locality_ground_truth``, ``locality`` (objects with a prompt and one of
    :data:`ANSWERS`, in a list or in named groups, whose names are not kept), and ``loc`` with ``loc_ans``.

    Args:
        record: the record.
        truth: the fact's truth; None if it has none, and then ``neighborhood_prompts`` have no answer and are left out.
        own: name of the list of objects.

    Raises:
        UserError: A field is of another kind.
    """
    return tuple(_neighbors(record, truth, own))


def _neighbors(record: dict[str, Any], truth: str | None, own: str) -> Iterator[Neighbor]:
    given = unpacked(record, own, strict=True) or []
    if not isinstance(given, list):
        raise UserError(f'has {own!r} that are not a list: write [{{"prompt": "...", "truth": "..."}}]')
    yield from (Neighbor(text(one, "prompt", prompt=True), first_of(one, "truth")) for one in given)
    prompts = texts(record, "neighborhood_prompts")
    if truth is not None:
        yield from (Neighbor(prompt, truth) for prompt in prompts)
    if record.get("locality_prompt"):
        yield from paired(record, "locality_prompt", "locality_ground_truth")
    yield from _locality(unpacked(record, "locality"))
    for question in texts(record, "loc"):
        yield Neighbor(question.removeprefix("nq question: ").lstrip(), first_of(record, "loc_ans"))


def _locality(found: Any) -> Iterator[Neighbor]:
    grouped = isinstance(found, dict) and not any(name in found for name in PROMPTS)
    for group in found.values() if grouped else [found or []]:
        for one in group if isinstance(group, list) else [group or {}]:
            if not isinstance(one, dict):
                raise UserError("has a 'locality' with a part that is not an object: give it prompt and ground_truth")
            yield from paired(one, found_name(one, PROMPTS), found_name(one, ANSWERS))


def found_name(record: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of several names that a record has; the first of all if it has none."""
    return next((name for name in names if name in record), names[0])


def paired(record: dict[str, Any], prompts: str, truths: str) -> Iterable[Neighbor]:
    """Yield neighbors from two parallel lists; pairs with an empty text are dropped, and counted if the answer is.

    If one prompt has several truths, they are names of the same thing, and the first is used.

    Raises:
        UserError: The lists differ in length.
    """
    asked, given = unpacked(record, prompts), unpacked(record, truths)
    questions = texts_with_gaps(record, prompts)
    answers = [] if given is None else [given] if not (isinstance(asked, list) and isinstance(given, list)) else given
    if len(questions) != len(answers):
        raise UserError(f"has {len(questions)} {prompts} but {len(answers)} {truths}: give as many of each")
    for question, answer in zip(questions, (_one(one, truths) for one in answers), strict=True):
        if question and answer:
            yield Neighbor(question, answer)
        elif question:
            leave_out(record, prompts)


def leave_out(record: dict[str, Any], name: str) -> None:
    """Note that a prompt in the field ``name`` has no answer and is left out."""
    if isinstance(record, Record):
        record.leave_out(name)


def placed(record: dict[str, Any], subject: str, prompt: str) -> tuple[str, str]:
    """Return a record's subject, and its prompt as a template.

    If the record may lack a subject (``data.subject``), and lacks it or has one that is not in its prompt, the subject
    is "" and the prompt is complete.

    Args:
        record: the record.
        subject: name of the field with the subject.
        prompt: name of the field with the prompt.

    Raises:
        UserError: One of them is missing or wrong.
    """
    if getattr(record, "needs_subject", True):
        if subject not in record:
            raise UserError(f"lacks {subject!r}: add it, or set data.subject to infer or last_token")
        named = text(record, subject)
        return named, as_template(text(record, prompt, prompt=True), named)
    asked = text(record, prompt, prompt=True)
    named = text(record, subject) if first_text(record, subject) else ""
    if not named or not ("{}" in asked or composed(named) in composed(asked)):
        return "", asked
    return named, as_template(asked, named)


def as_template(prompt: str, subject: str) -> str:
    """Return the prompt with ``{}`` in place of the subject's last occurrence, which attends to the most context.

    An occurrence inside another word, such as Niger in Nigeria, is used only if there is no other. A prompt that
    already contains ``{}`` is returned unchanged. If only the Unicode form of the two differs (an accented letter as
    one character or as two), the template has the composed form (NFC).

    Raises:
        UserError: The subject does not occur in the prompt.
    """
    if "{}" in prompt:
        return prompt
    if subject not in prompt:
        prompt, subject = composed(prompt), composed(subject)
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    start = whole[-1].start() if whole else prompt.rfind(subject)
    if start < 0:
        raise UserError(
            f"has a prompt in which its subject {subject!r} does not occur: write {{}} where it belongs, or set "
            "data.subject to infer or last_token"
        )
    return prompt[:start] + "{}" + prompt[start + len(subject) :]


def _required(record: Any, name: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"lacks {name!r}: add it")
    return unpacked(record, name)


def unpacked(record: dict[str, Any], name: str, strict: bool = False) -> Any:
    """Return a field; the text of a table's cell that holds a JSON list or object is parsed.

    Args:
        record: the record.
        name: name of the field.
        strict: whether a cell that begins with ``[`` must be a list, because the field is one of lists.

    Raises:
        UserError: Such a cell is not valid JSON.
    """
    value, raw = record.get(name), dict.get(record, name)  # a Record gives the text of a cell as a plain text
    looks_like_json = r"\s*\[" if strict else r'\s*(\[\s*)+["{\]]'
    if not isinstance(raw, Cell) or not re.match(rf'{looks_like_json}|\s*\{{\s*"', raw):
        return value
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise UserError(f"has a {name!r} that is not valid JSON ({error}): correct it") from error


def _one(value: Any, name: str, trim: Callable[[str], str] = str.strip) -> str:
    """Return a trimmed text, the ``str`` of an object, or the first such text in a list; "" for an empty list."""
    if isinstance(value, list):
        return next(filter(None, (_one(one, name, trim) for one in value)), "")
    if isinstance(value, dict):
        if "str" not in value:
            raise UserError(f"has a {name!r} that lacks 'str': add it, or write the text itself")
        value = value["str"]
    if not isinstance(value, str):
        raise UserError(f"has a {name!r} that is not a text: make it a text in quotes")
    return trim(value)


def _filled(found: str, name: str) -> str:
    if not found:
        raise UserError(f"has an empty {name!r}: fill it in")
    return found


def _text_of_object(value: Any) -> Any:
    """Return the text of an object in a list of texts; anything else unchanged."""
    if not isinstance(value, dict):
        return value
    return next((value[name] for name in _TEXTS if name in value), value)
