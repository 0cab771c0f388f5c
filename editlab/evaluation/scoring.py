"""Scoring facts: the probability of the new and of the true target after each of a fact's prompts.

The score of a target is its mean log-probability per token after the prompt. Each distinct prompt with its target is
run once, and a row of tokens with which a longer row begins is not run at all: in a causal model the longer row gives
the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.evaluation.score_cache import Request, RoughScore, Score, ScoreCache
from editlab.evaluation.two_stage import first_stage, refine, rounds_first
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import cut, scored
from editlab.metrics.scores import PromptScores


@dataclass
class FactScores:
    """The scores of some facts.

    Attributes:
        edit: scores of the edit prompts, one row per fact.
        paraphrases: scores of the paraphrases; None if they were not scored or no fact has any.
        neighbors: scores of the neighbor prompts; None if they were not scored or no fact has any.
    """

    edit: PromptScores
    paraphrases: PromptScores | None = None
    neighbors: PromptScores | None = None


Pair = tuple[str, str]
"""A prompt and a target."""


_TokenScore = tuple[float, bool, float, float]
"""Log-probability of a token, whether it is the argmax, and the two largest log-probabilities at its position."""


def score_pairs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    cache: ScoreCache | None = None,
    compared: Sequence[tuple[Pair, Pair]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean log-probability per token of each target after its prompt, and whether the argmax is right.

    Args:
        lm: the model.
        pairs: (prompt, target).
        cache: cache of the scores of the current weights; None measures everything.
        compared: if given, the scores are computed in two stages where that saves time
            (:mod:`editlab.evaluation.two_stage`), and these are the pairs of ``pairs`` of which it matters which one
            is more likely. Default: one stage.

    Returns:
        float32 [n] in nats, and bool [n]: whether the argmax is right at every token of the target.
    """
    encoded = {pair: lm.encode_pair(*pair) for pair in dict.fromkeys(pairs)}
    requests: dict[Pair, Request] = {pair: (encoding.ids, start) for pair, (encoding, start) in encoded.items()}
    unique = list(dict.fromkeys(requests.values()))
    if compared is not None and unique and rounds_first(lm):
        scores = _score_twice(lm, unique, [(requests[a], requests[b]) for a, b in compared], cache)
    else:
        scores = _score_once(lm, unique, cache)
    found = [scores[requests[pair]] for pair in pairs]
    return torch.tensor([logp for logp, _ in found]), torch.tensor([hit for _, hit in found], dtype=torch.bool)


def _score_once(lm: LanguageModel, requests: Sequence[Request], cache: ScoreCache | None) -> dict[Request, Score]:
    def find(missing: Sequence[Request]) -> list[Score]:
        return [(logp, hit) for logp, hit, _ in _score(lm, missing)]

    return dict(zip(requests, find(requests), strict=True)) if cache is None else cache.fetch(requests, find)


def _score_twice(
    lm: LanguageModel,
    requests: Sequence[Request],
    compared: Sequence[tuple[Request, Request]],
    cache: ScoreCache | None,
) -> dict[Request, Score]:
    with first_stage(lm):
        if cache is None:
            rough = dict(zip(requests, _score(lm, requests), strict=True))
        else:
            rough = cache.fetch_rough(requests, lambda missing: _score(lm, missing))
    return refine(rough, compared, lambda some: _score_once(lm, some, cache))


def _score(lm: LanguageModel, requests: Sequence[Request]) -> list[RoughScore]:
    # Each token of a target, as (index at which it is predicted, token id).
    targets = [[(p - 1, ids[p]) for p in range(start, len(ids))] for ids, start in requests]
    longest = _covering({ids[:-1] for ids, _ in requests})
    by_row: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
    for (ids, _), tokens in zip(requests, targets, strict=True):
        by_row.setdefault(longest[ids[:-1]], {}).update(dict.fromkeys(tokens))
    rows = list(by_row)
    found = lm.next_token_scores(rows, [list(by_row[row]) for row in rows])
    tables: dict[tuple[int, ...], dict[tuple[int, int], _TokenScore]] = {
        row: dict(zip(by_row[row], zip(*(part.tolist() for part in parts), strict=True), strict=True))
        for row, parts in zip(rows, zip(found.logps, found.hits, found.tops, found.seconds, strict=True), strict=True)
    }
    return [
        _score_of([tables[longest[ids[:-1]]][token] for token in tokens])
        for (ids, _), tokens in zip(requests, targets, strict=True)
    ]


def _score_of(tokens: Sequence[_TokenScore]) -> RoughScore:
    """The score of a target from its tokens' log-probability, hit, and the two largest log-probabilities there."""
    hit = all(right for _, right, _, _ in tokens)
    if hit:
        gap = min(logp - second for logp, _, _, second in tokens)
    else:
        gap = max(top - logp for logp, right, top, _ in tokens if not right)
    return RoughScore(sum(logp for logp, *_ in tokens) / len(tokens), hit, gap)


def _covering(rows: set[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each row, the longest row that begins with it; in a causal model that one's scores hold for both."""
    cover: dict[tuple[int, ...], tuple[int, ...]] = {}
    last: tuple[int, ...] = ()
    for row in sorted(rows, reverse=True):  # in this order a row follows those that extend it
        if last[: len(row)] != row:
            last = row
        cover[row] = last
    return cover


def score_facts(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    paraphrases: bool = True,
    neighbors: int | None = None,
    first_record: int = 0,
    cache: ScoreCache | None = None,
    two_stage: bool = False,
) -> FactScores:
    """Scores of the facts' edit prompts, paraphrases and neighbors.

    If the model gives NaN for one of the targets of a prompt, both targets count as missed: neither is the argmax, and
    neither is more likely.

    Args:
        lm: the model.
        facts: facts to score.
        paraphrases: whether to score paraphrases.
        neighbors: number of neighbors scored for each fact, the first ones; None for all. The true target of a
            neighbor is its own truth.
        first_record: record number of the first fact.
        cache: cache of the scores of the current weights; None measures everything.
        two_stage: whether to score in two stages where that saves time (:mod:`editlab.evaluation.two_stage`): each
            prompt's argmax and its more likely target are those of float32 then, and log-probabilities may be rounded.
    """
    groups: list[list[tuple[int, str, str, str | None]]] = [[], [], []]
    for i, fact in enumerate(facts, start=first_record):
        groups[0].append((i, fact.question, fact.target_new, fact.target_true))
        if paraphrases:
            groups[1] += [(i, p, fact.target_new, fact.target_true) for p in fact.paraphrases]
        groups[2] += [(i, n.prompt, fact.target_new, n.truth) for n in fact.neighbors[:neighbors]]
    pairs = [(p, new) for group in groups for _, p, new, _ in group]
    pairs += [(p, true) for group in groups for _, p, _, true in group if true is not None]
    compared = [((p, new), (p, true)) for group in groups for _, p, new, true in group if true is not None]
    logp, hit = score_pairs(lm, pairs, cache, compared if two_stage else None)
    table = {pair: (float(a), bool(b)) for pair, a, b in zip(pairs, logp, hit, strict=True)}
    no_truth, missed = (float("nan"), False), (float("-inf"), False)

    def both(prompt: str, new: str, true: str | None) -> tuple[Score, Score]:
        found = [table[prompt, text] for text in (new, true) if text is not None]
        if any(math.isnan(logp) for logp, _ in found):
            # NaN means that there is no truth: the means would not count the prompts of a broken model.
            found = [missed] * len(found)
        return found[0], found[1] if true is not None else no_truth

    def scores(group: list[tuple[int, str, str, str | None]]) -> PromptScores:
        found = [both(prompt, new, true) for _, prompt, new, true in group]
        new, true = [a for a, _ in found], [b for _, b in found]
        return PromptScores(
            torch.tensor([a for a, _ in new]),
            torch.tensor([a for a, _ in true]),
            torch.tensor([b for _, b in new], dtype=torch.bool),
            torch.tensor([b for _, b in true], dtype=torch.bool),
            torch.tensor([i for i, *_ in group], dtype=torch.long),
        )

    return FactScores(scores(groups[0]), *(scores(g) if g else None for g in groups[1:]))


def prefers_truth(lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None) -> list[bool]:
    """Whether the model prefers each fact's truth: P(true) > P(new) on the edit prompt."""
    edit = score_facts(lm, facts, paraphrases=False, neighbors=0, cache=cache).edit
    return (edit.logp_true > edit.logp_new).tolist()


def token_log_probs(lm: LanguageModel, ids: Sequence[int], window: int = 256) -> Tensor:
    """Log-probability of each token after the tokens before it in its window, float32 [scored tokens], in nats.

    These are the log-probabilities of :func:`window_log_probs` as one vector.
    """
    return torch.cat([torch.empty(0), *window_log_probs(lm, ids, window)])


def window_log_probs(lm: LanguageModel, ids: Sequence[int], window: int = 256) -> list[Tensor]:
    """For each window of a text the log-probability of each of its tokens, float32 [scored tokens], in nats.

    Windows do not overlap and begin as the tokenizer begins a text (:mod:`editlab.lm.text`). Without special tokens
    there, the first token of each window has no context and is not counted; a window without further tokens is left
    out.

    Args:
        lm: the model.
        ids: token ids of the text, without special tokens before it.
        window: tokens of text in a window, or fewer if the model takes fewer.
    """
    windows = [w for w in cut(lm, ids, window) if len(w) > 1]
    wanted = [[(p - 1, w[p]) for p in scored(lm, w)] for w in windows]
    # Logits of 4 x 256 positions in float32 fit into a laptop's memory.
    return lm.next_token_scores(windows, wanted, tokens_a_pass=4 * max(map(len, windows), default=1)).logps
