"""Several processes, one run: work is dealt out to the ranks, and every rank goes on with all results.

What is dealt out are the passes that one process would make, whole and in a fixed order, so results do not depend on
the number of ranks (but for :func:`summed`, whose order of summation does). In a single process each function does the
work and nothing else.

Every rank has to come to the same calls in the same order. Each call begins with a meeting at which all say where they
are and what failed, so a failure of one ends all, with one message, where the others would wait for it for ever.
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
"""Seconds that a rank which failed waits for the others to hear of it."""

_HEARD = "_heard_by_all_ranks"
"""Attribute of an exception that every rank has got."""

_group: Any = None
"""The ranks' own group, over gloo: no other library's collective can be mistaken for one of ours."""


class _Word(NamedTuple):
    """What a rank brings to a meeting."""

    place: str
    error: BaseException | None
    result: bytes


def join(timeout: timedelta | None = None) -> None:
    """Makes this process one of the ranks of torch.distributed's process group, which has to be there."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=timeout)


def leave() -> None:
    """Makes it a process of its own again."""
    global _group
    _group = None


def number() -> int:
    """Which rank this is, from 0."""
    return dist.get_rank(_group) if _group is not None else 0


def count() -> int:
    """How many ranks there are; 1 without :func:`join`."""
    return dist.get_world_size(_group) if _group is not None else 1


# ---- dealing out work ---------------------------------------------------------------------------------------------


def each(groups: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[R]], title: str = "") -> list[R]:
    """Results of all items, in their order; each group of items is worked on by one rank.

    Args:
        groups: indices of items, each index from 0 on in one group.
        work: gives the results of a group's items, tensors among them on the CPU. It must not call this module.
        title: of a progress bar; none where empty.

    Raises:
        Exception: whatever ``work`` raises, on every rank.
    """
    groups = list(groups)
    mine = progress(groups[number() :: count()], desc=title, unit="pass", disable=not title)
    shares = _meet(f"each {_name(work)}", lambda: [list(work(group)) for group in mine])
    found: dict[int, R] = {}
    for place, group in enumerate(groups):
        found.update(zip(group, shares[place % count()][place // count()], strict=True))
    return [found[index] for index in range(len(found))]


def summed(parts: Sequence[T], work: Callable[[Sequence[T]], Sequence[Tensor]]) -> list[Tensor]:
    """Sums over the ranks of what ``work`` makes of each rank's share of the parts.

    Args:
        parts: what there is to do.
        work: gives tensors on the CPU, of the same shapes for every share, zeros for an empty one.

    Returns:
        The sums, with the same bits on every rank. Their last bits depend on the number of ranks.
    """
    sums: list[Tensor] = []
    _meet(f"summed {_name(work)}", lambda: sums.extend(work(parts[number() :: count()])))
    if count() > 1:
        with reaching_others():
            for tensor in sums:
                dist.all_reduce(tensor, group=_group)
    return sums


def on_first(work: Callable[[], R]) -> R:
    """What ``work`` gives on rank 0, everywhere: for reading and writing files that the ranks share."""
    result: R = _meet(f"on_first {_name(work)}", lambda: work() if number() == 0 else None)[0]  # type: ignore[assignment]
    return result


def first_ahead(work: Callable[[], R]) -> R:
    """``work`` on every rank, rank 0 ahead of the others, which then find what it has fetched."""
    found: list[R] = []
    _meet(f"first_ahead {_name(work)}", lambda: found.append(work()) if number() == 0 else None)
    return found[0] if found else work()


def same(tensor: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, to the bit; the others give one of the same shape, type and kind of device."""
    if count() == 1:
        return tensor
    _meet("same", lambda: None)
    tensor = tensor.contiguous()
    with reaching_others():
        dist.broadcast(tensor, 0, group=_group if tensor.device.type == "cpu" else None)
    return tensor


def read_on_first(read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that rank 0 reads; the others need not see the file."""
    return same(read() if number() == 0 else torch.empty(*shape, dtype=dtype))


# ---- meetings and failures ----------------------------------------------------------------------------------------


def tell(error: BaseException) -> bool:
    """Tells the other ranks of a failure outside of any meeting; they raise it at their next one.

    Returns:
        whether all have heard of it, within :data:`PATIENCE`.
    """
    if count() == 1 or heard(error):
        return True

    def say() -> None:
        with suppress(EditLabError):  # nobody is there to hear it
            _exchange("failed", error, b"")
            setattr(error, _HEARD, True)

    # In a thread, as a meeting that the others do not come to can not be left.
    messenger = threading.Thread(target=say, daemon=True)
    messenger.start()
    messenger.join(PATIENCE)
    return heard(error)


def heard(error: BaseException) -> bool:
    """Whether every rank has got this error, so that rank 0 speaks for all."""
    return getattr(error, _HEARD, False)


@contextmanager
def reaching_others() -> Iterator[None]:
    """Around a collective of torch.distributed: one sentence where another rank was killed.

    Raises:
        EditLabError: where the collective fails.
    """
    try:
        yield
    except RuntimeError as error:
        raise EditLabError(
            "The other ranks can not be reached, as one was ended or its machine is gone: see what it said last; "
            "--ckpt_path last goes on from the last finished batch."
        ) from error


def _meet(place: str, work: Callable[[], R]) -> list[R]:
    """Does the work and exchanges results: those of all ranks, in their order.

    Raises:
        Exception: what the first rank with an error raised; on the other ranks, where it is none of editlab's, an
            EditLabError that says so.
        EditLabError: where the ranks are not at the same place.
    """
    if count() == 1:
        return [work()]
    error: BaseException | None = None
    result = b""
    try:
        result = _pack(work())
    except Exception as problem:
        error = problem
    words = _exchange(place, error, result)
    failed = [(rank, word.error) for rank, word in enumerate(words) if word.error is not None]
    if failed:
        rank, raised = failed[0]
        raised = error if rank == number() and error is not None else raised
        setattr(raised, _HEARD, True)
        raise raised
    places = [word.place for word in words]
    if len(set(places)) > 1:
        lost = EditLabError(
            f"The ranks are at different places ({', '.join(places)}): a callback has to do the same on every rank."
        )
        setattr(lost, _HEARD, True)
        raise lost
    return [_unpack(word.result) for word in words]


def _name(work: Callable[..., Any]) -> str:
    if isinstance(work, partial):  # by_halves of what?
        inner = ", ".join(_name(given) for given in work.args if isinstance(given, FunctionType))
        return f"{_name(work.func)}({inner})"
    return getattr(work, "__qualname__", type(work).__name__)


def _exchange(place: str, error: BaseException | None, result: bytes) -> list[_Word]:
    words: list[Any] = [None] * count()
    with reaching_others():
        dist.all_gather_object(words, _Word(place, _portable(error), result), group=_group)
    return words


def _portable(error: BaseException | None) -> BaseException | None:
    """The error as other ranks get it: one of editlab's as it is, any other in words."""
    if error is None:
        return None
    if isinstance(error, EditLabError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # one with arguments of its own
            return EditLabError(str(error))
    return EditLabError(f"Rank {number()} failed with {type(error).__name__}: {error}".splitlines()[0])


def _pack(result: Any) -> bytes:
    # Not plain pickle, which writes the whole storage of a view, once for each view.
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)
