"""Memory replay: earlier edits take part in later solves, as sampled constraints or as past keys in the metric."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.replay.buffer import Memory, ReplayBuffer
from callbacks.replay.past_keys import PastKeys, Released
from callbacks.replay.refresh import Refresh
from callbacks.replay.requirements import require_settings
from callbacks.replay.trained import add_facts
from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.subject_keys import CachedKey
from editlab.lm.precision import widened
from editlab.solver.methods import Method
from editlab.solver.preservation import Preservation
from editlab.utils.validation import above_zero, decays, fractions, one_of
from editlab.values.sources import NOT_AGAIN

log = logging.getLogger(__name__)

FORGOTTEN = 1e-6
"""Smallest factor of age at which a memory counts: a weaker constraint changes nothing and spoils the condition."""

KINDS = ("sampled", "consolidated", "both")
REFRESH = ("none", "values")


class MemoryReplay(EditCallback):
    """Makes later batches preserve, or repair, earlier edits. Only edits that were kept are remembered.

    ``sampled`` adds earlier edits to each batch's constraints. Their residuals are computed with the current weights,
    so an edit that has not drifted adds no change. ``consolidated`` adds the keys of all past edits (and their context
    keys, if ``model.preserve_prompt_tokens`` is set) to each layer's metric: all of history at constant memory, which
    for one layer with soft constraints is the same as one joint batch. Where only a fraction of a batch stays in the
    weights, the rest is carried into the next solve (``model.compensate``).

    Args:
        rate: number of replayed facts as a fraction of the batch (0.3 of a batch of 32 is 10).
        capacity: largest number of edits in the buffer.
        weight: weight of a replayed constraint, whose slack is 1 / weight; ``.inf`` makes it an equality.
        repair: fraction of a replayed fact's residual to remove; 0 only keeps its output where it is, which changes
            the weights less.
        age_decay: factor on the weight for each batch since the edit was made; 1 keeps the weight.
        sampling: ``random``, ``recent``, ``oldest``, ``priority`` (by drift from the value) or ``loss`` (the least
            likely targets).
        eviction: which edit a full buffer drops: ``fifo``, ``lru`` (the longest not replayed), ``reservoir`` (all of
            history equally likely to be in the buffer) or ``least_important``.
        refresh_every: number of batches between two measurements of loss, or of drift if that takes a forward pass.
        refresh: ``values`` recomputes the values of replayed facts on the current weights; ``none`` keeps them.
        cache_keys: use the keys from the time of the edit; exact only if nothing below the layer changes.
        memory: ``sampled``, ``consolidated`` or ``both``; with methods that train ``sampled``: further facts to train.
        past_weight: weight of each past key in the metric; default: 1 / slack of the method (1 if that is 0).
        forget: factor on the past keys in the metric after each batch, 0 to 1; 1 forgets nothing.
        seed: seed of sampling and eviction.

    Raises:
        UserError: A setting is out of range, or a name is unknown.
    """

    priority = 40

    def __init__(
        self,
        rate: float = 0.3,
        capacity: int = 200,
        weight: float = 1.0,
        repair: float = 1.0,
        age_decay: float = 1.0,
        sampling: str = "random",
        eviction: str = "fifo",
        refresh_every: int = 4,
        refresh: str = "none",
        cache_keys: bool = False,
        memory: str = "sampled",
        past_weight: float | None = None,
        forget: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= rate < math.inf:
            raise UserError(f"MemoryReplay.rate is {rate}: it must be a finite number and not negative.")
        where = "MemoryReplay"
        above_zero(where, weight=None if weight == math.inf else weight, refresh_every=refresh_every)
        decays(where, age_decay=age_decay)
        fractions(where, repair=repair)
        one_of(where, KINDS, memory=memory)
        one_of(where, REFRESH, refresh=refresh)
        self.rate = rate
        self.weight = weight
        self.repair = repair
        self.age_decay = age_decay
        self.refresh_every = refresh_every
        self.refresh = refresh
        self.cache_keys = cache_keys
        self.samples = memory != "consolidated"
        self.consolidates = memory != "sampled"
        self.past_weight = past_weight
        self.past = PastKeys(1.0 if past_weight is None else past_weight, forget)
        self.keeps_past_keys = self.consolidates
        self.refreshed = Refresh()
        self.buffer = ReplayBuffer(capacity, sampling, eviction, seed)
        self._bare_metric: dict[int, Preservation] = {}
        self._before: tuple[dict[str, Any], dict[int, Tensor]] = ({}, {})
        self._released: dict[int, Released] = {}
        self._fractions: dict[int, dict[int, float]] = {}  # number of a firm batch -> layer -> PastKeys.fraction
        self._initial_state = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the settings against the editor's, and logs how large the memory may grow."""
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        self.require_settings(editor)
        self.reset_for_new_run(editor, self._initial_state)
        if self.samples and self.rate and not self._replayed(size := trainer.datamodule.batch_size):  # type: ignore[attr-defined]
            log.warning("MemoryReplay.rate %g of a batch of %d rounds to no fact, so nothing is replayed: set it to %g "
                        "or more.", self.rate, size, 0.5 / size)  # fmt: skip
        if self.samples and editor.method.solves:
            anatomy, top = editor.lm.anatomy, editor.layer_numbers[-1]
            numbers = anatomy.key_size(top) + (1 + len(editor.sites)) * anatomy.value_size(top)
            log.info("Replay buffer: at most %d edits in %.1f MiB", self.buffer.capacity,
                     self.buffer.capacity * numbers * 4 / 2**20)  # fmt: skip

    def require_settings(self, editor: SequentialEditor) -> None:
        """Checks the settings against the editor's (:func:`~callbacks.replay.requirements.require_settings`)."""
        require_settings(editor, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Past keys of a resumed run enter the metric."""
        assert isinstance(pl_module, SequentialEditor)
        if self.refresh == "values" and not pl_module.targets.source.repeatable:
            raise UserError(NOT_AGAIN)
        self._bare_metric = {**pl_module.solver.preservation, **self.refreshed.metrics(pl_module)}
        if self.past_weight is None and isinstance(pl_module.method, Method):
            self.past.weight = 1 / pl_module.method.slack if pl_module.method.slack else 1.0
        self._set_metric(pl_module)

    def _set_metric(self, editor: SequentialEditor) -> None:
        for layer, moments in self.past.moments.items():
            bare = self._bare_metric[layer]
            editor.solver.preservation[layer] = bare.plus_moments(moments.to(bare.factor))

    # ---- the events of an edit --------------------------------------------------------------------------------

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Adds sampled memories to the batch; past keys of facts that are edited again leave the metric."""
        self._before = self.buffer.state_dict(), dict(self.past.moments)
        if self.consolidates:
            self._release(editor, plan)
        if not self.samples:
            return
        self._weigh(editor, plan.step)
        count = self._replayed(len(plan.facts))
        memories = [
            m for m in self.buffer.sample(count, exclude=plan.facts, step=plan.step) if self._weight(m, plan.step)
        ]
        if self.refresh == "values" and memories:
            for memory, value in zip(memories, editor.targets.find_now([m.fact for m in memories]), strict=True):
                memory.value = value.clone()
        plan.add([self._addition(memory, plan.step) for memory in memories])

    def _replayed(self, facts: int) -> int:
        """Number of memories that join a batch of so many facts."""
        return math.floor(self.rate * facts + 0.5)

    def _addition(self, memory: Memory, step: int) -> Addition:
        cached = CachedKey(memory.key, memory.origin, memory.context_keys) if self.cache_keys else None
        return Addition(memory.fact, memory.value, self._weight(memory, step), self.repair, cached)

    def _weight(self, memory: Memory, step: int) -> float:
        """Weight of a memory's constraint; 0 if it has decayed to less than :data:`FORGOTTEN` of its first weight."""
        decay = self.age_decay ** (step - memory.step)
        return self.weight * decay if decay > FORGOTTEN else 0.0

    def _release(self, editor: SequentialEditor, plan: EditPlan) -> None:
        """Removes past keys of facts that this batch edits again: the metric would preserve the old edits."""
        batches = {entry.fact.slot: entry.batch for entry in editor.ledger if entry.kept}
        indices = [index for index, fact in enumerate(plan.facts) if fact.slot in batches]
        self._released = {}
        if not indices:
            return
        again = [plan.facts[index] for index in indices]
        kept = {entry.batch for entry in editor.ledger if entry.kept}  # the past keys decay once for each of these
        ages = torch.tensor([sum(later > batches[fact.slot] for later in kept) for fact in again])
        for layer in editor.layer_numbers:
            keys = editor.solver.read_keys(again, layer)
            which = keys.fact.cpu()
            of_batch = [self._fractions.get(batches[fact.slot], {}).get(layer, 1.0) for fact in again]
            fractions = torch.tensor(of_batch, dtype=torch.float64)[which]
            self._released[layer] = Released(keys.keys, ages[which], torch.tensor(indices)[which], fractions)
        self._remove_released(())
        self._set_metric(editor)

    def _remove_released(self, dropped: Collection[int]) -> None:
        """Removes the released keys from the past as before the batch; those of facts dropped from it stay."""
        self.past.moments = dict(self._before[1])
        for layer, released in self._released.items():
            edited = torch.tensor([int(index) not in dropped for index in released.indices])
            keys = released.keys[:, edited.to(released.keys.device)]
            self.past.remove(layer, keys, released.ages[edited], released.fractions[edited].tolist())

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Remembers the batch if it was kept; otherwise restores the state from before the batch was planned."""
        if not outcome.kept:
            buffer, self.past.moments = self._before
            self.buffer.load_state_dict(buffer)
            if self.consolidates:
                self._set_metric(editor)
        if outcome.kept and self.samples:
            self._remember(editor, outcome)
        if outcome.kept and self.consolidates:
            if outcome.dropped and self._released:
                self._remove_released(outcome.dropped)  # facts not edited again are preserved as before
            count = len(outcome.plan.facts)
            for layer, keys in outcome.keys.items():
                own = keys.keys[:, keys.fact < count], keys.context_keys[:, keys.context_fact < count]
                fraction = self.past.fraction(outcome.firm_slack.get(layer, 0.0))
                if fraction < 1:
                    self._fractions.setdefault(outcome.plan.step, {})[layer] = fraction
                self.past.add(layer, *own, editor.solve_settings.context_key_weight, fraction)
            if outcome.factor < 1 and editor.solve_settings.compensate:
                editor.solver.carried.complete(outcome)
            if self.refreshed.due(editor):
                self.refreshed.take(editor, self.past.moments)
                self._bare_metric |= self.refreshed.metrics(editor)
            self._set_metric(editor)
        if self.samples:
            outcome.measured["replay/buffer"] = float(len(self.buffer))
            outcome.measured["replay/replaced"] = float(self.buffer.replaced)

    def _remember(self, editor: SequentialEditor, outcome: EditOutcome) -> None:
        plan, top = outcome.plan, editor.layer_numbers[-1]
        if not editor.method.solves:
            add_facts(self.buffer, plan.facts, plan.step)
            return
        keys = outcome.keys[top]
        count = len(plan.facts)
        device = keys.keys.device
        whole, last = (widened(updates[top], device) for updates in (outcome.updates, outcome.last_updates))
        # The sum when the keys were read: with the passes before the last one, none of which was scaled yet.
        before = widened(editor.layers[-1].total, device) + (1 - outcome.factor) * whole - last
        bare = keys.keys[:, :count]
        origins = keys.current[:, :count] - before @ bare
        values = plan.targets.stacked()
        for i, fact in enumerate(plan.facts):
            tensors = (values[i], bare[:, i], origins[:, i])
            value, key, origin = (t.float().cpu().clone() for t in tensors)
            context = None
            if self.cache_keys and editor.solve_settings.context_key_weight:
                context = keys.context_keys[:, keys.context_fact == i].T.float().cpu().contiguous()
            self.buffer.add(Memory(fact, value, key, origin, plan.step, context_keys=context))

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """After an adjustment, updates the memories to the adjusted model, so that replay does not undo it."""
        before, memories = outcome.before_adjustment, self.buffer.memories
        if before is None or not memories or not editor.method.solves:
            return
        facts, top = [memory.fact for memory in memories], editor.layer_numbers[-1]
        now = Snapshot(editor.changed_layers)
        before.restore_weights()
        unadjusted = editor.solver.read_outputs(facts)
        now.restore_weights()
        keys = editor.solver.read_keys(facts, top)
        bare = keys.keys[:, : len(facts)]
        shifts = (editor.solver.read_outputs(facts) - unadjusted).float().cpu()
        origins = (keys.current - widened(editor.layers[-1].total, bare.device) @ bare).T.float().cpu()
        for i, memory in enumerate(memories):
            memory.value = memory.value + shifts[i]
            memory.key, memory.origin = bare[:, i].float().cpu().clone(), origins[i].clone()
            if memory.context_keys is not None:
                memory.context_keys = keys.context_keys[:, keys.context_fact == i].T.float().cpu().contiguous()

    # ---- importance -------------------------------------------------------------------------------------------

    def _weigh(self, editor: SequentialEditor, step: int) -> None:
        """Updates the memories' importance, if a policy uses it."""
        memories = self.buffer.memories
        if not memories or not {"priority", "loss", "least_important"} & {self.buffer.sampling, self.buffer.eviction}:
            return
        due = step % self.refresh_every == 0
        if self.buffer.sampling == "loss":
            if due:
                scores = score_facts(editor.lm, [m.fact for m in memories], paraphrases=False, neighbors=0)
                _set_importance(memories, -scores.edit.logp_new)
        elif len(editor.layer_numbers) == 1 and editor.solve_settings.key_mode == "bare":
            total = editor.layers[-1].total.cpu()
            now = torch.stack([m.origin for m in memories]) + torch.stack([m.key for m in memories]) @ total.T
            _set_importance(memories, _drift(memories, now))
        elif due:
            facts: Sequence[Fact] = [m.fact for m in memories]
            _set_importance(memories, _drift(memories, editor.solver.read_outputs(facts).float().cpu()))

    # ---- the end, and checkpoints -----------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the size of the memory."""
        if self.samples:
            log.info(
                "Replay buffer: %d of at most %d edits, %.1f MiB, %d replaced",
                len(self.buffer), self.buffer.capacity, self.buffer.size / 2**20, self.buffer.replaced,
            )  # fmt: skip
        if self.consolidates:
            size = sum(m.numel() * m.element_size() for m in self.past.moments.values()) / 2**20
            log.info("Past keys: %.1f MiB in the metrics of layers %s", size, list(self.past.moments))

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the past keys, for a checkpoint."""
        return {
            "buffer": self.buffer.state_dict(),
            "past": self.past.state_dict(),
            "fractions": {batch: dict(of_layers) for batch, of_layers in self._fractions.items()},
            "refreshed": self.refreshed.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.buffer.load_state_dict(state_dict["buffer"])
        self.past.load_state_dict(state_dict["past"])
        self._fractions = {batch: dict(of_layers) for batch, of_layers in state_dict.get("fractions", {}).items()}
        self.refreshed.load_state_dict(state_dict.get("refreshed", Refresh().state_dict()))


def _drift(memories: Sequence[Memory], now: Tensor) -> Tensor:
    """Drift ``||v - now|| / ||v||`` of each memory, [n]; the values of several sites count as one long vector.

    Args:
        memories: the memories.
        now: the sites' present outputs, float32 [n, sites, d_v]; [n, d_v] if there is one.
    """
    values = torch.stack([m.value for m in memories]).flatten(1)
    return (values - now.flatten(1)).norm(dim=1) / values.norm(dim=1).clamp_min(1e-12)


def _set_importance(memories: Sequence[Memory], importance: Tensor) -> None:
    for memory, number in zip(memories, importance.tolist(), strict=True):
        memory.importance, memory.weighed = number, True
