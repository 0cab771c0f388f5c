"""What all tests share: one thread for tiny models, and a cache folder of their own."""

import os

import lightning.pytorch  # noqa: F401 - its messages keep to the stderr of its import, which must not be one test's
import pytest
import torch

import callbacks.forgetting
from editlab.runs.figures import new_figure
from editlab.utils.files import cache_dir

REAL_CACHE = cache_dir()
"""The user's cache, where the built-in model lies; only tests marked ``real`` see it."""


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run tests marked thorough (before a release)")


def pytest_collection_modifyitems(config, items):
    """Tests of the real model go to one worker: it is fetched once, and lies in memory once."""
    later = pytest.mark.skip(reason="thorough: run with pytest --thorough, as before a release")
    for item in items:
        if "real" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("real"))
        if "thorough" in item.keywords and not config.getoption("--thorough"):
            item.add_marker(later)


@pytest.fixture(autouse=True)
def _threads(request, monkeypatch):
    """One thread for tiny models; for the real one this worker's share of the cores, as more would only wait.

    Processes that a test starts have as many: on some CPUs the number of threads moves the last bits.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    count = max(1, (os.cpu_count() or 1) // workers) if "real" in request.keywords else 1
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    monkeypatch.setenv("OMP_NUM_THREADS", str(count))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path_factory, monkeypatch):
    folder = REAL_CACHE if "real" in request.keywords else tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("EDITLAB_CACHE", os.fspath(folder))


@pytest.fixture
def tiny_folder(tmp_path):
    """A tiny Llama with its tokenizer, saved as transformers saves models."""
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _blank_figures(request, monkeypatch):
    """Runs save an empty figure, as drawing one takes longer than all edits of a tiny model.

    Tests marked ``draws`` and those of the real model have the real one.
    """
    if not {"draws", "real"} & set(request.keywords):
        monkeypatch.setattr(callbacks.forgetting, "forgetting_figure", lambda *_: new_figure(1, 1, 0.5, 0.5)[0])
