"""The training of an adjustment, which is kept on the way, so that a killed run goes on in the middle of it.

No callback and no PEFT here: an objective, and an optimizer of the parameters to train.
"""

from __future__ import annotations

import logging
import pickle
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.lora.objective import Objective
from editlab.distributed import ranks
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import lacks_memory, release
from editlab.utils.files import atomic_file
from editlab.utils.progress import progress
from editlab.utils.rng import rng_state, set_rng_state

log = logging.getLogger(__name__)

SECONDS = 60.0
"""At least so long between two times that a training is kept: a killed run does this much again."""


@dataclass(frozen=True)
class Unfinished:
    """A file in which a training is kept while it goes on.

    Args:
        path: of the file.
        key: tells this training from others: what was kept under another key is none of its own.
    """

    path: Path
    key: str

    def read(self) -> dict[str, Any] | None:
        """What was kept of this very training, on all ranks; None where nothing is."""
        return ranks.on_first(self._read)

    def _read(self) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            log.warning("%s can not be read: the adjustment is trained from its start", self.path)
            return None
        return kept if kept.get("key") == self.key else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Keeps a training's state in place of what was kept before.

        Raises:
            EditLabError: The disk is full.
            UserError: The place can not be written to.
        """
        with atomic_file(self.path) as temporary:
            torch.save({"key": self.key, **state}, temporary)


@dataclass(frozen=True)
class Training:
    """How long and how fast: the learning rate falls from ``lr`` to 0, which costs the rest of the model less."""

    steps: int
    lr: float
    batch_size: int

    def run(
        self,
        lm: LanguageModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        draw: random.Random,
        unfinished: Unfinished | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Takes the steps; gives each part of the loss, the mean over the last quarter of them.

        Args:
            lm: the model, with the parameters to train in it.
            objective: what they are trained for.
            optimizer: of them.
            draw: what rows are drawn by.
            unfinished: where the training is kept on the way; what is found there of it is gone on with.
            stopped: whether the process was told to stop, which is asked after each step.

        Raises:
            FloatingPointError: where a loss is not finite.
            SIGTERMException: where it was stopped, with the training kept.
        """
        course = _Course(objective, optimizer, draw)
        if unfinished is not None:
            course.go_on(unfinished.read())
        kept = time.monotonic()
        done = len(course.seen)
        for number in progress(range(done, self.steps), desc="LoRA", unit="step", initial=done, total=self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - number / self.steps)
            course.step(lm, self.batch_size)
            stop = stopped()
            if unfinished is not None and ranks.number() == 0 and (stop or time.monotonic() - kept >= SECONDS):
                unfinished.write(course.state())
                kept = time.monotonic()
            if stop:  # the Trainer would wait for the end of the batch, which may be an hour away
                raise SIGTERMException
        last = course.seen[-max(1, self.steps // 4) :]
        return {name: sum(step[name] for step in last) / len(last) for name in (last[0] if last else {})}


class _Course:
    """A training as far as it has come."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, draw: random.Random) -> None:
        self.objective, self.optimizer, self.draw = objective, optimizer, draw
        self.decks = {"edits": Deck(len(objective.edits), draw), "others": Deck(len(objective.others), draw)}
        self.seen: list[dict[str, float]] = []
        """the parts of each step's loss"""
        self.pieces = 1
        """in how many pieces a step's rows go through the model; more after memory did not hold them"""

    def step(self, lm: LanguageModel, size: int) -> None:
        """One step on so many edits, and as many others."""
        edits, others = self.decks["edits"].deal(size), self.decks["others"].deal(size)
        parts = self._gradients(lm, edits, others)
        self.optimizer.step()
        self.seen.append(parts)

    def _gradients(self, lm: LanguageModel, edits: list[int], others: list[int]) -> dict[str, float]:
        """The gradients of a step, in as many pieces as memory needs; and the parts of the loss."""
        self.optimizer.zero_grad()
        try:
            if self.pieces > 1:
                return self.objective.gradients(lm, edits, others, self.pieces)
            return self._at_once(lm, edits, others)
        except Exception as error:
            if not lacks_memory(error) or self.pieces >= max(len(edits), len(others)):
                raise
        release()
        self.pieces *= 2
        log.warning("Memory does not hold a step's rows: they are trained on in %d pieces, which takes longer",
                    self.pieces)  # fmt: skip
        return self._gradients(lm, edits, others)

    def _at_once(self, lm: LanguageModel, edits: list[int], others: list[int]) -> dict[str, float]:
        with torch.enable_grad():
            parts = self.objective.loss(lm, edits, others)
            loss = self.objective.total(parts)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss.detach())} after {len(self.seen)} steps")
        loss.backward()
        return {name: float(part.detach()) for name, part in parts.items()}

    def state(self) -> dict[str, Any]:
        """All that the rest of it depends on."""
        return {
            "parameters": [parameter.detach() for parameter in self._parameters()],
            "optimizer": self.optimizer.state_dict(),
            "decks": {name: deck.left for name, deck in self.decks.items()},
            "draw": self.draw.getstate(),
            "random": rng_state(),
            "seen": self.seen,
            "pieces": self.pieces,
        }

    def go_on(self, state: Mapping[str, Any] | None) -> None:
        """From what :meth:`state` gave; from the start where there is none."""
        if state is None:
            return
        with torch.no_grad():
            for parameter, value in zip(self._parameters(), state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, left in state["decks"].items():
            self.decks[name].left = left
        self.draw.setstate(state["draw"])
        set_rng_state(state["random"])
        self.seen, self.pieces = state["seen"], state.get("pieces", 1)
        log.info("An adjustment goes on after %d steps", len(self.seen))

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Deck:
    """Deals numbers below ``count`` in random order, all of them before any comes again."""

    def __init__(self, count: int, draw: random.Random) -> None:
        self.count, self.draw, self.left = count, draw, list[int]()

    def deal(self, size: int) -> list[int]:
        """So many numbers, no two alike; all there are where there are fewer."""
        dealt: list[int] = []
        while len(dealt) < min(size, self.count):
            if not self.left:
                # Those of this hand go to the bottom, so that it has none twice.
                self.left = sorted(self.draw.sample(range(self.count), self.count), key=lambda i: i not in dealt)
            dealt.append(self.left.pop())
        return dealt
