"""The notebook that compares methods on facts of one's own, cell by cell, on the built-in model."""

from pathlib import Path

import pytest

from tests.test_notebook import executed

NOTEBOOK = Path(__file__).parents[1] / "docs" / "compare_methods.ipynb"

pytestmark = [pytest.mark.real, pytest.mark.thorough]


def test_the_notebook_runs_and_says_what_it_shows(capsys):
    space = executed(NOTEBOOK, capsys)
    # The claim of the table: every method holds these four facts, and leaves their neighbors alone.
    for name, result in space["results"].items():
        assert result.retained["accuracy"] == 1.0, name
        assert result.retained["neighbor_accuracy"] == 1.0, name
    assert [change.target.says for change in space["changes"]["MEMIT"].facts] == [True] * 4
