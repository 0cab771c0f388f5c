"""The training of an adjustment, whose state is saved from time to time, so that a killed run resumes in its middle.

This module knows neither the callback nor PEFT, only an objective and an optimizer of the parameters to train.
"""

from __future__ import annotations

import logging
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
from editlab.utils.torch_files import DamagedFileError, load_verified

log = logging.getLogger(__name__)

SECONDS = 60.0
"""Least time between two saves of the training's state: a killed run repeats at most about this much."""


@dataclass(frozen=True)
class Unfinished:
    """A file that holds the state of a training in progress.

    Args:
        path: path of the file.
        key: identifies the training: a state saved under another key is ignored.
    """

    path: Path
    key: str

    def read(self) -> dict[str, Any] | None:
        """The saved state of this training, on all ranks; None if there is none."""
        return ranks.on_first(self._read)

    def _read(self) -> dict[str, Any] | None:
        try:
            if not self.path.exists():
                return None
            kept = load_verified(self.path)
        except DamagedFileError:
            log.warning("%s is damaged: the adjustment is trained from its start", self.path)
            return None
        return kept if isinstance(kept, dict) and kept.get("key") == self.key else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Saves a training's state in place of the last one.

        Raises:
            EditLabError: The disk is full.
            UserError: The file cannot be written.
        """
        with atomic_file(self.path) as temporary:
            torch.save({"key": self.key, **state}, temporary)


@dataclass(frozen=True)
class Training:
    """Settings of a training. The learning rate falls linearly from ``lr`` to 0, which harms the model less."""

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
        """Runs the training.

        Args:
            lm: the model, with the parameters to train in it.
            objective: the loss.
            optimizer: optimizer of those parameters.
            draw: generator that rows are drawn by.
            unfinished: the file of the training's state; if it holds one, the training resumes from it.
            stopped: whether the process should stop; called after each step.

        Returns:
            Each part of the loss, the mean over the last quarter of the steps.

        Raises:
            FloatingPointError: A loss is not finite.
            SIGTERMException: It was stopped; the state is saved.
        """
        course = _Course(objective, optimizer, draw)
        if unfinished is not None:
            course.resume(unfinished.read())
        saved = time.monotonic()
        done = len(course.seen)
        for number in progress(range(done, self.steps), desc="LoRA", unit="step", initial=done, total=self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - number / self.steps)
            course.step(lm, self.batch_size)
            stop = stopped()
            if unfinished is not None and ranks.number() == 0 and (stop or time.monotonic() - saved >= SECONDS):
                unfinished.write(course.state())
                saved = time.monotonic()
            if stop:  # the Trainer would wait for the end of the batch, which may be an hour away
                raise SIGTERMException
        last = course.seen[-max(1, self.steps // 4) :]
        return {name: sum(step[name] for step in last) / len(last) for name in (last[0] if last else {})}


class _Course:
    """The state of a training."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, draw: random.Random) -> None:
        self.objective, self.optimizer, self.draw = objective, optimizer, draw
        self.decks = {"edits": Deck(len(objective.edits), draw), "others": Deck(len(objective.other_rows), draw)}
        self.seen: list[dict[str, float]] = []
        """the parts of each step's loss"""
        self.pieces = 1
        """number of pieces in which a step's rows go through the model; doubled when memory does not suffice"""

    def step(self, lm: LanguageModel, size: int) -> None:
        """Takes one step on up to ``size`` edit rows and up to ``size`` other rows."""
        edits, other_rows = self.decks["edits"].deal(size), self.decks["others"].deal(size)
        parts = self._gradients(lm, edits, other_rows)
        self.optimizer.step()
        self.seen.append(parts)

    def _gradients(self, lm: LanguageModel, edits: list[int], other_rows: list[int]) -> dict[str, float]:
        """Computes a step's gradients, in as many pieces as memory requires, and returns the parts of the loss."""
        self.optimizer.zero_grad()
        try:
            if self.pieces > 1:
                return self.objective.gradients(lm, edits, other_rows, self.pieces)
            return self._gradients_at_once(lm, edits, other_rows)
        except Exception as error:
            if not lacks_memory(error) or self.pieces >= max(len(edits), len(other_rows)):
                raise
        release()
        self.pieces *= 2
        log.warning("Memory does not hold the rows of a step: from now on they are processed in %d pieces, which takes "
                    "longer", self.pieces)  # fmt: skip
        return self._gradients(lm, edits, other_rows)

    def _gradients_at_once(self, lm: LanguageModel, edits: list[int], other_rows: list[int]) -> dict[str, float]:
        with torch.enable_grad():
            parts = self.objective.loss(lm, edits, other_rows)
            loss = self.objective.total(parts)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss.detach())} after {len(self.seen)} steps")
        loss.backward()
        return {name: float(part.detach()) for name, part in parts.items()}

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "parameters": [parameter.detach() for parameter in self._parameters()],
            "optimizer": self.optimizer.state_dict(),
            "decks": {name: deck.left for name, deck in self.decks.items()},
            "draw": self.draw.getstate(),
            "random": rng_state(),
            "seen": self.seen,
            "pieces": self.pieces,
        }

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Loads what :meth:`state` returned; with None, the training starts from its beginning."""
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
        log.info("An adjustment resumes after %d steps", len(self.seen))

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Deck:
    """Deals numbers below ``count`` in random order; each is dealt once before any is dealt again."""

    def __init__(self, count: int, draw: random.Random) -> None:
        self.count, self.draw, self.left = count, draw, list[int]()

    def deal(self, size: int) -> list[int]:
        """Deals up to ``size`` different numbers: all, if there are fewer."""
        dealt: list[int] = []
        while len(dealt) < min(size, self.count):
            if not self.left:
                # Numbers of this hand go to the bottom, so that none is dealt to it twice.
                self.left = sorted(self.draw.sample(range(self.count), self.count), key=lambda i: i not in dealt)
            dealt.append(self.left.pop())
        return dealt
