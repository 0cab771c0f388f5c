"""The notebook of the docs, cell by cell, on the built-in model."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "edit_model.ipynb"

pytestmark = pytest.mark.real


def test_the_notebook_runs_and_says_what_it_shows(capsys):
    space = executed(NOTEBOOK, capsys)
    assert space["result"].retained["accuracy"] == 1.0


def executed(notebook: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Runs a notebook cell by cell, compares the answers in its output, and returns its names."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    space: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), notebook.name, "exec"), space)
        said = capsys.readouterr().out
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        # Numbers may differ in the last digit from machine to machine, and what follows an answer too; answers may not.
        assert _answers(said) == _answers(shown)
    return space


def _answers(said: str) -> list[tuple[str, str]]:
    """Each prompt that was asked, and the first word of what the model said to it."""
    asked = [line.split(" -> ") for line in said.splitlines() if " -> " in line]
    return [(prompt, answer.split()[0]) for prompt, answer in asked]
