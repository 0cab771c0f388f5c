"""The schema of RippleEdits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from editlab.data.fact import Fact, Neighbor, Question
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import as_template, field, first_text, leave_out, text
from editlab.data.formats.questions import names_in
from editlab.data.formats.subjects import shared_words
from editlab.errors import UserError

FOLLOWS = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
"""Groups of tests whose answers follow from the edit."""
STAYS = ("Relation_Specificity", "Forgetfulness")
"""Groups of tests whose answers an edit must not change."""
_STATEMENT = re.compile(r"(.+ (?:is|are|follows|by)) (.+?)\.?", re.DOTALL)
"""A stated fact: its prompt, all of which end in one of these words, and its target."""


class RippleEdits(FactFormat):
    """RippleEdits (Cohen et al. 2024): an ``edit``, and six groups of tests.

    The tests of :data:`FOLLOWS` are portability in groups of the same names, those of :data:`STAYS` are neighbors. Each
    prompt of a test is a question of its own, and any of its answers counts, by any of its names.

    As published, an edit is one sentence ("The capital of Peru is Oslo.") with the Wikidata ids of subject and target.
    The target is then the label of its id in the tests' answers, else what follows the last "is" of the sentence. The
    subject is the label of its id, else the longest span, in whole words, that the sentence shares with the prompts of
    all tests of its id. Files that name them (``subject_label`` and ``target_label``, or ``subject`` and ``target``)
    are read by these names.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``edit`` and one of the groups."""
        return "edit" in record and any(group in record for group in (*FOLLOWS, *STAYS))

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record, which must have all six groups; each may be empty.

        Raises:
            UserError: A group or a part of the edit is missing or wrong.
        """
        edit, tests = field(record, "edit", dict), _Tests.of(record)
        target, aliases = tests.named(edit, "target_id")
        target = first_text(edit, "target_label", "target") or target
        prompt, target = _parts(edit, target)
        before = _object(edit, "previous_fact", "original_fact")
        truth, truth_aliases = tests.named(before, "target_id")
        truth = first_text(before, "target_label", "target") or truth
        if before and truth is None:
            truth = _parts(before, None, prompt)[1]
        subject = first_text(edit, "subject_label", "subject") or tests.subject(prompt, edit.get("subject_id"))
        if not subject and getattr(record, "needs_subject", True):
            raise UserError(
                f"names its subject by the id {edit.get('subject_id')!r} alone, and no test shows its name: add "
                "'subject_label' to 'edit', or set data.subject to infer or last_token"
            )
        asked = names_in(_object(edit, "fact_query").get("answers"), "answers")
        return Fact(
            subject=subject or "",
            prompt=as_template(prompt, subject) if subject else prompt,
            target_new=target,
            target_true=truth,
            neighbors=tuple(Neighbor(one.prompt, one.answers[0]) for one in tests.of_groups(STAYS)),
            id=index,
            aliases=tuple(one for one in dict.fromkeys((*aliases, *asked)) if one != target),
            truth_aliases=tuple(one for one in truth_aliases if one != truth),
            portability=tuple(Question(one.group, one.prompt, one.answers) for one in tests.of_groups(FOLLOWS)),
        )


class _Test(NamedTuple):
    group: str
    prompt: str
    answers: tuple[str, ...]
    subject: Any
    """Wikidata id of the prompt's subject; None if it is not known, or if the prompt has another name of it"""


class _Tests:
    """The tests of a record, and the labels that their answers give to Wikidata ids."""

    def __init__(self, tests: Sequence[_Test], labels: Mapping[str, tuple[str, ...]]) -> None:
        self.tests, self.labels = tests, labels

    @classmethod
    def of(cls, record: dict[str, Any]) -> _Tests:
        """Read the tests of a record.

        Raises:
            UserError: A group is missing, or a test is of another kind.
        """
        found: list[_Test] = []
        labels: dict[str, tuple[str, ...]] = {}
        for group in (*FOLLOWS, *STAYS):
            for query in _queries(record, group):
                answers = query.get("answers") or []
                ids = query.get("second_hop_target_ids") or query.get("target_ids") or []
                if isinstance(ids, list) and isinstance(answers, list) and len(ids) == len(answers):
                    for one, answer in zip(ids, answers, strict=True):
                        labels.setdefault(str(one), names_in(answer, "answers"))
                prompt, subject = text(query, "prompt", prompt=True), query.get("subject_id")
                if names := names_in(answers, "answers"):
                    found.append(_Test(group, prompt, names, None if group == "Subject_Aliasing" else subject))
                else:
                    leave_out(query, "prompt")
        return cls(found, labels)

    def of_groups(self, groups: Sequence[str]) -> Iterator[_Test]:
        """Yield the tests of some groups."""
        return (test for test in self.tests if test.group in groups)

    def named(self, fact: dict[str, Any], name: str) -> tuple[str | None, tuple[str, ...]]:
        """Return the label of the Wikidata id in a field, and its other names; None if no answer has this id."""
        names = self.labels.get(str(fact.get(name)), ())
        return (names[0], names[1:]) if names else (None, ())

    def subject(self, prompt: str, subject: Any) -> str | None:
        """Return the name of a subject, given by its id, in a prompt; None if no test shows it.

        It is the label of the id if an answer has it, else the words that the prompt shares with all tests of the id.
        """
        label = next(iter(self.labels.get(str(subject), ())), None)
        if label and label in prompt:
            return label
        others = [test.prompt for test in self.tests if test.subject == subject and test.prompt != prompt]
        return shared_words(prompt, others) if subject else None


def _object(edit: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the first of several inner objects that is there; an empty one if none is."""
    return next((field(edit, name, dict) for name in names if edit.get(name)), {})


def _queries(record: dict[str, Any], group: str) -> Iterator[dict[str, Any]]:
    name = group
    if group not in record and group == "Relation_Specificity":
        name = "Relation_Specifity"  # as in the example of the data set's description
    if name not in record:
        raise UserError(f"lacks {group!r}: add it, as an empty list if the record has no such test")
    tests = record[name] or []
    for test in tests if isinstance(tests, list) else [tests]:
        queries = test.get("test_queries") if isinstance(test, dict) else None
        if not (isinstance(queries, list) and all(isinstance(one, dict) for one in queries)):
            raise UserError(f"has a {group!r} with a test that is not an object with 'test_queries': give it that list")
        yield from queries


def _parts(fact: dict[str, Any], target: str | None, prompt: str | None = None) -> tuple[str, str]:
    """Return the prompt and the target of a stated fact.

    Args:
        fact: the edit, or the fact that it replaces.
        target: the target, if it is known.
        prompt: the prompt, if it is known.

    Raises:
        UserError: The statement is missing, or cannot be divided.
    """
    if target and (given := first_text(fact, "fact_prompt")):
        return given, target
    stated = text(fact, "prompt")
    body = stated.removesuffix(".")
    for end in (stated, body):
        if target and end.endswith(f" {target}"):
            return end[: -len(target)].rstrip(), target
    if prompt and body.startswith(f"{prompt} "):
        return prompt, body[len(prompt) :].strip()
    divided = _STATEMENT.fullmatch(stated)
    if divided is None:
        raise UserError(
            f"has the edit {stated!r}, in which no target is found after 'is': add 'target_label' to 'edit'"
        )
    return divided[1], divided[2]
