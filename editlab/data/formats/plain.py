"""The plain schema, for a user's own facts."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, TRUTHS, first_of, first_text, neighbors_of, placed, texts
from editlab.data.formats.questions import PORTABILITY, aliases_of, questions_of


class Plain(FactFormat):
    """Schema of users' own facts: ``subject``, ``prompt`` and ``target``, or fields with the names that are given.

    All other fields are optional. Paraphrases and aliases are a text or a list of texts, neighbors a list of objects
    with ``prompt`` and ``truth``, portability a list of objects with ``group``, ``prompt`` and ``answers``. In a cell
    of a CSV file, lists are written as JSON. QAEdit (Yang et al. 2025) has this schema.

    Args:
        subject: name of the field with the subject.
        prompt: name of the field with the prompt, which is either complete or a template.
        target: name of the field with the new target.
        truth: name of the field with the true target.
        paraphrases: name of the field with the paraphrases.
        neighbors: name of the field with the neighbors.
        aliases: name of the field with other names of the new target.
        truth_aliases: name of the field with other names of the true target.
        portability: name of the field with the questions whose answers follow from the edit.
        id: name of the field with the record's identifier; default: the record's number.
    """

    def __init__(
        self,
        subject: str = "subject",
        prompt: str = "prompt",
        target: str = "target",
        truth: str = "truth",
        paraphrases: str = "paraphrases",
        neighbors: str = "neighbors",
        aliases: str = "aliases",
        truth_aliases: str = "truth_aliases",
        portability: str = PORTABILITY,
        id: str = "id",
    ) -> None:
        self.subject, self.prompt, self.target = subject, prompt, target
        self.truth, self.paraphrases, self.neighbors = truth, paraphrases, neighbors
        self.aliases, self.truth_aliases = aliases, truth_aliases
        self.portability, self.id = portability, id

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has the fields of prompt and target."""
        return {self.prompt, self.target} <= record.keys()

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; an empty cell counts as an absent field."""
        truths = tuple(dict.fromkeys((self.truth, *TRUTHS)))
        (subject, prompt), truth = placed(record, self.subject, self.prompt), first_text(record, *truths)
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=first_of(record, self.target),
            target_true=truth,
            paraphrases=texts(record, *dict.fromkeys((self.paraphrases, *PARAPHRASES))),
            neighbors=neighbors_of(record, truth, self.neighbors),
            id=index if record.get(self.id) in (None, "") else record[self.id],
            aliases=aliases_of(record, [self.target], self.aliases),
            truth_aliases=aliases_of(record, truths, self.truth_aliases),
            portability=questions_of(record, self.portability),
        )


class WikiBio(Plain):
    """WikiBio of KnowEdit (Zhang et al. 2024): a ``concept``, a passage in ``text``, the next one in ``labels``."""

    def __init__(self) -> None:
        super().__init__(subject="concept", prompt="text", target="labels")
