"""The fork: what accepting a batch does, compared with rejecting it, on probes that no gate looks at.

Both branches start from the state before each batch: with the batch and without it. Some batches are compared again
after the next ``later`` batches that were kept, which are solved again on either branch. The run itself is not changed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.evaluation.language import BUILTIN_TEXT
from editlab.evaluation.scoring import score_pairs, token_log_probs
from editlab.experiments.faults import InjectFaults
from editlab.lm.matmul import products_above
from editlab.lm.text import read_file, read_ids
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder

FILE = "fork.jsonl"


@dataclass
class _Open:
    """A batch whose branches will be compared again later."""

    step: int
    totals: list[Tensor]
    updates: list[Tensor]
    kept: bool
    intended: list[Fact]
    past: list[Fact]
    edited: int
    """number of good edits before it, of which ``past`` is a sample"""
    plans: list[EditPlan] = field(default_factory=list)


class ForkLabels(EditCallback):
    """Measures both branches of every batch and writes them to ``fork.jsonl``.

    The probes are paraphrases of the batch's own facts (the gate sees edit prompts), earlier edits (it sees none), the
    first neighbors of a fixed set of facts (it sees last ones), and a text (it sees statements of facts).

    Args:
        text: file whose perplexity is measured, or ``builtin``.
        tokens: number of tokens of that text.
        past: number of earlier good edits that are evaluated: half the newest, half the oldest.
        neighbors: number of facts whose first neighbor is evaluated.
        later: number of kept batches after which the branches are compared again.
        later_every: every so many batches are compared again; batches with faults always are.
        matmul: type of the probes' products above the edited layers, as for the gate.
    """

    priority = 90  # after trust (50): the verdict is in when it compares the branches

    def __init__(
        self,
        text: str,
        tokens: int = 2048,
        past: int = 64,
        neighbors: int = 64,
        later: int = 3,
        later_every: int = 5,
        matmul: str = "auto",
    ) -> None:
        self.text, self.tokens, self.past, self.neighbors = text, tokens, past, neighbors
        self.matmul = matmul
        self.later, self.later_every = later, later_every
        self.good: list[Fact] = []
        self.open: deque[_Open] = deque()
        self._known: deque[tuple[list[Tensor], dict[str, float]]] = deque(maxlen=4)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the fixed probes."""
        assert isinstance(pl_module, SequentialEditor)
        self.ids = read_ids(
            pl_module.lm, read_file(str(BUILTIN_TEXT) if self.text == "builtin" else self.text), self.tokens
        )
        spare = trainer.datamodule.spare_facts(10 * self.neighbors)[::-1]  # type: ignore[attr-defined]
        self.bystanders = [fact for fact in spare if len(fact.neighbors) > 1][: self.neighbors]
        injected = [callback for callback in trainer.callbacks if isinstance(callback, InjectFaults)]  # type: ignore[attr-defined]
        self.with_faults = set(injected[0].faults) if injected else set()
        self.events = EventLog(run_folder(trainer) / FILE)
        self.events.resume(trainer.global_step)

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Keeps the state before the batch."""
        self._totals = [layer.total.clone() for layer in editor.layers]
        stream = trainer.datamodule.facts  # type: ignore[attr-defined]
        size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self._intended = stream[plan.step * size : (plan.step + 1) * size]
        self._plan = EditPlan(plan.step, list(plan.facts), plan.targets.unsolved(), firmness=plan.firmness)

    def on_edit_applied(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Keeps the whole update, before a verdict scales it or rolls it back; a firm one is that which was solved."""
        if not outcome.dropped:
            self._updates = [outcome.updates[number] for number in editor.layer_numbers]

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Compares the branches of this batch, and of earlier ones that enough kept batches have followed."""
        now = [layer.total.clone() for layer in editor.layers]
        half = self.past // 2
        past = self.good[:half] + self.good[half:][-half:]
        this = _Open(outcome.plan.step, self._totals, self._updates, outcome.kept, self._intended, past, len(self.good))
        reject = self._measure(editor, this, self._totals)
        accept = self._measure(editor, this, [t + u for t, u in zip(self._totals, self._updates, strict=True)])
        self._write(this, 0, accept, reject)
        if outcome.kept:
            for waiting in self.open:
                waiting.plans.append(self._plan)
        if this.step % self.later_every == 0 or this.step in self.with_faults:
            self.open.append(this)
        while self.open and len(self.open[0].plans) >= self.later:
            self._compare_later(editor, self.open.popleft())
        for layer, total in zip(editor.layers, now, strict=True):
            layer.restore(total)
        if outcome.kept:
            self.good += [fact for fact in self._intended if fact in outcome.plan.facts]

    def _compare_later(self, editor: SequentialEditor, waiting: _Open) -> None:
        found = []
        for with_it in (True, False):
            totals = [t + u if with_it else t for t, u in zip(waiting.totals, waiting.updates, strict=True)]
            for layer, total in zip(editor.layers, totals, strict=True):
                layer.restore(total)
            for plan in waiting.plans:
                editor.solver.solve(EditOutcome(replace(plan, targets=plan.targets.unsolved())))
            found.append(self._measure(editor, waiting, [layer.total.clone() for layer in editor.layers]))
        self._write(waiting, len(waiting.plans), *found)

    def _measure(self, editor: SequentialEditor, batch: _Open, totals: list[Tensor]) -> dict[str, float]:
        for layer, total in zip(editor.layers, totals, strict=True):
            layer.restore(total)
        own = [(p, fact) for fact in batch.intended for p in fact.paraphrases[:1]]
        pairs = [(p, fact.target_new) for p, fact in own] + [(p, str(fact.target_true)) for p, fact in own]
        pairs += [(fact.question, fact.target_new) for fact in batch.past]
        with products_above(editor.lm, editor.layer_numbers[-1], self.matmul):
            logp, hit = score_pairs(editor.lm, pairs)
        own_new, own_true, _ = logp.split([len(own), len(own), len(batch.past)])
        return {
            "own": float((own_new > own_true).sum()),
            "own_asked": float(len(own)),
            "past": float(hit[2 * len(own) :].sum()),
            "past_asked": float(len(batch.past)),
            **self._measure_bystanders(editor, totals),
        }

    def _measure_bystanders(self, editor: SequentialEditor, totals: list[Tensor]) -> dict[str, float]:
        """Metrics that do not depend on the batch, cached: a branch of one batch is often the state before the next."""
        for known, numbers in self._known:
            if all(torch.equal(a, b) for a, b in zip(known, totals, strict=True)):
                return numbers
        near = [(fact.neighbors[0], fact) for fact in self.bystanders]
        pairs = [(n.prompt, n.truth) for n, _ in near] + [(n.prompt, fact.target_new) for n, fact in near]
        with products_above(editor.lm, editor.layer_numbers[-1], self.matmul):
            logps = score_pairs(editor.lm, pairs)[0]
            nll = float(-token_log_probs(editor.lm, self.ids).mean())
        near_true, near_new = logps[: len(near)], logps[len(near) :]
        numbers = {"NS": float((near_true > near_new).float().mean()) if near else float("nan"), "nll": nll}
        self._known.append((totals, numbers))
        return numbers

    def _write(self, batch: _Open, later: int, accept: dict[str, float], reject: dict[str, float]) -> None:
        def plain(numbers: dict[str, float]) -> dict[str, Any]:
            return {k: v if torch.isfinite(torch.tensor(v)) else None for k, v in numbers.items()}

        self.events.append(
            {"step": batch.step, "later": later, "kept": batch.kept, "edited": batch.edited,
             "accept": plain(accept), "reject": plain(reject)}
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The edits made so far; comparisons that are pending are lost if the run stops."""
        return {"good": [fact.to_dict() for fact in self.good]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.good = [Fact.from_dict(fact) for fact in state_dict["good"]]
