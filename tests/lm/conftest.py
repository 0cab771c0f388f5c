"""One tiny model of each family, shared by the tests of this folder, which must not change it."""

from __future__ import annotations

import functools

import pytest

from editlab.lm.language_model import LanguageModel
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer


@functools.cache
def lm_of(family: str) -> LanguageModel:
    return LanguageModel(tiny_model(family), tiny_tokenizer())


@pytest.fixture(params=FAMILIES)
def lm(request):
    return lm_of(request.param)
