"""Plain, slow editing: one fact at a time, whole prompts, the whole model, full logits, an inverse for each batch.

The functions follow the reference codes (ROME, MEMIT, EMMET) and share nothing with the rest of editlab but the text of
the prompts. They are the oracle of tests and the baseline of ``scripts/benchmark.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedTokenizerBase

from editlab.data.fact import Fact
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values.loss import SUBJECT
from editlab.values.settings import ValueSettings


def last_token(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Index of the last token that has a character before ``end``."""
    return max(i for i, (a, b) in enumerate(offsets) if a < end and b > a)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [rows, longest], padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _value_prompts(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Ids, mask and labels (-100: none) of the prompts of one fact, and the index of each subject's last token.

    The last prompt is the one of the KL term, which has no labels.
    """
    texts = [context + fact.question for context in contexts] + [f"{fact.subject} is a"]
    starts = [len(context) + fact.subject_span[0] for context in contexts] + [0]
    rows, lasts, targets = [], [], []
    for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
        essence = number == len(contexts)
        encoded = _offsets(lm.tokenizer, text if essence else f"{text} {fact.target_new}")
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        lasts.append(last_token(offsets, start + len(fact.subject)))
        rows.append(tokens)
        in_target = [b > len(text) and not essence for _, b in offsets]
        targets.append([token if hit else -100 for token, hit in zip(tokens, in_target, strict=True)])
    ids, mask = padded(rows, lm.device)
    width = ids.shape[1]
    labels = torch.tensor([[*target, *[-100] * (width - len(target))] for target in targets], device=lm.device)
    return ids, mask, labels, lasts


def plain_value(
    lm: LanguageModel, fact: Fact, site: Site, contexts: Sequence[str], settings: ValueSettings
) -> tuple[Tensor, float, int]:
    """Value [d_v] of one fact, its final loss, and the number of evaluations of the loss."""
    ids, mask, labels, lasts = _value_prompts(lm, fact, contexts)
    delta = torch.zeros(lm.anatomy.value_size(site.layer), device=lm.device, requires_grad=True)
    origin: Tensor | None = None

    def add(module: torch.nn.Module, args: Any, output: Any) -> Any:
        nonlocal origin
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if origin is None:
            origin = hidden[0, lasts[0]].detach().clone()
        for row, last in enumerate(lasts):
            hidden[row, last] = hidden[row, last] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    optimizer = torch.optim.Adam([delta], lr=settings.step_size, betas=settings.betas)
    initial = None
    hit_streak = 0
    turns = -(-len(contexts) // (settings.contexts_a_step or len(contexts)))
    latest = [torch.tensor(torch.inf)] * turns
    for step in range(settings.steps):
        turn = range(step % turns, len(contexts), turns)  # the whole model runs on all contexts, used or not
        handle = site.module.register_forward_hook(add)
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        handle.remove()
        assert origin is not None
        logp = log_softmax(logits, dim=-1)
        picked = logp[:-1, :-1].gather(2, labels[:-1, 1:].clamp_min(0)[..., None]).squeeze(-1)
        wanted = labels[:-1, 1:] != -100
        nll = -(picked * wanted).sum(1) / wanted.sum(1)
        right = (logp[:-1, :-1].argmax(2) == labels[:-1, 1:]) | ~wanted
        hit = bool(right[list(turn)].all())
        hit_streak = hit_streak + 1 if hit else 0
        essence = logp[-1, lasts[-1] if settings.kl_position == SUBJECT else int(mask[-1].sum()) - 1]
        if initial is None:
            initial = essence.detach()
        kl = kl_div(initial[None], essence[None], log_target=True, reduction="batchmean")
        decay = settings.weight_decay * delta.norm() / origin.norm() ** 2
        loss = nll[list(turn)].mean() + settings.kl_factor * kl + decay
        latest[step % turns] = loss.detach()
        mean_loss = sum(len(range(i, len(contexts), turns)) * some for i, some in enumerate(latest)) / len(contexts)
        stop_early = 0 < settings.early_stop * turns <= hit_streak
        if mean_loss < settings.loss_threshold or step == settings.steps - 1 or stop_early:
            break
        optimizer.zero_grad()
        loss.backward()
        part = step / max(1, settings.steps - 2)  # of the way from the first update to the last
        optimizer.param_groups[0]["lr"] = settings.step_size * ((1 - part) + part * settings.lr_end)
        optimizer.step()
        with torch.no_grad():
            radius = settings.clamp * origin.norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    assert origin is not None
    return origin + delta.detach(), float(mean_loss), step + 1


@torch.no_grad()
def plain_keys(lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]) -> Tensor:
    """Mean over contexts of the keys at the subjects' last tokens, [d_k, facts] in float64: a pass for each fact."""
    keys = []
    for fact in facts:
        encoded = [_offsets(lm.tokenizer, context + fact.question) for context in contexts]
        ends = [len(context) + fact.subject_span[1] for context in contexts]
        ids, mask = padded([e["input_ids"] for e in encoded], lm.device)
        seen = _record(lm, lm.anatomy.edit_module(layer), ids, mask)
        at = [last_token(e["offset_mapping"], end) for e, end in zip(encoded, ends, strict=True)]
        keys.append(seen[range(len(at)), at].double().mean(0))
    return torch.stack(keys, 1)


@torch.no_grad()
def plain_moments(
    lm: LanguageModel, layer: int, windows: Sequence[Sequence[int]], before: int = 0, rows: int = 8
) -> Tensor:
    """Second moments of keys over windows of one length, float64 [d_k, d_k]: all blocks and the logits run.

    The first ``before`` tokens of each window are not counted.
    """
    total, count = torch.zeros(lm.anatomy.key_size(layer), lm.anatomy.key_size(layer), dtype=torch.float64), 0
    for start in range(0, len(windows), rows):
        ids, mask = padded(windows[start : start + rows], lm.device)
        keys = _record(lm, lm.anatomy.edit_module(layer), ids, mask)[:, before:].flatten(0, 1).double().cpu()
        total += keys.T @ keys
        count += len(keys)
    return total / count


def plain_solve(keys: Tensor, residuals: Tensor, moments: Tensor, weight: float, slack: float) -> Tensor:
    """Update [d_v, d_k] of one batch in closed form, with explicit inverses; all float64."""
    inverse = torch.linalg.inv(weight * moments)
    gram = keys.T @ inverse @ keys + slack * torch.eye(keys.shape[1]).to(keys)
    return residuals @ torch.linalg.inv(gram) @ keys.T @ inverse


@torch.no_grad()
def plain_scores(lm: LanguageModel, fact: Fact, neighbors: int | None = None) -> list[tuple[float, float]]:
    """(new, true) mean log-probability per token after each prompt of a fact, in one padded batch of its own.

    The edit prompt comes first, then paraphrases, then neighbors; a neighbor's truth is its own.
    """
    prompts = [(p, str(fact.target_true)) for p in (fact.question, *fact.paraphrases)]
    prompts += [(n.prompt, n.truth) for n in fact.neighbors[:neighbors]]
    pairs = [(p, target) for p, true in prompts for target in (fact.target_new, true)]
    encoded = [_offsets(lm.tokenizer, f"{p} {target}") for p, target in pairs]
    ids, mask = padded([e["input_ids"] for e in encoded], lm.device)
    logp = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    means = []
    for row, (e, (prompt, _)) in enumerate(zip(encoded, pairs, strict=True)):
        indices = [i for i, (_, b) in enumerate(e["offset_mapping"]) if b > len(prompt)]
        means.append(sum(float(logp[row, i - 1, ids[row, i]]) for i in indices) / len(indices))
    return list(zip(means[::2], means[1::2], strict=True))


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, list]:
    return dict(tokenizer(text, return_offsets_mapping=True))


def _record(lm: LanguageModel, module: torch.nn.Module, ids: Tensor, mask: Tensor, output: bool = False) -> Tensor:
    """Input or output of a module, [rows, tokens, d], from a pass of the whole model with all logits."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(args[0] if not output else result[0] if isinstance(result, tuple) else result)

    handle = module.register_forward_hook(note)
    lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return seen[0].view(*ids.shape, -1)


@torch.no_grad()
def plain_outputs(lm: LanguageModel, facts: Sequence[Fact], site: Site) -> Tensor:
    """Output of the site at the subjects' last tokens of the bare prompts, [d_v, facts] in float64."""
    found = []
    for fact in facts:
        encoded = _offsets(lm.tokenizer, fact.question)
        ids, mask = padded([encoded["input_ids"]], lm.device)
        last = last_token(encoded["offset_mapping"], fact.subject_span[1])
        found.append(_record(lm, site.module, ids, mask, output=True)[0, last].double())
    return torch.stack(found, 1)


def plain_step(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    contexts: list[str],
    settings: ValueSettings,
    moments: Tensor,
    weight: float,
    slack: float,
) -> Tensor:
    """Edits one batch into the site's layer; returns the update, [d_v, d_k] in float64."""
    targets = torch.stack([plain_value(lm, fact, site, contexts, settings)[0] for fact in facts], 1).double()
    keys = plain_keys(lm, facts, site.layer, contexts)
    delta = plain_solve(keys, targets - plain_outputs(lm, facts, site), moments.to(keys), weight, slack)
    module_weight = lm.anatomy.edit_module(site.layer).weight
    with torch.no_grad():
        module_weight += (delta.T if lm.anatomy.transposed(site.layer) else delta).to(module_weight)
    return delta
