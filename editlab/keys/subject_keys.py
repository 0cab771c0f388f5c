"""Keys: the inputs of the edited layer at the last token of each subject, and at the context tokens of its prompt."""

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
from editlab.lm.tokens import Encoding

KEY_MODES = ("bare", "mean", "templates")
"""Names of the ways to read a fact's key (:func:`read_keys`)."""

STREAM, MLP = "stream", "mlp"
SITES = (STREAM, MLP)
"""Names of the outputs that a target can replace (:class:`Site`)."""


@dataclass(frozen=True)
class Site:
    """The place of a target: the residual stream after a block, or the MLP's output.

    In most models the output of the edited projection is added to the stream unchanged, so the target can be a state of
    the stream, and the residual can be spread over several layers below it (MEMIT). If a norm comes between (Gemma 2
    and 3), the target has to be an output of the projection itself. ROME's authors choose the MLP's output in any model
    (Meng et al. 2022, arXiv:2202.05262, section 3.1); the ball and the weight decay of a value are then relative to the
    norm of that output.
    """

    layer: int
    """number of the block"""
    in_stream: bool
    """whether the target is a state of the residual stream"""
    module: nn.Module
    """module whose output the target replaces: the block or its edited projection"""

    @classmethod
    def of(cls, lm: LanguageModel, layer: int, where: str | None = None) -> Site:
        """The site for edits whose topmost layer is ``layer``.

        Args:
            lm: the model.
            layer: number of the block.
            where: ``stream`` or ``mlp``; default: the stream, or the MLP's output if a norm follows it.

        Raises:
            UserError: The stream is asked for in a model with a norm after its MLP.
        """
        additive = lm.anatomy.additive
        if where == STREAM and not additive:
            raise UserError(
                "model.site is stream, and this model has a norm after its MLP, so no update of the projection can be "
                "solved for in the stream: set model.site to mlp, or leave it out."
            )
        in_stream = additive and where != MLP
        return cls(layer, in_stream, lm.anatomy.blocks[layer] if in_stream else lm.anatomy.edit_module(layer))

    @property
    def name(self) -> str:
        """``stream`` or ``mlp``."""
        return STREAM if self.in_stream else MLP


@dataclass
class Keys:
    """Keys of some facts at one layer, one in each column, and the site's present output for them."""

    keys: Tensor
    """float64 [d_k, n]"""
    fact: Tensor
    """long [n]: which fact each key belongs to"""
    current: Tensor
    """float64 [d_v, facts]: the site's present output at the subject's last token in the bare prompt"""
    context_keys: Tensor
    """float64 [d_k, m]: keys of the bare prompts' context tokens: all but the first and the subject's last"""
    context_fact: Tensor
    """long [m]: the fact whose prompt each context key is in"""
    bare: Tensor | None = None
    """float64 [d_k, facts]: key of each fact in the bare prompt; None if it was not read"""

    def plus(self, cached: Sequence[CachedKey], total: Tensor) -> Keys:
        """These keys and the cached keys of further facts; ``total`` [d_v, d_k] is the layer's sum of updates."""
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
            bare=None if self.bare is None else torch.cat([self.bare, more], 1),
        )


@dataclass(frozen=True)
class CachedKey:
    """A fact's key and output at a layer below which no weight changes, so that no forward pass is needed for them."""

    key: Tensor
    """[d_k]: key in the bare prompt"""
    origin: Tensor
    """[d_v]: output of the site without the layer's updates"""
    context_keys: Tensor | None = None
    """[m, d_k]: keys of its prompt's context tokens; None if they are not preserved"""


def locate(lm: LanguageModel, fact: Fact, context: str = "") -> tuple[Encoding, int]:
    """The tokens of a fact's question behind a context, and the index of the subject's last token.

    Raises:
        UserError: The tokenizer gives the subject no token.
    """
    encoding = lm.encode(lm.in_context(context, fact.question))
    return encoding, encoding.token_at(len(context) + fact.subject_span[1])


def check_lengths(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]) -> None:
    """Makes sure that every fact fits into the model; see :func:`too_long`.

    Raises:
        UserError: A fact has more tokens than the model takes.
    """
    for fact in facts:
        fault = too_long(lm, fact, contexts)
        if fault is not None:
            raise UserError(f"The fact {fact.question[:40]!r}... {fault}.")


def too_long(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> str | None:
    """Why a fact does not fit into the model, as a predicate with a fix ("has 80 tokens ..."); None if it fits.

    The prompt with the new target is checked with every context; the fact's other texts are scored without one. A model
    with learned position embeddings has none for later tokens, and other models were not trained on longer texts.
    """
    if lm.longest is None:
        return None
    limit = f"and the model takes {lm.longest}: shorten"
    if not _short(lm.longest, *contexts, fact.question, fact.target_new):
        before = max((len(lm.encode(context).ids) for context in contexts if context), default=0)
        length = before + _length(lm, fact.question, fact.target_new)
        if length > lm.longest:
            return f"has {length} tokens with its target and a context, {limit} its prompt"
    for kind, prompt, continuation in _scored(fact):
        # No pass needs the last token: its score comes from the prediction at the token before it.
        if _short(lm.longest, prompt, continuation) or _length(lm, prompt, continuation) - 1 <= lm.longest:
            continue
        return f"has a {kind} with {_length(lm, prompt, continuation)} tokens from prompt to answer, {limit} it"
    return None


def _scored(fact: Fact) -> Iterator[tuple[str, str, str]]:
    """The kind of each text of a fact that is scored, the text, and a continuation that it is scored with."""
    truths = [fact.target_true] if fact.target_true is not None else []
    yield from (("truth", fact.question, truth) for truth in truths)
    yield from (("paraphrase", p, answer) for p in fact.paraphrases for answer in (fact.target_new, *truths))
    yield from (("neighbor", n.prompt, answer) for n in fact.neighbors for answer in (fact.target_new, n.truth))
    yield from (("portability question", q.prompt, q.answers[0]) for q in fact.portability)


def _short(tokens: int, *texts: str) -> bool:
    """Whether texts have at most ``tokens`` tokens for certain, without tokenizing, which takes minutes for a file.

    ASCII text has no more tokens than characters, apart from special tokens and a space before each text.
    """
    return all(map(str.isascii, texts)) and sum(len(text) + 4 for text in texts) <= tokens


def _length(lm: LanguageModel, prompt: str, continuation: str) -> int:
    return len(lm.encode_pair(prompt, continuation)[0].ids)


def read_keys(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    site: Site,
    contexts: Sequence[str],
    mode: str,
    device: torch.device | None = None,
) -> Keys:
    """Reads the facts' keys and context keys at one layer, and the site's output, in the same forward passes.

    Several ranks share the passes.

    Args:
        lm: the model, with the weights as they are now.
        facts: the facts.
        layer: number of the layer.
        site: site of the targets; its block is the last that runs.
        contexts: prefixes, the empty one first.
        mode: ``bare`` takes the key in the bare prompt; ``mean`` the average over all contexts, the empty one included;
            ``templates`` the average of the key in the bare prompt and of the mean over the other contexts, as MEMIT's
            authors do: with five of them the bare prompt weighs 1/2 and each context 1/10.
        device: device of the result; default: the model's, or the CPU if that device has no float64.
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
    at_last = at_last.view(len(used), n, -1)
    return Keys(
        keys=_averaged(at_last, mode).T.contiguous(),
        fact=torch.arange(n, device=where),
        current=widened(torch.stack([site for _, _, site in found[:n]]), where).T,
        context_keys=widened(torch.cat(of_context), where).T,
        context_fact=context_fact,
        bare=at_last[0].T.contiguous(),
    )


def _averaged(keys: Tensor, mode: str) -> Tensor:
    """One key for each fact, [n, d_k], of its keys [contexts, n, d_k], those of the bare prompts first."""
    if mode == "templates" and len(keys) > 1:
        return (keys[0] + keys[1:].mean(0)) / 2
    return keys.mean(0)


def _picked(
    seen: Sequence[dict[str, Tensor]], lasts: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each row of a pass: the key at the subject's last token, the context keys and the site's output, on the CPU.

    They are selected on the device for all rows at once and copied together, so the host waits twice in all and not
    twice for each row.

    Args:
        seen: keys and outputs of each row, [tokens, features].
        lasts: index of each subject's last token.
        lengths: number of tokens of each row whose context keys are wanted; 0 for other rows.
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
    """The rows of the concatenated tensors with these indices, on the CPU."""
    whole = torch.cat(list(rows))
    return whole[torch.tensor(indices, dtype=torch.long).to(whole.device, non_blocking=True)].cpu()
