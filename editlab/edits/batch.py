"""The closed-form solve of one batch of edits, layer by layer, and its reversal according to the verdict."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.edits.carried import Carried
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.keys.moments import MomentSettings, second_moments
from editlab.keys.subject_keys import CachedKey, Keys, Site, read_keys, read_outputs
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import spare_gpu_memory
from editlab.lm.precision import rounding, widened
from editlab.solver.bare_denominator import exact_at
from editlab.solver.closed_form import Solution, diagnostics, effective_weight, solve
from editlab.solver.compensation import solve_from
from editlab.solver.constraints import Constraints, duplicate_tolerance
from editlab.solver.device import choose_device
from editlab.solver.methods import Method
from editlab.solver.post_steps import EditedWeight, apply_all
from editlab.solver.preservation import Preservation
from editlab.values.spread import RESIDUAL, distinct, sites_of

log = logging.getLogger(__name__)


@dataclass
class BatchSolver:
    """Solves batches of edits at some layers of a model and adds the updates to the weights."""

    lm: LanguageModel
    settings: SolveSettings
    sites: Mapping[int, Site]
    """layer number -> the site whose target the layer works towards (:func:`~editlab.values.spread.sites_of`)"""
    layers: Mapping[int, EditedLayer]
    """layer number -> the edited layer, from the lowest up"""
    contexts: Sequence[str]
    """prefixes in which keys are read, the empty one first"""
    preservation: dict[int, Preservation] = field(default_factory=dict)
    """layer -> its metric; callbacks may replace it between batches (consolidated replay)"""
    carried: Carried = field(default_factory=Carried)
    """what was cut off from earlier updates and takes part in the next solve"""
    moments: dict[int, Tensor] = field(default_factory=dict)
    """layer -> C0, kept for methods alone whose metric is computed again after some edits"""
    _computed: dict[int, dict[str, Any]] = field(default_factory=dict)
    """layer -> what its post-steps have computed from the original weight"""

    @classmethod
    def at(
        cls,
        lm: LanguageModel,
        layers: Sequence[int],
        contexts: Sequence[str],
        settings: SolveSettings,
        spread: str = RESIDUAL,
    ) -> BatchSolver:
        """A solver with layers of its own, whose sums of updates start at zero.

        Args:
            lm: the model.
            layers: numbers of the layers to edit, from the lowest up.
            contexts: prefixes in which keys are read, the empty one first.
            settings: the settings of the solve.
            spread: how the layers share the work (:data:`~editlab.values.spread.SPREADS`).
        """
        edited = {layer: EditedLayer.of(lm, layer) for layer in layers}
        return cls(lm, settings, sites_of(lm, layers, spread, settings.site), edited, contexts)

    @property
    def method(self) -> Method:
        """The method of the closed form."""
        method = self.settings.method
        assert isinstance(method, Method)
        return method

    @property
    def device(self) -> torch.device:
        """Device of keys, residuals, metrics and the solve (:func:`choose_device`)."""
        shapes = [self.lm.anatomy.moments_shape(layer) for layer in self.layers]
        return choose_device(self.settings.device, self.lm.device, shapes, spare_gpu_memory(self.lm.model))

    def set_moments(self, moments: dict[int, Tensor]) -> None:
        """Computes each layer's metric from its second moments C0, and empties the dict.

        Each matrix is freed once its metric is computed: those of an 8B model have 1.6 GB each.
        """
        device = self.device
        for layer in list(moments):
            c0 = moments.pop(layer)
            self.preservation[layer] = self.method.preservation(c0, device)
            if self.method.edits_between_refreshes:
                self.moments[layer] = c0

    def refreshed_metric(self, layer: int, past: Tensor, edits: int) -> Preservation:
        """The metric of a layer as it has to be after some edits (:meth:`~editlab.solver.methods.Method.refreshed`)."""
        return self.method.refreshed(self.moments[layer], past, edits, self.device)

    def read_moments(self, settings: MomentSettings, name: str) -> None:
        """Computes each layer's metric from the second moments of the weights as they are, which are the unedited ones.

        Methods whose metric does not depend on them get tensors without data.

        Args:
            settings: the text and its size.
            name: name of the model, for messages and the cache folder.
        """
        if self.method.needs_moments:
            self.set_moments(second_moments(self.lm, list(self.layers), settings, name, self.device))
            return
        shapes = {layer: self.lm.anatomy.moments_shape(layer) for layer in self.layers}
        self.set_moments({layer: torch.empty(shape, device="meta") for layer, shape in shapes.items()})

    def metric_bytes(self, device: torch.device) -> int:
        """Bytes of the metrics that lie on a device."""
        return sum(metric.bytes for metric in self.preservation.values() if metric.device == device)

    def read_keys(self, facts: Sequence[Fact], layer: int) -> Keys:
        """Keys of facts at an edited layer and what its site outputs for them, with the weights as they are."""
        return read_keys(self.lm, facts, layer, self.sites[layer], self.contexts, self.settings.key_mode, self.device)

    def read_outputs(self, facts: Sequence[Fact]) -> Tensor:
        """What the sites output for facts, with the weights as they are, float64 [n, sites, d_v]."""
        return read_outputs(self.lm, facts, distinct(self.sites), self.device)

    @torch.no_grad()
    def solve(self, outcome: EditOutcome) -> None:
        """Solves the outcome's plan layer by layer and adds each update before the next layer is solved.

        The residual at a site is spread over the layers that work towards it, from the lowest up (MEMIT, Meng et al.
        2023, arXiv:2210.07229, eq. 20); with a site for each layer, each removes the whole residual at its own. Keys
        and residuals of a layer are read with the updates of the layers below. Blocks between the layers distort what
        lower updates contribute, and slack leaves a part of the residual; each further pass solves for the remaining
        residual.

        Args:
            outcome: its plan is solved; it gets the updates of all passes, and keys and diagnostics of the last pass.
        """
        outcome.lowest_keys = None
        self._solve(outcome)

    @torch.no_grad()
    def solve_again(self, outcome: EditOutcome, before: Snapshot, firmness: float) -> None:
        """Solves the batch again with another firmness, on the weights of ``before``.

        The keys of the lowest layer are those that the solve before has read. Keys of the layers above depend on the
        updates below them and are read again, so the result is, to the bit, that of a plan with this firmness.

        Args:
            outcome: a batch that was solved on the weights of ``before``; its results are replaced.
            before: the state before the batch.
            firmness: how much the update is held back; 0: not at all.
        """
        before.restore_weights()
        outcome.plan.firmness = firmness
        outcome.plan.targets = outcome.plan.targets.unsolved()
        outcome.clear()
        self._solve(outcome)

    def _solve(self, outcome: EditOutcome) -> None:
        system = _System.of(outcome.plan, self.method.slack)
        for index in range(self.settings.passes):
            carried = self.carried.parts if index == 0 else {}
            for number, layer in self.layers.items():
                layer.add(self._solve_layer(outcome, system, number, carried.get(number)))

    def _read(self, outcome: EditOutcome, system: _System, number: int) -> Keys:
        """The keys to read of a batch at a layer; those that no update has changed since they were read are reused."""
        if outcome.updates:
            return self.read_keys(system.to_read, number)
        if outcome.lowest_keys is None:
            outcome.lowest_keys = self.read_keys(system.to_read, number)
        return outcome.lowest_keys

    def _solve_layer(self, outcome: EditOutcome, system: _System, number: int, carried: Tensor | None) -> Tensor:
        """The update [d_v, d_k] of one layer, which takes its part of the residual; the weights do not change."""
        plan, layer, facts = outcome.plan, self.layers[number], len(outcome.plan.facts)
        site = self.sites[number].layer
        layers_left = sum(other >= number and self.sites[other].layer == site for other in self.layers)
        targets = system.targets(plan, site)
        keys = self._read(outcome, system, number).plus(system.cached, layer.total)
        if outcome.residual_norm is None:  # later layers and passes see what remains of it
            now = keys.current[:, :facts].T
            outcome.residual_norm = (widened(targets[:facts], now.device) - now).norm(dim=1)
        repair = system.repair.to(keys.current)
        residuals = (widened(targets.T, keys.current.device) - keys.current) * repair / layers_left
        slack = system.slack[keys.fact.cpu()]
        constraints = Constraints(keys.keys, residuals[:, keys.fact], slack.to(keys.keys), keys.fact >= facts)
        solution = self._solution(constraints, number, keys, carried, plan.firmness)
        for note in solution.notes:
            log.info("Batch %d, layer %d: %s", plan.step, number, note)
        delta, cut = self._after_post_steps(solution.delta, number)
        update = delta.to(layer.total.dtype).to(layer.total.device)  # the device may lack float64
        whole = outcome.updates[number] + update if number in outcome.updates else update
        outcome.keys[number], outcome.updates[number], outcome.last_updates[number] = keys, whole, update
        measured = diagnostics(solution)
        own = slack[keys.fact.cpu() < facts]
        if plan.firmness:
            outcome.firm_slack[number] = measured["firm_slack"] = solution.firm_slack
        measured["effective_weight"] = effective_weight(own + solution.firm_slack, self.method.weight)
        measured["update_norm"] = float(whole.norm() / layer.original.float().norm())
        if cut is not None:
            outcome.cut[number] = cut.to(layer.total.dtype)
            measured["cut_off"] = float(cut.norm() / solution.delta.norm().clamp_min(1e-300))
        outcome.diagnostics |= {f"layer_{number}/{name}": value for name, value in measured.items()}
        return update

    def _solution(
        self, constraints: Constraints, number: int, keys: Keys, carried: Tensor | None, firmness: float
    ) -> Solution:
        """The solution of a layer's system, which starts from what was cut off from earlier updates."""
        metric, weight = self.preservation[number], self.settings.context_key_weight
        limit = self.settings.condition_limit
        same_key = duplicate_tolerance(rounding(self.lm.model.dtype, self.lm.device))
        if self.settings.bare_denominator:
            _require_one_constraint(constraints, carried)
        if carried is not None:
            return solve_from(carried, constraints, metric, limit, same_key, firmness, keys.context_keys, weight)
        if weight:
            metric = metric.plus(keys.context_keys, weight)
        solution = solve(constraints, metric, limit, same_key, firmness)
        if self.settings.bare_denominator and keys.bare is not None:
            solution = exact_at(solution, keys.bare[:, 0], constraints.residuals[:, 0] / (1 + firmness))
        return solution

    def _after_post_steps(self, solved: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """The update to apply for a solved one, and what was cut off; None without post-steps."""
        if not self.settings.post_steps:
            return solved, None
        layer = self.layers[number]
        original, total = (widened(matrix, solved.device) for matrix in (layer.original_matrix, layer.total))
        weight = EditedWeight(original, total, self._computed.setdefault(number, {}))
        applied = apply_all(self.settings.post_steps, solved, weight)
        return applied, solved - applied

    def solve_without_dropped(self, outcome: EditOutcome, before: Snapshot) -> None:
        """Solves the batch again without its dropped facts, on the weights of ``before``."""
        before.restore_weights()
        outcome.remove_dropped()
        self.solve(outcome)

    def apply_verdict(self, outcome: EditOutcome, before: Snapshot) -> None:
        """Keeps the batch, scales it, or rolls it back, as the outcome's factor says.

        A rollback leaves no bit of the batch in the weights or the random generators.
        """
        if self.settings.compensate:
            self.carried.settle(outcome)
        if outcome.factor == 1 and not outcome.dropped:
            return
        what = f"kept without {len(outcome.dropped)} of its facts"
        if not outcome.kept:
            before.restore()
            what = "rolled back"
        elif outcome.factor < 1:
            before.restore_weights()
            for number, layer in self.layers.items():
                layer.add(outcome.factor * outcome.updates[number])
            what = f"scaled by {outcome.factor:.3g}"
        log.info("Batch %d %s: %s", outcome.plan.step, what, "; ".join(outcome.reasons))


def _require_one_constraint(constraints: Constraints, carried: Tensor | None) -> None:
    """Makes sure that a solve has the one constraint of ROME's published form, and nothing else.

    Raises:
        UserError: A callback added others, or something is carried.
    """
    if len(constraints) > 1:
        raise UserError(
            "With ROME's published conventions a solve has one constraint, and a callback added others: set "
            "memory: consolidated for MemoryReplay, or model.conventions to own."
        )
    if carried is not None:
        raise UserError(
            "With ROME's published conventions nothing can be carried into a solve: set model.compensate to false, "
            "or model.conventions to own."
        )


@dataclass(frozen=True)
class _System:
    """A plan's facts and additions in the order of the solve: facts, additions to read, additions with cached keys."""

    to_read: list[Fact]
    """facts whose keys have to be read in a forward pass"""
    cached: list[CachedKey]
    """keys of the additions that follow them"""
    additions: list[Addition]
    """the additions in their order"""
    slack: Tensor
    """slack of each, float64 [n]"""
    repair: Tensor
    """float64 [n]: fraction of each residual to remove"""

    @classmethod
    def of(cls, plan: EditPlan, slack: float) -> _System:
        """The system of a plan whose own facts have this slack."""
        additions = sorted(plan.additions, key=lambda a: a.cached_key is not None)
        return cls(
            [*plan.facts, *(a.fact for a in additions if a.cached_key is None)],
            [a.cached_key for a in additions if a.cached_key is not None],
            additions,
            torch.tensor([slack] * len(plan.facts) + [1 / a.weight for a in additions], dtype=torch.float64),
            torch.tensor([1.0] * len(plan.facts) + [a.repair for a in additions], dtype=torch.float64),
        )

    def targets(self, plan: EditPlan, layer: int) -> Tensor:
        """Target of each fact and addition at the site of a layer, [n, d_v]."""
        own, sites = plan.targets.at(layer), plan.targets.layers
        each = [a.target.view(-1, own.shape[1]).to(own) for a in self.additions]
        wrong = next((len(rows) for rows in each if len(rows) != len(sites)), None)
        if wrong is not None:
            raise ValueError(f"an addition has targets for {wrong} sites: the layers work towards {len(sites)}")
        return torch.cat([own, *(rows[sites.index(layer), None] for rows in each)])
