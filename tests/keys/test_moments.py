"""Second moments against sums of outer products over the same windows, and the key of the cache."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from editlab.errors import UserError
from editlab.keys import moments
from editlab.keys.moments import MomentSettings, accumulate, excess, second_moments
from editlab.lm import text as corpus
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import sample_text
from editlab.utils.disk_cache import TENSORS, DiskCache
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

TOKENS = 300
"""Two whole windows of 128 and one of 44."""


@functools.cache
def lm_of(family: str) -> LanguageModel:
    return LanguageModel(tiny_model(family), tiny_tokenizer())


@pytest.fixture
def lm():
    return lm_of("llama")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Use a cache folder for this test alone."""
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT * 10), encoding="utf-8")
    return str(path)


@pytest.fixture
def short(monkeypatch):
    """Use windows of 16 tokens, because sampling token by token is slow."""
    monkeypatch.setattr(corpus, "WINDOW", 16)


@pytest.fixture
def computed(monkeypatch):
    """Record the layers that are computed and not taken from the cache."""
    seen = []
    accumulate = moments.accumulate

    def noted(lm, layers, windows, device):
        seen.append(list(layers))
        return accumulate(lm, layers, windows, device)

    monkeypatch.setattr(moments, "accumulate", noted)
    return seen


@torch.no_grad()
def naive(lm: LanguageModel, windows, layer: int) -> torch.Tensor:
    """Average k k^T token by token, with one plain pass per window."""
    seen, total, count = [], 0, 0
    handle = lm.anatomy.edit_module(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for window in windows:
        lm.model(input_ids=torch.tensor([window]))
        for key in seen.pop().reshape(len(window), -1).double():
            total = total + torch.outer(key, key)
            count += 1
    handle.remove()
    return total / count


def windows_of(lm: LanguageModel, text: str, tokens: int = TOKENS) -> list[list[int]]:
    ids = lm.tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][:tokens]
    return [ids[:128], ids[128:256], ids[256:]]


def files(cache):
    return sorted(p.name for p in cache.rglob("*") if p.is_file())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_moments_are_the_mean_outer_product(family, text):
    """All tokens count alike, also those of the last window, which is shorter and so is padded."""
    lm = lm_of(family)
    got = second_moments(lm, [0, 2], MomentSettings(text=text, tokens=TOKENS), "tiny")
    assert set(got) == {0, 2}
    for layer, c0 in got.items():
        assert c0.dtype == torch.float64
        assert c0.shape == (48, 48)
        torch.testing.assert_close(c0, naive(lm, windows_of(lm, text), layer), rtol=1e-4, atol=1e-7)


def test_many_passes_add_up(lm, text, monkeypatch):
    monkeypatch.setattr(moments, "ROWS", 1)
    got = second_moments(lm, [1], MomentSettings(text=text, tokens=TOKENS), "tiny")[1]
    torch.testing.assert_close(got, naive(lm, windows_of(lm, text), 1), rtol=1e-4, atol=1e-7)


def test_sampled_text_is_what_the_moments_are_taken_over(lm, short):
    windows = sample_text(lm, 20, 3, "title")
    assert [len(w) for w in windows] == [16, 4]
    got = second_moments(lm, [1], MomentSettings(text="self", tokens=20, seed=3), "tiny")[1]
    torch.testing.assert_close(got, naive(lm, windows, 1), rtol=1e-4, atol=1e-7)


def test_blocks_above_the_highest_layer_never_run(lm, text):
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.anatomy.blocks)]
    second_moments(lm, [0, 2], MomentSettings(text=text, tokens=TOKENS), "tiny")
    for handle in handles:
        handle.remove()
    # The reading ends at the map's input, so even block 2 is not run to its end.
    assert set(ran) == {0, 1}


# how much text is enough


def test_keys_are_as_long_as_themselves():
    keys = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert excess(keys.T @ keys / 200, keys) == pytest.approx(0, abs=1e-5)  # but for the ridge
    assert excess(keys.T @ keys / 200, 2 * keys) == pytest.approx(3, abs=1e-4)


def test_new_keys_of_a_normal_distribution_are_longer_by_what_the_wishart_s_mean_says():
    # n = 10 d keys: (d + 1) / (n - d - 1) = 21 / 179, the mean over draws of the moments.
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(100, 400, 20, dtype=torch.float64, generator=draw)
    mixed = keys @ torch.randn(20, 20, dtype=torch.float64, generator=draw)  # directions do not matter
    found = [excess(some[:200].T @ some[:200] / 200, some[200:]) for some in mixed]
    assert sum(found) / len(found) == pytest.approx(21 / 179, abs=0.01)


def read_until(lm, text, monkeypatch, said, tolerance):
    """The moments of a run in which new keys are as much longer as is ``said``, part by part."""
    given = iter(said)
    monkeypatch.setattr(moments, "WINDOW", 16)
    monkeypatch.setattr(corpus, "WINDOW", 16)
    monkeypatch.setattr(moments, "KEYS_A_FEATURE", 1)  # 48 features: 3 windows at first
    monkeypatch.setattr(moments, "excess", lambda *_: next(given))
    settings = MomentSettings(text=text, tokens=16 * 20, tolerance=tolerance, cache=False)
    return second_moments(lm, [1], settings, "tiny")[1]


@pytest.mark.parametrize(("said", "tokens"), [([0.3, 0.05], 96), ([0.1], 48), ([0.3, 0.3, 0.3], 320)])
def test_text_is_read_until_new_keys_are_no_longer(lm, text, monkeypatch, said, tokens):
    """Parts of 3, 3, 6 and the last 8 windows of 16 tokens; in float64, as other passes round float32 otherwise."""
    lm.double()
    got = read_until(lm, text, monkeypatch, said, tolerance=0.2)
    windows = moments.text_windows(lm, MomentSettings(text=text, tokens=tokens), "tiny")
    torch.testing.assert_close(got, accumulate(lm, [1], windows)[1], rtol=1e-12, atol=1e-15)


def test_without_a_tolerance_nobody_asks(lm, text, monkeypatch):
    got = read_until(lm, text, monkeypatch, [], tolerance=0)
    windows = moments.text_windows(lm, MomentSettings(text=text, tokens=320), "tiny")
    assert torch.equal(got, accumulate(lm, [1], windows)[1])


def test_moments_that_stopped_early_are_no_one_else_s(lm, text, computed, monkeypatch):
    monkeypatch.setattr(moments, "excess", lambda *_: 0.0)
    for tolerance in (0.0, 0.1, 0.2, 0.1):
        second_moments(lm, [0, 1], MomentSettings(text=text, tokens=TOKENS, tolerance=tolerance), "tiny")
    assert computed == [[0, 1]] * 3  # the last came from the cache


def test_a_negative_tolerance_is_refused():
    with pytest.raises(UserError, match=r"model\.moments\.tolerance is -1"):
        MomentSettings(tolerance=-1)


# the cache


def test_the_second_time_comes_from_the_cache_and_is_the_same(lm, text, computed, cache):
    settings = MomentSettings(text=text, tokens=TOKENS)
    first = second_moments(lm, [1], settings, "tiny")
    assert len(files(cache)) == 1
    again = second_moments(lm, [1], settings, "another name")
    assert computed == [[1]]
    assert torch.equal(again[1], first[1])


def test_only_missing_layers_are_computed(lm, text, computed):
    settings = MomentSettings(text=text, tokens=TOKENS)
    alone = second_moments(lm, [1], settings, "tiny")
    both = second_moments(lm, [0, 1], settings, "tiny")
    assert computed == [[1], [0]]
    assert torch.equal(both[1], alone[1])


def test_the_key_is_what_the_moments_were_computed_from(lm, text, computed, tmp_path, short):
    """Each of these differs from the first in one thing, and none is answered from another's entry."""
    base = {"text": text, "tokens": TOKENS}
    second_moments(lm, [1], MomentSettings(**base), "tiny")
    second_moments(lm, [2], MomentSettings(**base), "tiny")
    second_moments(lm, [1], MomentSettings(text=text, tokens=TOKENS - 1), "tiny")
    other = tmp_path / "other.txt"
    other.write_text("x" + "\n".join(TEXT * 10), encoding="utf-8")
    second_moments(lm, [1], MomentSettings(text=str(other), tokens=TOKENS), "tiny")
    changed = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    with torch.no_grad():
        changed.model.lm_head.weight[0, 0] += 1e-3
    second_moments(changed, [1], MomentSettings(**base), "tiny")
    second_moments(lm, [1], MomentSettings(text="self", tokens=20, seed=0), "tiny")
    second_moments(lm, [1], MomentSettings(text="self", tokens=20, seed=1), "tiny")
    turned = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    turned.model.config.rms_norm_eps = 0.5
    second_moments(turned, [1], MomentSettings(**base), "tiny")
    assert len(computed) == 8


def test_the_key_of_a_file_is_its_content_and_not_its_name(lm, text, computed, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(text).read_text(encoding="utf-8"), encoding="utf-8")
    for path in (text, str(copy)):
        second_moments(lm, [1], MomentSettings(text=path, tokens=TOKENS), "tiny")
    assert len(computed) == 1


def test_the_seed_plays_no_part_in_a_files_key(lm, text, computed):
    for seed in (0, 1):
        second_moments(lm, [1], MomentSettings(text=text, tokens=TOKENS, seed=seed), "tiny")
    assert len(computed) == 1


def test_without_the_cache_nothing_is_written_or_read(lm, text, computed, cache):
    settings = MomentSettings(text=text, tokens=TOKENS)
    off = MomentSettings(text=text, tokens=TOKENS, cache=False)
    second_moments(lm, [1], off, "tiny")
    assert files(cache) == []
    second_moments(lm, [1], settings, "tiny")
    entry = next(cache.rglob("*.cache"))
    DiskCache(entry.parent, TENSORS).write(entry.stem, {"moments": torch.zeros(1)})  # an entry that would be noticed
    assert second_moments(lm, [1], off, "tiny")[1].shape == (48, 48)
    assert len(computed) == 3


# bad texts


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    message = str(error.value)
    return message.endswith(".") and ". " not in message and "\n" not in message


def test_a_missing_text_is_the_users_error(lm, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt' does not exist") as caught:
        second_moments(lm, [0], MomentSettings(text=str(tmp_path / "nowhere.txt")), "tiny")
    assert one_sentence(caught)


def test_a_text_that_is_none_is_the_users_error(lm, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80" * 10)
    for path in (tmp_path / "weights.bin", tmp_path):  # bytes, and a folder
        with pytest.raises(UserError, match="cannot be read as UTF-8") as caught:
            second_moments(lm, [0], MomentSettings(text=str(path)), "tiny")
        assert one_sentence(caught)


def test_a_short_text_is_the_users_error_and_leaves_no_entry(lm, tmp_path, cache):
    (tmp_path / "short.txt").write_text("The capital of France")
    with pytest.raises(UserError, match="The text has 4 tokens, and 50 are needed: lower") as caught:
        second_moments(lm, [0], MomentSettings(text=str(tmp_path / "short.txt"), tokens=50), "tiny")
    assert one_sentence(caught)
    assert files(cache) == []


def test_a_count_of_no_tokens_is_refused():
    with pytest.raises(UserError, match=r"model\.moments\.tokens is 0"):
        MomentSettings(tokens=0)
