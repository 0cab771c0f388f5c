"""Starts the runs of an experiment: each in a process of its own, here or on the machines of a Ray cluster.

In a run's folder lie, beside what ``editlab fit`` writes, ``run.log`` (all output), ``provenance.json`` (what it was
started with) and, where it ended badly, ``failed.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from editlab.errors import EditLabError
from editlab.utils.files import atomic_file

ROOT = Path(__file__).parents[1]
T = TypeVar("T")

LOG, PROVENANCE, FAILED = "run.log", "provenance.json", "failed.json"
WHERE = "--trainer.logger.init_args."
"""Arguments that say where a run lies, and not what it does, begin so."""

JOINT, UNKNOWN = " | ", "unknown"
"""Between the values of what was made in several ways; in place of one that is not noted."""

STOPPED = {130, 143, -2, -15}
"""Exit codes of what was told to stop, which is no failure."""


class _Begun:
    """Processes that this one has begun; none is begun unseen by what stops them all."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _Begun, ()  # a worker of Ray's has its own

    def begin(self, command: Sequence[str], **how: Any) -> subprocess.Popen[bytes] | None:
        """A new process; None where all are to stop."""
        with self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(command, **how)
            self.running.add(process)
        return process

    def stop(self) -> None:
        """Ends all there are, and begins no more."""
        with self._lock:
            self.stopping = True
        for process in list(self.running):
            process.terminate()


_BEGUN = _Begun()


@dataclass(frozen=True)
class Job:
    """One run to be started."""

    folder: Path
    arguments: tuple[str, ...]
    """of ``editlab``"""
    threads: int

    @property
    def settings(self) -> str:
        """A digest (8 hex digits) of what is run, wherever it lies: runs that have the same one are told the same.

        Files in the repository or beside it count from there, so that another checkout gives the same one.
        """
        told = "\n".join(argument for argument in self.arguments if not argument.startswith(WHERE))
        return hashlib.sha256(told.replace(f"{ROOT.parent}/", "../").encode()).hexdigest()[:8]


def start(job: Job, variables: Mapping[str, str] | None = None) -> int:
    """Runs a job, or resumes it from its checkpoint.

    Args:
        job: what to run.
        variables: of the environment, beside those of this process.

    Returns:
        Its exit code; 1 where its folder can not be written to, and 143 where it was not begun as all are to stop.
    """
    try:
        code = _run(job, variables or {})
    except (OSError, EditLabError) as error:
        _failed(job, str(error))
        return 1
    if code and code not in STOPPED and not _BEGUN.stopping:
        _failed(job, f"it ended with {code}")
    return code


def _failed(job: Job, why: str) -> None:
    with suppress(OSError, EditLabError):  # where nothing can be written, its status is that it is still to run
        _write(job.folder / FAILED, {"why": why, "log": str(job.folder / LOG)})


def _run(job: Job, variables: Mapping[str, str]) -> int:
    (job.folder / FAILED).unlink(missing_ok=True)
    arguments = list(job.arguments)
    checkpoint, noted = job.folder / "checkpoints" / "last.ckpt", {"settings": job.settings, **provenance()}
    if checkpoint.exists():
        arguments += ["--ckpt_path", str(checkpoint)]
        noted = _with_earlier(read_provenance(job.folder), noted)
    _write(job.folder / PROVENANCE, noted)
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "editlab.cli.main", *arguments]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        process = _BEGUN.begin(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        if process is None:
            return 128 + signal.SIGTERM
        try:
            return process.wait()
        finally:
            _BEGUN.running.discard(process)


def read_provenance(folder: Path) -> dict[str, str]:
    """What a run was started with, as far as it is noted and can be read."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_earlier(earlier: Mapping[str, str], noted: Mapping[str, str]) -> dict[str, str]:
    """What a run that goes on is made with: all that it was ever started with, where that differs."""
    before = {name: earlier.get(name, UNKNOWN).split(JOINT) for name in noted}
    return {name: JOINT.join(dict.fromkeys([*before[name], value])) for name, value in noted.items()}


def _write(path: Path, content: Mapping[str, object]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def provenance() -> dict[str, str]:
    """What the code and the machine are: git's revision ("+" where files were changed since), the CPU and GPUs.

    Tables and figures do not count as changed: experiments write them.
    """
    written = (":!results", ":!figs")
    changed = "+" if _says("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written) else ""
    gpus = _says("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {
        "revision": _says("git", "rev-parse", "--short", "HEAD") + changed,
        "machine": ", ".join([f"{cores()} x {cpu_name()}", *gpus]),
    }


def _says(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if found.returncode else found.stdout.strip()


def cores() -> int:
    """Cores that this process may run on, where the system tells; else those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def processes(jobs: Sequence[Job], workers: int, after: Mapping[Job, Job]) -> Iterator[tuple[Job, int]]:
    """Runs jobs on this machine, ``workers`` at a time.

    Args:
        jobs: what to run, in the order in which they start.
        workers: jobs at a time.
        after: job -> another of them that it waits for, however that one ends.

    Yields:
        Each job with its exit code, as it ends.
    """
    _BEGUN.stopping = False
    with ThreadPoolExecutor(workers) as pool, told_to_stop():

        def next_of(running: Sequence[Future[int]]) -> Future[int]:
            return wait(running, return_when=FIRST_COMPLETED).done.pop()

        try:
            for job, code in _as_they_end(jobs, after, lambda job: pool.submit(start, job), next_of):
                yield job, code.result()
        except BaseException:  # whatever ends this ends what it started: nothing runs on unseen, and no more is begun
            pool.shutdown(wait=False, cancel_futures=True)
            _BEGUN.stop()
            raise


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Within it SIGTERM ends this process as Ctrl-C does: by an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_they_end(
    jobs: Sequence[Job], after: Mapping[Job, Job], submit: Callable[[Job], T], next_of: Callable[[Sequence[T]], T]
) -> Iterator[tuple[Job, T]]:
    """Submits jobs as soon as what they wait for has ended; gives each as it ends, with what stands for it."""
    waiting, running, ended = list(jobs), dict[T, Job](), set[Job]()
    while waiting or running:
        ready = [job for job in waiting if job not in after or after[job] in ended]
        running |= {submit(job): job for job in ready}
        waiting = [job for job in waiting if job not in ready]
        task = next_of(list(running))
        job = running.pop(task)
        ended.add(job)
        yield job, task


def over_ray(jobs: Sequence[Job], workers: int, after: Mapping[Job, Job]) -> Iterator[tuple[Job, int]]:
    """:func:`processes` on the machines of a Ray cluster, ``workers`` at a time on each.

    The cluster is that of ``RAY_ADDRESS``, or one that was started on this machine, else one of this machine alone.
    Its machines are alike, and have this checkout, its environment, the facts and the runs' folder at the same paths.
    A run whose machine is lost goes on elsewhere from its checkpoint. Exits with a sentence where Ray is absent.
    """
    try:
        import ray
    except ImportError:
        sys.exit("The launcher ray needs Ray: pip install 'editlab[ray]', or leave --launcher out.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # scripts are no package that a worker could import
    try:
        share = {name: ray.cluster_resources().get(name, 0) / len(ray.nodes()) / workers for name in ("CPU", "GPU")}
        needs = {"num_cpus": max(1, math.ceil(share["CPU"])), "num_gpus": min(1.0, share["GPU"])}
        variables = {name: value for name, value in os.environ.items() if name.startswith(("EDITLAB_", "HF_"))}
        remote: Any = ray.remote(start)

        def submit(job: Job) -> Any:
            return remote.options(**needs).remote(job, variables)

        for job, task in _as_they_end(jobs, after, submit, lambda tasks: ray.wait(list(tasks), num_returns=1)[0][0]):
            try:
                yield job, ray.get(task)
            except ray.exceptions.RayError as error:
                _failed(job, str(error))
                yield job, 1
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
        if ours:
            ray.shutdown()


Launcher = Callable[[Sequence[Job], int, Mapping[Job, Job]], Iterator[tuple[Job, int]]]
LAUNCHERS: dict[str, Launcher] = {"local": processes, "ray": over_ray}
"""name -> jobs, jobs at a time on one machine, which waits for which -> each job with its exit code"""
