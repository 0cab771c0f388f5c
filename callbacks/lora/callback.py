"""LoRA fine-adjustment: a low-rank adapter is trained briefly after some batches, to mend what the edits bent."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.lora.adapter import Adapter, between, find_targets, parameters
from callbacks.lora.objective import (
    WINDOW,
    Adjustment,
    Objective,
    distributions,
    draw_edits,
    edit_rows,
    examine,
    loss_weights,
    prompt_rows,
    short_windows,
    text_rows,
)
from callbacks.lora.training import Training, Unfinished
from callbacks.trust.probes import quick
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.batch import StepState
from editlab.edits.plan import EditCallback, EditOutcome
from editlab.errors import UserError
from editlab.lm.fingerprint import fingerprint
from editlab.lm.matmul import MATMULS
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder
from editlab.utils.rng import private_draws
from editlab.utils.validation import above_zero, at_least_one, not_negative, one_of

log = logging.getLogger(__name__)

EVENTS = "lora_events.jsonl"
UNFINISHED = "lora_unfinished.pt"
"""In the run's folder while it goes on: an adjustment on its way, for a killed run to go on from."""
MODES = ("merge", "adapter")
SHARES = (1.0, 0.5, 0.25)
"""Of what an adjustment has learnt, the largest first: half of the way does about a quarter of the harm elsewhere, and
more than half of the good (interpolated weights, Wortsman et al. 2022, arXiv:2109.01903)."""


class LoRAAdjust(EditCallback):
    """After some batches, trains a LoRA adapter on edits made so far while the rest of the model is held in place.

    The closed form is left as it is. The adapter learns ``edits`` (cross-entropy of the targets of recent and earlier
    edits, in bare prompts and in contexts) against ``before`` (divergence from the model before the adjustment) and
    ``unedited`` (from the unedited model) on prompts of other facts and on a text. Where an adjustment makes edits
    or text worse that it was not trained on, a half or a quarter of it is tried, and else it is dropped.

    Args:
        rank: of the adapter.
        alpha: what it adds is scaled by alpha / rank.
        dropout: on its inputs in training.
        targets: ``edited`` (the MLP's output projection), ``mlp``, ``attention``, or a regular expression for paths
            inside a block.
        layers: that it goes to; the edited ones where not given.
        every_n_batches: between two adjustments; null makes none on the way.
        at_end: also after the last batch.
        steps: of each adjustment.
        lr: of its AdamW at the first step; over an adjustment it falls to 0 in a straight line.
        batch_size: prompts of edits, and others, in each step.
        replayed: earlier edits that an adjustment draws, beside those since the last one.
        weights: of the losses ``edits``, ``before`` and ``unedited``; those not named keep 1, 2 and 0.
        text: to stay as likely as it was: ``self`` (sampled from the unedited model) or a text file.
        text_tokens: of it; half of them are the guard's.
        prompts: questions of facts that are not edited, to be answered as before.
        probes: edits that the guard sets aside, at most a quarter of all; 0 leaves it the text alone.
        tolerance: nats per token by which edits and text set aside may get worse.
        matmul: how the blocks above and the head multiply in training: ``float32``, ``bfloat16``, or ``auto``: bfloat16
            on CPUs with instructions for it.
        mode: ``merge`` adds each adjustment to the weights; ``adapter`` trains one adapter on and keeps it beside them,
            to be written in PEFT's format into ``adapter/`` of the run's folder.
        seed: of the adapter's first factors and of what is drawn.

    Raises:
        UserError: for a setting out of range or an unknown name.
    """

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
        counts = {"rank": rank, "steps": steps, "batch_size": batch_size, "every_n_batches": every_n_batches}
        at_least_one(where, **counts)
        above_zero(where, alpha=alpha, lr=lr)
        not_negative(where, replayed=replayed, text_tokens=text_tokens, prompts=prompts)
        not_negative(where, probes=probes, tolerance=tolerance)
        if not probes and text_tokens < WINDOW:
            raise UserError(
                f"LoRAAdjust.probes is 0 and text_tokens {text_tokens}: give its guard edits, or {WINDOW} tokens."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"LoRAAdjust.dropout is {dropout}: it must lie between 0 and 1.")
        one_of(where, MODES, mode=mode)
        one_of(where, MATMULS, matmul=matmul)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.layers = targets, layers
        self.every_n_batches, self.at_end = every_n_batches, at_end
        self.training = Training(steps, lr, batch_size)
        self.replayed, self.probes = replayed, probes
        self.tolerance = tolerance
        self.weights = loss_weights(f"{where}.weights", weights or {})
        self.text, self.text_tokens, self.prompts = text, text_tokens, prompts
        self.matmul = matmul
        self.mode = mode
        self.seed = seed
        self.adapter: Adapter | None = None
        self.paths: list[str] = []
        self.last = -1
        self.decisions: Counter[str] = Counter()
        self._optimizer: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._unused = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the maps that the adapter goes to, and says how much of the model it is.

        Raises:
            UserError: where there are none, or batches are independent.
        """
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        if editor.restore_between_batches:
            raise UserError("LoRAAdjust has nothing to adjust where model.restore_between_batches is set: drop one.")
        self._events = EventLog(run_folder(trainer) / EVENTS)  # a finished run comes to its end without a start
        self._unfinished = run_folder(trainer) / UNFINISHED
        self.begin_anew(editor, self._unused)
        self._take_up(editor)
        weights = [editor.changed_layer(path).weight for path in self.paths]
        whole = sum(p.numel() for p in editor.lm.model.parameters())
        own, full = sum(self.rank * sum(w.shape) for w in weights), sum(w.numel() for w in weights)
        log.info(
            "LoRA of rank %d on %d linear maps: %d trainable parameters, %.3f%% of the model's (all of those maps: %d, "
            "%.2f%%)", self.rank, len(weights), own, 100 * own / whole, full, 100 * full / whole,
        )  # fmt: skip

    def _take_up(self, editor: SequentialEditor) -> None:
        """The adapter of a checkpoint is put beside the weights."""
        self.paths = find_targets(editor.lm.anatomy, self.targets, self.layers or editor.layer_numbers)
        layers = {path: editor.changed_layer(path) for path in self.paths}
        if self._resumed is not None and self._resumed["factors"] is not None:
            if (self.mode, self.rank, self.paths) != tuple(self._resumed[name] for name in ("mode", "rank", "paths")):
                raise UserError(
                    f"The checkpoint has a LoRA adapter of rank {self._resumed['rank']} on {self._resumed['paths']}, "
                    "and this run asks for another: set LoRAAdjust as it was, or start a new run without --ckpt_path."
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
        """``editlab validate`` measures the model with its adapter."""
        if self._resumed is not None and isinstance(pl_module, SequentialEditor):
            self._take_up(pl_module)

    on_test_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses what shall stay as it is, and drops events that a resumed run makes anew."""
        editor = pl_module
        assert isinstance(editor, SequentialEditor)
        lm, count = editor.lm, self.text_tokens // WINDOW
        spare = trainer.datamodule.spare_facts(8 * self.prompts)[-self.prompts :] if self.prompts else []  # type: ignore[attr-defined]
        if len(spare) < self.prompts:
            log.info("LoRA: %d of the %d prompts asked for, as no more facts are neither edited nor bystanders",
                     len(spare), self.prompts)  # fmt: skip
        with editor.unedited():
            windows = short_windows(lm, self.text, count, self.seed) if count else []
            half = -(-count // 2)
            self.texts = text_rows(windows[:half])
            self.others = [*prompt_rows(lm, spare), *text_rows(windows[half:])]
            with self._quick(editor):
                self._said_unedited = distributions(lm, self.others) if self.weights["unedited"] else []
        if trainer.is_global_zero:
            self._events.go_on(trainer.global_step)

    def _quick(self, editor: SequentialEditor) -> AbstractContextManager[None]:
        return quick(editor, self.matmul, self.layers or (), head=True)

    def _new_adapter(self, editor: SequentialEditor, step: int) -> Adapter:
        return Adapter(editor.lm, self.paths, self.rank, self.alpha, self.dropout, self._seed(step))

    def _seed(self, step: int) -> int:
        return 1000 * self.seed + step

    # ---- an adjustment ----------------------------------------------------------------------------------------

    def on_edit_adjust(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Trains the adapter when its turn has come, and keeps it if the guard finds nothing worse."""
        step = outcome.plan.step
        due = self.every_n_batches is not None and (step + 1) % self.every_n_batches == 0
        if not (due or (self.at_end and trainer.is_last_batch)):
            return
        draw = random.Random(f"{self.seed}:{step}")
        trained, aside = self._draw(editor, draw)
        if not trained or (self.probes and not aside):
            log.info("Batch %d: no LoRA adjustment, as there are too few edits", step)
            return
        state = StepState(editor.changed_layers)
        done = self._adjust(editor, step, draw, trained, aside)
        if done.reason:
            state.restore_weights()
        else:
            outcome.before_adjustment = state
        self.last = step
        self._record(trainer, editor, outcome, done)

    def _draw(self, editor: SequentialEditor, draw: random.Random) -> tuple[list[Fact], list[Fact]]:
        """Edits to train on (those since the last adjustment, and some earlier ones), and edits set aside."""
        batches = {entry.fact.slot: entry.batch for entry in editor.ledger if entry.kept}
        recent = [batches[fact.slot] > self.last for fact in editor.edited_facts]
        return draw_edits(editor.edited_facts, recent, self.replayed, self.probes, draw)

    def _adjust(
        self, editor: SequentialEditor, step: int, draw: random.Random, trained: Sequence[Fact], aside: Sequence[Fact]
    ) -> Adjustment:
        """Trains and tries it, and keeps what it learnt if nothing is worse; the weights are left as tried."""
        lm, started = editor.lm, time.perf_counter()
        rows = edit_rows(lm, trained, [""])
        contexts = [context for context in editor.contexts if context]
        if contexts:
            rows += [row for fact in trained for row in edit_rows(lm, [fact], [draw.choice(contexts)])]
        done = Adjustment(examine(lm, aside, self.texts))
        with self._quick(editor):
            said = distributions(lm, self.others) if self.weights["before"] else []
        objective = Objective(rows, self.others, said, self._said_unedited, self.weights)
        adapter = self.adapter or self._new_adapter(editor, step)
        for path in self.paths:
            editor.changed_layer(path).set_adapter(None)  # PEFT's own takes its place
        unfinished = self._kept(editor, objective)
        with adapter.in_place() as model, private_draws(self._seed(step)):
            optimizer = torch.optim.AdamW(parameters(model), lr=self.training.lr, weight_decay=0.0)
            if self._optimizer is not None:
                optimizer.load_state_dict(self._optimizer)
            start = adapter.state(model)
            try:
                with self._quick(editor):
                    done.losses = self.training.run(
                        lm, objective, optimizer, draw, unfinished, lambda: editor.trainer.received_sigterm
                    )
            except FloatingPointError as error:
                done.reason = str(error)
            end = adapter.state(model)
        if not done.reason:
            self._try(editor, adapter, (start, end), aside, done)
        if not done.reason and self.mode == "adapter":
            self.adapter, self._optimizer = adapter, optimizer.state_dict()
        done.seconds = time.perf_counter() - started
        return done

    def _kept(self, editor: SequentialEditor, objective: Objective) -> Unfinished:
        """Where this adjustment is kept on its way, under all that it depends on."""
        rows = (list(objective.edits), list(objective.others), objective.weights)
        what = (self.training, rows, self.paths, self.rank, self.alpha, self.dropout, self.seed, self.mode)
        weights = nn.ParameterList(nn.Parameter(layer.weight, False) for layer in editor.changed_layers)
        key = hashlib.sha256(f"{editor.fingerprint} {fingerprint(weights)} {what}".encode()).hexdigest()
        return Unfinished(self._unfinished, key)

    def _try(
        self,
        editor: SequentialEditor,
        adapter: Adapter,
        learnt: tuple[dict[str, Tensor], dict[str, Tensor]],
        aside: Sequence[Fact],
        done: Adjustment,
    ) -> None:
        """Leaves the largest share of what was learnt with which nothing is worse; where none is, says what is."""
        state, held = StepState(editor.changed_layers), adapter.factors
        for done.share in SHARES:
            adapter.factors = between(*learnt, done.share)
            with adapter.in_place() as model:
                updates = adapter.updates(model)
            for path, update in updates.items():
                layer = editor.changed_layer(path)
                if self.mode == "merge":
                    layer.add(update)
                else:
                    layer.set_adapter(update)
            done.after = examine(editor.lm, aside, self.texts)
            done.reason = done.after.worse_than(done.before, self.tolerance)
            if not done.reason:
                return
            state.restore_weights()
        adapter.factors = held

    def _record(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome, done: Adjustment) -> None:
        decision = "drop" if done.reason else "keep"
        self.decisions[decision] += 1
        outcome.measured["lora/share"] = 0.0 if done.reason else done.share
        told = {"before": done.before.numbers(), "after": done.after.numbers() if done.after else {}}
        for when, numbers in told.items():
            outcome.measured |= {f"lora/{name}_{when}": number for name, number in numbers.items()}
        outcome.measured |= {f"lora/loss_{name}": value for name, value in done.losses.items()}
        outcome.measured["lora/kept"] = float(not done.reason)
        if done.reason:
            log.info("Batch %d: the LoRA adjustment is dropped: %s", outcome.plan.step, done.reason)
        if trainer.is_global_zero:
            found = {**asdict(done), **told, "seconds": round(done.seconds, 3)}
            self._events.append({"step": outcome.plan.step, "edits": editor.edits, "decision": decision, **found})

    # ---- the end, and checkpoints -----------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what was done; writes the adapter, where one is kept."""
        assert isinstance(pl_module, SequentialEditor)
        if self.decisions:
            told = ", ".join(f"{self.decisions[name]} {what}" for name, what in (("keep", "kept"), ("drop", "dropped")))
            log.info("LoRA adjustments: %s (see %s)", told, self._events.path)
        elif self.at_end and not trainer.is_last_batch:
            log.info("No LoRA adjustment: the run stopped before its last batch")
        folder = run_folder(trainer) / "adapter"  # all ranks have to ask for it
        if self.adapter is not None and self.adapter.factors is not None and trainer.is_global_zero:
            self.adapter.save(folder)
            log.info("LoRA adapter: %s, for the edited model", folder)
        if trainer.is_global_zero:
            self._unfinished.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The adapter and its optimizer, and when it was trained."""
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
        """Takes up what :meth:`state_dict` gave; the adapter is put in place once the model is there."""
        self._resumed = state_dict
        self.adapter, self._optimizer = None, None
        self.last = state_dict["last"]
        self.decisions = Counter(state_dict["decisions"])
