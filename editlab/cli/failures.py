"""Explaining failures that are not the user's mistake: a full disk, no permission, too little memory, a bug."""

from __future__ import annotations

import re

import torch

from editlab.errors import EditLabError, causes
from editlab.lm.memory import lacks_memory
from editlab.utils.files import FORBIDDEN, FULL

_SAVED = "_run_is_saved"
"""Attribute that marks an exception whose run has a checkpoint."""


def note_saved(error: BaseException) -> None:
    """Mark an error whose run has a checkpoint that ``--ckpt_path last`` resumes."""
    setattr(error, _SAVED, True)


def is_saved(error: BaseException) -> bool:
    """Tell whether :func:`note_saved` has marked an error."""
    return getattr(error, _SAVED, False)


def describe(error: BaseException, editing: bool = True, saved: bool = True) -> str | None:
    """Return one sentence with a fix for a failure of the system; None for any other error.

    The causes of the error are examined too.

    Args:
        error: what was raised.
        editing: whether a verb of the Trainer raised it, so that the sentence may name settings.
        saved: whether the run can be resumed from a checkpoint.
    """
    for link in causes(error):
        found = _of_system(link, editing, saved) or _of_memory(link, editing, saved)
        if found:
            return found
    return None


def unexpected(error: Exception, editing: bool = True, saved: bool = True) -> EditLabError:
    """Return an error with a sentence for an unexpected one; the arguments are those of :func:`describe`."""
    first = (str(error).strip() or "no message").splitlines()[0]
    written = " What was written so far is complete, and --ckpt_path last resumes it." if editing and saved else ""
    return EditLabError(
        f"{type(error).__name__}: {first.rstrip('.')}. This should not happen: run it again with --debug and report "
        f"the output.{written}"
    )


def _of_system(error: BaseException, editing: bool, saved: bool) -> str | None:
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's error for ~nobody
        return "A path begins with ~ and the name of a user that this machine does not have: write it in full."
    if not isinstance(error, OSError):
        return None
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in FULL:
        setting = "trainer.logger.init_args.save_dir" if editing else "--out"
        after = "what was written is complete" + (", and --ckpt_path last resumes it" if editing and saved else "")
        return (
            f"The disk is full{where}: free some space, or use another disk ({setting}, EDITLAB_CACHE, HF_HOME); "
            f"{after}."
        )
    if error.errno in FORBIDDEN:
        return f"{error.filename or 'A file'} may not be read or written: change its permissions, or name another path."
    return None


def _of_memory(error: BaseException, editing: bool, saved: bool) -> str | None:
    text = str(error)
    requested = re.search(r"allocate(?:d memory)?:?\D*([\d.]+ ?(?:bytes|[KMGT]i?B))", text)
    if isinstance(error, torch.OutOfMemoryError):
        place, more = "The GPU's memory", "model.values.batch_tokens, data.batch_size, or trainer.precision bf16-true"
    elif lacks_memory(error):
        place, more = "Memory", "model.values.batch_tokens or data.batch_size, or take a smaller model"
    else:
        return None
    wanted = f" ({_readable(requested.group(1))} more were requested)" if requested else ""
    if not editing:
        return f"{place} does not suffice{wanted}: close other programs, or take a machine with more."
    after = "; --ckpt_path last resumes after the last finished batch" if saved else ""
    return f"{place} does not suffice{wanted}: lower {more}{after}."


def _readable(amount: str) -> str:
    number, _, unit = amount.partition(" ")
    if unit != "bytes":
        return amount
    return f"{int(float(number)) / 2**20:.0f} MiB"
