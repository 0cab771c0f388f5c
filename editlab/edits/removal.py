r"""Taking single facts out of edited weights, while the other edits are held.

Let ``W + T`` be an edited weight, with T the sum of its updates, and k the key of a fact to take out. The update of its
removal is the closed form of :mod:`editlab.solver.closed_form` with the residual ``-T k`` and no slack, so that the
layer outputs ``W k`` there, exactly what the original layer outputs::

    minimize tr(delta C delta^T) + w sum_j ||delta k_j||^2   subject to   delta k = -T k

The same holds at the context tokens of the fact's prompt, where other edits have left their traces: with the original
outputs at the subject alone, the model would answer from a prompt whose other tokens it still reads differently.

C is the metric of the run's method, and the k_j are the keys of all other facts that the weights hold, and of those
that were taken out before. It is the memory of :mod:`callbacks.replay.past_keys`, computed again from the facts. Layers
are solved from the lowest up, with keys read after the layers below have changed, so that at these tokens every edited
layer gives back its original output.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.keys.subject_keys import Keys, Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import spare_gpu_memory
from editlab.lm.precision import rounding, widened
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints, duplicate_tolerance
from editlab.solver.device import AUTO, choose_device
from editlab.solver.preservation import Preservation
from editlab.utils.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemovalSettings:
    """The settings of a removal."""

    hold: float = 1.0
    """w, the weight in the metric of each key of the facts that are held"""
    context_key_weight: float = 0.0
    """weight of the keys of their prompts' context tokens"""
    condition_limit: float = 1e10
    """condition number of the system above which its slack is raised"""
    device: str = AUTO
    """device of the solve"""

    def device_of(self, lm: LanguageModel, layers: Sequence[int]) -> torch.device:
        """The device of keys, metrics and the solve (:func:`~editlab.solver.device.choose_device`)."""
        shapes = [lm.anatomy.moments_shape(layer) for layer in layers]
        return choose_device(self.device, lm.device, shapes, spare_gpu_memory(lm.model))


@torch.no_grad()
def take_out(
    lm: LanguageModel,
    layers: Mapping[int, EditedLayer],
    facts: Sequence[Fact],
    held: Sequence[Fact],
    metrics: Mapping[int, Preservation],
    settings: RemovalSettings,
    gone: Sequence[Fact] = (),
) -> dict[int, Tensor]:
    """Takes facts out of the edited layers together; their weights change.

    Args:
        lm: the edited model.
        layers: number of each edited layer -> the layer, from the lowest up.
        facts: the facts to take out.
        held: the other facts that the weights hold, whose outputs should stay.
        metrics: layer -> the metric of the run's method, without memory.
        settings: the settings.
        gone: facts that were taken out before, whose outputs should stay the original ones.

    Returns:
        Layer -> the update that was added to it, float32 [d_v, d_k].

    Raises:
        UserError: A held fact has the same key as one to take out, so that no update can tell the two apart; or the
            edited layers are mixtures of experts.
    """
    if not facts:
        raise ValueError("there is no fact to take out")
    lm.anatomy.require_one_map("Taking single facts out")
    device = settings.device_of(lm, list(layers))
    updates: dict[int, Tensor] = {}
    for number, layer in progress(list(layers.items()), desc="Taking facts out", unit="layer"):
        keys = _read(lm, facts, number, device)
        metric, others = metrics[number], None
        if held or gone:
            others = _read(lm, [*held, *gone], number, device)
            if not updates:
                _require_distinct(lm, facts, keys.keys, held, others.keys[:, : len(held)])
            metric = metric.plus(others.keys, settings.hold)
            of_held = others.context_fact < len(held)
            metric = metric.plus(others.context_keys[:, ~of_held], settings.hold)
            if settings.context_key_weight:
                metric = metric.plus(others.context_keys[:, of_held], settings.context_key_weight)
        wanted = torch.cat([keys.keys, _unlike(lm, keys.context_keys, others.keys if others else None)], 1)
        residuals = -widened(layer.total, device) @ wanted
        optional = torch.arange(wanted.shape[1], device=wanted.device) >= len(facts)
        constraints = Constraints(wanted, residuals, wanted.new_zeros(wanted.shape[1]), optional)
        solution = solve(constraints, metric, settings.condition_limit, _same_key(lm))
        for note in solution.notes:
            log.info("Layer %d: %s", number, note)
        updates[number] = solution.delta.to(layer.total)
        layer.add(updates[number])
    return updates


def _read(lm: LanguageModel, facts: Sequence[Fact], layer: int, device: torch.device) -> Keys:
    site = Site(layer, False, lm.anatomy.edit_module(layer))
    return read_keys(lm, facts, layer, site, [""], "bare", device)


def _same_key(lm: LanguageModel) -> float:
    return duplicate_tolerance(rounding(lm.model.dtype, lm.device))


def _unlike(lm: LanguageModel, context: Tensor, others: Tensor | None) -> Tensor:
    """The context keys [d_k, m] that are no held fact's own key, as the subject of one may be part of a prompt."""
    if others is None or not context.shape[1]:
        return context
    near = torch.cdist(context.T, others.T) <= _same_key(lm) * context.norm(dim=0)[:, None]
    return context[:, ~near.any(1)]


def _require_distinct(
    lm: LanguageModel, facts: Sequence[Fact], keys: Tensor, held: Sequence[Fact], others: Tensor
) -> None:
    """Make sure that no held fact has the key of a fact to take out: keys are [d_k, n] and [d_k, m]."""
    for fact, key in zip(facts, keys.T, strict=True):
        near = (others - key[:, None]).norm(dim=0) <= _same_key(lm) * key.norm()
        if bool(near.any()):
            other = held[int(near.int().argmax())]
            raise UserError(
                f"{fact.subject}|{fact.prompt} cannot be taken out alone, because {other.subject}|{other.prompt} has "
                "the same key (their prompts agree up to the subject): name both in --facts."
            )
