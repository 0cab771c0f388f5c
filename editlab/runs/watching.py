"""Logging numbers so that Lightning's callbacks, such as ``EarlyStopping``, can watch them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from editlab.errors import UserError
from editlab.metrics.names import BEFORE, GROUPS, IMMEDIATE, LANGUAGE, MAGNITUDES, METRICS, RETAINED, full_name
from editlab.utils import compat


def log_numbers(trainer: Trainer, numbers: Mapping[str, float], edits: int) -> None:
    """Log numbers at a number of edits to all loggers, and to the callbacks that watch one of them.

    ``EarlyStopping`` is evaluated whenever the number that it watches is logged. By itself it would look at the end of
    an epoch, and a run of edits has only one.

    Args:
        trainer: of the run.
        numbers: value of each name.
        edits: number of facts that have gone through a step.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=edits)
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in numbers.items()})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.monitor in numbers:
            compat.check_early_stopping(callback, trainer)


def require_watchable(callbacks: Iterable[Callback]) -> None:
    """Make sure, before the first batch, that the numbers that callbacks watch can be logged during a run.

    Names outside of the groups of metrics are checked by :func:`require_logged`, after the first batch.

    Raises:
        UserError: A name is unknown, or is measured only at the end of a run.
    """
    callbacks = list(callbacks)
    measured = {group for callback in callbacks for group in getattr(callback, "measured_groups", ())}
    known = [full_name(group, name) for group in (BEFORE, IMMEDIATE) for name in _FACT_METRICS]
    known += [full_name(RETAINED, name) for name in (*_FACT_METRICS, *LANGUAGE)]
    for callback, name in _watched(callbacks):
        group = name.partition("/")[0]
        if name in known and group == RETAINED and RETAINED not in measured:
            raise UserError(
                f"{callback} watches {name}, which is measured only at the end of a run: add ForgettingCurve to "
                "trainer.callbacks, which measures it during the run."
            )
        if name not in known and (group in GROUPS or "/" not in name):
            raise UserError(f"{callback} watches {name!r}, which no run logs{_near(name, known)}.")


def require_logged(trainer: Trainer) -> None:
    """Make sure, after the first batch, that the numbers that callbacks watch were logged or may be logged later.

    Raises:
        UserError: A watched number was not logged, and no callback of the run may log it later.
    """
    logged = trainer.callback_metrics
    may_come = any(hasattr(callback, "on_edit_planned") for callback in trainer.callbacks)  # type: ignore[attr-defined]
    for callback, name in _watched(trainer.callbacks):  # type: ignore[attr-defined]
        own = name.partition("/")[0] in _OF_EACH_STEP
        if name not in logged and (own or not may_come):
            raise UserError(f"{callback} watches {name!r}, which this run does not log{_near(name, logged)}.")


_FACT_METRICS = (*(metric.name for metric in METRICS if metric.name not in LANGUAGE), *MAGNITUDES)

_OF_EACH_STEP = (BEFORE, IMMEDIATE, "solve", "weights", "edit")
"""Groups of the numbers that the editor logs after each batch."""


def _watched(callbacks: Iterable[Callback]) -> list[tuple[str, str]]:
    """Return the class name of each callback that watches a number, and the number's name."""
    return [
        (type(callback).__name__, name)
        for callback in callbacks
        if isinstance(name := getattr(callback, "monitor", None), str)
    ]


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return (
        f": did you mean {near[0]}?"
        if near
        else f": name one of {', '.join(sorted(known)[:8])} or another column of metrics.csv"
    )
