"""What is said of failures that are no mistake of the user's."""

import errno

import pytest
import torch

from editlab.cli import main
from editlab.failures import describe, surprise


def wrapped(error):
    """An error as a library passes it on: as the cause of one of its own."""
    try:
        raise RuntimeError("could not save") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ["disk is full at /x/y", "free some space"]),
        (wrapped(OSError(errno.EDQUOT, "Quota exceeded")), ["The disk is full:", "--ckpt_path last"]),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), ["/x/y may not be read or written", "permissions"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
         ["The GPU's memory does not suffice (2.50 GiB", "batch_tokens"]),
        # What torch says on a CPU: 8 GiB = 8589934592 bytes.
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 8589934592 bytes. Error code 12"), ["Memory does not suffice (8192 MiB"]),
        (MemoryError(), ["Memory does not suffice: lower", "smaller model"]),
    ],
)  # fmt: skip
def test_the_sentence_names_what_failed_and_the_mend(error, parts):
    said = describe(error)
    assert all(part in said for part in parts), said
    assert "\n" not in said


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "No such file"), KeyError("a")])
def test_other_errors_are_not_described(error):
    assert describe(error) is None


def test_a_surprise_names_the_error_and_asks_for_a_report():
    assert str(surprise(ValueError("first line.\nsecond"))).startswith("ValueError: first line. This should not happen")
    assert "KeyError: no message" in str(surprise(KeyError())), surprise(KeyError())


def test_torch_really_says_that(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert describe(caught.value).startswith("Memory does not suffice")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ZeroDivisionError("division by zero"), 1, "editlab: ZeroDivisionError: division by zero. This should not"),
        (OSError(errno.ENOSPC, "No space left"), 1, "editlab: The disk is full"),
        (KeyboardInterrupt(), 130, "editlab: Interrupted"),
    ],
)
def test_one_sentence_and_a_traceback_only_where_it_is_asked_for(monkeypatch, capsys, error, code, sentence):
    seen = []

    def fail(arguments):
        seen.append(arguments)
        raise error

    monkeypatch.setattr("editlab.cli.run", fail)
    assert main(["fit", "--config", "x"]) == code
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1
    assert main(["fit", "--debug", "--config", "x"]) == code
    assert seen == [["fit", "--config", "x"]] * 2
    if code == 1:
        assert "Traceback" in capsys.readouterr().err
