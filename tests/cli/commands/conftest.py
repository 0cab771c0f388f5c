"""Runs that the tests of all verbs share; none of them changes a run."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest

from tests.cli.commands.runs import MODELS, edited


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Gives the run on a model of :data:`tests.cli.commands.runs.MODELS`, made where it is first asked for."""
    made = {}

    def run(name, **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            said = io.StringIO()  # nothing of it may be taken for what the test's own verb says
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
                patch.setenv("EDITLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
                made[key] = edited(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return run


@pytest.fixture(params=MODELS)
def run(request, runs):
    """The run on each model."""
    return runs(request.param)
