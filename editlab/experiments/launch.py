"""Starts the runs of an experiment: each in a process of its own, on this machine or on those of a Ray cluster.

A run's folder holds, next to what ``editlab fit`` writes, ``run.log`` (all output), ``provenance.json`` (what it was
started with) and, if it failed, ``failed.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
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

import yaml

from editlab.errors import EditLabError, UserError
from editlab.experiments.csv_files import UNKNOWN
from editlab.experiments.provenance import RECIPE_CONTENT, provenance, write_json, write_provenance

T = TypeVar("T")

LOG, FAILED = "run.log", "failed.json"
LOCATION = "--trainer.logger.init_args."
"""Arguments that say where a run's folder lies, and not what the run does, begin so."""

STOPPED = {130, 143, -2, -15}
"""Exit codes of a run that was interrupted or terminated, which is no failure."""


class _Processes:
    """The runs that this process has started; once they are stopped, no more are started."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes] | None:
        """A new process; None after :meth:`stop`."""
        with self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(command, **options)
            self.running.add(process)
        return process

    def stop(self) -> None:
        """Terminates all of them, and starts no more."""
        with self._lock:
            self.stopping = True
        for process in list(self.running):
            process.terminate()


_PROCESSES = _Processes()


@dataclass(frozen=True)
class Job:
    """One run to be started."""

    folder: Path
    """the run's folder"""
    arguments: tuple[str, ...]
    """of ``editlab``"""
    threads: int
    """cores that it may use"""
    project: Path
    """folder that it runs in: relative paths in the arguments count from there"""

    @property
    def settings(self) -> str:
        """Digest (8 hex digits) of what the run does, wherever its folder lies.

        Files in the project or next to it count relative to it, so that another checkout has the same digest.
        """
        lines = "\n".join(argument for argument in self.arguments if not argument.startswith(LOCATION))
        return hashlib.sha256(lines.replace(f"{self.project.parent}/", "../").encode()).hexdigest()[:8]

    @property
    def recipe_content(self) -> str:
        """Digest (8 hex digits) of the recipe's settings; unknown if it cannot be read, which its run will report."""
        recipe = self.arguments[self.arguments.index("--config") + 1] if "--config" in self.arguments else ""
        try:
            content = yaml.safe_load((self.project / recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return UNKNOWN
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def start(job: Job, variables: Mapping[str, str] | None = None) -> int:
    """Runs a job, or resumes it from its checkpoint.

    Args:
        job: what to run.
        variables: of the environment, over those of this process.

    Returns:
        Its exit code; 1 if its folder cannot be written to, and 143 if all runs are being stopped.
    """
    try:
        code = _run(job, variables or {})
    except (OSError, EditLabError) as error:
        _note_failure(job, str(error))
        return 1
    if code and code not in STOPPED and not _PROCESSES.stopping:
        _note_failure(job, f"it ended with exit code {code}")
    return code


def _note_failure(job: Job, why: str) -> None:
    with suppress(OSError, EditLabError):  # without this file, the run's status is "to run"
        write_json(job.folder / FAILED, {"why": why, "log": str(job.folder / LOG)})


def _run(job: Job, variables: Mapping[str, str]) -> int:
    (job.folder / FAILED).unlink(missing_ok=True)
    checkpoint = job.folder / "checkpoints" / "last.ckpt"
    arguments = [*job.arguments, *(["--ckpt_path", str(checkpoint)] if checkpoint.exists() else [])]
    made = {"settings": job.settings, RECIPE_CONTENT: job.recipe_content, **provenance(job.project)}
    write_provenance(job.folder, made, resumed=checkpoint.exists())
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "editlab.cli.main", *arguments]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        process = _PROCESSES.start(command, stdout=log, stderr=log, env=environment, cwd=job.project)
        if process is None:
            return 128 + signal.SIGTERM
        try:
            return process.wait()
        finally:
            _PROCESSES.running.discard(process)


def processes(jobs: Sequence[Job], workers: int, after: Mapping[Job, Job]) -> Iterator[tuple[Job, int]]:
    """Runs jobs on this machine, ``workers`` at a time.

    Args:
        jobs: what to run, in the order in which they start.
        workers: number of jobs at a time.
        after: job -> another one of ``jobs`` that it waits for, whether that one fails or not.

    Yields:
        Each job with its exit code, as it ends.
    """
    _PROCESSES.stopping = False
    with ThreadPoolExecutor(workers) as pool, sigterm_as_exit():

        def next_of(running: Sequence[Future[int]]) -> Future[int]:
            return wait(running, return_when=FIRST_COMPLETED).done.pop()

        try:
            for job, code in _in_order_of_end(jobs, after, lambda job: pool.submit(start, job), next_of):
                yield job, code.result()
        except BaseException:  # an interrupt too: no run may be left behind, and none may start
            pool.shutdown(wait=False, cancel_futures=True)
            _PROCESSES.stop()
            raise


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Within it SIGTERM ends this process as Ctrl-C does: by an exception, so that its runs are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_order_of_end(
    jobs: Sequence[Job], after: Mapping[Job, Job], submit: Callable[[Job], T], next_of: Callable[[Sequence[T]], T]
) -> Iterator[tuple[Job, T]]:
    """Submits each job once the one that it waits for has ended; yields jobs as they end, with their task.

    Args:
        jobs: in the order in which they are submitted.
        after: job -> the job that it waits for.
        submit: starts a job and returns its task.
        next_of: waits until one of the running tasks ends, and returns it.
    """
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
    """As :func:`processes`, on the machines of a Ray cluster, with ``workers`` jobs at a time on each.

    The cluster is the one of ``RAY_ADDRESS``, or one that was started on this machine, or else a new one of this
    machine alone. Its machines are alike, and have the checkout, its environment, the facts and the runs' folder at the
    same paths. A run whose machine is lost is resumed on another one from its checkpoint.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("The launcher 'ray' needs Ray: pip install 'editlab[ray]', or omit --launcher.") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        part = {name: ray.cluster_resources().get(name, 0) / len(ray.nodes()) / workers for name in ("CPU", "GPU")}
        needs = {"num_cpus": max(1, math.ceil(part["CPU"])), "num_gpus": min(1.0, part["GPU"])}
        variables = {name: value for name, value in os.environ.items() if name.startswith(("EDITLAB_", "HF_"))}
        remote: Any = ray.remote(start)

        def submit(job: Job) -> Any:
            return remote.options(**needs).remote(job, variables)

        for job, task in _in_order_of_end(
            jobs, after, submit, lambda tasks: ray.wait(list(tasks), num_returns=1)[0][0]
        ):
            try:
                yield job, ray.get(task)
            except ray.exceptions.RayError as error:
                _note_failure(job, str(error))
                yield job, 1
    finally:
        if ours:
            ray.shutdown()


Launcher = Callable[[Sequence[Job], int, Mapping[Job, Job]], Iterator[tuple[Job, int]]]
LAUNCHERS: dict[str, Launcher] = {"local": processes, "ray": over_ray}
"""name -> function of jobs, jobs at a time on one machine, and which waits for which; yields jobs with exit codes"""
