"""A callback that deliberately injects faults into some batches, for experiments with edit trust."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.subject_keys import locate
from editlab.lm.language_model import LanguageModel
from editlab.runs.summary import run_folder
from editlab.utils.files import atomic_file
from editlab.utils.validation import at_least_one

KINDS = ("noise", "norm", "shuffle", "contradiction", "wrong_key")
"""Gross faults, which spoil a whole batch."""
GRADED = ("noise_0.1", "noise_0.2", "noise_0.3", "noise_0.4", "noise_0.5", "wrong_fact", "wrong_span", "duplicate")
"""Graded faults, from hardly harmful ones up: what a mistake in data or in an optimization does to a few facts."""
FILE = "faults.json"


class InjectFaults(EditCallback):
    """Injects faults into a random fraction of the batches; the kinds of faults alternate.

    - ``noise``: Gaussian noise with the value's norm is added to each value;
    - ``norm``: values are multiplied by a factor from 10 to 50;
    - ``shuffle``: each fact gets another fact's value;
    - ``contradiction``: half of the facts occur twice, the second time with another fact's target and value;
    - ``wrong_key``: keys are read at the last word of the prompt instead of the subject.

    Those are gross; the graded ones are

    - ``noise_0.1`` to ``noise_0.5``: noise with that fraction of the value's norm;
    - ``wrong_fact``: one fact of the batch gets another fact's value;
    - ``wrong_span``: each key is read one token before the subject's last, or one after it if the subject is one token;
    - ``duplicate``: one fact of the batch occurs a second time, with another fact's target and value.

    At the end it writes ``faults.json`` with the batches that got a fault, and with the retention of the facts of all
    other batches, whether the gate kept them or not, during the run and at its end.

    Args:
        share: fraction of the batches that get a fault; 0 only measures.
        seed: seed of the choice of batches.
        first: number of the first batch that may get a fault.
        every_n_batches: number of batches between two points of the curve.
        sample: number of facts that are evaluated at each point, spread evenly over all facts without a fault so far.
        kinds: kinds of faults to inject, of :data:`KINDS` and :data:`GRADED`; default: all gross ones.

    Raises:
        UserError: A kind is unknown.
    """

    priority = 20  # before replay and trust read the plan

    def __init__(
        self,
        share: float = 0.1,
        seed: int = 0,
        first: int = 1,
        every_n_batches: int = 10,
        sample: int = 64,
        kinds: list[str] | None = None,
    ) -> None:
        self.kinds = kinds or list(KINDS)
        for kind in self.kinds:
            if kind not in (*KINDS, *GRADED):
                raise UserError(f"InjectFaults.kinds has {kind!r}: the kinds are {', '.join((*KINDS, *GRADED))}.")
        self.share = share
        self.seed = seed
        self.first = first
        at_least_one("InjectFaults", every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self.sample = sample
        self.faults: dict[int, str] = {}
        self.good: list[Fact] = []
        self.curve: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the batches that get a fault."""
        assert isinstance(pl_module, SequentialEditor)
        pl_module.method.require_closed_form("InjectFaults", "its faults are of keys and values")
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        draw = random.Random(self.seed)
        count = round(self.share * batches)
        if count > batches - self.first:
            raise UserError(
                f"InjectFaults.share is {self.share} of {batches} batches, and the first {self.first} get no fault: "
                "give a smaller share, or set first to 0."
            )
        chosen = draw.sample(range(self.first, batches), count)
        kinds = [self.kinds[i % len(self.kinds)] for i in range(count)]
        self.faults = dict(sorted(zip(chosen, kinds, strict=True)))

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Measure a point of the curve every ``every_n_batches`` batches."""
        batch = outcome.plan.step
        if batch not in self.faults:
            self.good += [entry.fact for entry in editor.ledger if entry.batch == batch]
        if (batch + 1) % self.every_n_batches == 0 and self.good:
            some = self.good[:: max(1, len(self.good) // self.sample)][: self.sample]
            scores = score_facts(editor.lm, some, paraphrases=False, neighbors=0).edit
            point = {"accuracy": float(scores.hit_new.float().mean())} | editor.evaluation.language(editor.lm)
            self.curve[editor.edits] = point

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Inject the fault of this batch, if it has one."""
        kind = self.faults.get(plan.step)
        if kind is not None:
            inject(plan, kind, seed=1000 * self.seed + plan.step, lm=editor.lm)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the facts of all batches without a fault, and write ``faults.json``."""
        assert isinstance(pl_module, SequentialEditor)
        entries = list(pl_module.ledger)
        found = {
            "faults": self.faults,
            "kept": sorted({entry.batch for entry in entries if entry.kept}),
            "batches": 1 + max(entry.batch for entry in entries),
            "good": pl_module.evaluation.measure(pl_module.lm, self.good, "Good edits"),
            "curve": self.curve,
        }
        with atomic_file(run_folder(trainer) / FILE) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1), encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far; the batches with faults are drawn again from the seed."""
        return {"curve": self.curve, "good": [fact.to_dict() for fact in self.good]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.curve = dict(state_dict["curve"])
        self.good = [Fact.from_dict(fact) for fact in state_dict["good"]]


def inject(plan: EditPlan, kind: str, seed: int, lm: LanguageModel | None = None) -> None:
    """Change the facts or targets of a plan in place.

    A batch of one fact has no other fact whose value or target could be taken, so it stays as it is then.

    Args:
        plan: the plan.
        kind: one of :data:`KINDS` or :data:`GRADED`.
        seed: seed of the noise, and of the choice of facts.
        lm: the model whose tokens ``wrong_span`` counts; other kinds do not need it.

    Raises:
        ValueError: The kind of fault is unknown, or needs the model.
    """
    draw = torch.Generator().manual_seed(seed)
    count = len(plan.facts)

    def noisy(values: Tensor) -> Tensor:
        fraction = float(kind.removeprefix("noise").removeprefix("_") or 1)
        noise = torch.randn(values.shape, generator=draw).to(values)
        noise = noise * values.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        return values + fraction * noise

    def longer(values: Tensor) -> Tensor:
        return values * (10 + 40 * torch.rand(len(values), 1, generator=draw).to(values))

    if kind == "noise" or kind.startswith("noise_"):
        plan.targets = plan.targets.changed(noisy)
    elif kind == "norm":
        plan.targets = plan.targets.changed(longer)
    elif kind == "shuffle":
        plan.targets = plan.targets.changed(lambda values: values.roll(1, 0))
    elif kind == "contradiction":
        half = count // 2
        doubled = [replace(fact, target_new=other.target_new)
                   for fact, other in zip(plan.facts[:half], plan.facts[half:], strict=False)]  # fmt: skip
        plan.facts = [*plan.facts[:half], *doubled, *plan.facts[2 * half :]]
    elif kind == "wrong_key":
        plan.facts = [about_last_word(fact) for fact in plan.facts]
    elif kind in ("wrong_fact", "duplicate"):
        one, other = (torch.randperm(count, generator=draw)[:2].tolist() * 2)[:2]
        if kind == "wrong_fact":
            mine = [other if row == one else row for row in range(count)]
            plan.targets = plan.targets.changed(lambda values: values[mine])
        else:  # the batch keeps its size: the other fact gives its target and value to a second edit of the one
            facts = list(plan.facts)
            facts[other] = replace(facts[one], target_new=facts[other].target_new)
            plan.facts = facts
    elif kind == "wrong_span" and lm is not None:
        plan.facts = [one_token_off(lm, fact) for fact in plan.facts]
    else:
        raise ValueError(f"{kind!r} is not a kind of fault: choose among {', '.join((*KINDS, *GRADED))}.")


def about_last_word(fact: Fact) -> Fact:
    """Return the fact with the last word of its question as the subject, so that keys are read there."""
    head, space, last = fact.question.rstrip().rpartition(" ")
    return replace(fact, subject=last, prompt=f"{head}{space}{{}}")


def one_token_off(lm: LanguageModel, fact: Fact) -> Fact:
    """Return the fact with a subject that ends one token early, or one token late if it is one token.

    A subject that is the whole question's only token stays as it is.
    """
    encoding, last = locate(lm, fact)
    start = fact.subject_span[0]
    # Several tokens may make up one letter, whose ends are the same.
    ends = max((stop for _, stop in encoding.offsets[:last] if stop < encoding.offsets[last][1]), default=0)
    if ends <= start:  # the token before is none of the subject's
        if last + 1 == len(encoding.offsets):
            return fact
        ends = encoding.offsets[last + 1][1]
    question = fact.question
    return replace(fact, subject=question[start:ends], prompt=f"{question[:start]}{{}}{question[ends:]}")
