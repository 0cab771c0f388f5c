"""What a call finds and leaves behind as it was: the model's modes, the environment, messages, and a folder."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from editlab.runs import summary
from editlab.utils.compat import calls_not_compiled


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model into eval mode, without gradients and uncompiled, inside the ``with``; afterwards restores it."""
    device = model.device
    training = {module: module.training for module in model.modules()}
    with_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with calls_not_compiled(model):
            yield
    finally:
        model.to(device)  # type: ignore[arg-type]  # the Trainer leaves it on the CPU
        for module, mode in training.items():
            module.training = mode
        for parameter in with_gradient:
            parameter.requires_grad_(True)


@contextmanager
def environment() -> Iterator[None]:
    """Removes the variables that Lightning's seeding sets, which would seed whatever the process does later."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def root_folder(folder: str | Path | None) -> Iterator[Path]:
    """Yields the folder that holds the run's; without one a temporary folder, of which no message tells."""
    if folder is not None:
        yield Path(folder)
        return
    log = logging.getLogger(summary.__name__)
    log.addFilter(_is_important)  # the summary of the run names files that are removed
    try:
        with tempfile.TemporaryDirectory(prefix="editlab-") as temporary:
            yield Path(temporary)
    finally:
        log.removeFilter(_is_important)


def _is_important(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO
