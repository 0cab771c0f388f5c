"""Memory replay: earlier edits take part in the solve of later ones, as samples or as past keys in the metric."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.replay.buffer import Memory, ReplayBuffer
from callbacks.replay.past_keys import PastKeys
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.batch import StepState
from editlab.edits.plan import Addition, EditCallback, EditOutcome, EditPlan
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.subject_keys import CachedKey
from editlab.lm.precision import widened
from editlab.solver.closed_form import Preservation
from editlab.utils.validation import above_zero, decays, one_of, shares

log = logging.getLogger(__name__)

KINDS = ("sampled", "consolidated", "both")
REFRESH = ("none", "values")


class _Released(NamedTuple):
    """Keys at one layer of facts that are edited anew."""

    keys: Tensor
    """[d_k, n]"""
    ages: Tensor
    """long [n]: batches that were kept since theirs"""
    places: Tensor
    """long [n]: of their facts in the batch"""


class MemoryReplay(EditCallback):
    """Makes later batches spare, or repair, earlier edits. Only edits that were kept are remembered.

    ``sampled`` adds earlier edits to each batch's constraints. Their residuals are taken against the current weights:
    where nothing has drifted, replay asks for nothing. ``consolidated`` keeps the keys of all past edits (and of their
    prompts' other tokens, where ``model.preserve_prompt_tokens`` asks for them) in each layer's metric: all of history
    at constant memory, which in one layer with soft constraints is the same as one joint batch.

    Args:
        rate: replayed facts as a share of the batch (0.3 of a batch of 32 is 10).
        capacity: edits in the buffer.
        weight: of a replayed constraint, whose slack is 1 / weight; ``.inf`` makes it an equality.
        repair: share of the way back to its value that a replayed fact is asked to go; 0 only spares it where it is,
            which bends the weights less.
        age_decay: factor on the weight for each batch since the edit was made; 1 leaves it as it is.
        sampling: ``random``, ``recent``, ``oldest``, ``priority`` (by drift from the value) or ``loss`` (the least
            likely targets).
        eviction: what leaves a full buffer: ``fifo``, ``lru`` (the longest not replayed), ``reservoir`` (all of
            history equally likely to be there) or ``least_important``.
        refresh_every: batches between two measurements of loss, or of drift where it takes a forward pass.
        refresh: ``values`` finds the values of replayed facts anew on the current weights.
        cache_keys: use the keys as they were when the edit was made; right only where nothing below the layer changes.
        memory: ``sampled``, ``consolidated`` or ``both``.
        past_weight: of each past key in the metric; 1 / slack of the method where not given (1 where that is 0).
        forget: what is left of past keys in the metric after each batch, 0 to 1; 1 forgets nothing.
        seed: of sampling and eviction.

    Raises:
        UserError: for a setting out of range or an unknown name.
    """

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
        shares(where, repair=repair)
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
        self.buffer = ReplayBuffer(capacity, sampling, eviction, seed)
        self._bare_metric: dict[int, Preservation] = {}
        self._before: tuple[dict[str, Any], dict[int, Tensor]] = ({}, {})
        self._again: dict[int, _Released] = {}
        self._unused = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what can not be exact, and says how large the memory may grow.

        Raises:
            UserError: where keys are to be cached although they move, or batches are independent.
        """
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        if editor.restore_between_batches:
            raise UserError(
                "MemoryReplay has nothing to remember where model.restore_between_batches is set: drop one."
            )
        if self.cache_keys and len(editor.layer_numbers) > 1:
            raise UserError(
                f"MemoryReplay.cache_keys can not be used with layers {editor.layer_numbers}: an edit of a lower layer "
                "moves the keys of the higher ones. Edit one layer, or leave it out."
            )
        if self.cache_keys and editor.key_mode != "bare":
            raise UserError(
                f"MemoryReplay.cache_keys needs model.keys: bare, not {editor.key_mode}: it keeps one key a fact."
            )
        self.begin_anew(editor, self._unused)
        if self.samples:
            anatomy, top = editor.lm.anatomy, editor.layer_numbers[-1]
            numbers = anatomy.key_size(top) + 2 * anatomy.value_size(top)
            log.info("Replay buffer: at most %d edits in %.1f MiB", self.buffer.capacity,
                     self.buffer.capacity * numbers * 4 / 2**20)  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Past keys of a resumed run enter the metric."""
        assert isinstance(pl_module, SequentialEditor)
        self._bare_metric = dict(pl_module.preservation)
        if self.past_weight is None:
            self.past.weight = 1 / pl_module.method.slack if pl_module.method.slack else 1.0
        self._set_metric(pl_module)

    def _set_metric(self, editor: SequentialEditor) -> None:
        for layer, moments in self.past.moments.items():
            bare = self._bare_metric[layer]
            editor.preservation[layer] = bare.plus_moments(moments.to(bare.factor))

    # ---- the events of an edit --------------------------------------------------------------------------------

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Adds the sampled memories to the batch; facts that are edited anew are taken out of the past."""
        self._before = self.buffer.state_dict(), dict(self.past.moments)
        if self.consolidates:
            self._release(editor, plan)
        if not self.samples:
            return
        self._weigh(editor, plan.step)
        count = math.floor(self.rate * len(plan.facts) + 0.5)
        memories = [m for m in self.buffer.sample(count, but=plan.facts, step=plan.step) if self._weight(m, plan.step)]
        if self.refresh == "values" and memories:
            for memory, value in zip(memories, editor.optimize_values([m.fact for m in memories]), strict=True):
                memory.value = value.clone()
        plan.add([self._addition(memory, plan.step) for memory in memories])

    def _addition(self, memory: Memory, step: int) -> Addition:
        known = CachedKey(memory.key, memory.origin, memory.others) if self.cache_keys else None
        return Addition(memory.fact, memory.value, self._weight(memory, step), self.repair, known)

    def _weight(self, memory: Memory, step: int) -> float:
        """Of its constraint; 0 where it has faded beyond what a float holds."""
        weight = self.weight * self.age_decay ** (step - memory.step)
        return weight if weight > sys.float_info.min else 0.0

    def _release(self, editor: SequentialEditor, plan: EditPlan) -> None:
        """The user changed their mind about these facts: the metric must not hold them where they were."""
        batches = {entry.fact.slot: entry.batch for entry in editor.ledger if entry.kept}
        places = [place for place, fact in enumerate(plan.facts) if fact.slot in batches]
        self._again = {}
        if not places:
            return
        again = [plan.facts[place] for place in places]
        kept = {entry.batch for entry in editor.ledger if entry.kept}  # the past fades with these, and with no others
        ages = torch.tensor([sum(later > batches[fact.slot] for later in kept) for fact in again])
        for layer in editor.layer_numbers:
            keys = editor.read_keys(again, layer)
            which = keys.fact.cpu()
            self._again[layer] = _Released(keys.keys, ages[which], torch.tensor(places)[which])
        self._take_out(())
        self._set_metric(editor)

    def _take_out(self, left_out: Collection[int]) -> None:
        """Takes the released keys out of the past as it was before the batch, but for facts that are left out of it."""
        self.past.moments = dict(self._before[1])
        for layer, released in self._again.items():
            going = torch.tensor([int(place) not in left_out for place in released.places])
            self.past.remove(layer, released.keys[:, going.to(released.keys.device)], released.ages[going])

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Remembers the batch if it was kept; else all is as it was before the batch was planned."""
        if not outcome.kept:
            buffer, self.past.moments = self._before
            self.buffer.load_state_dict(buffer)
            if self.consolidates:
                self._set_metric(editor)
        if outcome.kept and self.samples:
            self._remember(editor, outcome)
        if outcome.kept and self.consolidates:
            if outcome.left_out and self._again:
                self._take_out(outcome.left_out)  # what was not edited anew is held as before
            count = len(outcome.plan.facts)
            for layer, keys in outcome.keys.items():
                own = keys.keys[:, keys.fact < count], keys.others[:, keys.others_fact < count]
                self.past.add(layer, *own, editor.preserve_prompt_tokens)
            self._set_metric(editor)
        if self.samples:
            outcome.measured["replay/buffer"] = float(len(self.buffer))
            outcome.measured["replay/replaced"] = float(self.buffer.replaced)

    def _remember(self, editor: SequentialEditor, outcome: EditOutcome) -> None:
        plan, top = outcome.plan, editor.layer_numbers[-1]
        keys = outcome.keys[top]
        count = len(plan.facts)
        device = keys.keys.device
        whole, last = (widened(updates[top], device) for updates in (outcome.updates, outcome.last_updates))
        # What was there when the keys were read: passes before the last one were, and none of them was scaled yet.
        before = widened(editor.layers[-1].total, device) + (1 - outcome.factor) * whole - last
        bare = keys.keys[:, :count]
        origins = keys.current[:, :count] - before @ bare
        for i, fact in enumerate(plan.facts):
            others = (
                keys.others[:, keys.others_fact == i].T if self.cache_keys and editor.preserve_prompt_tokens else None
            )
            tensors = (plan.targets[i], bare[:, i], origins[:, i])
            value, key, origin = (t.float().cpu().clone() for t in tensors)
            kept = None if others is None else others.float().cpu().contiguous()
            self.buffer.add(Memory(fact, value, key, origin, plan.step, others=kept))

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """After an adjustment memories are as the model has them now: replay must not pull back against it."""
        before, memories = outcome.before_adjustment, self.buffer.memories
        if before is None or not memories:
            return
        facts, top = [memory.fact for memory in memories], editor.layer_numbers[-1]
        now = StepState(editor.changed_layers)
        before.restore_weights()
        was = editor.read_keys(facts, top).current
        now.restore_weights()
        keys = editor.read_keys(facts, top)
        bare = keys.keys[:, : len(facts)]
        shifts = (keys.current - was).T.float().cpu()
        origins = (keys.current - widened(editor.layers[-1].total, bare.device) @ bare).T.float().cpu()
        for i, memory in enumerate(memories):
            memory.value = memory.value + shifts[i]
            memory.key, memory.origin = bare[:, i].float().cpu().clone(), origins[i].clone()
            if memory.others is not None:
                memory.others = keys.others[:, keys.others_fact == i].T.float().cpu().contiguous()

    # ---- importance -------------------------------------------------------------------------------------------

    def _weigh(self, editor: SequentialEditor, step: int) -> None:
        """Keeps the memories' importance up to date, where a policy looks at it."""
        memories = self.buffer.memories
        if not memories or not {"priority", "loss", "least_important"} & {self.buffer.sampling, self.buffer.eviction}:
            return
        due = step % self.refresh_every == 0
        if self.buffer.sampling == "loss":
            if due:
                scores = score_facts(editor.lm, [m.fact for m in memories], paraphrases=False, neighbors=0)
                _set_importance(memories, -scores.edit.logp_new)
        elif len(editor.layer_numbers) == 1 and editor.key_mode == "bare":
            total = editor.layers[-1].total.cpu()
            now = torch.stack([m.origin for m in memories]) + torch.stack([m.key for m in memories]) @ total.T
            _set_importance(memories, _drift(memories, now))
        elif due:
            facts: Sequence[Fact] = [m.fact for m in memories]
            now = editor.read_keys(facts, editor.layer_numbers[-1]).current.T.float().cpu()
            _set_importance(memories, _drift(memories, now))

    # ---- the end, and checkpoints -----------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what the memory holds."""
        if self.samples:
            log.info(
                "Replay buffer: %d of at most %d edits, %.1f MiB, %d replaced",
                len(self.buffer), self.buffer.capacity, self.buffer.size / 2**20, self.buffer.replaced,
            )  # fmt: skip
        if self.consolidates:
            size = sum(m.numel() * m.element_size() for m in self.past.moments.values()) / 2**20
            log.info("Past keys: %.1f MiB in the metrics of layers %s", size, list(self.past.moments))

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the past keys."""
        return {"buffer": self.buffer.state_dict(), "past": self.past.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.buffer.load_state_dict(state_dict["buffer"])
        self.past.load_state_dict(state_dict["past"])


def _drift(memories: Sequence[Memory], now: Tensor) -> Tensor:
    """``||v - what the site gives now|| / ||v||`` of each memory, [n]; ``now`` is float32 [n, d_v]."""
    values = torch.stack([m.value for m in memories])
    return (values - now).norm(dim=1) / values.norm(dim=1).clamp_min(1e-12)


def _set_importance(memories: Sequence[Memory], importance: Tensor) -> None:
    for memory, number in zip(memories, importance.tolist(), strict=True):
        memory.importance, memory.weighed = number, True
