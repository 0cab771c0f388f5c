"""Tests of text corpora: files, hub data sets, text sampled from the model, and text that ships with editlab."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from editlab.errors import EditLabError, UserError
from editlab.keys.moments import MomentSettings
from editlab.lm import text as corpus
from editlab.lm.fingerprint import architecture, fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import SHIPPED, ShippedText, read_ids, read_windows, sample_text, self_text, text_key
from tests.tiny import TEXT, tiny_model, tiny_tokenizer


@functools.cache
def lm_of(family: str) -> LanguageModel:
    return LanguageModel(tiny_model(family), tiny_tokenizer())


@pytest.fixture
def lm():
    return lm_of("llama")


@pytest.fixture(autouse=True)
def cache(request, monkeypatch, tmp_path):
    """Use a separate cache folder for each test, except that the built-in model is read from the user's cache."""
    if "real" not in request.keywords:
        monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def short(monkeypatch):
    """Make windows of 16 tokens, because sampling is slow."""
    monkeypatch.setattr(corpus, "WINDOW", 16)


@pytest.fixture
def sampled(monkeypatch):
    """Record the numbers of prompts of each call of the sampler."""
    seen = []
    sample = LanguageModel.sample

    def noted(self, prompts, *args, **kwargs):
        seen.append(len(prompts))
        return sample(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "sample", noted)
    return seen


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    message = str(error.value)
    return message.endswith(".") and ". " not in message and "\n" not in message


# files


def test_a_file_is_cut_into_windows(lm, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 10), encoding="utf-8")
    ids = lm.tokenizer("\n".join(TEXT * 10))["input_ids"]
    windows = read_windows(lm, str(tmp_path / "text.txt"), 300)
    assert [len(window) for window in windows] == [128, 128, 44]
    assert [token for window in windows for token in window] == ids[:300]


def test_read_ids_takes_the_first_tokens_without_special_ones():
    """Also of a text far longer than needed, and with a tokenizer that begins each text with <s>."""
    plain = lm_of("llama")
    bos = LanguageModel(tiny_model("llama"), tiny_tokenizer(bos=True))
    text = " ".join(TEXT * 50)
    expected = plain.tokenizer(text)["input_ids"][:90]
    assert read_ids(plain, text, 90) == read_ids(bos, text, 90) == expected


def test_bad_texts_raise_a_user_error(lm, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80" * 10)
    (tmp_path / "short.txt").write_text("The capital of France")
    for name, message in (
        ("nowhere.txt", r"nowhere\.txt' does not exist: give a file"),
        ("weights.bin", "cannot be read as UTF-8"),
        (".", "cannot be read as UTF-8"),
        ("short.txt", "The text has 4 tokens, and 50 are needed: lower"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_windows(lm, str(tmp_path / name), 50)
        assert one_sentence(caught)


def test_the_key_depends_on_the_text_and_not_on_its_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("The same.")
    (tmp_path / "c").write_text("Another.")
    keys = [text_key(str(tmp_path / name), seed) for name, seed in (("a", 0), ("b", 1), ("c", 0))]
    assert keys[0] == keys[1] == hashlib.sha256(b"The same.").hexdigest()
    assert keys[2] != keys[0]
    assert text_key("hub:some/text", 0) == text_key("hub:some/text", 1)
    assert text_key("self", 0) == "self:0:128"  # part of the keys of second moments that are in users' caches
    assert text_key("self", 1) != text_key("self", 0)


# hub data sets


def test_a_hub_data_set_needs_its_package(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what makes Python's import fail
    with pytest.raises(UserError, match="needs the package datasets: pip install datasets") as caught:
        read_windows(lm, "hub:some/text", 50)
    assert one_sentence(caught)


class Rows(list):
    """The part of a streamed data set that is used."""

    def take(self, count):
        return self[:count]


def stand_in(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:some/text", ("some/text", None, "train")),
        ("hub:some/text:en", ("some/text", "en", "train")),
        ("hub:some/text:en:test", ("some/text", "en", "test")),
        ("hub:some/text::test", ("some/text", None, "test")),
    ],
)
def test_a_hub_data_set_is_named_with_config_and_split(lm, monkeypatch, name, expected):
    calls = []

    def load(path, config, *, split, streaming):
        calls.append((path, config, split))
        assert streaming
        return Rows({"text": line} for line in TEXT * 10)

    stand_in(monkeypatch, load)
    windows = read_windows(lm, name, 300)
    assert calls == [expected]
    assert [token for window in windows for token in window] == lm.tokenizer("\n".join(TEXT * 10))["input_ids"][:300]


def test_a_hub_data_set_that_does_not_load_raises_a_user_error(lm, monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    stand_in(monkeypatch, load)
    with pytest.raises(UserError, match=r"'hub:some/text' cannot be loaded \(ConnectionError\)") as caught:
        read_windows(lm, "hub:some/text", 50)
    assert one_sentence(caught)


# sampled text


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_sampled_text_has_exactly_so_many_tokens(lm, short, tokens):
    windows = sample_text(lm, tokens, 0, "title")
    assert sum(map(len, windows)) == tokens
    assert all(len(w) == 16 for w in windows[:-1])


def test_sampled_text_begins_with_an_ordinary_token_and_leaves_the_random_state(lm, short):
    torch.manual_seed(9)
    state = torch.get_rng_state()
    windows = sample_text(lm, 100, 0, "title")
    assert torch.equal(torch.get_rng_state(), state)
    assert not {w[0] for w in windows} & set(lm.tokenizer.all_special_ids)
    assert sample_text(lm, 100, 0, "title") == windows
    assert sample_text(lm, 100, 1, "title") != windows


def test_each_group_of_windows_is_one_sample_with_a_seed_of_its_own(lm, short, monkeypatch):
    """The seed of a group is the seed of the text plus the index of the group's first window."""
    monkeypatch.setattr(corpus, "SAMPLED_ROWS", 2)
    windows = sample_text(lm, 16 * 5, 7, "")
    for start in (0, 2, 4):
        group = windows[start : start + 2]
        assert group == lm.sample([[window[0]] for window in group], 15, seed=7 + start)


def test_the_bar_moves_with_each_step(lm, short, monkeypatch):
    """Sampling with a large model takes minutes, and one step a second."""
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.steps, self.options = total, [], options
            bars.append(self)

        def update(self, count):
            self.steps.append(count)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(corpus, "progress", Bar)
    monkeypatch.setattr(corpus, "SAMPLED_ROWS", 3)
    sample_text(lm, 16 * 5, 0, "Sampling")
    (bar,) = bars
    assert bar.steps == [3] * 15 + [2] * 15
    assert bar.total == sum(bar.steps)
    assert bar.options["desc"] == "Sampling"


# kept text


def test_sampled_text_is_cached_by_model_and_settings(lm, short, sampled, cache):
    first = self_text(lm, 40, 0, "")
    assert first == sample_text(lm, 40, 0, "")
    calls = len(sampled)
    assert self_text(lm, 40, 0, "") == first
    assert len(sampled) == calls  # read and not sampled
    others = [
        self_text(lm, 40, 1, ""),
        self_text(lm, 33, 0, ""),  # not the beginning of the longer text, because fewer rows draw other numbers
        self_text(lm_of("gpt2"), 40, 0, ""),
    ]
    assert all(other != first for other in others)
    assert len(sampled) == calls + 3
    assert len(list((cache / "texts").iterdir())) == 4


def test_changed_weights_are_another_model(short, sampled):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    first = self_text(lm, 40, 0, "")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(-1)
    assert self_text(lm, 40, 0, "") != first
    assert len(sampled) == 2


def test_without_the_cache_no_file_is_written(lm, short, sampled, cache):
    assert self_text(lm, 40, 0, "", cache=False) == self_text(lm, 40, 0, "", cache=False)
    assert len(sampled) == 2
    assert not cache.exists()


# text that ships with editlab


@pytest.fixture
def shipped(lm, monkeypatch, tmp_path):
    """Make a shipped text for the tiny model, of tokens that the model would hardly sample."""
    ids = np.arange(256, dtype=np.uint16).reshape(2, 128)
    made_with = {"architecture": {**architecture(lm.model), "no longer in configurations": 1}}
    file = tmp_path / "tiny.self.safetensors"
    safetensors.numpy.save_file({"ids": ids}, file, {"made_with": json.dumps(made_with)})
    text = ShippedText(
        file=file, weights=fingerprint(lm.model), seed=0, tokens=256,
        sha256=hashlib.sha256(bytes(b for i in range(256) for b in (i, 0))).hexdigest(),
    )  # fmt: skip
    monkeypatch.setattr(corpus, "SHIPPED", (text,))
    return text


def test_shipped_text_is_used_for_its_model_and_settings(lm, shipped, sampled):
    assert self_text(lm, 256, 0, "", cache=False) == [list(range(128)), list(range(128, 256))]
    assert sampled == []


@pytest.mark.parametrize(("family", "tokens", "seed"), [("llama", 255, 0), ("llama", 256, 1), ("gpt2", 256, 0)])
def test_shipped_text_is_not_used_for_other_models_or_settings(shipped, sampled, family, tokens, seed):
    lm = lm_of(family)
    assert self_text(lm, tokens, seed, "") == sample_text(lm, tokens, seed, "")
    assert sampled


def test_the_same_weights_in_another_architecture_sample_their_own(shipped, sampled, monkeypatch):
    monkeypatch.setattr(corpus, "architecture", lambda model: {"model_type": "llama", "vocab_size": 7})
    self_text(lm_of("llama"), 256, 0, "")
    assert sampled


def test_damaged_shipped_text_is_not_used(lm, shipped, monkeypatch):
    monkeypatch.setattr(corpus, "SHIPPED", (replace(shipped, sha256="0" * 64),))
    with pytest.raises(EditLabError, match=r"tiny\.self\.safetensors is damaged: install editlab again") as caught:
        self_text(lm, 256, 0, "")
    assert one_sentence(caught)
    shipped.file.write_bytes(b"nothing of the kind")
    with pytest.raises(EditLabError, match=r"cannot be read \(.*\): install editlab again"):
        shipped.ids()


def test_the_built_in_models_text_is_complete_and_states_how_it_was_made():
    (text,) = SHIPPED
    assert (text.tokens, text.seed) == (MomentSettings().tokens, MomentSettings().seed)
    ids = text.ids()  # checks the digest
    made = text.made_with()
    assert len(ids) == text.tokens == made["tokens"]
    assert (made["sha256"], made["weights"], made["seed"]) == (text.sha256, text.weights, text.seed)
    assert (made["window"], made["rows"]) == (text.window, corpus.SAMPLED_ROWS) == (corpus.WINDOW, 128)
    assert max(ids) < made["architecture"]["vocab_size"]
    assert text.file.stat().st_size < 100_000


@pytest.mark.real
def test_the_built_in_models_text_is_what_the_model_samples():
    """The text is used for the fetched model, and the first tokens of its first 128 windows are sampled again.

    The windows of a group are drawn together, so a few steps of all of them are what can be compared.
    """
    lm = LanguageModel.from_name("smollm2-135m", torch.float32)
    settings = MomentSettings()
    windows = read_windows(lm, settings.text, settings.tokens, seed=settings.seed, cache=False)
    assert windows == corpus.cut(lm, SHIPPED[0].ids())
    steps = 6
    drawn = lm.sample([[window[0]] for window in windows[:128]], steps, seed=0)
    assert drawn == [window[: steps + 1] for window in windows[:128]]
    generator = torch.Generator().manual_seed(0)
    special = set(lm.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(lm.tokenizer)) if i not in special])
    firsts = ordinary[torch.randint(len(ordinary), (192,), generator=generator)].tolist()
    assert [window[0] for window in windows] == firsts
