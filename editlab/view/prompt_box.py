"""Asking a model with and without its edits: one unedited model in memory, on which edits are put for each question."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from editlab.lm.generate import Answer, answer, require_words
from editlab.runs.delta import Delta


@dataclass(frozen=True)
class Asked:
    """The answers to one prompt without and with the edits of a checkpoint."""

    before: Answer
    after: Answer
    adapted: int
    """number of modules with a separate adapter in the run, which the answer does not have"""


class PromptBox:
    """Answers prompts on checkpoints; at most one model is in memory, and one prompt is answered at a time.

    Args:
        base: name or path of the base model of all checkpoints; default: the one that each checkpoint names.
        device: device of the model; default: the CPU.
    """

    def __init__(self, base: str | None = None, device: torch.device | None = None) -> None:
        self.base = base
        self.device = device or torch.device("cpu")
        self._lock = Lock()
        self._delta: tuple[tuple[Path, int], Delta] | None = None
        self._loaded: tuple[tuple[str, str, torch.dtype], Any, Any] | None = None

    def needs_loading(self, checkpoint: Path) -> bool:
        """Whether a model must be loaded before prompts on this checkpoint can be answered.

        Raises:
            UserError: The checkpoint cannot be read.
        """
        with self._lock:
            delta = self._read(checkpoint)
            return self._loaded is None or self._loaded[0] != _model_of(delta)

    def ask(self, checkpoint: Path, prompt: str, new_tokens: int = 20, top: int = 5) -> Asked:
        """Answers a prompt, after loading the model if another one or none is in memory.

        Raises:
            UserError: The prompt is empty or too long, the checkpoint cannot be read, or its model cannot be found or
                is not the one that was edited.
        """
        require_words(prompt)
        with self._lock:
            delta = self._read(checkpoint)
            model, tokenizer = self._load(delta)
            before = answer(model, tokenizer, prompt, new_tokens, top)
            with delta.lent_to(model):
                after = answer(model, tokenizer, prompt, new_tokens, top)
        return Asked(before, after, delta.history.adapted)

    def _read(self, checkpoint: Path) -> Delta:
        """The edits of a checkpoint, which a run may have replaced since they were last read."""
        key = (checkpoint, checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0)
        if self._delta is None or self._delta[0] != key:
            self._delta = (key, Delta.from_checkpoint(checkpoint))
        return self._delta[1]

    def _load(self, delta: Delta) -> tuple[Any, Any]:
        key = _model_of(delta)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the other one is loaded, so that there is never more than one
            gc.collect()
            model, tokenizer = delta.base(self.base)
            model.to(self.device)  # type: ignore[arg-type]
            self._loaded = (key, model, tokenizer)
        return self._loaded[1:]


def _model_of(delta: Delta) -> tuple[str, str, torch.dtype]:
    return delta.language_model, delta.fingerprint, delta.dtype


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = {file: file.stat().st_mtime for file in (folder / "checkpoints").glob("*.ckpt")}
    return sorted(found, key=lambda file: (-found[file], file.stem != "last", file.name))
