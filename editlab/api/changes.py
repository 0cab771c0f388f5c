"""What edits change: the answers to the edited facts, to neighbors and to bystanders, the perplexity, the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from editlab.data import Fact
from editlab.editor import SequentialEditor
from editlab.evaluation.retrieval import as_read
from editlab.evaluation.scoring import score_pairs
from editlab.lm.generate import greedy_continuations
from editlab.lm.language_model import LanguageModel
from editlab.metrics.names import BEFORE, PERPLEXITY, RETAINED, full_name
from editlab.runs.tables import Table

TARGET, TRUTH = "target", "truth"
NEIGHBORS, BUILT_IN = "neighbors", "built-in facts"
"""Kinds of prompts about other subjects: those that come with the facts, and the bystanders of the evaluation."""

ANSWER_TOKENS = 12
"""Largest number of tokens of an answer that is shown."""
WIDEST = 44
"""Number of characters of a prompt that a table shows; a longer one loses its beginning."""


@dataclass(frozen=True)
class Probability:
    """Probability that a model continues a prompt with exactly this text, before and after the edits."""

    text: str
    before: float
    after: float
    said: bool
    """whether, before the edits, the argmax was right at every token of the text"""
    says: bool
    """the same after the edits"""


@dataclass(frozen=True)
class FactChange:
    """The answers to one edited fact."""

    fact: Fact
    target: Probability
    truth: Probability | None
    """of the true target; None if the fact names none"""


@dataclass(frozen=True)
class Flip:
    """A prompt about another subject that the model answered rightly before the edits, and wrongly after them."""

    prompt: str
    truth: str
    says: str
    """what the edited model says instead, up to the end of its sentence"""


@dataclass(frozen=True)
class Others:
    """Prompts about other subjects, whose answers should not change."""

    kind: str
    """:data:`NEIGHBORS` or :data:`BUILT_IN`"""
    asked: int
    """number of them"""
    right: int
    """number of them that the model answered rightly before the edits"""
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class Changes:
    """What edits changed in a model."""

    facts: tuple[FactChange, ...]
    others: tuple[Others, ...]
    """one for each kind of prompts that were asked"""
    perplexity: tuple[float, float] | None
    """held-out perplexity before and after the edits; None if it was not measured"""
    norms: Mapping[int, float]
    """layer -> Frobenius norm of its update over that of its weight"""

    @property
    def held(self) -> int:
        """Number of facts whose target the edited model says."""
        return sum(one.target.says for one in self.facts)

    def to_text(self, flips: int = 5) -> str:
        """The changes as lines for a terminal, with at most ``flips`` flipped prompts of each kind."""
        lines = [_table(self.facts).to_text(), ""]
        for others in self.others:
            lines += _lines(others, flips)
        if self.perplexity is not None:
            lines.append("held-out perplexity {:.2f} before, {:.2f} after".format(*self.perplexity))
        norms = ", ".join(f"{value:.4f} (layer {layer})" for layer, value in self.norms.items())
        return "\n".join([*lines, f"||delta|| / ||W||: {norms}"])


class _Asked(NamedTuple):
    """A prompt and an answer to it, whose probability is computed."""

    kind: str
    prompt: str
    answer: str


def measure_changes(editor: SequentialEditor, facts: Sequence[Fact], summary: Mapping[str, Any]) -> Changes:
    """Compare the edited model with the original one.

    Args:
        editor: what has edited the model, which is in eval mode and still holds the edits.
        facts: the edited facts.
        summary: the run's summary.
    """
    lm, memory, bystanders = editor.lm, editor.evaluation.memory, editor.evaluation.bystanders
    asked = _asked(as_read(lm, facts, memory), as_read(lm, bystanders, memory))
    after = _scores(lm, asked)
    with _original(editor):
        before = _scores(lm, _asked(as_read(lm, facts), as_read(lm, bystanders)))
    named = _asked(facts, bystanders)
    answers: dict[str, list[Probability]] = {TARGET: [], TRUTH: []}
    for one, (old, said), (new, says) in zip(asked, before, after, strict=True):
        if one.kind in answers:
            answers[one.kind].append(Probability(one.answer, old, new, said, says))
    truths = iter(answers[TRUTH])
    changed = tuple(
        FactChange(fact, target, None if fact.target_true is None else next(truths))
        for fact, target in zip(facts, answers[TARGET], strict=True)
    )
    lost = [i for i, ((_, right), (_, still)) in enumerate(zip(before, after, strict=True)) if right and not still]
    others = []
    for kind in (NEIGHBORS, BUILT_IN):
        right = [hit for one, (_, hit) in zip(asked, before, strict=True) if one.kind == kind]
        own = [i for i in lost if asked[i].kind == kind]
        texts = greedy_continuations(lm, [asked[i].prompt for i in own], ANSWER_TOKENS)
        flips = (Flip(_plain(lm, named[i].prompt), named[i].answer, text) for i, text in zip(own, texts, strict=True))
        others += [Others(kind, len(right), sum(right), tuple(flips))] if right else []
    numbers = [summary["metrics"].get(full_name(group, PERPLEXITY)) for group in (BEFORE, RETAINED)]
    perplexity = None if None in numbers else (numbers[0], numbers[1])
    return Changes(changed, tuple(others), perplexity, {int(n): norm for n, norm in summary["delta_norm"].items()})


def _asked(facts: Sequence[Fact], bystanders: Sequence[Fact]) -> list[_Asked]:
    found: list[_Asked] = []
    for fact in facts:
        found.append(_Asked(TARGET, fact.question, fact.target_new))
        found += [_Asked(TRUTH, fact.question, fact.target_true)] if fact.target_true is not None else []
        found += [_Asked(NEIGHBORS, near.prompt, near.truth) for near in fact.neighbors]
    return found + [_Asked(BUILT_IN, fact.question, str(fact.target_true)) for fact in bystanders]


def _scores(lm: LanguageModel, asked: Sequence[_Asked]) -> list[tuple[float, bool]]:
    """Return for each answer its probability, and whether the argmax is right at every token of it."""
    pairs = [(one.prompt, one.answer) for one in asked]
    means, hits = score_pairs(lm, pairs)
    sizes = [len(encoding.ids) - start for encoding, start in (lm.encode_pair(*pair) for pair in pairs)]
    return [(math.exp(size * mean), hit) for size, mean, hit in zip(sizes, means.tolist(), hits.tolist(), strict=True)]


@contextmanager
def _original(editor: SequentialEditor) -> Iterator[None]:
    """Puts the original weights in place inside the ``with``; afterwards the weights are as they were found.

    They may have been changed by others since, so it does not suffice to add the sums of updates again.
    """
    found = [(layer.weight, layer.weight.detach().clone()) for layer in editor.changed_layers]
    try:
        with editor.unedited():
            yield
    finally:
        with torch.no_grad():
            for weight, content in found:
                weight.copy_(content)


def _plain(lm: LanguageModel, prompt: str) -> str:
    """Return a prompt without the chat template."""
    return lm.chat.unwrap(prompt) if lm.chat else prompt


def _table(changed: Sequence[FactChange]) -> Table:
    rows = []
    for one in changed:
        rows.append([_end(one.fact.question), *_cells(one.target, "")])
        rows += [["", *_cells(one.truth, " (truth)")]] if one.truth is not None else []
    return Table(["prompt", "probability of", "before", "after"], rows, numbers=(2, 3))


def _cells(one: Probability, note: str) -> list[str]:
    return [one.text + note, f"{one.before:.4f}", f"{one.after:.4f}"]


def _end(prompt: str) -> str:
    """Return the end of a prompt on one line, which is where its answer follows.

    >>> _end("a" * 50 + " is in")
    '...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa is in'
    """
    prompt = " ".join(prompt.split())
    return prompt if len(prompt) <= WIDEST else "..." + prompt[-(WIDEST - 3) :]


def _lines(others: Others, most: int) -> list[str]:
    flips = others.flips
    if not others.right:
        return [f"the unedited model answers none of {others.asked} {others.kind} rightly, so that none can get lost"]
    lines = [f"{len(flips)} of {others.right} {others.kind} that the unedited model answers rightly are now wrong"]
    rows = [["", _end(flip.prompt), flip.truth, _end(flip.says)] for flip in flips[:most]]
    if rows:
        lines.append(Table(["", "", "before", "after"], rows).to_text())
    if len(flips) > most:
        lines.append(f"  and {len(flips) - most} more")
    return lines
