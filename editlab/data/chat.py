"""Facts whose prompts are the user's turn of a chat.

With ``model.chat_template`` ``edit`` or ``both`` all facts of a run have templated prompts, so that values, keys and
callbacks read them; the evaluation maps them to the prompts that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from editlab.data.fact import Fact, Neighbor, Question
from editlab.lm.chat import Chat


def as_edited(facts: Sequence[Fact], chat: Chat | None) -> list[Fact]:
    """Return the facts of a file with the prompts at which they are edited."""
    return _mapped(facts, chat.wrap) if chat is not None and chat.edits else list(facts)


def as_evaluated(facts: Sequence[Fact], chat: Chat | None) -> list[Fact]:
    """Return the facts of :func:`as_edited` with the prompts at which they are scored."""
    if chat is None or chat.edits == chat.evaluates:
        return list(facts)
    return _mapped(facts, chat.wrap if chat.evaluates else chat.unwrap)


def _mapped(facts: Sequence[Fact], change: Callable[[str], str]) -> list[Fact]:
    """Return facts with all their prompts changed; the ``{}`` of a prompt stays in it."""
    return [
        replace(
            fact,
            prompt=change(fact.prompt),
            paraphrases=tuple(map(change, fact.paraphrases)),
            neighbors=tuple(Neighbor(change(near.prompt), near.truth) for near in fact.neighbors),
            portability=tuple(Question(q.group, change(q.prompt), q.answers) for q in fact.portability),
        )
        for fact in facts
    ]
