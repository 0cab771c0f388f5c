"""All steps in one go: what each is called with fits its script, failures end in exit code 1, wrappers pass on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import reproduce_all as everything
from launch import ROOT

SWEEPS = [step for step in everything.STEPS if step.sweep]


@pytest.mark.parametrize("step", SWEEPS, ids=lambda step: step.name)
def test_the_quick_pass_names_cases_that_there_are(step, tmp_path):
    options = everything.parse(["--quick", "--dry-run", "--out", str(tmp_path)])
    printed = subprocess.run(everything.command(step, options), capture_output=True, text=True, check=True).stdout
    only = step.quick[step.quick.index("--only") + 1 :]
    for name in only:
        assert f"to run  {name}, seed 1" in printed
    assert f"{len(only)} of {len(only)} runs are to be made" in printed
    assert not list(tmp_path.iterdir())


def test_every_script_that_makes_a_table_is_a_step():
    scripts = {path.name for path in (ROOT / "scripts").glob("run_*.py")}
    assert scripts == {step.script for step in SWEEPS}
    for step in SWEEPS:
        text = (ROOT / "scripts" / step.script).read_text()
        assert all(table in text for table in step.tables)


@pytest.mark.parametrize(("body", "result"), [
    ("import sys; sys.exit(3)", "failed with exit code 3"),
    ("pass", "failed: it wrote no results/a.csv"),
    ("import pathlib, sys; f = pathlib.Path(sys.argv[2]) / 'results'; f.mkdir(); (f / 'a.csv').touch()", "passed"),
])  # fmt: skip
def test_a_step_that_fails_fails_all_and_the_others_run(body, result, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.py").write_text(body)
    (tmp_path / "two.py").write_text("")
    steps = tuple(everything.Step(name, str(tmp_path / f"{name}.py"), tables, (), sweep=False)
                  for name, tables in (("one", ("a.csv",)), ("two", ())))  # fmt: skip
    monkeypatch.setattr(everything, "STEPS", steps)
    (tmp_path / "out").mkdir()
    if result == "passed":
        everything.main(["--out", str(tmp_path / "out"), "--quick"])
    else:
        with pytest.raises(SystemExit, match="1"):
            everything.main(["--out", str(tmp_path / "out")])
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split(maxsplit=2)[::2] == ["one", result]
    assert table[1].split(maxsplit=2)[::2] == ["two", "passed"]
    assert str(tmp_path / "out") in table[2]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_what_is_told_to_stop_stops_its_step(tmp_path):
    """Three processes: this one, one that carries the step out, and the step, which says so when it is stopped."""
    step = (
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'stopped').touch(), sys.exit(143)))\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "step.py").write_text(step)
    caller = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import reproduce_all as r\n"
        f"r.STEPS = (r.Step('one', {str(tmp_path / 'step.py')!r}, (), (), sweep=False),)\n"
        f"r.main(['--out', {str(tmp_path)!r}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 143
    assert (tmp_path / "stopped").exists()


def test_the_quick_pass_lies_beside_the_results_that_are_kept():
    assert everything.parse(["--quick"]).out == ROOT / "lightning_logs" / "quick"
    assert everything.parse([]).out == ROOT
    full = everything.command(SWEEPS[0], everything.parse(["--path", "facts.csv"]))
    assert full[-2:] == ["--path", "facts.csv"]
    assert "--work" not in full


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("name", ["reproduce_all", "run_all_baselines"])
def test_the_wrappers_pass_everything_on(name, tmp_path):
    script = ROOT / "scripts" / f"{name}.sh"
    called = subprocess.run([str(script), "a b", "--c"], cwd=tmp_path, capture_output=True, text=True, check=True,
                            env={"PATH": "/usr/bin:/bin", "PYTHON": "echo"}).stdout  # fmt: skip
    assert called.strip() == f"{script.parent}/{name}.py a b --c"
    assert f"{name}.py" in script.with_suffix(".cmd").read_text()
