"""Ranks of one run as processes forked from a server that has everything imported; results come back as files."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

import editlab.cli.main
import editlab.editor
from editlab.distributed import ranks
from tests import forked

PATIENCE = 90.0
"""Seconds after which ranks that have not ended are taken to hang."""


def _start(target: Callable[..., None], count: int, *arguments: Any) -> list[Any]:
    """Runs ``target(rank, count, *arguments)`` in a process for each rank; gives the processes, which have ended."""
    processes = [forked.process(target, rank, count, *arguments) for rank in range(count)]
    for process in processes:
        process.join(PATIENCE)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging, f"ranks {hanging} hang"
    return processes


def _call(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    result: Any
    try:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
                                    timeout=timedelta(seconds=60))  # fmt: skip
            ranks.join(timedelta(seconds=60))
        result = function(*arguments)
    except Exception as error:
        result = error
    torch.save(result, Path(folder) / f"result_{rank}")
    os._exit(0)  # some tests leave a rank in a meeting that nobody else comes to


def together(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` gives on each of ``count`` ranks; an exception where it raised one."""
    folder.mkdir()
    _start(_call, count, str(folder), function, arguments)
    return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(count)]


def _command(
    rank: int, count: int, arguments: list[str], folder: str, port: int, dies: tuple[int, int] | None, nodes: bool
) -> None:
    os.chdir(folder)
    sys.stdout = sys.stderr = open(f"said_{rank}.txt", "a")  # noqa: SIM115 - open until the end
    os.environ |= {
        "EDITLAB_CACHE": f"{folder}/cache", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": "0" if nodes else str(rank), "NODE_RANK": str(rank) if nodes else "0",
    }  # fmt: skip
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    editor = editlab.editor.SequentialEditor
    end, log_step = editor.on_fit_end, editor._log_step

    def keep(self: Any) -> None:
        torch.save([layer.weight for layer in self.changed_layers], f"weights_{rank}.pt")
        end(self)

    def die(self: Any, *given: Any) -> None:
        log_step(self, *given)
        if dies == (rank, self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    editor.on_fit_end, editor._log_step = keep, die  # type: ignore[method-assign]
    code = editlab.cli.main.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def command(
    count: int, arguments: list[str], folder: Path, dies: tuple[int, int] | None = None, nodes: bool = False
) -> list[int]:
    """Runs ``editlab`` in ``folder`` as ``count`` ranks that a launcher has started.

    Each leaves ``said_RANK.txt`` and, at the end of ``fit``, ``weights_RANK.pt``.

    Args:
        count: ranks.
        arguments: of the command; devices and strategy are added.
        folder: working directory; the cache is in it, too.
        dies: (rank, step): this rank is killed right after it logged that step.
        nodes: each rank is a node of its own with one device.

    Returns:
        the exit codes, by rank; minus the signal where one was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = (
        ["--trainer.num_nodes", str(count), "--trainer.devices", "1"] if nodes else ["--trainer.devices", str(count)]
    )
    several = [*places, "--trainer.strategy", "editlab_ddp"] if count > 1 else []
    return [p.exitcode for p in _start(_command, count, [*arguments, *several], str(folder), port, dies, nodes)]
