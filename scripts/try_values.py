"""Tries ideas for a faster search of values: steps, tokens that run, loss over all contexts, scores after one solve.

    python scripts/try_values.py --path FILE --facts 16 --tries "Adam, all contexts" "Gauss-Newton, all contexts"

Tokens are those of one forward pass and of its backward pass, for each fact. The time is processor time on a busy
machine, so tokens are compared first. Writes a row for each try to ``results/values_tries.csv``.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from editlab.api import edit_model
from editlab.data import EditDataModule
from editlab.data.fact import Fact
from editlab.evaluation.scoring import prefers_truth, score_pairs
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.experiments.values_speed import LAYERS, METRICS, losses_of
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import by_length
from editlab.solver.methods import EMMET
from editlab.values import optimize, sources
from editlab.values.loss import ValueGroup, in_turn, rows_of
from editlab.values.optimize import Values, loss_of, optimize_values, products_above, turns_of
from editlab.values.settings import ValueSettings

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [0]
Found = tuple[Tensor, Tensor]


@contextmanager
def counting() -> Iterator[None]:
    """Counts the tokens of each evaluation of the loss."""
    plain = ValueGroup._logits

    def counted(self: Any, shift: Tensor) -> Tensor:
        TOKENS[0] += self.layout.ids.numel()
        return plain(self, shift)

    ValueGroup._logits = counted
    try:
        yield
    finally:
        ValueGroup._logits = plain


def adam(lm: Any, facts: Any, site: Any, contexts: Any, settings: ValueSettings) -> Found:
    """The package's own search."""
    values = optimize_values(lm, facts, site, contexts, settings)
    return values.target, values.steps


def grouped(
    lm: Any, facts: Any, site: Any, contexts: Any, settings: ValueSettings, search: Callable, tokens: int = 512
) -> Found:
    """Another search, for groups of facts; it gets the parts of the group and the indices of its facts."""
    turns = turns_of(len(contexts), settings)
    rows = [rows_of(lm, i, fact, contexts, settings.kl_position) for i, fact in enumerate(facts)]
    padded = [max(len(r.tail) for r in some) * (len(turns[0]) + 1) for some in rows]
    target = torch.zeros(len(facts), lm.anatomy.value_size(site.layer))
    steps = torch.zeros(len(facts))
    with products_above(lm, site, settings):
        for group in by_length(padded, tokens):
            parts = [ValueGroup(lm, site, [in_turn(rows[i], turn) for i in group]) for turn in turns]
            target[group], steps[group] = search(parts, settings, list(group))
    return target, steps


def _evaluate(group: ValueGroup, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per fact and context: -log p of the target, its tokens; the KL; and the gradient of each row."""
    there, n = group.there, len(delta)
    rows = len(there.row_fact)
    shift = delta[there.row_fact].detach().requires_grad_()
    wanted, essence = group._logits(shift).split([len(there.at_row), len(there.kl_row)])
    nll = cross_entropy(wanted, there.token, reduction="none")
    total = torch.zeros(rows).index_add(0, there.at_row, nll)
    count = torch.zeros(rows).index_add(0, there.at_row, torch.ones_like(nll))
    edited = torch.log_softmax(essence, 1)
    if group.initial is None:
        group.initial = edited.detach()
    kl = (edited.exp() * (edited - group.initial)).sum(1)
    (gradient,) = torch.autograd.grad(total.sum() + kl.sum(), shift)
    at = rows // n
    return total.detach().view(n, at)[:, :-1], count.view(n, at)[:, :-1], kl.detach(), gradient.view(n, at, -1)


def _log_odds(nll: Tensor) -> Tensor:
    return -nll - torch.log(-torch.expm1(-nll))


def newton(parts: Any, settings: ValueSettings, which: Any) -> Found:
    """Gauss-Newton on the log-odds of the target in each context, in a trust region that a worse loss shrinks.

    The step is the shortest one that brings each context's linearised log-odds to the goal (half of the threshold), with
    a soft row for the root of twice the KL.
    """
    (part,) = parts
    origin = part.origin
    n, size = len(origin), origin.norm(dim=1)
    u = torch.zeros_like(origin)
    rows = len(part.indices.row_fact) // n
    done, steps = torch.zeros_like(origin), torch.zeros(n)
    active = torch.arange(n)
    rho, best, at = torch.full((n,), 0.3), torch.full((n,), torch.inf), u.clone()
    jacobian, residual = torch.zeros(n, rows, origin.shape[1]), torch.zeros(n, rows)
    for step in range(settings.steps):
        scale, now = size[active], u[active]
        nll, tokens, kl, gradient = _evaluate(part, now * scale[:, None])
        loss = (nll / tokens).mean(1) + settings.kl_factor * kl + settings.weight_decay * now.norm(dim=1) / scale
        better = loss < best[active]
        goal = (settings.loss_threshold - settings.kl_factor * kl).clamp_min(0.2 * settings.loss_threshold) / 2
        capped = nll.clamp_min(1e-4)
        wanted = (_log_odds(goal[:, None] * tokens) - _log_odds(capped)).clamp_min(0)
        slopes = -gradient[:, :-1] * scale[:, None, None] / (-torch.expm1(-capped))[..., None]
        root = (2 * kl).clamp_min(0).sqrt()
        slope_kl = gradient[:, -1] * scale[:, None] / root.clamp_min(1e-3)[:, None]
        chosen = active[better]
        jacobian[chosen] = torch.cat([slopes, slope_kl[:, None]], 1)[better]
        residual[chosen] = torch.cat([wanted, -root[:, None]], 1)[better]
        at[chosen], best[chosen] = now[better], loss[better]
        if step:
            rho[active] = torch.where(better, (1.5 * rho[active]).clamp_max(0.5), (0.4 * rho[active]).clamp_min(0.02))
        leaving = (loss < settings.loss_threshold) | torch.tensor(step == settings.steps - 1)
        gone = active[leaving]
        done[gone], steps[gone] = at[gone] * size[gone][:, None], step + 1.0
        if bool(leaving.all()):
            break
        a, r, now = jacobian[active], residual[active], at[active]
        gram = a @ a.transpose(1, 2)
        ridge = 0.01 * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1)
        slack = torch.cat([ridge[:, None].expand(-1, rows - 1), torch.full((len(a), 1), 1 / 0.03)], 1)
        move = (a * torch.linalg.solve(gram + torch.diag_embed(slack), r)[..., None]).sum(1)
        move = move * (rho[active] / move.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None]
        now = now + move
        u[active] = now * (settings.clamp / now.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None]
        if bool(leaving.any()):
            active = active[~leaving]
            part.keep(~leaving)
    return origin + done, steps


def lbfgs(parts: Any, settings: ValueSettings, which: Any) -> Found:
    """torch.optim.LBFGS with its strong Wolfe line search, one fact at a time; ``steps`` bounds the evaluations."""
    (part,) = parts
    size = part.origin.norm(dim=1)
    radius = settings.clamp * size
    part.losses(torch.zeros_like(part.origin))
    raw = torch.zeros_like(part.origin, requires_grad=True)
    count, best, at = [1], [torch.inf], [torch.zeros_like(part.origin)]

    def inside() -> Tensor:
        return raw * (radius / raw.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None]

    def closure() -> Tensor:
        optimizer.zero_grad()
        delta = inside()
        loss = loss_of(part, delta, size, settings)[0].sum()
        count[0] += 1
        if float(loss) < best[0]:
            best[0], at[0] = float(loss), delta.detach().clone()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([raw], lr=float(size) / 4, max_iter=40, max_eval=4, history_size=10,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    while count[0] < settings.steps and best[0] > settings.loss_threshold:
        optimizer.param_groups[0]["max_eval"] = settings.steps - count[0]
        before = count[0]
        optimizer.step(closure)
        if count[0] <= before + 1:
            break
    return part.origin + at[0], torch.full((1,), float(count[0]))


def turn_stop(parts: Any, settings: ValueSettings, which: Any, starts: Tensor | None = None, all_of: int = 0) -> Found:
    """Adam as in the package, from ``starts`` if given; with ``all_of`` 1 a fact leaves once the turn's own loss, of
    contexts that the last update did not see, is under the threshold, whatever the other turns' last losses were."""
    origin = parts[0].origin
    n, size = len(origin), origin.norm(dim=1)
    radius = settings.clamp * size
    delta = torch.zeros_like(origin) if starts is None else starts[which] - origin
    with torch.no_grad():
        parts[0].losses(torch.zeros_like(origin))  # what the KL compares with; a warm start pays for this pass
        if starts is None:
            TOKENS[0] -= parts[0].layout.ids.numel()
        delta = delta * (radius / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None]
    for part in parts[1:]:
        part.initial = parts[0].initial
    delta.requires_grad_()
    optimizer = torch.optim.Adam([delta], settings.step_size, settings.betas)
    done, steps, active = torch.zeros_like(origin), torch.zeros(n), torch.arange(n)
    latest = torch.full((len(parts), n), torch.inf)
    for step in range(settings.steps):
        turn = step % len(parts)
        loss, _ = loss_of(parts[turn], delta[active], size[active], settings)
        latest[turn] = loss.detach()
        mean = latest.mean(0) if not all_of else latest[turn]
        leaving = (mean < settings.loss_threshold) | torch.tensor(step == settings.steps - 1)
        gone = active[leaving]
        done[gone], steps[gone] = delta.detach()[gone], step + 1.0
        if bool(leaving.all()):
            break
        (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
        optimizer.param_groups[0]["lr"] = settings.step_size_of(step)
        optimizer.step()
        with torch.no_grad():
            delta.mul_((radius / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None])
        if bool(leaving.any()):
            active, latest = active[~leaving], latest[:, ~leaving]
            for part in parts:
                part.keep(~leaving)
    return origin + done, steps


def features(lm: LanguageModel, facts: Sequence[Fact], site: Site) -> tuple[Tensor, Tensor]:
    """Subject states v0 and embeddings of the target (first token, mean), float64 [n, 3 d]; and v0."""
    rows, table = [], lm.model.get_input_embeddings().weight.detach()
    for fact in facts:
        encoding, start = lm.encode_pair(fact.question, fact.target_new)
        last = encoding.token_at(fact.subject_span[1])
        seen = lm.read([encoding.ids[: last + 1]], {"site": (site.module, "output")}, stop="site")[0]["site"][-1]
        target = table[list(encoding.ids[start:])]
        rows.append(torch.cat([seen.float(), target[0], target.mean(0)]).double())
    found = torch.stack(rows)
    return found, found[:, : site_width(lm, site)]


def site_width(lm: LanguageModel, site: Site) -> int:
    """Width of a value."""
    return lm.anatomy.value_size(site.layer)


def ridge_starts(
    lm: LanguageModel, facts: Sequence[Fact], site: Site, known: Sequence[tuple[Fact, Tensor]]
) -> tuple[Tensor, str]:
    """Starts of the facts by a float64 ridge map learnt on values found before, and how well it predicts them."""
    asked = {fact.question for fact in facts}
    known = [(fact, value) for fact, value in known if fact.question not in asked]
    x, origin = features(lm, [fact for fact, _ in known], site)
    y = torch.stack([value for _, value in known]).double() - origin
    z, start = features(lm, facts, site)
    d = origin.shape[1]
    scale = torch.cat([x[:, i * d : (i + 1) * d].var(0).sum().sqrt().expand(d) for i in range(3)])
    mean, offset = x.mean(0), y.mean(0)
    a, b = (x - mean) / scale, (z - mean) / scale
    results = []
    for ridge in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        gram = a @ a.T
        hat = gram @ torch.linalg.inv(gram + ridge * torch.eye(len(a), dtype=a.dtype))
        left_out = ((y - offset) - hat @ (y - offset)) / (1 - hat.diagonal())[:, None]  # errors of leave-one-out
        results.append((float(left_out.square().sum() / (y - offset).square().sum()), ridge, gram))
    error, ridge, gram = min(results, key=lambda one: one[0])
    predicted = offset + b @ a.T @ torch.linalg.solve(gram + ridge * torch.eye(len(a), dtype=a.dtype), y - offset)
    cosine = torch.cosine_similarity(y - ((y - offset) * 0), y).mean()
    note = f"{len(known)} values, ridge {ridge}, unexplained when left out {error:.2f}, norm {float(predicted.norm(dim=1).mean() / y.norm(dim=1).mean()):.2f} {float(cosine):.0f}"
    return (start + predicted).float(), note


def scores(lm: LanguageModel, facts: Sequence[Fact], targets: Tensor, settings: ValueSettings) -> dict[str, str]:
    """Scores of all facts after one solve with these values; also mean log-probabilities, which vary less."""

    def given(lm_: Any, some: Sequence[Fact], *rest: Any, progress: Any = None, **more: Any) -> Values:
        which = [facts.index(fact) for fact in some]
        if progress:
            progress(len(some))
        return Values(targets[which], torch.zeros(len(which)), torch.zeros(len(which), dtype=torch.long))

    sources.optimize_values = given
    try:
        evaluation = EvaluationSettings(
            heldout_tokens=0, generated_texts=0, generation=0, bystanders=0, immediate="edits", neighbors=5
        )
        _, result = edit_model(
            lm.model, lm.tokenizer, facts, layers=LAYERS, batch_size=len(facts), progress=False,
            values=replace(settings, reference="current"), method=EMMET(covariance_weight=3000, gram_ridge=0.1),
            preserve_prompt_tokens=1.0, evaluation=evaluation,
        )  # fmt: skip
    finally:
        sources.optimize_values = optimize.optimize_values
    found = {name: f"{result.retained[name]:.3f}" for name in METRICS if name in result.retained}
    asked = [(prompt, fact.target_new) for fact in facts for prompt in fact.paraphrases]
    found["paraphrase_logp"] = f"{float(score_pairs(lm, asked)[0].mean()):.3f}"
    near = [(one.prompt, fact) for fact in facts for one in fact.neighbors[:5]]
    true = score_pairs(lm, [(prompt, str(fact.target_true)) for prompt, fact in near])[0]
    new = score_pairs(lm, [(prompt, fact.target_new) for prompt, fact in near])[0]
    found["neighbor_margin"] = f"{float((true - new).mean()):.3f}"
    result.revert()
    return found


FALLING: dict[str, Any] = {"lr": 2.0, "lr_end": 0.05, "betas": (0.5, 0.9), "steps": 18}
TRIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam, all contexts": (adam, {}),
    "Adam, two contexts a step": (adam, {"contexts_a_step": 2}),
    "Adam, larger steps that fall, two contexts a step": (adam, {**FALLING, "contexts_a_step": 2}),
    "Adam, larger steps that fall, all contexts": (adam, FALLING),
    "Adam, larger steps that fall, one context a step": (adam, {**FALLING, "steps": 21, "contexts_a_step": 1}),
    "Gauss-Newton, all contexts": (newton, {"steps": 12}),
    "L-BFGS, all contexts": (lbfgs, {"steps": 18}),
    "leave by the turn's own loss": (turn_stop, {**FALLING, "contexts_a_step": 2}),
    "warm start by a ridge map": (turn_stop, {**FALLING, "lr": 1.0, "lr_end": 0.1, "steps": 15, "contexts_a_step": 2}),
    "no warm start, as many steps": (turn_stop, {**FALLING, "steps": 15, "contexts_a_step": 2}),
}


def main() -> None:
    """Runs the tries and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="worldfacts", help="fact file")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--tries", nargs="+", choices=list(TRIES), default=list(TRIES))
    parser.add_argument("--known", type=Path, help="values found before, for the warm start")
    parser.add_argument("--no-scores", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="other settings, as name=value")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "values_tries.csv")
    given = parser.parse_args()
    lm = LanguageModel.from_name("smollm2-135m", torch.float32)
    data = EditDataModule(given.path, split="dev", limit=given.facts)
    data.setup()
    data.select(lambda facts: prefers_truth(lm, facts))
    facts, site, contexts = list(data.facts), Site.of(lm, LAYERS[-1]), sample_contexts(lm, ContextSettings())
    for name in given.tries:
        way, changed = TRIES[name]
        changed = changed | {k: eval(v) for k, v in (one.split("=") for one in given.set)}
        settings = replace(ValueSettings(reference="original"), **changed)
        note = ""
        TOKENS[0], begun = 0, time.process_time()
        with counting():
            if way is adam:
                target, steps = adam(lm, facts, site, contexts, settings)
            else:
                more: dict[str, Any] = {}
                if name.startswith("warm"):
                    table = torch.load(given.known, weights_only=False)
                    known = [(fact, row) for (_, _, fact), row in max(table.values(), key=len)]
                    more["starts"], note = ridge_starts(lm, facts, site, known)
                if name.startswith("leave"):
                    more["all_of"] = 1
                target, steps = grouped(
                    lm, facts, site, contexts, settings,
                    lambda parts, s, which, way=way, more=more: way(parts, s, which, **more), 1 if way is lbfgs else 512,
                )  # fmt: skip
        seconds, tokens = time.process_time() - begun, TOKENS[0]
        losses, hits = losses_of(lm, facts, site, contexts, settings, target, together=8)
        row = {
            "file": Path(given.path).name, "split": "dev", "model": "smollm2-135m", "way": name,
            "values": " ".join(f"{k}={v}" for k, v in changed.items()).replace("(", "[").replace(")", "]"),
            "facts": len(facts), "steps": f"{float(steps.double().mean()):.2f}", "tokens": round(tokens / len(facts)),
            "cpu_seconds": f"{seconds / len(facts):.2f}", "loss": f"{float(losses.mean()):.4f}",
            "median_loss": f"{float(losses.median()):.4f}", "hits": f"{float(hits.double().mean()):.3f}",
            **({} if given.no_scores else scores(lm, facts, target, settings)), "note": note,
            "threads": str(torch.get_num_threads()), "date": datetime.date.today().isoformat(),
            **made_here(ROOT, {"path": Path(given.path).name, "facts": given.facts, "way": name, **changed}),
        }  # fmt: skip
        print({k: v for k, v in row.items() if k not in ("model", "split", "machine")}, flush=True)
        earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
        same = [one for one in earlier if (one["file"], one["way"], one["facts"], one.get("values", "")) != (
            row["file"], name, str(len(facts)), row["values"])]  # fmt: skip
        write_rows([*same, row], given.out)


if __name__ == "__main__":
    main()
