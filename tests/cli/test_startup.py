"""Commands that start without torch: their imported modules are counted, since times depend on the machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from editlab import __version__
from editlab.cli.commands import TRAINER_VERBS, VERBS
from editlab.cli.main import main

HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "numpy", "matplotlib")
SCRIPT = (
    "import json, sys\n"
    "from editlab.cli.main import main\n"
    "try:\n"
    "    code = main(sys.argv[1:])\n"
    "except SystemExit as end:\n"
    "    code = end.code\n"
    "sys.stderr.write(json.dumps([code, [name for name in {heavy} if name in sys.modules]]))\n"
)


def started(*arguments: str):
    """The output, exit code and heavy modules of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *arguments], capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, code, modules


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--help"], "usage: editlab"), (["--help=all"], "usage: editlab"), (["--version"], f"editlab {__version__}\n")],
)
def test_help_and_version_import_nothing_heavy(arguments, shown):
    out, code, modules = started(*arguments)
    assert out.startswith(shown)
    assert code == 0
    assert modules == []


def test_a_file_of_facts_is_checked_without_torch(tmp_path):
    (tmp_path / "facts.csv").write_text("subject,prompt,target\nOslo,Oslo lies in,Peru\n")
    out, code, modules = started("facts", "check", str(tmp_path / "facts.csv"))
    assert out.startswith("1 fact in")
    assert code == 0
    assert modules == ["jsonargparse"]  # it parses the arguments, in a fifth of a second


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "editlab: A verb is missing: --help lists them.\n"),
        (["fitt"], "editlab: There is no verb 'fitt': did you mean fit?\n"),
        (["xyz"], "editlab: There is no verb 'xyz': use fit, validate, test, export, push, apply, revert, log, ask, "),
        (["facts", "check", "none.csv"], "editlab: The fact file none.csv does not exist"),
    ],
)
def test_mistakes_are_reported_without_torch(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "editlab", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "editlab.cli.main" in imported
    assert not {"torch", "lightning", "transformers"} & imported
    (said,) = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("editlab: ")]
    assert said.startswith(sentence)


def test_the_module_runs_as_the_command(capfd):
    done = subprocess.run([sys.executable, "-m", "editlab", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"editlab {__version__}\n"


def test_the_list_of_verbs_agrees_with_their_files():
    for verb in VERBS.values():
        command = verb.load()
        assert (verb.name, verb.help) == (command.name, command.help)


def test_every_file_of_a_verb_is_listed():
    folder = Path(main.__code__.co_filename).parent / "commands"
    files = {path.stem for path in folder.glob("*.py") if "COMMAND = " in path.read_text(encoding="utf-8")}
    assert files == {name.replace("-", "_") for name in VERBS}


def test_every_listed_verb_is_one_of_lightning_s_or_has_a_file():
    from editlab.cli.training import EditLabCLI

    assert list(EditLabCLI.subcommands()) == list(TRAINER_VERBS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_an_interrupt_before_any_run_is_one_sentence(tmp_path):
    fifo = tmp_path / "facts.csv"
    os.mkfifo(fifo)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "editlab", "facts", "check", str(fifo)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        ) as checking,
        fifo.open("w"),
    ):  # opening it waits for the reader, which then waits for text
        checking.send_signal(signal.SIGINT)
        assert checking.communicate(timeout=60)[1] == "editlab: Interrupted.\n"
    assert checking.returncode == 130
