"""The closed-form solve of one batch of edits, layer by layer, and its reversal according to the verdict."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.errors import UserError
from editlab.keys.subject_keys import KEY_MODES, CachedKey, Keys, Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import spare_gpu_memory
from editlab.lm.precision import rounding, widened
from editlab.solver.closed_form import diagnostics, effective_weight, solve
from editlab.solver.constraints import Constraints, duplicate_tolerance
from editlab.solver.device import AUTO, choose_device, require_setting
from editlab.solver.methods import Method
from editlab.solver.preservation import Preservation
from editlab.utils.validation import at_least_one, not_negative, one_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SolveSettings:
    """The settings of a solve that do not depend on which layers are edited.

    Raises:
        UserError: A setting is out of range.
    """

    method: Method
    """metric and slack of the closed form"""
    key_mode: str = "bare"
    """how keys are read (:func:`~editlab.keys.subject_keys.read_keys`)"""
    context_key_weight: float = 0.0
    """weight with which the keys of the edited prompts' context tokens enter the metric of their batch; 0: they do
    not"""
    passes: int = 1
    """number of times that a batch goes through the layers, each time for the remaining residual"""
    condition_limit: float = 1e10
    """condition number of the Gram matrix above which the slack is raised"""
    device: str = AUTO
    """device on which the closed form is solved: one with float64, or ``auto`` (:func:`choose_device`)"""

    def __post_init__(self) -> None:
        one_of("model", KEY_MODES, keys=self.key_mode)
        not_negative("model", preserve_prompt_tokens=self.context_key_weight)
        if not self.condition_limit > 1:
            raise UserError(f"model.condition_limit is {self.condition_limit}: a condition number is above 1.")
        at_least_one("model", passes=self.passes)
        require_setting(self.device)


@dataclass
class BatchSolver:
    """Solves batches of edits at some layers of a model and adds the updates to the weights."""

    lm: LanguageModel
    settings: SolveSettings
    site: Site
    """site of the targets, at the highest of the layers"""
    layers: Mapping[int, EditedLayer]
    """layer number -> the edited layer, from the lowest up"""
    contexts: Sequence[str]
    """prefixes in which keys are read, the empty one first"""
    preservation: dict[int, Preservation] = field(default_factory=dict)
    """layer -> its metric; callbacks may replace it between batches (consolidated replay)"""

    @classmethod
    def at(
        cls, lm: LanguageModel, layers: Sequence[int], contexts: Sequence[str], settings: SolveSettings
    ) -> BatchSolver:
        """A solver with layers of its own, whose sums of updates start at zero.

        Args:
            lm: the model.
            layers: numbers of the layers to edit, from the lowest up.
            contexts: prefixes in which keys are read, the empty one first.
            settings: the settings of the solve.
        """
        edited = {layer: EditedLayer.of(lm, layer) for layer in layers}
        return cls(lm, settings, Site.of(lm, layers[-1]), edited, contexts)

    @property
    def device(self) -> torch.device:
        """Device of keys, residuals, metrics and the solve (:func:`choose_device`)."""
        sizes = [self.lm.anatomy.key_size(layer) for layer in self.layers]
        return choose_device(self.settings.device, self.lm.device, sizes, spare_gpu_memory(self.lm.model))

    def set_moments(self, moments: dict[int, Tensor]) -> None:
        """Computes each layer's metric from its second moments C0, float64 [d_k, d_k], and empties the dict.

        Each matrix is freed once its metric is computed: those of an 8B model have 1.6 GB each.
        """
        device = self.device
        for layer in list(moments):
            self.preservation[layer] = self.settings.method.preservation(moments.pop(layer), device)

    def metric_bytes(self, device: torch.device) -> int:
        """Bytes of the metrics that lie on a device."""
        return sum(metric.bytes for metric in self.preservation.values() if metric.device == device)

    def read_keys(self, facts: Sequence[Fact], layer: int) -> Keys:
        """Keys of facts at an edited layer and what the site outputs for them, with the weights as they are."""
        return read_keys(self.lm, facts, layer, self.site, self.contexts, self.settings.key_mode, self.device)

    @torch.no_grad()
    def solve(self, outcome: EditOutcome) -> None:
        """Solves the outcome's plan layer by layer and adds each update before the next layer is solved.

        The residual is spread over the layers from the lowest up (MEMIT, Meng et al. 2023, arXiv:2210.07229, eq. 20).
        Blocks between the layers distort what lower updates contribute, and slack leaves a part of the residual; each
        further pass solves for the remaining residual.

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
        outcome.clear()
        self._solve(outcome)

    def _solve(self, outcome: EditOutcome) -> None:
        system = _System.of(outcome.plan, self.settings.method.slack)
        for _ in range(self.settings.passes):
            for index, (number, layer) in enumerate(self.layers.items()):
                update = self._solve_layer(outcome, system, number, len(self.layers) - index)
                layer.add(update)

    def _read(self, outcome: EditOutcome, system: _System, number: int) -> Keys:
        """The keys to read of a batch at a layer; those that no update has changed since they were read are reused."""
        if outcome.updates:
            return self.read_keys(system.to_read, number)
        if outcome.lowest_keys is None:
            outcome.lowest_keys = self.read_keys(system.to_read, number)
        return outcome.lowest_keys

    def _solve_layer(self, outcome: EditOutcome, system: _System, number: int, layers_left: int) -> Tensor:
        """The update [d_v, d_k] of one layer, which takes its part of the residual; the weights do not change."""
        plan, layer, facts = outcome.plan, self.layers[number], len(outcome.plan.facts)
        keys = self._read(outcome, system, number).plus(system.cached, layer.total)
        if outcome.residual_norm is None:  # later layers and passes see what remains of it
            now = keys.current[:, :facts].T
            outcome.residual_norm = (widened(plan.targets, now.device) - now).norm(dim=1)
        repair = system.repair.to(keys.current)
        residuals = (widened(system.targets.T, keys.current.device) - keys.current) * repair / layers_left
        slack = system.slack[keys.fact.cpu()]
        constraints = Constraints(keys.keys, residuals[:, keys.fact], slack.to(keys.keys), keys.fact >= facts)
        preservation = self.preservation[number]
        if self.settings.context_key_weight:
            preservation = preservation.plus(keys.context_keys, self.settings.context_key_weight)
        same_key = duplicate_tolerance(rounding(self.lm.model.dtype, self.lm.device))
        limit = self.settings.condition_limit
        solution = solve(constraints, preservation, limit, same_key=same_key, firmness=plan.firmness)
        for note in solution.notes:
            log.info("Batch %d, layer %d: %s", plan.step, number, note)
        update = solution.delta.to(layer.total.dtype).to(layer.total.device)  # the device may lack float64
        whole = outcome.updates[number] + update if number in outcome.updates else update
        outcome.keys[number], outcome.updates[number], outcome.last_updates[number] = keys, whole, update
        measured = diagnostics(solution)
        own = slack[keys.fact.cpu() < facts]
        if plan.firmness:
            outcome.firm_slack[number] = measured["firm_slack"] = solution.firm_slack
        measured["effective_weight"] = effective_weight(own + solution.firm_slack, self.settings.method.weight)
        measured["update_norm"] = float(whole.norm() / layer.original.float().norm())
        outcome.diagnostics |= {f"layer_{number}/{name}": value for name, value in measured.items()}
        return update

    def solve_without_dropped(self, outcome: EditOutcome, before: Snapshot) -> None:
        """Solves the batch again without its dropped facts, on the weights of ``before``."""
        before.restore_weights()
        outcome.remove_dropped()
        self.solve(outcome)

    def apply_verdict(self, outcome: EditOutcome, before: Snapshot) -> None:
        """Keeps the batch, scales it, or rolls it back, as the outcome's factor says.

        A rollback leaves no bit of the batch in the weights or the random generators.
        """
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


@dataclass(frozen=True)
class _System:
    """A plan's facts and additions in the order of the solve: facts, additions to read, additions with cached keys."""

    to_read: list[Fact]
    """facts whose keys have to be read in a forward pass"""
    cached: list[CachedKey]
    """keys of the additions that follow them"""
    targets: Tensor
    """target of each fact and addition, [n, d_v]"""
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
            torch.cat([plan.targets, *(a.target[None].to(plan.targets) for a in additions)]),
            torch.tensor([slack] * len(plan.facts) + [1 / a.weight for a in additions], dtype=torch.float64),
            torch.tensor([1.0] * len(plan.facts) + [a.repair for a in additions], dtype=torch.float64),
        )
