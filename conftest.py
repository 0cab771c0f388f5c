"""Names that the examples in docstrings use, for pytest's doctests.

An example that edits a loaded model gets a small one with random weights and eight blocks, made on the spot; one that
reads a run's folder gets the folder of a finished run.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

METRICS = "edits,before/accuracy,immediate/accuracy,retained/accuracy\n1,0.0,1.0,\n2,0.0,1.0,0.5\n"
OUTCOMES = (
    "edit,id,subject,prompt,target_new,target_true,step,status,factor,immediate/hit,retained/hit\n"
    "1,0,Mount Fuji,{} is a mountain in,Peru,Japan,0,kept,1.0,1,0\n"
    "2,1,The Eiffel Tower,{} is in,Rome,Paris,1,kept,1.0,1,1\n"
)


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest) -> None:
    """Gives the examples of these modules their names; all other tests are left alone."""
    names = {"editlab.api.edit.edit_model": "_loaded_model", "editlab.runs.run.Run": "_finished_run"}
    if isinstance(request.node, pytest.DoctestItem) and request.node.name in names:
        request.getfixturevalue(names[request.node.name])


@pytest.fixture
def _loaded_model(doctest_namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    monkeypatch.setenv("EDITLAB_CACHE", os.fspath(tmp_path))
    # A test that called the command line has left its messages on, which go to the same output.
    monkeypatch.setattr(logging.getLogger("editlab"), "handlers", [])
    doctest_namespace |= {"model": tiny_model("llama", num_hidden_layers=8), "tokenizer": tiny_tokenizer()}


@pytest.fixture
def _finished_run(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "outcomes.csv").write_text(OUTCOMES)
    (tmp_path / "summary.json").write_text(json.dumps({"edits": 2, "metrics": {"retained/accuracy": 0.5}}))
    doctest_namespace["folder"] = tmp_path
