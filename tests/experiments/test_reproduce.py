"""All steps in one go: a quick pass names cases that exist, failures end in exit code 1, wrappers pass arguments on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from editlab.cli.main import main
from editlab.experiments.reproduce import FIGURES, ORDER, Step, experiment_files, parse, run_steps, steps
from editlab.experiments.spec import load_experiment

PROJECT = Path(__file__).parents[2]


def of(*arguments):
    return steps(PROJECT, parse(PROJECT, arguments))


def test_every_committed_experiment_is_a_step_and_figures_come_last():
    assert [step.name for step in of()] == [*ORDER, FIGURES]
    assert [step.name for step in of("--dry-run")] == list(ORDER)
    assert [step.name for step in of("--only", "forgetting", "figures")] == ["forgetting", "figures"]


@pytest.mark.parametrize("file", experiment_files(PROJECT), ids=lambda file: file.stem)
def test_the_quick_pass_has_a_few_small_runs(file, tmp_path, capsys):
    (step,) = of("--quick", "--dry-run", "--only", file.stem, "--out", str(tmp_path))
    assert step.command[:3] == (sys.executable, "-m", "editlab.cli.main")
    assert main([*step.command[3:]]) == 0  # in this process, as importing everything takes seconds
    printed = capsys.readouterr().out
    only = load_experiment(file).quick.only
    for name in only:
        assert f"to run  {name}, seed 1" in printed
    assert f"{len(only)} of {len(only)} runs are missing" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("body", "result"), [
    ("import sys; sys.exit(3)", "failed with exit code 3"),
    ("pass", "failed: it wrote no results/a.csv"),
    ("import pathlib, sys; f = pathlib.Path(sys.argv[1]) / 'results'; f.mkdir(); (f / 'a.csv').touch()", "passed"),
])  # fmt: skip
def test_a_failed_step_fails_the_whole_and_the_others_run(body, result, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    some = [Step("one", (sys.executable, "-c", body, str(out)), ("a.csv",)), Step("two", (sys.executable, "-c", ""))]
    assert run_steps(some, parse(PROJECT, ["--out", str(out)])) == int(result != "passed")
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split(maxsplit=2)[::2] == ["one", result]
    assert table[1].split(maxsplit=2)[::2] == ["two", "passed"]
    assert str(out) in table[2]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_stops_the_step_too(tmp_path):
    """Three processes: this one, one that carries the step out, and the step, which notes that it is stopped."""
    step = (
        "import pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'stopped').touch(), sys.exit(143)))\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    caller = (
        "import sys, pathlib\n"
        "from editlab.experiments import reproduce as r\n"
        f"options = r.parse(pathlib.Path({str(PROJECT)!r}), ['--out', {str(tmp_path)!r}])\n"
        f"sys.exit(r.run_steps([r.Step('one', (sys.executable, '-c', {step!r}))], options))\n"
    )
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 143
    assert (tmp_path / "stopped").exists()


def test_the_quick_pass_has_a_folder_of_its_own():
    assert parse(PROJECT, ["--quick"]).out == PROJECT / "lightning_logs" / "quick"
    assert parse(PROJECT, []).out == PROJECT
    first = of("--path", "facts.csv")[0].command
    assert first[-2:] == ("--path", "facts.csv")
    assert "--quick" not in first
