"""One run on several processes (ranks): the work is divided among the ranks, and every rank gets all results.

The units of work are the forward passes that a single process would run, complete and in a fixed order, so results do
not depend on the number of ranks (except for :func:`summed`, whose order of summation does). In a single process each
function only does the work.

Every rank must make the same calls in the same order. In each call the ranks exchange the name of the call and any
error before they continue, so the failure of one rank ends all of them with one message, instead of leaving the other
ranks waiting forever.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from editlab.errors import EditLabError
from editlab.utils.progress import progress

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 10.0
"""Seconds that a failed rank waits until the other ranks have received its error."""

_REACHED_ALL = "_reached_all_ranks"
"""Name of the attribute that marks an exception which every rank has received."""

_group: Any = None
"""A process group of its own, over gloo, so that collectives of other libraries cannot be mistaken for editlab's."""


class _Report(NamedTuple):
    """The message that each rank sends to all ranks in a call of this module."""

    call: str
    """name of the call and of the work in it"""
    error: BaseException | None
    """the error that the rank's work raised, if any"""
    result: bytes
    """the result of the rank's work, serialized"""


def join(timeout: timedelta | None = None) -> None:
    """Make this process a rank of torch.distributed's default process group, which must be initialized."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=timeout)


def leave() -> None:
    """Make this process a single process again."""
    global _group
    _group = None


def number() -> int:
    """Return the number of this rank, counted from 0."""
    return dist.get_rank(_group) if _group is not None else 0


def count() -> int:
    """Return the number of ranks; 1 without :func:`join`."""
    return dist.get_world_size(_group) if _group is not None else 1


# ---- dividing work ------------------------------------------------------------------------------------------------


def each(groups: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[R]], title: str = "") -> list[R]:
    """Return the results of all items, in the order of the items; each group of items is processed by one rank.

    Args:
        groups: indices of items; together the groups hold each index from 0 to n - 1 once.
        work: returns the results of a group's items, with any tensors on the CPU. It must not call this module.
        title: title of a progress bar; no bar is shown if it is empty.

    Raises:
        Exception: ``work`` raised it on some rank; it is raised on every rank.
    """
    groups = list(groups)
    mine = progress(groups[number() :: count()], desc=title, unit="pass", disable=not title)
    by_rank = _gather(f"each {_name(work)}", lambda: [list(work(group)) for group in mine])
    found: dict[int, R] = {}
    for index, group in enumerate(groups):
        found.update(zip(group, by_rank[index % count()][index // count()], strict=True))
    return [found[index] for index in range(len(found))]


def summed(parts: Sequence[T], work: Callable[[Sequence[T]], Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums over all ranks of the tensors that ``work`` computes from each rank's subset of ``parts``.

    Args:
        parts: the parts to process, each by one rank.
        work: returns tensors on the CPU, of the same shapes for every subset, and zeros for an empty subset.

    Returns:
        The sums, with the same bits on every rank. Their last bits depend on the number of ranks.
    """
    sums: list[Tensor] = []
    _gather(f"summed {_name(work)}", lambda: sums.extend(work(parts[number() :: count()])))
    if count() > 1:
        with explained():
            for tensor in sums:
                dist.all_reduce(tensor, group=_group)
    return sums


def on_first(work: Callable[[], R]) -> R:
    """Run ``work`` on rank 0 and return its result on every rank, as for reading and writing shared files."""
    result: R = _gather(f"on_first {_name(work)}", lambda: work() if number() == 0 else None)[0]  # type: ignore[assignment]
    return result


def first_ahead(work: Callable[[], R]) -> R:
    """Run ``work`` on every rank, first on rank 0, so that the other ranks find the files that rank 0 has fetched."""
    found: list[R] = []
    _gather(f"first_ahead {_name(work)}", lambda: found.append(work()) if number() == 0 else None)
    return found[0] if found else work()


def broadcast(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor, bit by bit, on every rank; ``tensor`` has the same shape, type and device type on all."""
    if count() == 1:
        return tensor
    _gather("broadcast", lambda: None)
    tensor = tensor.contiguous()
    with explained():
        dist.broadcast(tensor, 0, group=_group if tensor.device.type == "cpu" else None)
    return tensor


def read_on_first(read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return, on every rank, the CPU tensor that rank 0 reads; the other ranks need no access to the file."""
    return broadcast(read() if number() == 0 else torch.empty(*shape, dtype=dtype))


# ---- exchange and failures ----------------------------------------------------------------------------------------


def notify(error: BaseException) -> bool:
    """Send an error that arose outside of this module to the other ranks, which raise it in their next call.

    Returns:
        Whether all ranks have received it within :data:`PATIENCE` seconds.
    """
    if count() == 1 or reached_all(error):
        return True

    def send() -> None:
        with suppress(EditLabError):  # no other rank is running any more
            _exchange("failed", error, b"")
            setattr(error, _REACHED_ALL, True)

    # In a thread, because an exchange in which another rank takes no part cannot be cancelled.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE)
    return reached_all(error)


def reached_all(error: BaseException) -> bool:
    """Return whether every rank has received this error, so that only rank 0 needs to report it."""
    return getattr(error, _REACHED_ALL, False)


@contextmanager
def explained() -> Iterator[None]:
    """Turn the failure of a torch.distributed collective inside the ``with`` into one clear error.

    Raises:
        EditLabError: The collective failed, because another rank was killed.
    """
    try:
        yield
    except RuntimeError as error:
        raise EditLabError(
            "The other ranks cannot be reached, because one was killed or its machine failed: read its last output; "
            "--ckpt_path last resumes after the last finished batch."
        ) from error


def _gather(call: str, work: Callable[[], R]) -> list[R]:
    """Run ``work`` on each rank and return the results of all ranks, in the order of the ranks.

    Raises:
        Exception: The error of the first rank that failed. If it is not an EditLabError, the other ranks raise an
            EditLabError that describes it.
        EditLabError: The ranks made different calls.
    """
    if count() == 1:
        return [work()]
    error: BaseException | None = None
    result = b""
    try:
        result = _pack(work())
    except Exception as problem:
        error = problem
    reports = _exchange(call, error, result)
    failed = [(rank, report.error) for rank, report in enumerate(reports) if report.error is not None]
    if failed:
        rank, raised = failed[0]
        raised = error if rank == number() and error is not None else raised
        setattr(raised, _REACHED_ALL, True)
        raise raised
    calls = [report.call for report in reports]
    if len(set(calls)) > 1:
        diverged = EditLabError(
            f"The ranks made different calls ({', '.join(calls)}): a callback must do the same on every rank."
        )
        setattr(diverged, _REACHED_ALL, True)
        raise diverged
    return [_unpack(report.result) for report in reports]


def _name(work: Callable[..., Any]) -> str:
    if isinstance(work, partial):  # name the function inside it too, as in by_halves(score)
        inner = ", ".join(_name(given) for given in work.args if isinstance(given, FunctionType))
        return f"{_name(work.func)}({inner})"
    return getattr(work, "__qualname__", type(work).__name__)


def _exchange(call: str, error: BaseException | None, result: bytes) -> list[_Report]:
    reports: list[Any] = [None] * count()
    with explained():
        dist.all_gather_object(reports, _Report(call, _portable(error), result), group=_group)
    return reports


def _portable(error: BaseException | None) -> BaseException | None:
    """Return the error as it is sent to other ranks: an EditLabError unchanged, any other as an EditLabError."""
    if error is None:
        return None
    if isinstance(error, EditLabError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # its class takes other arguments, so it cannot be unpickled
            return EditLabError(str(error))
    return EditLabError(f"Rank {number()} failed with {type(error).__name__}: {error}".splitlines()[0])


def _pack(result: Any) -> bytes:
    # Plain pickle would write the whole storage of a view, once for each view.
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)
