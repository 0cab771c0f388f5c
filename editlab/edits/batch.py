"""One batch of edits on its way through the closed form: solved layer by layer, then carried out as the verdict is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome
from editlab.lm.precision import rounding
from editlab.solver.closed_form import Constraints, diagnostics, duplicate_tolerance, effective_weight, solve
from editlab.utils.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from editlab.editor import SequentialEditor

log = logging.getLogger(__name__)


class StepState:
    """What a step may change of the weights and the random generators, as it was before.

    Args:
        layers: the edited layers.
    """

    def __init__(self, layers: Sequence[EditedLayer]) -> None:
        self.layers = layers
        self.totals = [layer.total.clone() for layer in layers]
        self.adapters = [layer.adapter for layer in layers]  # they are exchanged, never written into
        self.rng = rng_state()

    def restore_weights(self) -> None:
        """The weights as they were, bit for bit."""
        for layer, total, adapter in zip(self.layers, self.totals, self.adapters, strict=True):
            layer.adapter = adapter
            layer.restore(total)

    def restore(self) -> None:
        """Weights and random generators as they were, bit for bit."""
        self.restore_weights()
        set_rng_state(self.rng)


def solve_batch(editor: SequentialEditor, outcome: EditOutcome) -> Iterator[tuple[EditedLayer, Tensor]]:
    """Each layer's update, solved against the weights below it as already edited; add it before the next is asked for.

    Residuals are spread over the layers from the lowest up, MEMIT's way (Meng et al. 2023, arXiv:2210.07229, eq. 20).
    Blocks between the layers bend what lower ones add, and slack leaves a part undone; each of the editor's ``passes``
    after the first asks for what is left.

    Args:
        editor: whose method, metrics and weights are used.
        outcome: its plan is solved; keys and diagnostics of the last pass and updates of all are put into it.

    Yields:
        The layer and its update in this pass, float32 [d_v, d_k].
    """
    plan, device = outcome.plan, editor.solver_device
    additions = sorted(plan.additions, key=lambda a: a.known is not None)  # those to be read stand first
    read = [*plan.facts, *(a.fact for a in additions if a.known is None)]
    known = [a.known for a in additions if a.known is not None]
    targets = torch.cat([plan.targets, *(a.target[None].to(plan.targets) for a in additions)])
    slack = torch.tensor(
        [editor.method.slack] * len(plan.facts) + [1 / a.weight for a in additions], dtype=torch.float64
    )
    same_key = duplicate_tolerance(rounding(editor.lm.model.dtype, editor.lm.device))
    asked = torch.tensor([1.0] * len(plan.facts) + [a.repair for a in additions], dtype=torch.float64, device=device)
    for place, layer in editor.passes * list(enumerate(editor.layer_numbers)):
        edited = editor.layers[place]
        keys = editor.read_keys(read, layer).plus(known, edited.total)
        if outcome.missing is None:  # later layers and passes see what is left of it
            now = keys.current[:, : len(plan.facts)].T
            outcome.missing = (plan.targets.to(now) - now).norm(dim=1)
        share = len(editor.layer_numbers) - place
        residuals = (targets.double().T.to(keys.current) - keys.current) * asked.to(keys.current) / share
        each = slack[keys.fact.cpu()]
        constraints = Constraints(
            keys.keys.to(device),
            residuals[:, keys.fact].to(device),
            each.to(device),
            (keys.fact >= len(plan.facts)).to(device),
        )
        preservation = editor.preservation[layer]
        if editor.preserve_prompt_tokens:
            preservation = preservation.plus(keys.others.to(device), editor.preserve_prompt_tokens)
        solution = solve(constraints, preservation, editor.condition_limit, same_key=same_key)
        for note in solution.notes:
            log.info("Batch %d, layer %d: %s", plan.step, layer, note)
        outcome.keys[layer] = keys
        update = solution.delta.to(edited.total.dtype).to(edited.total.device)
        whole = outcome.updates[layer] + update if layer in outcome.updates else update
        outcome.updates[layer], outcome.last_updates[layer] = whole, update
        measured = diagnostics(solution)
        own = each[keys.fact.cpu() < len(plan.facts)]
        measured["effective_weight"] = effective_weight(own, editor.method.weight)
        measured["update_norm"] = float(whole.norm() / edited.original.float().norm())
        outcome.diagnostics |= {f"layer_{layer}/{name}": value for name, value in measured.items()}
        yield edited, update


def solve_again(editor: SequentialEditor, outcome: EditOutcome, before: StepState) -> None:
    """The batch without the facts that were left out, on the weights of before."""
    before.restore_weights()
    outcome.drop_left_out()
    for layer, update in solve_batch(editor, outcome):
        layer.add(update)


def carry_out(editor: SequentialEditor, outcome: EditOutcome, before: StepState) -> None:
    """What the callbacks made of a batch: kept, scaled down, or taken back without a bit left in weights and draws."""
    if outcome.factor == 1 and not outcome.left_out:
        return
    what = f"kept without {len(outcome.left_out)} of its facts"
    if not outcome.kept:
        before.restore()
        what = "rolled back"
    elif outcome.factor < 1:
        before.restore_weights()
        for number, layer in zip(editor.layer_numbers, editor.layers, strict=True):
            layer.add(outcome.factor * outcome.updates[number])
        what = f"scaled by {outcome.factor:.3g}"
    log.info("Batch %d %s: %s", outcome.plan.step, what, "; ".join(outcome.reasons))
