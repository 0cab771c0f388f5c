"""The unit of editing: one fact, with the prompts on which its edit is measured."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

SIDES = ("dev", "test")
"""The two halves of a file of facts: the first for choosing settings, the second for reported numbers."""


class Neighbor(NamedTuple):
    """A prompt about another subject, whose answer an edit must not change."""

    prompt: str
    truth: str


class Question(NamedTuple):
    """A prompt whose answer follows from an edit, such as a two-hop question or the reversed fact."""

    group: str
    """Name of the kind of question, such as ``reasoning``; portability is measured for each group."""
    prompt: str
    answers: tuple[str, ...]
    """The answer, then its aliases; at least one."""


@dataclass(frozen=True)
class Fact:
    """One fact edit: after the prompt with the subject in its ``{}`` the model should continue with ``target_new``.

    Targets are words without a leading space; :func:`editlab.lm.joints.join` puts a space between a prompt and its
    continuation if the language writes one.
    """

    subject: str
    """The entity that the fact is about; the edit acts at its last token."""
    prompt: str
    """Template with exactly one ``{}`` for the subject."""
    target_new: str
    """The continuation that the edit teaches."""
    target_true: str | None = None
    """The continuation that was right before the edit; None if the data set has none."""
    paraphrases: tuple[str, ...] = ()
    """Complete prompts that ask for the same fact in other words; in a file, ``{}`` in one stands for the subject."""
    neighbors: tuple[Neighbor, ...] = ()
    """Prompts about other subjects, with their own answers."""
    id: int | str = 0
    """Identifier of the record in its file."""
    aliases: tuple[str, ...] = ()
    """Other names of the new target that count as right in a generated answer."""
    truth_aliases: tuple[str, ...] = ()
    """Other names of the true target."""
    portability: tuple[Question, ...] = ()
    """Questions whose answers follow from the edit."""

    @property
    def question(self) -> str:
        """The edit prompt with the subject in place of ``{}``."""
        return self.prompt.replace("{}", self.subject)  # other braces belong to the prompt's text

    @property
    def slot(self) -> tuple[str, str]:
        """Subject and prompt; of two facts that agree in both, the later one replaces the earlier one.

        Both are in Unicode's composed form, so that an accented letter written as one character or as two is the same.
        """
        return composed(self.subject), composed(self.prompt)

    @property
    def side(self) -> str:
        """Half of its file that the fact is in, ``dev`` or ``test``.

        It is the first bit of the SHA-256 digest of :attr:`slot`, so it depends neither on the other facts nor on their
        order, and two facts of one subject and prompt are in the same half.
        """
        subject, prompt = self.slot
        digest = hashlib.sha256(f"{subject}\n{prompt}".encode(errors="surrogatepass")).digest()
        return SIDES[digest[0] >> 7]

    @property
    def keeps_the_truth(self) -> bool:
        """Whether the new target is the true target, so that the edit has nothing to change."""
        return self.target_true is not None and composed(self.target_new) == composed(self.target_true)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end (exclusive) of the subject in :attr:`question`, in characters."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as plain strings and lists, for a checkpoint."""
        return {
            **asdict(self),
            "neighbors": [list(n) for n in self.neighbors],
            "portability": [[q.group, q.prompt, list(q.answers)] for q in self.portability],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fact:
        """Return the fact that :meth:`to_dict` was called on; fields that an older version did not have are empty."""
        texts = {name: tuple(values.get(name, ())) for name in ("paraphrases", "aliases", "truth_aliases")}
        neighbors = tuple(Neighbor(*n) for n in values["neighbors"])
        asked = values.get("portability", ())
        questions = tuple(Question(group, prompt, tuple(answers)) for group, prompt, answers in asked)
        return cls(**{**values, **texts, "neighbors": neighbors, "portability": questions})


def composed(text: str) -> str:
    r"""Return a text in Unicode's composed form (NFC), in which equal texts have equal characters.

    >>> composed("e\u0301") == "\u00e9"
    True
    """
    return unicodedata.normalize("NFC", text)


def latest(facts: Sequence[Fact]) -> list[Fact]:
    """Return the last fact of each subject and prompt, in the order of ``facts``."""
    last = {fact.slot: index for index, fact in enumerate(facts)}
    return [facts[index] for index in sorted(last.values())]
