"""Scoring facts: how likely the new and the true continuation are after each of a fact's prompts.

P(x) is the probability of the whole string after the prompt, as its mean log-probability per token. Both
continuations of a prompt, and prompts that repeat between facts, are read off one forward pass where one row is the
beginning of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.evaluation.score_cache import Request, Score, ScoreCache
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import encode_pair
from editlab.metrics.scores import PromptScores


@dataclass
class FactScores:
    """The scores of some facts; a group is None where no fact has such prompts or it was not asked for."""

    edit: PromptScores
    paraphrases: PromptScores | None = None
    neighbors: PromptScores | None = None


def score_pairs(
    lm: LanguageModel, pairs: Sequence[tuple[str, str]], cache: ScoreCache | None = None
) -> tuple[Tensor, Tensor]:
    """Mean log-probability per token of each continuation after its prompt, and whether it is the argmax.

    Args:
        lm: the model.
        pairs: (prompt, continuation).
        cache: of the weights as they are; None measures everything.

    Returns:
        float32 [n] in nats, and bool [n]: the argmax is right at every token of the continuation.
    """
    encoded = {pair: encode_pair(lm.tokenizer, *pair) for pair in dict.fromkeys(pairs)}
    requests: list[Request] = [(encoding.ids, start) for encoding, start in encoded.values()]
    if cache is None:
        scores = dict(zip(requests, _score(lm, requests), strict=True))
    else:
        scores = cache.fetch(requests, lambda missing: _score(lm, missing))
    found = [scores[encoded[pair][0].ids, encoded[pair][1]] for pair in pairs]
    return torch.tensor([logp for logp, _ in found]), torch.tensor([hit for _, hit in found], dtype=torch.bool)


def _score(lm: LanguageModel, requests: Sequence[Request]) -> list[Score]:
    wanted = [[(p - 1, ids[p]) for p in range(start, len(ids))] for ids, start in requests]
    longest = _covering({ids[:-1] for ids, _ in requests})
    asked: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
    for (ids, _), places in zip(requests, wanted, strict=True):
        asked.setdefault(longest[ids[:-1]], {}).update(dict.fromkeys(places))
    rows = list(asked)
    logps, hits, _ = lm.next_token_scores(rows, [list(asked[row]) for row in rows])
    tables = {
        row: {place: (float(logp[i]), bool(hit[i])) for i, place in enumerate(asked[row])}
        for row, logp, hit in zip(rows, logps, hits, strict=True)
    }
    scores: list[Score] = []
    for (ids, _), places in zip(requests, wanted, strict=True):
        each = [tables[longest[ids[:-1]]][place] for place in places]
        scores.append((sum(logp for logp, _ in each) / len(each), all(hit for _, hit in each)))
    return scores


def _covering(rows: set[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each row, a row that begins with it: in a causal model the longer one's states serve both."""
    cover: dict[tuple[int, ...], tuple[int, ...]] = {}
    last: tuple[int, ...] = ()
    for row in sorted(rows, reverse=True):  # a row stands right after those that extend it
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
) -> FactScores:
    """Scores of the facts' edit prompts and, where asked for and present, paraphrases and neighbors.

    Neighbors are scored on their own truth, each fact's first ``neighbors`` or all. Records are numbered from
    ``first_record`` on. ``cache`` has to be that of the weights as they are. A prompt at which the model gives no
    number (NaN) for one of its continuations is missed: neither is said, and neither is likelier.
    """
    groups: list[list[tuple[int, str, str, str | None]]] = [[], [], []]
    for i, fact in enumerate(facts, start=first_record):
        groups[0].append((i, fact.question, fact.target_new, fact.target_true))
        if paraphrases:
            groups[1] += [(i, p, fact.target_new, fact.target_true) for p in fact.paraphrases]
        groups[2] += [(i, n.prompt, fact.target_new, n.truth) for n in fact.neighbors[:neighbors]]
    pairs = [(p, new) for group in groups for _, p, new, _ in group]
    pairs += [(p, true) for group in groups for _, p, _, true in group if true is not None]
    logp, hit = score_pairs(lm, pairs, cache)
    table = {pair: (float(a), bool(b)) for pair, a, b in zip(pairs, logp, hit, strict=True)}
    unknown, unsaid = (float("nan"), False), (float("-inf"), False)

    def answers(prompt: str, new: str, true: str | None) -> tuple[Score, Score]:
        found = [table[prompt, text] for text in (new, true) if text is not None]
        if any(math.isnan(logp) for logp, _ in found):
            # NaN stands for a truth that no one knows, and would leave a broken model's prompts out of every mean.
            found = [unsaid] * len(found)
        return found[0], found[1] if true is not None else unknown

    def scores(group: list[tuple[int, str, str, str | None]]) -> PromptScores:
        said = [answers(p, n, t) for _, p, n, t in group]
        new, true = [a for a, _ in said], [b for _, b in said]
        return PromptScores(
            torch.tensor([a for a, _ in new]),
            torch.tensor([a for a, _ in true]),
            torch.tensor([b for _, b in new], dtype=torch.bool),
            torch.tensor([b for _, b in true], dtype=torch.bool),
            torch.tensor([i for i, *_ in group], dtype=torch.long),
        )

    return FactScores(scores(groups[0]), *(scores(g) if g else None for g in groups[1:]))


def prefers_truth(lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None) -> list[bool]:
    """Whether the model finds each fact's truth likelier than its new target: it knows the fact."""
    edit = score_facts(lm, facts, paraphrases=False, neighbors=0, cache=cache).edit
    return (edit.logp_true > edit.logp_new).tolist()


def token_log_probs(lm: LanguageModel, ids: Sequence[int], window: int = 256) -> Tensor:
    """Log-probability of each token after the tokens before it in its window, float32 [n - windows], in nats.

    Windows do not overlap, so the first token of each has nothing to be predicted from and is left out. None is longer
    than what the model takes.
    """
    window = min(window, lm.longest or window)
    windows = [list(ids[i : i + window]) for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) > 1]
    wanted = [[(p - 1, w[p]) for p in range(1, len(w))] for w in windows]
    # 4 x 256 positions x the vocabulary in float32 is what a laptop can hold.
    logps = lm.next_token_scores(windows, wanted, tokens_a_pass=4 * window).logps
    return torch.cat([torch.empty(0), *logps])
