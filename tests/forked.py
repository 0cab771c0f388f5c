"""Processes of their own, forked from a server that has imported everything, for which a new interpreter takes seconds.

The server is started by the first test that needs it. Whatever a process would import later is imported here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard

import callbacks.lora.objective  # noqa: F401
import editlab.cli.main
import editlab.cli.training
import tests.tiny  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")


def process(target: Callable[..., None], *arguments: Any) -> Any:
    """Start ``target(*arguments)`` in a forked process, and return that process."""
    CONTEXT.set_forkserver_preload([__name__])
    forked = CONTEXT.Process(target=target, args=arguments)
    forked.start()
    return forked


class Command:
    """A command of editlab, with the interface of ``subprocess.Popen`` that :mod:`editlab.experiments.launch` uses."""

    def __init__(self, command: Sequence[str], *, stdout: Any, stderr: Any, env: dict[str, str], cwd: Path) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "editlab.cli.main"]
        assert stdout is stderr
        self._process = process(_command, list(command[3:]), stdout.name, env, str(cwd))

    def wait(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        self._process.join()
        code: int = self._process.exitcode
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the process."""
        self._process.terminate()


def _command(arguments: list[str], log: str, environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115 - open until the end
    torch.set_num_threads(1)
    code = editlab.cli.main.main(arguments)
    sys.stdout.flush()
    os._exit(code)
