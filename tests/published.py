"""The published procedures of ROME, MEMIT, EMMET and AlphaEdit, written out naively: an oracle for tests.

Written from the papers' equations and from what the authors' repositories do (loops, indices, averages): one fact at a
time, whole prompts, no padding, explicit inverses. It shares nothing with editlab but the facts and the model. Weights
are in mathematical orientation, [d_v, d_k]; the tests use Linear layers alone.
"""

import torch
from torch.nn.functional import kl_div, log_softmax


def subject_index(tok, context, fact):
    """Index of the subject's last token: the tokens of all that comes before its end, minus one."""
    before = fact.prompt.split("{}")[0]
    return len(tok(context + before + fact.subject)["input_ids"]) - 1


def run(model, ids, module=None, edit=None):
    """Logits [tokens, vocabulary] of one row; ``edit`` changes the module's output in place."""

    def hook(_, args, output):
        whole = (output[0] if isinstance(output, tuple) else output).clone()
        edit(whole[0])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handle = module.register_forward_hook(hook) if module is not None else None
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    if handle is not None:
        handle.remove()
    return logits


def value(model, tok, fact, module, contexts, *, steps, lr, kl_factor, weight_decay, clamp, kl_at_subject=True):
    """v*, [d_v], as compute_v (ROME, module: the MLP) and compute_z (MEMIT, module: the block) find it."""
    target = tok(" " + fact.target_new)["input_ids"]
    prompts = [context + fact.prompt.format(fact.subject) + tok.decode(target[:-1]) for context in contexts]
    rows = [tok(prompt)["input_ids"] for prompt in prompts]
    places = [subject_index(tok, context, fact) for context in contexts]
    essence = tok(f"{fact.subject} is a")["input_ids"]
    essence_place = len(tok(fact.subject)["input_ids"]) - 1
    kl_index = essence_place if kl_at_subject else len(essence) - 1
    delta, start, initial = None, None, None

    def add_at(place):
        def edit(states):
            nonlocal start, delta
            if start is None:
                start = states[place].detach().clone()
                delta = torch.zeros_like(start, requires_grad=True)
            states[place] += delta

        return edit

    for step in range(steps):
        each = []
        for row, place in zip(rows, places, strict=True):
            logp = log_softmax(run(model, row, module, add_at(place)).float(), dim=1)
            first = len(row) - len(target)
            each.append(-sum(logp[first + i, token] for i, token in enumerate(target)) / len(target))
        here = log_softmax(run(model, essence, module, add_at(essence_place)).float(), dim=1)[kl_index][None]
        initial = here.detach().clone() if initial is None else initial
        loss = torch.stack(each).mean()
        loss = loss + kl_factor * kl_div(initial, here, log_target=True, reduction="batchmean")
        loss = loss + weight_decay * delta.norm() / start.norm() ** 2 if step else loss  # a norm has no gradient at 0
        if step == 0:
            optimizer = torch.optim.Adam([delta], lr=lr)
        if loss < 5e-2 or step == steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if delta.norm() > clamp * start.norm():
                delta *= clamp * start.norm() / delta.norm()
    return start + delta.detach()


@torch.no_grad()
def seen(model, tok, fact, context, module, output=False):
    """Input or output of a module at the subject's last token behind a context, float64."""
    found = []
    handle = module.register_forward_hook(lambda _, args, out: found.append(out if output else args[0]))
    run(model, tok(context + fact.prompt.format(fact.subject))["input_ids"])
    handle.remove()
    states = found[0][0] if isinstance(found[0], tuple) else found[0]
    return states[0, subject_index(tok, context, fact)].double()


def key_of_rome(model, tok, fact, contexts, projection):
    """compute_u's key: the mean over all contexts."""
    return torch.stack([seen(model, tok, fact, context, projection) for context in contexts]).mean(0)


def key_of_memit(model, tok, fact, contexts, projection):
    """compute_ks' key: the mean over the kinds of contexts (none; sampled) of the mean over each kind."""
    bare, *others = [seen(model, tok, fact, context, projection) for context in contexts]
    return (bare + torch.stack(others).mean(0)) / 2


def rome(model, tok, fact, target, contexts, projection, c0):
    """Rank-one update: the direction from the mean key, the denominator from the bare prompt's key."""
    left = torch.linalg.inv(c0) @ key_of_rome(model, tok, fact, contexts, projection)
    left = left / left.norm()
    bare = seen(model, tok, fact, "", projection)
    now = seen(model, tok, fact, "", projection, output=True)
    return torch.outer((target - now) / (bare @ left), left)


def spread(model, tok, facts, targets, contexts, blocks, projections, update):
    """Updates of MEMIT's loop over the layers, by :func:`update`; the model is left edited."""
    updates = []
    for i, projection in enumerate(projections):
        keys = torch.stack([key_of_memit(model, tok, fact, contexts, projection) for fact in facts], 1)
        now = torch.stack([seen(model, tok, fact, "", blocks[-1], output=True) for fact in facts], 1)
        updates.append(update(i, keys, (targets - now) / (len(projections) - i)))
        with torch.no_grad():
            projection.weight += updates[-1].to(projection.weight)
    return updates


def memit(keys, residuals, c0, weight):
    """``R (lambda C0 + K K^T)^-1 K``, transposed (MEMIT, arXiv:2210.07229, eq. 14)."""
    return residuals @ torch.linalg.solve(weight * c0 + keys @ keys.T, keys).T


def emmet(keys, residuals, c0, weight, ridge):
    """``R (K^T C^-1 K + ridge I)^-1 K^T C^-1`` (EMMET, arXiv:2403.14236), with the ridge of its code."""
    inverse = torch.linalg.inv(weight * c0)
    inner = keys.T @ inverse @ keys + ridge * torch.eye(keys.shape[1]).to(keys)
    return residuals @ torch.linalg.inv(inner) @ keys.T @ inverse


def alphaedit(keys, residuals, c0, threshold, l2, past):
    """``(P (K K^T + past) + l2 I)^-1 P K R^T``, transposed (AlphaEdit, arXiv:2410.02355)."""
    vectors, sizes, _ = torch.linalg.svd(c0)
    basis = vectors[:, sizes < threshold]
    projector = basis @ basis.T
    identity = torch.eye(len(c0)).to(c0)
    return torch.linalg.solve(projector @ (keys @ keys.T + past) + l2 * identity, projector @ keys @ residuals.T).T
