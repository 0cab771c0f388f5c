"""Messages about failures that are not the user's mistake."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from editlab.cli.failures import describe, note_saved, unexpected
from editlab.cli.main import main


def wrapped(error):
    """An error as a library reports it: as the cause of an error of its own."""
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
def test_the_sentence_names_the_failure_and_a_fix(error, parts):
    said = describe(error)
    assert all(part in said for part in parts), said
    assert "\n" not in said


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "No such file"), KeyError("a")])
def test_other_errors_are_not_described(error):
    assert describe(error) is None


def test_an_unexpected_error_names_the_error_and_asks_for_a_report():
    assert str(unexpected(ValueError("first line.\nsecond"))).startswith(
        "ValueError: first line. This should not happen"
    )
    assert "KeyError: no message" in str(unexpected(KeyError())), unexpected(KeyError())


def test_a_verb_that_edits_nothing_gets_no_advice_to_resume():
    for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError()):
        assert "--ckpt_path" not in describe(error, editing=False)
        assert "model." not in describe(error, editing=False)
    assert "--ckpt_path" not in str(unexpected(ValueError("x"), editing=False))


def test_a_home_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        Path("~nobody-of-this-name/x.csv").expanduser()
    assert "write it in full" in describe(caught.value)


def test_torch_really_raises_these_messages(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert describe(caught.value).startswith("Memory does not suffice")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ZeroDivisionError("division by zero"), 1, "editlab: ZeroDivisionError: division by zero. This should not"),
        (OSError(errno.ENOSPC, "No space left"), 1, "editlab: The disk is full"),
        (KeyboardInterrupt(), 130, "editlab: Interrupted"),
        (SIGTERMException(), 143, "editlab: Terminated.\n"),
    ],
)
def test_one_sentence_and_a_traceback_only_with_debug(monkeypatch, capsys, error, code, sentence):
    seen = []

    def fail(arguments):
        seen.append(arguments)
        raise error

    monkeypatch.setattr("editlab.cli.main.run", fail)
    assert main(["fit", "--config", "x"]) == code
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1
    assert main(["fit", "--debug", "--config", "x"]) == code
    assert seen == [["fit", "--config", "x"]] * 2
    if code == 1:
        assert "Traceback" in capsys.readouterr().err


def test_the_trainer_passes_an_interrupt_on_as_its_own_exit(monkeypatch, capsys):
    def stopped(arguments):  # what Lightning's Trainer makes of Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("editlab.cli.main.run", stopped)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "editlab: Interrupted.\n"


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), SIGTERMException()])
def test_only_a_saved_run_gets_advice_to_resume(monkeypatch, capsys, stopped):
    def stop(arguments):
        note_saved(stopped)
        raise stopped

    monkeypatch.setattr("editlab.cli.main.run", stop)
    main(["fit"])
    assert "--ckpt_path last resumes the run after its last finished batch" in capsys.readouterr().err


EDITLAB = "import sys; from editlab.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe without a reader fails otherwise on Windows")
def test_a_reader_that_has_gone_is_an_end_without_a_word(tmp_path):
    (tmp_path / "bad.csv").write_text("subject,prompt,target\n" + "a,b,c\n" * 5000)
    with subprocess.Popen(
        [sys.executable, "-c", EDITLAB, "facts", "check", str(tmp_path / "bad.csv")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as checking:  # fmt: skip
        checking.stdout.readline()
        checking.stdout.close()
        assert checking.stderr.read() == ""
    assert checking.returncode == 141


def test_a_terminal_that_lacks_a_character_shows_its_number(tmp_path):
    (tmp_path / "bad.csv").write_text("subject,prompt,target\n東京,The capital is,Rome\n", encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-c", EDITLAB, "facts", "check", str(tmp_path / "bad.csv")],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False,
    )  # fmt: skip
    assert "\\u6771\\u4eac" in checked.stdout + checked.stderr
    assert "Logging error" not in checked.stderr
