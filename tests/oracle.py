"""The plain way to find a value: one fact at a time, the whole model on the whole prompt, full logits.

It follows the reference codes' procedure (ROME, MEMIT) and shares nothing with :mod:`editlab.values` but the text of
the prompts; it is the oracle of the tests and the yardstick of ``scripts/benchmark_values.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from editlab.data.fact import Fact
from editlab.keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values import ValueSettings


def naive_value(
    lm: LanguageModel, fact: Fact, site: Site, contexts: list[str], settings: ValueSettings
) -> tuple[Tensor, float, int]:
    """The target [d_v] of one fact, its final loss, and the evaluations of the loss it took."""
    model, tokenizer = lm.model, lm.tokenizer
    texts = [c + fact.question for c in contexts] + [f"{fact.subject} is a"]
    starts = [len(c) + fact.subject_span[0] for c in contexts] + [0]
    rows, lasts, targets = [], [], []
    for text, start in zip(texts, starts, strict=True):
        essence = text is texts[-1]
        full = text if essence else f"{text} {fact.target_new}"
        encoded = tokenizer(full, return_offsets_mapping=True)
        end = start + len(fact.subject)
        lasts.append(max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > a))
        labels = [
            token if b > len(text) and not essence else -100
            for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        rows.append(encoded["input_ids"])
        targets.append(labels)
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = torch.tensor([t + [-100] * (width - len(t)) for t in targets])
    delta = torch.zeros(lm.anatomy.value_size(site.layer), requires_grad=True)
    origin: Tensor | None = None

    def add(module, args, output):
        nonlocal origin
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if origin is None:
            origin = hidden[0, lasts[0]].detach().clone()
        for row, last in enumerate(lasts):
            hidden[row, last] = hidden[row, last] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    direction: Tensor | None = None
    initial = None
    for step in range(settings.steps):
        handle = site.module.register_forward_hook(add)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        handle.remove()
        logp = F.log_softmax(logits, dim=-1)
        picked = logp[:-1, :-1].gather(2, labels[:-1, 1:].clamp_min(0)[..., None]).squeeze(-1)
        wanted = labels[:-1, 1:] != -100
        nll = -(picked * wanted).sum(1) / wanted.sum(1)
        essence = logp[-1, len(rows[-1]) - 1]
        if initial is None:
            initial = essence.detach()
        kl = F.kl_div(initial[None], essence[None], log_target=True, reduction="batchmean")
        decay = settings.weight_decay * delta.norm() / origin.norm() ** 2
        loss = nll.mean() + settings.kl_factor * kl + decay
        if loss < settings.loss_threshold or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        if settings.optimizer == "adam":
            optimizer.step()
        else:
            # Half of the last direction, half of the new gradient's; a step of lr ||v0|| where both agree.
            unit = delta.grad / delta.grad.norm()
            direction = unit if direction is None else 0.5 * direction + 0.5 * unit
            delta.data -= settings.lr * origin.norm() * direction
        with torch.no_grad():
            radius = settings.clamp * origin.norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return origin + delta.detach(), float(loss.detach()), step + 1
