"""Neighbors whose subject the same run edits: their answers may rightly change, so they do not measure specificity."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from editlab.data.fact import Fact, Neighbor, composed
from editlab.lm.joints import unspaced

_PARTS = re.compile(r"\w+|[^\w\s]")


def without_edited_neighbors(facts: Sequence[Fact], edited: Sequence[Fact]) -> tuple[list[Fact], int]:
    """Return facts without the neighbors that are about an edited subject, and the number of neighbors left out.

    A neighbor is about an edited subject if it is an edited fact's question, or if its own subject contains the edited
    one as whole words. Its own subject is the text that fills the fact's template in it; in a neighbor in other words,
    the whole prompt is searched. A neighbor about the fact's own subject asks for another property on purpose, so it
    stays, unless that very question is edited. Upper and lower case differ.

    Args:
        facts: the facts whose neighbors are checked.
        edited: the facts that the run edits.
    """
    subjects, questions = _Subjects(edited), {composed(fact.question) for fact in edited}
    left_out = 0
    checked: list[Fact] = []
    for fact in facts:
        before, _, after = map(composed, fact.prompt.partition("{}"))
        own = subjects.key(fact.subject)

        def is_edited(neighbor: Neighbor, before: str = before, after: str = after, own: object = own) -> bool:
            prompt = composed(neighbor.prompt)
            return prompt in questions or any(s != own for s in subjects.within(_filling(prompt, before, after)))

        kept = tuple(neighbor for neighbor in fact.neighbors if not is_edited(neighbor))
        left_out += len(fact.neighbors) - len(kept)
        checked.append(fact if len(kept) == len(fact.neighbors) else replace(fact, neighbors=kept))
    return checked, left_out


def _filling(prompt: str, before: str, after: str) -> str:
    """Return the text between ``before`` and ``after`` in a prompt; the whole prompt if it does not have them."""
    fits = prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after)
    return prompt[len(before) : len(prompt) - len(after)] if fits else prompt


class _Subjects:
    """The subjects of facts, as sequences of words, so that a text is searched for thousands of them at once."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._by_first: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for fact in facts:
            if words := self.key(fact.subject):
                self._by_first[words[0]].add(words)

    @staticmethod
    def key(text: str) -> tuple[str, ...]:
        """Return the words and marks of a text; where a script has no spaces between words, its characters."""
        parts = _PARTS.findall(composed(text))
        return tuple(piece for part in parts for piece in (part if any(map(unspaced, part)) else (part,)))

    def within(self, text: str) -> Iterator[tuple[str, ...]]:
        """Yield the subjects that a text contains as whole words."""
        words = self.key(text)
        for start, word in enumerate(words):
            for subject in self._by_first.get(word, ()):
                if words[start : start + len(subject)] == subject:
                    yield subject
