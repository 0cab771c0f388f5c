"""Runs that kill themselves: ``editlab fit`` in a process of its own, ended by SIGKILL at a chosen point.

Points are counted, not timed: each call of the functions below is one, so the same number always means the same place,
inside a step, between the two layers of an update, or in the middle of a file.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import callbacks.forgetting
import callbacks.lora.objective
import editlab.cli.main
import editlab.editor
import editlab.edits.batch
import editlab.edits.edited_layer
import editlab.runs.checkpoint
import editlab.runs.event_log
import editlab.runs.logger
import editlab.runs.run_table
import editlab.values.sources
from editlab.runs.figures import new_figure
from tests import forked

HALF = "half a checkpoint written"


class Clock:
    """Notes points by name, and kills the process at one of them."""

    def __init__(self, die_at: int | None) -> None:
        self.die_at = die_at
        self.points: list[str] = []

    def tick(self, name: str) -> None:
        self.points.append(name)
        if len(self.points) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Makes a point before and after each call of ``owner.name``."""
        plain = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.tick(f"before {name}")
            result = plain(*args, **kwargs)
            self.tick(f"after {name}")
            return result

        setattr(owner, name, watched)

    def within_torch_save(self) -> None:
        """Makes a point where half of a checkpoint's bytes are written."""
        plain = torch.save

        def watched(what: Any, path: Any) -> None:
            plain(what, path)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            self.tick(HALF)
            Path(path).write_bytes(whole)
            self.tick("a checkpoint written, not yet in place")

        torch.save = watched


def _child(arguments: list[str], folder: str, cache: str, die_at: int | None, count_file: str) -> None:
    os.chdir(folder)
    os.environ["EDITLAB_CACHE"] = cache
    sys.stdout = sys.stderr = open(Path(count_file).with_suffix(".log"), "a")  # noqa: SIM115 - open until the end
    torch.set_num_threads(1)
    clock = Clock(die_at)
    clock.around(editlab.edits.edited_layer.EditedLayer, "add")
    clock.around(editlab.edits.batch, "solve")
    clock.around(editlab.values.sources, "optimize_values")
    clock.around(editlab.editor.SequentialEditor, "_log_step")
    clock.around(editlab.runs.logger.RunLogger, "log_metrics")
    clock.around(editlab.runs.run_table, "_write")
    clock.around(editlab.runs.event_log.EventLog, "append")
    callbacks.lora.training.SECONDS = 0.0  # an adjustment is kept after each step
    clock.around(callbacks.lora.objective.Objective, "loss")  # in the middle of an adjustment
    callbacks.forgetting.forgetting_figure = lambda *_: new_figure(1, 1, 0.5, 0.5)[0]  # drawing one takes longest
    clock.around(os, "replace")
    clock.within_torch_save()
    code = editlab.cli.main.main(arguments)
    Path(count_file).write_text("\n".join(clock.points))
    os._exit(code)


def run(arguments: list[str], folder: Path, cache: Path, die_at: int | None = None) -> list[str] | None:
    """Runs ``editlab`` with ``arguments`` in ``folder``.

    Returns:
        the points it went through; None where it was killed at the one with the number ``die_at``, from 1.

    Raises:
        AssertionError: it failed.
    """
    count_file = folder / "points"
    count_file.unlink(missing_ok=True)
    process = forked.process(_child, arguments, str(folder), str(cache), die_at, str(count_file))
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, (folder / "points.log").read_text()[-3000:]
    return count_file.read_text().splitlines()
