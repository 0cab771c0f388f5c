"""What all tests share: one thread for tiny models, and a cache folder of their own."""

import os

import pytest
import torch

from editlab.lm.cache import cache_dir

REAL_CACHE = cache_dir()
"""The user's cache, where the built-in model lies; only tests marked ``real`` see it."""


@pytest.fixture(autouse=True)
def _one_thread(request, monkeypatch):
    """One thread here and in processes that a test starts: on some CPUs the number of threads moves the last bits."""
    if "real" in request.keywords:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
