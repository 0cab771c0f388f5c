"""What the model says when it is asked freely: greedy continuations, scored against the names that count as right.

The model gets a prompt and nothing of the answer, not even its length. Teacher-forced accuracy gives it all tokens of
the target but the last, and can be far higher (arXiv:2502.11177).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from editlab.data.fact import Fact
from editlab.data.portability import ANY_COUNTS
from editlab.distributed import ranks
from editlab.evaluation.judge import Item, JudgeSettings, judged
from editlab.evaluation.score_cache import ScoreCache
from editlab.lm.generate import end_tokens, greedy_continuations
from editlab.lm.language_model import LanguageModel
from editlab.metrics import CaseScore
from editlab.metrics.functional.answers import ANSWER_KINDS, answer_scores
from editlab.metrics.names import EDIT, GENERATION_JUDGED, NEIGHBOR, PARAPHRASE, generation_name, portability_name

NEW_TOKENS = 32
"""The largest number of tokens of an answer."""


def any_counts(kind: str) -> bool:
    """Whether a case of a kind of prompt counts as answered where any of its prompts is, as in MQuAKE."""
    return kind in map(portability_name, ANY_COUNTS)


@dataclass(frozen=True)
class Asked:
    """A prompt that the model answers freely.

    Attributes:
        index: index of the fact among those that are measured together.
        kind: ``edit``, ``paraphrase``, ``neighbor``, ``bystander``, or ``portability/GROUP``.
        prompt: the text that the model continues.
        names: the right answer and its aliases.
        case: number of the case that the prompt counts for; by default the fact's.
    """

    index: int
    kind: str
    prompt: str
    names: tuple[str, ...]
    case: int | None = None


@dataclass(frozen=True)
class Generated:
    """One answer of the model and its scores.

    Attributes:
        index: index of the fact among those that are measured together: before, the facts to edit; at the end, the
            edits that the weights should hold; both in the order of the edits.
        kind: ``edit``, ``paraphrase``, ``neighbor``, ``bystander``, or ``portability/GROUP``.
        prompt: the text that the model continued.
        text: its continuation up to the end of the first sentence.
        contains: whether the text contains one of the names of the answer.
        exact: whether it is one of them.
        f1: token F1, the best over the names.
        case: number of the case that the prompt counts for; by default the fact's.
        judged: whether a judge says that the answer states the target; None without a verdict.
    """

    index: int
    kind: str
    prompt: str
    text: str
    contains: bool
    exact: bool
    f1: float
    case: int | None = None
    judged: bool | None = None

    @property
    def record(self) -> int:
        """Number of the case or fact that the answer counts for."""
        return self.index if self.case is None else self.case

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain values, for a checkpoint."""
        return asdict(self)


def fixed_sample(facts: Sequence[Fact], count: int | None, seed: int = 0) -> list[int]:
    """Indices of the facts of a fixed sample, in order.

    A fact's rank depends only on the fact and the seed, so from one list to a longer one a fact leaves the sample only
    if a new fact of a lower rank enters.

    Args:
        facts: the facts.
        count: number of facts in the sample; None for all.
        seed: seed of the ranks.
    """
    if count is None or count >= len(facts):
        return list(range(len(facts)))
    ranks = [hashlib.sha256(f"{seed}\0{fact.subject}\0{fact.prompt}".encode()).digest() for fact in facts]
    return sorted(sorted(range(len(facts)), key=lambda index: (ranks[index], index))[:count])


def prompts_of_edits(facts: Sequence[Fact], sample: Iterable[int], neighbors: int | None = None) -> list[Asked]:
    """The edit prompt, the first paraphrase and the first neighbor of each fact of a sample.

    Args:
        facts: all facts that are measured.
        sample: indices of those whose prompts are asked.
        neighbors: number of neighbors that the run scores; with 0 none is asked.
    """
    asked: list[Asked] = []
    for index in sample:
        fact = facts[index]
        target = (fact.target_new, *fact.aliases)
        asked.append(Asked(index, EDIT, fact.question, target))
        asked += [Asked(index, PARAPHRASE, prompt, target) for prompt in fact.paraphrases[:1]]
        asked += [Asked(index, NEIGHBOR, n.prompt, (n.truth,)) for n in fact.neighbors[:neighbors][:1]]
    return asked


def generate_answers(
    lm: LanguageModel, asked: Sequence[Asked], judge: JudgeSettings | None = None, cache: ScoreCache | None = None
) -> list[Generated]:
    """The model's answers to prompts, with their scores, in the order of the prompts.

    Args:
        lm: the model.
        asked: the prompts.
        judge: settings of a judge of the answers to edit prompts; None for no judge.
        cache: cache of the unedited model's answers; only for the unedited weights.
    """
    asked = [one for one in asked if one.prompt.strip()]  # after nothing there is nothing to continue
    texts = _answered(lm, [one.prompt for one in asked], cache)
    answers = [
        Generated(one.index, one.kind, one.prompt, text, *answer_scores(text, one.names), one.case)
        for one, text in zip(asked, texts, strict=True)
    ]
    return answers if judge is None else _with_verdicts(judge, asked, answers)


def _answered(lm: LanguageModel, prompts: Sequence[str], cache: ScoreCache | None) -> list[str]:
    def find() -> list[str]:
        return greedy_continuations(lm, prompts, NEW_TOKENS)

    if cache is None or not prompts:
        return find()
    asked = [(prompt, lm.encode(prompt).ids) for prompt in prompts]
    return cache.answers(asked, NEW_TOKENS, end_tokens(lm.model), find)


def _with_verdicts(judge: JudgeSettings, asked: Sequence[Asked], answers: Sequence[Generated]) -> list[Generated]:
    """The answers with the judge's verdicts on those to edit prompts; as they are if there is no judge, or it fails."""
    edits = [i for i, one in enumerate(asked) if one.kind == EDIT]
    items = [Item(asked[i].prompt, answers[i].text, asked[i].names[0], asked[i].names[1:]) for i in edits]
    verdicts = ranks.on_first(lambda: judged(judge, items)) or [None] * len(items)
    found = dict(zip(edits, verdicts, strict=True))
    return [replace(one, judged=found[i]) if i in found else one for i, one in enumerate(answers)]


def generation_metrics(answers: Sequence[Generated], **kwargs: Any) -> dict[str, float]:
    """``generation``, ``generation_exact``, ``generation_f1`` and so on -> value, for each kind of prompt.

    ``generation_judged`` is the fraction of answers to edit prompts that a judge accepts, of those with a verdict.

    Args:
        answers: of one group.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """
    found: dict[str, float] = {}
    for kind in dict.fromkeys(one.kind for one in answers):
        own = [one for one in answers if one.kind == kind]
        record = torch.tensor([one.record for one in own])
        for score in ANSWER_KINDS:
            metric = CaseScore(any_counts(kind), **kwargs)
            metric.update(torch.tensor([float(getattr(one, score)) for one in own]), record)
            found[generation_name(kind, score)] = float(metric.compute())
    verdicts = [one.judged for one in answers if one.judged is not None]
    if verdicts:
        found[GENERATION_JUDGED] = sum(verdicts) / len(verdicts)
    return found
