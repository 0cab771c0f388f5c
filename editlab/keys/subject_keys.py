"""Keys: what the edited layer sees at the last token of each subject, and what it must not move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.lm.precision import has_float64, widened
from editlab.lm.tokens import Encoding, encode, encode_pair

KEY_MODES = ("bare", "mean")


@dataclass(frozen=True)
class Site:
    """Where a target lives: the residual stream after a block or, where a norm follows the MLP, the MLP's output.

    In most models what the edited projection adds arrives unchanged in the stream, so the target can be one of the
    stream and be spread over several layers below it (MEMIT). Where it does not (Gemma 2 and 3), it has to be a
    target of the projection itself.
    """

    layer: int
    in_stream: bool
    module: nn.Module

    @classmethod
    def of(cls, lm: LanguageModel, layer: int) -> Site:
        """The site for edits whose topmost layer is ``layer``."""
        additive = lm.anatomy.additive
        return cls(layer, additive, lm.anatomy.blocks[layer] if additive else lm.anatomy.edit_module(layer))


@dataclass
class Keys:
    """One layer's view of some facts. Columns are keys."""

    keys: Tensor
    """float64 [d_k, n]"""
    fact: Tensor
    """long [n]: which fact each key belongs to"""
    current: Tensor
    """float64 [d_v, facts]: what the site gives now at the subject's last token in the bare prompt"""
    context_keys: Tensor
    """float64 [d_k, m]: keys of the bare prompts' context tokens: all but the first and the subject's last"""
    context_fact: Tensor
    """long [m]: the fact whose prompt each context key is in"""

    def plus(self, cached: Sequence[CachedKey], total: Tensor) -> Keys:
        """These and the keys of further facts, which are known; ``total`` [d_v, d_k] is the layer's sum of updates."""
        if not cached:
            return self
        count = self.current.shape[1]
        more = torch.stack([c.key for c in cached]).to(self.keys).T
        origin = torch.stack([c.origin for c in cached]).to(self.keys).T
        context = [c.context_keys if c.context_keys is not None else c.key.new_zeros(0, len(c.key)) for c in cached]
        number = torch.arange(count, count + len(cached)).to(self.fact)
        lengths = torch.tensor([len(keys) for keys in context]).to(self.fact)
        return Keys(
            keys=torch.cat([self.keys, more], 1),
            fact=torch.cat([self.fact, number]),
            current=torch.cat([self.current, origin + widened(total, more.device) @ more], 1),
            context_keys=torch.cat([self.context_keys, torch.cat(context).to(self.keys).T], 1),
            context_fact=torch.cat([self.context_fact, number.repeat_interleave(lengths)]),
        )


@dataclass(frozen=True)
class CachedKey:
    """What is known of a fact at a layer below which nothing changes, so that no forward pass need run for it."""

    key: Tensor
    """[d_k]: in the bare prompt"""
    origin: Tensor
    """[d_v]: what the site gives but for the layer's updates"""
    context_keys: Tensor | None = None
    """[m, d_k]: keys of its prompt's context tokens; None if they are not preserved"""


def locate(lm: LanguageModel, fact: Fact, context: str = "") -> tuple[Encoding, int]:
    """The tokens of ``context + question`` and the index of the subject's last token.

    Raises:
        UserError: where the tokenizer gives the subject no token.
    """
    encoding = encode(lm.tokenizer, context + fact.question)
    return encoding, encoding.token_at(len(context) + fact.subject_span[1])


def check_lengths(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]) -> None:
    """Makes sure that every fact fits into the model; see :func:`too_long`.

    Raises:
        UserError: where one has more tokens than the model takes.
    """
    for fact in facts:
        fault = too_long(lm, fact, contexts)
        if fault is not None:
            raise UserError(f"The fact {fact.question[:40]!r}... {fault}.")


def too_long(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> str | None:
    """What of a fact has more tokens than the model takes, as the end of a sentence with the mend; None for nothing.

    Its prompt with the new target stands behind every context, all else that is scored by itself. A model whose
    positions are learnt has none for what comes later, and others were never trained that far.
    """
    if lm.longest is None:
        return None
    limit = f"and the model takes {lm.longest}: shorten"
    if not _short(lm.longest, *contexts, fact.question, fact.target_new):
        before = max((len(encode(lm.tokenizer, context).ids) for context in contexts if context), default=0)
        length = before + _length(lm, fact.question, fact.target_new)
        if length > lm.longest:
            return f"has {length} tokens with its target and a context, {limit} its prompt"
    for what, prompt, continuation in _scored(fact):
        # The last token of what is scored is read off what stands before it.
        if _short(lm.longest, prompt, continuation) or _length(lm, prompt, continuation) - 1 <= lm.longest:
            continue
        return f"has a {what} with {_length(lm, prompt, continuation)} tokens from prompt to answer, {limit} it"
    return None


def _scored(fact: Fact) -> Iterator[tuple[str, str, str]]:
    """What a text is, the text, and a continuation that it is scored with."""
    truths = [fact.target_true] if fact.target_true is not None else []
    yield from (("truth", fact.question, truth) for truth in truths)
    yield from (("paraphrase", p, answer) for p in fact.paraphrases for answer in (fact.target_new, *truths))
    yield from (("neighbor", n.prompt, answer) for n in fact.neighbors for answer in (fact.target_new, n.truth))


def _short(tokens: int, *texts: str) -> bool:
    """Whether texts are of so few tokens for certain; tokenizing those of a whole file takes minutes.

    No tokenizer makes more tokens of ASCII than it has characters, but for a special one or a space before each text.
    """
    return all(map(str.isascii, texts)) and sum(len(text) + 4 for text in texts) <= tokens


def _length(lm: LanguageModel, prompt: str, continuation: str) -> int:
    return len(encode_pair(lm.tokenizer, prompt, continuation)[0].ids)


def read_keys(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    site: Site,
    contexts: Sequence[str],
    mode: str,
    device: torch.device | None = None,
) -> Keys:
    """Read the facts' keys at one layer, the site's output, and the keys of the prompts' other tokens, all at once.

    Several ranks share the passes.

    Args:
        lm: the model, with the weights as they are now.
        facts: the facts.
        layer: whose keys.
        site: where targets live; its block is the last that runs.
        contexts: prefixes, the empty one first.
        mode: ``bare`` takes the key in the bare prompt, ``mean`` the average over contexts.
        device: of the result; default: the model's, or the CPU if that device has no float64.
    """
    used = [""] if mode == "bare" else list(contexts)
    rows: list[tuple[int, ...]] = []
    lasts: list[int] = []
    for context in used:
        for fact in facts:
            encoding, last = locate(lm, fact, context)
            rows.append(encoding.ids if context == "" else encoding.ids[: last + 1])
            lasts.append(last)
    modules = {"key": (lm.anatomy.edit_module(layer), "input"), "site": (site.module, "output")}
    n = len(facts)

    def read(group: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        seen = lm.read([rows[i] for i in group], modules, stop="site")
        return _picked(seen, [lasts[i] for i in group], [len(rows[i]) if i < n else 0 for i in group])

    found = ranks.each(lm.passes(rows), read)
    where = device or (lm.device if has_float64(lm.device) else torch.device("cpu"))
    at_last = widened(torch.stack([key for key, _, _ in found]), where)
    of_context = [keys for _, keys, _ in found[:n]]
    context_fact = torch.arange(n).repeat_interleave(torch.tensor([len(keys) for keys in of_context])).to(where)
    at_last = at_last.view(len(used), n, -1).mean(0)
    return Keys(
        keys=at_last.T.contiguous(),
        fact=torch.arange(n, device=where),
        current=widened(torch.stack([site for _, _, site in found[:n]]), where).T,
        context_keys=widened(torch.cat(of_context), where).T,
        context_fact=context_fact,
    )


def _picked(
    seen: Sequence[dict[str, Tensor]], lasts: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each row of a pass, on the CPU: the key at the subject's last token, the context keys, the site's output.

    They are picked on the device, for all rows at once, and copied together: the host waits twice in all, and not for
    each row.

    Args:
        seen: keys and outputs of each row, [tokens, features].
        lasts: index of each subject's last token.
        lengths: number of tokens of each row whose context keys are wanted; 0 for a row of which none are.
    """
    context = [[t for t in range(1, tokens) if t != last] for last, tokens in zip(lasts, lengths, strict=True)]
    starts = [0, *accumulate(len(row["key"]) for row in seen)]
    last_at = [start + last for start, last in zip(starts, lasts, strict=False)]
    context_at = [start + t for start, some in zip(starts, context, strict=False) for t in some]
    keys = _at([row["key"] for row in seen], last_at + context_at)
    sites = _at([row["site"] for row in seen], last_at)
    split = keys[len(lasts) :].split([len(some) for some in context])
    return list(zip(keys[: len(lasts)], split, sites, strict=True))


def _at(rows: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """The rows with these indices of all tensors, one below the other; on the CPU."""
    whole = torch.cat(list(rows))
    return whole[torch.tensor(indices, dtype=torch.long).to(whole.device, non_blocking=True)].cpu()
