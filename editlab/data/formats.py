"""Schemas of fact files: CounterFact, EasyEdit's, zsRE's and the plain one, told apart by looking at a record."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.errors import UserError


class FactFormat(ABC):
    """One schema of fact files."""

    @abstractmethod
    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a record looks like one of this schema."""

    @abstractmethod
    def read(self, record: dict[str, Any], index: int) -> Fact:
        """The fact of a record; ``index`` names it where it has no name of its own.

        Raises:
            UserError: with what is missing or wrong, as the end of a sentence.
        """


class CounterFact(FactFormat):
    """CounterFact and MultiCounterFact (Meng et al. 2022): ``requested_rewrite``, and lists of prompts."""

    def matches(self, record: dict[str, Any]) -> bool:
        """By ``requested_rewrite``."""
        return "requested_rewrite" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """All but ``requested_rewrite`` may be absent, and so may ``target_true`` in it."""
        rewrite = _get(record, "requested_rewrite", dict)
        true = rewrite.get("target_true")
        truth = _text(true, "str") if true is not None else None
        neighbors = _texts(record, "neighborhood_prompts")
        return Fact(
            subject=_text(rewrite, "subject"),
            prompt=_text(rewrite, "prompt"),
            target_new=_text(_get(rewrite, "target_new", dict), "str"),
            target_true=truth,
            paraphrases=_texts(record, "paraphrase_prompts"),
            neighbors=tuple(Neighbor(prompt, truth) for prompt in neighbors) if truth is not None else (),
            id=record.get("case_id", index),
        )


class EasyEdit(FactFormat):
    """EasyEdit's schema: ``prompt``, ``subject``, ``target_new``, ``ground_truth`` and ``rephrase_prompt``.

    Neighbors come as ``locality_prompt`` and ``locality_ground_truth``, or in a nested ``locality``.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """By ``prompt`` and ``target_new`` on the top level."""
        return "prompt" in record and "target_new" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """The prompt is a whole one with the subject in it, or a template."""
        subject = _text(record, "subject")
        return Fact(
            subject=subject,
            prompt=as_template(_text(record, "prompt"), subject),
            target_new=_text(record, "target_new"),
            target_true=_first(record, "ground_truth"),
            paraphrases=_texts(record, "rephrase_prompt"),
            neighbors=tuple(_easyedit_neighbors(record)),
            id=record.get("case_id", index),
        )


def _easyedit_neighbors(record: dict[str, Any]) -> Iterable[Neighbor]:
    if record.get("locality_prompt"):
        yield from _paired(record, "locality_prompt", "locality_ground_truth")
    for group in (_get(record, "locality", dict) if record.get("locality") else {}).values():
        for one in group if isinstance(group, list) else [group]:
            if not isinstance(one, dict):
                raise UserError("has a 'locality' with a part that is no object: give it prompt and ground_truth")
            yield from _paired(one, "prompt", "ground_truth")


def _paired(record: dict[str, Any], prompts: str, truths: str) -> Iterable[Neighbor]:
    """Prompts with the truths at their places; a pair of which one is empty is none.

    Several truths of one prompt are names of the same thing, of which the first is taken.

    Raises:
        UserError: There are not as many of the one as of the other; as the end of a sentence.
    """
    asked, answers = _listed(record, prompts), _listed(record, truths)
    if isinstance(record.get(prompts), str):
        answers = answers[:1]
    if len(asked) != len(answers):
        raise UserError(f"has {len(asked)} {prompts} but {len(answers)} {truths}: give as many")
    yield from (Neighbor(p, t) for p, t in zip(asked, answers, strict=True) if p and t)


def _first(record: dict[str, Any], name: str) -> str | None:
    """A field that is a text, a list of texts that mean the same, or absent: the first text; None where it is empty."""
    value = record.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    return _get({name: value}, name, str).strip() or None


class ZsRE(FactFormat):
    """zsRE in MEND's schema: ``src``, ``rephrase``, ``alt`` (the new target), ``answers``, ``loc``, ``loc_ans``."""

    def matches(self, record: dict[str, Any]) -> bool:
        """By ``src`` and ``alt``."""
        return "src" in record and "alt" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """The neighbor is the unrelated question ``loc``, without the marker that MEND puts before it."""
        subject = _text(record, "subject")
        answers = _texts(record, "answers")
        loc = record.get("loc")
        return Fact(
            subject=subject,
            prompt=as_template(_text(record, "src"), subject),
            target_new=_text(record, "alt"),
            target_true=answers[0] if answers else None,
            paraphrases=_texts(record, "rephrase"),
            neighbors=(
                (Neighbor(str(loc).removeprefix("nq question: ").strip(), _text(record, "loc_ans")),) if loc else ()
            ),
            id=record.get("case_id", index),
        )


class Plain(FactFormat):
    """A user's own: ``subject``, ``prompt`` and ``target``; where known, ``truth``, ``paraphrases`` and ``neighbors``.

    Paraphrases are a text or a list of texts, neighbors a list of objects with ``prompt`` and ``truth``; in a cell of a
    CSV, lists are written as JSON.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """By ``subject``, ``prompt`` and ``target``."""
        return {"subject", "prompt", "target"} <= record.keys()

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """The prompt is a whole one with the subject in it, or a template; an empty cell is an absent field."""
        subject = _text(record, "subject")
        truth = None if record.get("truth") == "" else record.get("truth")
        neighbors = _unpacked(record, "neighbors") or []
        if not isinstance(neighbors, list):
            raise UserError('has \'neighbors\' that are no list: write [{"prompt": "...", "truth": "..."}]')
        return Fact(
            subject=subject,
            prompt=as_template(_text(record, "prompt"), subject),
            target_new=_text(record, "target"),
            target_true=_text(record, "truth") if truth is not None else None,
            paraphrases=_texts({"paraphrases": _unpacked(record, "paraphrases")}, "paraphrases"),
            neighbors=tuple(Neighbor(_text(one, "prompt"), _text(one, "truth")) for one in neighbors),
            id=record.get("id") or index,
        )


def _unpacked(record: dict[str, Any], name: str) -> Any:
    """A field that may hold a list; a text that begins like one is taken for JSON."""
    value = record.get(name) or None
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"has a {name!r} that is no valid JSON ({error}): mend it") from error


_SURROGATE = re.compile("[\\ud800-\\udfff]")

FORMATS: tuple[FactFormat, ...] = (CounterFact(), ZsRE(), EasyEdit(), Plain())
"""Tried in this order."""


def format_of(record: dict[str, Any]) -> FactFormat:
    """The first of :data:`FORMATS` that a record looks like.

    Raises:
        UserError: None; with what is wrong, as the end of a sentence.
    """
    for fact_format in FORMATS:
        if fact_format.matches(record):
            return fact_format
    known = ", ".join(type(f).__name__ for f in FORMATS)
    raise UserError(
        f"has the fields {', '.join(sorted(map(str, record))) or 'none'}, which no format has ({known}): give it "
        "subject, prompt and target"
    )


def read_record(record: dict[str, Any], index: int, fact_format: FactFormat | None = None) -> Fact:
    """The fact of one record; its schema is found by looking at it where not given.

    Raises:
        UserError: with what is missing or wrong, as the end of a sentence.
    """
    return checked((fact_format or format_of(record)).read(record, index))


def checked(fact: Fact) -> Fact:
    """The fact, its prompt having one place for the subject, and all of its texts being text.

    Raises:
        UserError: It has none or several, or a text holds half a character; as the end of a sentence.
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


def as_template(prompt: str, subject: str) -> str:
    """The prompt with ``{}`` for the subject's last occurrence: the one that has seen most of the prompt.

    One inside another word, as Niger's in Nigeria, is taken only where there is no other.

    Raises:
        UserError: where the subject does not occur.
    """
    if "{}" in prompt:
        return prompt
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    start = whole[-1].start() if whole else prompt.rfind(subject)
    if start < 0:
        raise UserError(f"has a prompt in which its subject {subject!r} does not occur: write {{}} where it belongs")
    return prompt[:start] + "{}" + prompt[start + len(subject) :]


def _get(record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"lacks {name!r}: add it")
    if not isinstance(record[name], kind):
        wanted = "an object" if kind is dict else "a text in quotes"
        raise UserError(f"has a {name!r} that is no {'object' if kind is dict else 'text'}: make it {wanted}")
    return record[name]


def _text(record: Any, name: str) -> str:
    text = _get(record, name, str).strip()
    if not text:
        raise UserError(f"has an empty {name!r}: fill it in")
    return str(text)


def _texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """A field that is a text, a list of texts, or absent; without those that are empty."""
    return tuple(text for text in _listed(record, name) if text)


def _listed(record: dict[str, Any], name: str) -> list[str]:
    """The same with the empty ones, each at its place."""
    value = record.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f'has a {name!r} that is no list of texts: write it as ["...", "..."]')
    return [v.strip() for v in values]
