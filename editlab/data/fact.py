"""The unit of editing: one fact, and what its edit is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Neighbor(NamedTuple):
    """A prompt about something else, whose answer an edit must leave alone."""

    prompt: str
    truth: str


@dataclass(frozen=True)
class Fact:
    """One fact edit: after the prompt with the subject in its ``{}`` the model should continue with ``target_new``.

    Targets are words without a leading space; a prompt and its continuation are joined by one space.
    """

    subject: str
    """What the fact is about; its last token is where the edit acts."""
    prompt: str
    """Template with exactly one ``{}`` for the subject."""
    target_new: str
    """The continuation to be learnt."""
    target_true: str | None = None
    """The continuation that was right before; None where the data set names none."""
    paraphrases: tuple[str, ...] = ()
    """Whole prompts that ask the same in other words."""
    neighbors: tuple[Neighbor, ...] = ()
    """Prompts on other subjects, with their own truths."""
    id: int | str = 0
    """The record's name in its file."""

    @property
    def question(self) -> str:
        """The edit prompt with the subject put in."""
        return self.prompt.replace("{}", self.subject)  # other braces are the prompt's own text

    @property
    def slot(self) -> tuple[str, str]:
        """Subject and prompt: of two facts that share it, the later replaces the earlier."""
        return self.subject, self.prompt

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end (exclusive) of the subject in :attr:`question`, in characters."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The fact as plain strings and lists, which a checkpoint may hold."""
        return {**asdict(self), "neighbors": [list(n) for n in self.neighbors]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fact:
        """The inverse of :meth:`to_dict`."""
        neighbors = tuple(Neighbor(*n) for n in values["neighbors"])
        return cls(**{**values, "paraphrases": tuple(values["paraphrases"]), "neighbors": neighbors})


def latest(facts: Sequence[Fact]) -> list[Fact]:
    """Of facts with one subject and prompt the last, in the order in which those stand."""
    last = {fact.slot: place for place, fact in enumerate(facts)}
    return [facts[place] for place in sorted(last.values())]
