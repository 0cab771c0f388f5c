"""The guard of an adjustment: held-out edits and text that it must not worsen, and the fraction of it that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.snapshot import Snapshot
from editlab.evaluation.scoring import score_facts
from editlab.lm.language_model import LanguageModel
from editlab.training.adapter import Adapter, between
from editlab.training.rows import Row

FRACTIONS = (1.0, 0.5, 0.25)
"""Fractions of an adjustment that are tried, the largest first. Half of it does about a quarter of the harm elsewhere
and keeps more than half of the benefit (interpolated weights, Wortsman et al. 2022, arXiv:2109.01903)."""


@dataclass(frozen=True)
class Health:
    """The guard's measurements on held-out edits and text."""

    edits: float | None
    """mean log-probability per token of edits' targets, in nats; None if none are held out"""
    accuracy: float | None
    """fraction of edits whose targets are the argmax at every token; None if none are held out"""
    text: float | None
    """mean negative log-probability per token of the texts, in nats; None if there are none"""
    ES: float | None = None
    """fraction of edits whose new target is likelier than the truth; None if no truth is given"""

    def numbers(self) -> dict[str, float]:
        """The measured numbers by name, without those that are not finite."""
        return {name: x for name, x in asdict(self).items() if x is not None and math.isfinite(x)}

    def worse_than(self, before: Health, tolerance: float) -> str:
        """A clause that names the number that got worse by more than ``tolerance`` nats per token; "" if none did."""
        if before.edits is not None and self.edits is not None and not self.edits >= before.edits - tolerance:
            return f"held-out edits went from {before.edits:.3f} to {self.edits:.3f} nats per token"
        if before.text is not None and self.text is not None and not self.text <= before.text + tolerance:
            return f"the held-out text went from {before.text:.3f} to {self.text:.3f} nats per token"
        return ""


def examine(lm: LanguageModel, facts: Sequence[Fact], texts: Sequence[Row]) -> Health:
    """Measures the model on some edits and texts, with the weights as they are."""
    scores = score_facts(lm, facts, paraphrases=False, neighbors=0).edit if facts else None
    wanted = [list(zip(row.indices, row.following, strict=True)) for row in texts]
    logps = lm.next_token_scores([row.ids for row in texts], wanted).logps
    text = float(-torch.cat(logps).mean()) if logps else None
    if scores is None:
        return Health(None, None, text)
    with_truth = ~scores.logp_true.isnan()
    success = (scores.logp_new > scores.logp_true)[with_truth].float()
    return Health(
        edits=float(scores.logp_new.mean()),
        accuracy=float(scores.hit_new.float().mean()),
        text=text,
        ES=float(success.mean()) if len(success) else None,
    )


@dataclass
class Adjustment:
    """Result of one adjustment."""

    before: Health
    after: Health | None = None
    losses: dict[str, float] = field(default_factory=dict)
    """parts of the loss at the end of the training"""
    fraction: float = 1.0
    """fraction of the trained adapter that is kept"""
    reason: str = ""
    """why it is dropped; "" if it is kept"""
    seconds: float = 0.0

    @property
    def decision(self) -> str:
        """``keep`` or ``drop``."""
        return "drop" if self.reason else "keep"

    @property
    def health(self) -> dict[str, dict[str, float]]:
        """The guard's numbers ``before`` and ``after`` the adjustment, by name; none of the latter if it failed."""
        return {"before": self.before.numbers(), "after": self.after.numbers() if self.after else {}}

    def measured(self) -> dict[str, float]:
        """The numbers that the step logs, by name."""
        numbers = {"lora/fraction": 0.0 if self.reason else self.fraction}
        for when, found in self.health.items():
            numbers |= {f"lora/{name}_{when}": number for name, number in found.items()}
        numbers |= {f"lora/loss_{name}": value for name, value in self.losses.items()}
        return {**numbers, "lora/kept": float(not self.reason)}

    def event(self) -> dict[str, Any]:
        """The adjustment as a JSON object for the event log."""
        return {"decision": self.decision, **asdict(self), **self.health, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Guard:
    """Held-out edits and text, and how much worse an adjustment may make them."""

    held_out: Sequence[Fact]
    """edits that the adjustment is not trained on"""
    texts: Sequence[Row]
    """windows of text that it is not trained on"""
    tolerance: float
    """nats per token by which they may get worse"""

    def examine(self, lm: LanguageModel) -> Health:
        """Measures the model on the held-out edits and text, with the weights as they are."""
        return examine(lm, self.held_out, self.texts)

    def apply(
        self,
        editor: SequentialEditor,
        adapter: Adapter,
        endpoints: tuple[dict[str, Tensor], dict[str, Tensor]],
        merge: bool,
        done: Adjustment,
    ) -> None:
        """Puts the largest fraction of an adjustment into the weights with which nothing gets worse.

        Args:
            editor: whose weights change.
            adapter: the trained adapter.
            endpoints: its factors before and after the training.
            merge: whether the update is added to the weights, or set as their adapter.
            done: gets the fraction, or the reason if no fraction is acceptable.
        """
        before, factors = Snapshot(editor.changed_layers), adapter.factors
        for done.fraction in FRACTIONS:
            adapter.factors = between(*endpoints, done.fraction)
            with adapter.in_place() as model:
                updates = adapter.updates(model)
            for path, update in updates.items():
                layer = editor.changed_layer(path)
                if merge:
                    layer.add(update)
                else:
                    layer.set_adapter(update)
            done.after = self.examine(editor.lm)
            done.reason = done.after.worse_than(done.before, self.tolerance)
            if not done.reason:
                return
            before.restore_weights()
        adapter.factors = factors
