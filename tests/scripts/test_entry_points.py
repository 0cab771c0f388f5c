"""Scripts are short entry points over the package; wrappers pass all arguments on."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = ("run_all_baselines", "run_batch_experiments", "analyze_results", "reproduce_all")


def test_no_script_imports_another_or_changes_where_python_looks():
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    for path in SCRIPTS.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & {*names, "scripts"}, path.name
        assert "sys.path" not in path.read_text(), path.name


@pytest.mark.parametrize(("name", "arguments", "printed"), [
    ("run_all_baselines", ["--dry-run", "--path", "worldfacts"], "10 of 10 runs are missing"),
    ("run_batch_experiments", ["--dry-run", "--path", "worldfacts", "--seeds", "1", "--where", "lora_rank=8",
                               "batch_size=1"], "2 of 2 runs are missing"),
    ("reproduce_all", ["--help"], "--quick"),
    ("analyze_results", ["--help"], "trust_roc"),
])  # fmt: skip
def test_each_entry_point_is_short_and_starts_from_any_folder(name, arguments, printed, tmp_path, monkeypatch, capsys):
    script = SCRIPTS / f"{name}.py"
    assert len(script.read_text().splitlines()) < 25
    arguments = [*arguments, *(["--work", str(tmp_path)] if name.startswith("run_") else [])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code in (0, None)
    assert printed in capsys.readouterr().out


def test_an_entry_point_starts_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(SCRIPTS / "reproduce_all.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("name", ["reproduce_all", "run_all_baselines"])
def test_the_wrappers_pass_everything_on(name, tmp_path):
    script = SCRIPTS / f"{name}.sh"
    called = subprocess.run([str(script), "a b", "--c"], cwd=tmp_path, capture_output=True, text=True, check=True,
                            env={"PATH": "/usr/bin:/bin", "PYTHON": "echo"}).stdout  # fmt: skip
    assert called.strip() == f"{script.parent}/{name}.py a b --c"
    assert f"{name}.py" in script.with_suffix(".cmd").read_text()
