"""Choice of the number of compute threads on this machine, and of how they wait for each other.

PyTorch divides each operation among OpenMP threads, which by default keep a core busy while they wait for each other.
On an idle machine this is fastest: threads that sleep instead take half as long again for values on two cores. On a
machine with other work they wait for a thread that is not running, and a run takes three times as long
(``results/busy_machine.csv``). So where other programs are busy at the start, threads sleep
(:func:`wait_passively_if_busy`, before torch is imported), and there are no more of them than there are free cores
(:func:`choose_threads`). What the user has set in the environment is never changed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

import psutil

log = logging.getLogger(__name__)

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP threads wait: the standard's, GNU's and Intel's."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which a user fixes the number of threads."""
_RANK_VARIABLE = "LOCAL_RANK"
"""Set in a process that a launcher started as one of several on this machine; the launcher divides the cores."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit of processor time (control groups, version 2)."""
_SHORTEST = 0.25
"""Seconds below which a measurement of the load is unreliable."""


def usable_cores() -> float:
    """Return the number of cores that this process may use: those it is bound to, limited by its container's quota."""
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        bound = os.cpu_count() or 1
    return min(float(bound), _quota())


def _quota() -> float:
    """Return the container's limit of processor time, in cores; infinity if there is no limit."""
    try:
        limit, period = _QUOTA.read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # no such file, or the word "max" as the limit
        return float("inf")


class _Times(NamedTuple):
    """Processor seconds since the machine or the process was started."""

    machine: float
    """total time of all cores, idle or not"""
    idle: float
    """time in which cores had no work, or only work of lower priority than this process"""
    own: float
    """time in which this process worked"""


class LoadMeter:
    """Measures how many cores other processes leave free, from its construction to each reading.

    The work of this process itself in between, such as importing torch, does not count as load.
    """

    def __init__(self) -> None:
        self._start = _times()

    def free_cores(self) -> float | None:
        """Return the average number of free cores, of those that the process may use.

        None if the time since the construction is too short to measure, or the system does not report such times.
        """
        if self._start is None or (now := _times()) is None:
            return None
        machine, idle, own = (b - a for a, b in zip(self._start, now, strict=True))
        cores = os.cpu_count() or 1
        if machine < _SHORTEST * cores:
            return None
        return max(0.0, min(usable_cores(), cores * (idle + own) / machine))


def _times() -> _Times | None:
    try:
        whole, own = psutil.cpu_times(), psutil.Process().cpu_times()
    except (psutil.Error, OSError):
        return None
    idle = whole.idle + getattr(whole, "iowait", 0.0)
    if not _is_nice():
        idle += getattr(whole, "nice", 0.0)  # processes of lower priority give way to this one
    # The time of virtual machines' guests is part of the user's.
    counted = sum(whole) - getattr(whole, "guest", 0.0) - getattr(whole, "guest_nice", 0.0)
    return _Times(counted, idle, own.user + own.system)


def _is_nice() -> bool:
    """Return whether this process itself runs at a lowered priority."""
    return hasattr(os, "getpriority") and os.getpriority(os.PRIO_PROCESS, 0) > 0


def wait_passively_if_busy(meter: LoadMeter, environment: MutableMapping[str, str] = os.environ) -> None:
    """Make OpenMP threads sleep while they wait if other programs are busy, unless the environment sets how they wait.

    OpenMP reads the setting once, when torch is imported, so this has no effect on the calling process afterwards;
    processes that it starts inherit the setting. It takes as long as the measurement of the load: 0.3 seconds.
    """
    if any(name in environment for name in WAIT_VARIABLES):
        return
    if meter.free_cores() is None:
        time.sleep(_SHORTEST + 0.05)
    free = meter.free_cores()
    if free is not None and round(free) < usable_cores():
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def choose_threads(meter: LoadMeter) -> None:
    """Make torch compute with as many threads as there are free cores, at least one and at most its own default.

    Nothing is changed if the user has fixed the number by an environment variable (:data:`THREAD_VARIABLES`), or if
    the process is one of several that a launcher has started.
    """
    if _is_fixed() or _RANK_VARIABLE in os.environ:
        return
    import torch

    default = torch.get_num_threads()
    free = meter.free_cores()
    threads = max(1, min(default, round(usable_cores() if free is None else free)))
    if threads < default:
        log.info(
            "Other programs are busy or the cores are limited: computing with %d of %d threads (OMP_NUM_THREADS sets "
            "another number).", threads, default,
        )  # fmt: skip
        torch.set_num_threads(threads)


def restore_threads(threads: int | None) -> None:
    """Make torch compute with the number of threads that a checkpoint was made with.

    On some processors the number of threads changes the last bits of sums, so a resumed run uses the same number,
    unless the user has fixed another one.

    Args:
        threads: the number of threads of the earlier run; None if its checkpoint does not record it.
    """
    if threads is None or _is_fixed():
        return
    import torch

    if threads != torch.get_num_threads() and threads <= (os.cpu_count() or 1):
        log.info("Computing with %d threads, as before the interruption.", threads)
        torch.set_num_threads(threads)


def _is_fixed() -> bool:
    return any(name in os.environ for name in THREAD_VARIABLES)
