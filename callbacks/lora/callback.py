"""LoRA adjustment: a low-rank adapter is trained briefly after some batches, to repair what the edits damaged."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.lora.draws import draw_edits, known_edits, stored_edits
from callbacks.lora.guard import Adjustment, Guard
from callbacks.lora.objective import (
    WINDOW,
    Objective,
    distributions,
    loss_weights,
    prompt_rows,
    short_windows,
    text_rows,
)
from callbacks.lora.targets import find_targets
from callbacks.lora.training import Training, Unfinished
from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome
from editlab.edits.snapshot import Snapshot
from editlab.errors import UserError
from editlab.lm.fingerprint import fingerprint
from editlab.lm.matmul import MATMULS, products_above
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder
from editlab.training.adapter import Adapter, parameters, size_of_adapter
from editlab.training.rows import edit_rows
from editlab.utils.rng import private_draws
from editlab.utils.validation import above_zero, at_least_one, not_negative, one_of

log = logging.getLogger(__name__)

EVENTS = "lora_events.jsonl"
UNFINISHED = "lora_unfinished.pt"
"""File in the run's folder with the state of an adjustment in training, from which a killed run resumes."""
MODES = ("merge", "adapter")


class LoRAAdjust(EditCallback):
    """Trains a LoRA adapter on the edits made so far, after some batches, while the rest of the model is frozen.

    The closed-form updates do not change. The loss has three parts: ``edits`` (cross-entropy of the targets of recent
    and earlier edits, in bare prompts and in contexts), ``before`` (divergence from the model before the adjustment)
    and ``unedited`` (divergence from the unedited model), the latter two on prompts of other facts and on a text. If
    the adjustment worsens held-out edits or text, a half or a quarter of it is tried; if those do too, it is dropped.

    Args:
        rank: rank of the adapter.
        alpha: the adapter's update is scaled by alpha / rank.
        dropout: dropout on the adapter's inputs in training.
        targets: ``edited`` (the MLP's output projection), ``mlp``, ``attention``, or a regular expression for paths
            inside a block.
        layers: blocks that get the adapter; default: the edited ones.
        every_n_batches: number of batches between two adjustments; null adjusts only at the end.
        at_end: also adjust after the last batch.
        steps: training steps of each adjustment.
        lr: learning rate of AdamW at the first step; it falls linearly to 0 within an adjustment.
        batch_size: number of edit prompts in each step, and of other prompts.
        replayed: number of earlier edits drawn for an adjustment, in addition to those since the last one.
        only_stored: draw earlier edits, to train on and for the guard, only from those that ``MemoryReplay`` stores: an
            adjustment sees no edit that the run would not still have.
        weights: weights of the losses ``edits``, ``before`` and ``unedited``; default: 1, 2 and 0.
        text: text whose likelihood should not change: ``self`` (sampled from the unedited model) or a text file.
        text_tokens: number of its tokens; half of them are held out for the guard.
        prompts: number of prompts of unedited facts, whose next-token distributions should not change.
        probes: number of edits held out for the guard, at most a quarter of all; 0 guards the text alone.
        tolerance: nats per token by which held-out edits and text may get worse.
        matmul: how the blocks above the adapter and the head multiply in training: ``float32``, ``bfloat16``, or
            ``auto``: bfloat16 on CPUs with instructions for it.
        mode: ``merge`` adds each adjustment to the weights; ``adapter`` continues to train one adapter, keeps it apart
            from the weights, and saves it in PEFT's format in ``adapter/`` of the run's folder.
        seed: seed of the adapter's initial factors and of all draws.

    Raises:
        UserError: A setting is out of range, or a name is unknown.
    """

    priority = 30
    adjusts_weights = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str = "edited",
        layers: list[int] | None = None,
        every_n_batches: int | None = None,
        at_end: bool = True,
        steps: int = 60,
        lr: float = 4e-3,
        batch_size: int = 32,
        replayed: int = 128,
        only_stored: bool = False,
        weights: dict[str, float] | None = None,
        text: str = "self",
        text_tokens: int = 2048,
        prompts: int = 96,
        probes: int = 32,
        tolerance: float = 0.01,
        matmul: str = "auto",
        mode: str = "merge",
        seed: int = 0,
    ) -> None:
        where = "LoRAAdjust"
        at_least_one(where, rank=rank, steps=steps, batch_size=batch_size, every_n_batches=every_n_batches)
        above_zero(where, alpha=alpha, lr=lr)
        not_negative(where, replayed=replayed, text_tokens=text_tokens, prompts=prompts)
        not_negative(where, probes=probes, tolerance=tolerance)
        if not probes and text_tokens < WINDOW:
            raise UserError(
                f"LoRAAdjust.probes is 0 and text_tokens {text_tokens}: the guard needs held-out edits, or {WINDOW} "
                "tokens of text."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"LoRAAdjust.dropout is {dropout}: it must lie between 0 and 1.")
        one_of(where, MODES, mode=mode)
        one_of(where, MATMULS, matmul=matmul)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.layers = targets, layers
        self.every_n_batches, self.at_end = every_n_batches, at_end
        self.training = Training(steps, lr, batch_size)
        self.replayed, self.probes, self.tolerance = replayed, probes, tolerance
        self.only_stored = only_stored
        self.weights = loss_weights(f"{where}.weights", weights or {})
        self.text, self.text_tokens, self.prompts = text, text_tokens, prompts
        self.matmul, self.mode, self.seed = matmul, mode, seed
        self.charts = {"edits around an adjustment": ["^lora/accuracy_(before|after)$"]} if probes else {}
        self.adapter: Adapter | None = None
        self.paths: list[str] = []
        self.last = -1
        self.decisions: Counter[str] = Counter()
        self._optimizer: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._initial_state = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the linear maps that get the adapter, and logs its number of parameters."""
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        self.require_settings(editor)
        if self.only_stored:
            stored_edits(trainer.callbacks)  # type: ignore[attr-defined]
        # Opened here, because a resumed run that was finished never starts its training.
        self._events = EventLog(run_folder(trainer) / EVENTS)
        self._unfinished = run_folder(trainer) / UNFINISHED
        self.reset_for_new_run(editor, self._initial_state)
        self._load_adapter(editor)
        weights = [editor.changed_layer(path).weight for path in self.paths]
        log.info("%s", size_of_adapter(self.rank, weights, editor.lm.model))

    def require_settings(self, editor: SequentialEditor) -> None:
        """Refuses independent batches, and a method that changes no weights."""
        if editor.restore_between_batches:
            raise UserError(
                "LoRAAdjust has nothing to adjust with model.restore_between_batches: remove one of the two."
            )
        editor.method.require_changed_weights("LoRAAdjust", "it adjusts edited weights")

    def _load_adapter(self, editor: SequentialEditor) -> None:
        """Puts the adapter of a checkpoint on top of the weights."""
        self.paths = find_targets(editor.lm.anatomy, self.targets, self.layers or editor.layer_numbers)
        layers = {path: editor.changed_layer(path) for path in self.paths}
        if self._resumed is not None and self._resumed["factors"] is not None:
            if (self.mode, self.rank, self.paths) != tuple(self._resumed[name] for name in ("mode", "rank", "paths")):
                raise UserError(
                    f"The checkpoint has a LoRA adapter of rank {self._resumed['rank']} on {self._resumed['paths']}, "
                    "and this run another: set LoRAAdjust to the checkpoint's settings, or start a new run without "
                    "--ckpt_path."
                )
            self.adapter = self._new_adapter(editor, 0)
            self.adapter.factors = self._resumed["factors"]
            self._optimizer = self._resumed["optimizer"]
            with self.adapter.in_place() as model:
                updates = self.adapter.updates(model)
            for path, layer in layers.items():
                layer.set_adapter(updates[path])
        self._resumed = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the adapter for ``editlab validate``, which measures the model with it."""
        if self._resumed is not None and isinstance(pl_module, SequentialEditor):
            self._load_adapter(pl_module)

    on_test_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses prompts and text that should not change; removes events that a resumed run writes again."""
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        lm, count = editor.lm, self.text_tokens // WINDOW
        spare = trainer.datamodule.spare_facts(8 * self.prompts)[-self.prompts :] if self.prompts else []  # type: ignore[attr-defined]
        if len(spare) < self.prompts:
            log.info("LoRA: %d of the %d prompts, as no more facts are neither edited nor bystanders",
                     len(spare), self.prompts)  # fmt: skip
        with editor.unedited():
            windows = short_windows(lm, self.text, count, self.seed) if count else []
            half = -(-count // 2)
            self.texts = text_rows(lm, windows[:half])
            self.other_rows = [*prompt_rows(lm, spare), *text_rows(lm, windows[half:])]
            with self._products(editor):
                self._unedited_distributions = distributions(lm, self.other_rows) if self.weights["unedited"] else []
        if trainer.is_global_zero:
            self._events.resume(trainer.global_step)

    def _products(self, editor: SequentialEditor) -> AbstractContextManager[None]:
        highest = max([*editor.layer_numbers, *(self.layers or ())])
        return products_above(editor.lm, highest, self.matmul, head=True)

    def _new_adapter(self, editor: SequentialEditor, step: int) -> Adapter:
        return Adapter(editor.lm, self.paths, self.rank, self.alpha, self.dropout, self._seed(step))

    def _seed(self, step: int) -> int:
        return 1000 * self.seed + step

    # ---- an adjustment ----------------------------------------------------------------------------------------

    def on_edit_adjust(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Trains the adapter if an adjustment is due, and keeps it if the guard finds nothing worse."""
        step = outcome.plan.step
        due = self.every_n_batches is not None and (step + 1) % self.every_n_batches == 0
        if not (due or (self.at_end and trainer.is_last_batch)):
            return
        draw = random.Random(f"{self.seed}:{step}")
        edits = known_edits(editor, self.last, self.only_stored)
        trained, held_out = draw_edits(edits, self.replayed, self.probes, draw)
        if not trained or (self.probes and not held_out):
            log.info("Batch %d: no LoRA adjustment, as there are too few edits", step)
            return
        before = Snapshot(editor.changed_layers)
        done = self._adjust(editor, step, draw, trained, held_out)
        if done.reason:
            before.restore_weights()
        else:
            outcome.before_adjustment = before
        self.last = step
        self._record(trainer, editor, outcome, done)

    def _adjust(
        self,
        editor: SequentialEditor,
        step: int,
        draw: random.Random,
        trained: Sequence[Fact],
        held_out: Sequence[Fact],
    ) -> Adjustment:
        """Trains an adjustment and puts the largest acceptable fraction of it into the weights.

        If none is acceptable, the result has a reason, and the weights have to be restored.
        """
        lm, started = editor.lm, time.perf_counter()
        rows = edit_rows(lm, trained, [""])
        contexts = [context for context in editor.contexts if context]
        if contexts:
            rows += [row for fact in trained for row in edit_rows(lm, [fact], [draw.choice(contexts)])]
        guard = Guard(held_out, self.texts, self.tolerance)
        done = Adjustment(guard.examine(lm))
        with self._products(editor):
            now = distributions(lm, self.other_rows) if self.weights["before"] else []
        objective = Objective(rows, self.other_rows, now, self._unedited_distributions, self.weights)
        adapter = self.adapter or self._new_adapter(editor, step)
        for path in self.paths:
            editor.changed_layer(path).set_adapter(None)  # PEFT's modules replace it
        unfinished = self._unfinished_training(editor, objective)
        with adapter.in_place() as model, private_draws(self._seed(step)):
            optimizer = torch.optim.AdamW(parameters(model), lr=self.training.lr, weight_decay=0.0)
            if self._optimizer is not None:
                optimizer.load_state_dict(self._optimizer)
            start = adapter.state(model)
            try:
                with self._products(editor):
                    done.losses = self.training.run(
                        lm, objective, optimizer, draw, unfinished, lambda: editor.trainer.received_sigterm
                    )
            except FloatingPointError as error:
                done.reason = str(error)
            end = adapter.state(model)
        if not done.reason:
            guard.apply(editor, adapter, (start, end), self.mode == "merge", done)
        if not done.reason and self.mode == "adapter":
            self.adapter, self._optimizer = adapter, optimizer.state_dict()
        done.seconds = time.perf_counter() - started
        return done

    def _unfinished_training(self, editor: SequentialEditor, objective: Objective) -> Unfinished:
        """The file with the state of this adjustment's training, with a key of everything that it depends on."""
        rows = (list(objective.edits), list(objective.other_rows), objective.weights)
        content = (self.training, rows, self.paths, self.rank, self.alpha, self.dropout, self.seed, self.mode)
        weights = nn.ParameterList(nn.Parameter(layer.weight, False) for layer in editor.changed_layers)
        key = hashlib.sha256(f"{editor.fingerprint} {fingerprint(weights)} {content}".encode()).hexdigest()
        return Unfinished(self._unfinished, key)

    def _record(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome, done: Adjustment) -> None:
        self.decisions[done.decision] += 1
        outcome.measured |= done.measured()
        if done.reason:
            log.info("Batch %d: the LoRA adjustment is dropped: %s", outcome.plan.step, done.reason)
        if trainer.is_global_zero:
            self._events.append({"step": outcome.plan.step, "edits": editor.edits, **done.event()})

    # ---- the end, and checkpoints -----------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs how many adjustments were kept; saves the adapter, if there is one."""
        assert isinstance(pl_module, SequentialEditor)
        if self.decisions:
            kept, dropped = self.decisions["keep"], self.decisions["drop"]
            log.info("LoRA adjustments: %d kept, %d dropped (see %s)", kept, dropped, self._events.path)
        elif self.at_end and not trainer.is_last_batch:
            log.info("No LoRA adjustment: the run stopped before its last batch")
        folder = run_folder(trainer) / "adapter"  # collective: every rank has to call it
        if self.adapter is not None and self.adapter.factors is not None and trainer.is_global_zero:
            self.adapter.save(folder)
            log.info("LoRA adapter: %s, to be used with the edited model", folder)
        if trainer.is_global_zero:
            self._unfinished.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The adapter, its optimizer, and the batch of the last adjustment, for a checkpoint."""
        return {
            "factors": self.adapter.factors if self.adapter is not None else None,
            "optimizer": self._optimizer,
            "last": self.last,
            "decisions": dict(self.decisions),
            "mode": self.mode,
            "rank": self.rank,
            "paths": self.paths,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; the adapter is put into the model later, when that is loaded."""
        self._resumed = state_dict
        self.adapter, self._optimizer = None, None
        self.last = state_dict["last"]
        self.decisions = Counter(state_dict["decisions"])
