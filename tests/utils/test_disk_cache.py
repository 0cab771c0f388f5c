"""Tests that the disk cache returns stored results bit by bit, and never returns a damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from editlab.errors import EditLabError
from editlab.keys.moments import MomentSettings, second_moments
from editlab.lm.language_model import LanguageModel
from editlab.utils.disk_cache import (
    TENSORS,
    Codec,
    DiskCache,
    RowCache,
    cached_folder,
    key_of,
    read_checked,
    write_checked,
)
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = [key_of(number=number) for number in range(4)]
ROWS = torch.tensor([[0.1, 1.0], [-2.5, 0.0], [3e-30, 1.0], [-4.0, 1.0]], dtype=torch.float64)
TEXT = Codec(lambda text: text.encode(), lambda content: content.decode())


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def the_file(folder: Path) -> Path:
    (path,) = [path for path in folder.rglob("*") if path.is_file()]
    return path


def test_keys_differ_in_names_and_values_and_not_in_order():
    assert key_of(a=1, b="x") == key_of(b="x", a=1)
    keys = {key_of(a=1), key_of(b=1), key_of(a="1"), key_of(a=[1]), key_of(a=None), key_of(), key_of(a=1.5)}
    assert len(keys) == 7
    assert {len(key) for key in keys} == {32}
    with pytest.raises(TypeError):
        key_of(a=torch.ones(1))


def test_stored_results_are_read_and_not_computed_twice(tmp_path):
    cache = DiskCache(tmp_path / "deep" / "folder", TENSORS)
    result = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.tensor([True])}
    assert cache.read("key") is None
    assert cache.fetch("key", lambda: result) is result
    again = DiskCache(cache.folder, TENSORS).fetch("key", lambda: pytest.fail("recomputed"))
    assert again.keys() == result.keys()
    assert all(torch.equal(again[name], result[name]) for name in result)
    assert cache.read("other") is None


def test_one_flipped_bit_anywhere_is_detected_and_logged(tmp_path, caplog):
    cache = DiskCache(tmp_path, TEXT)
    cache.write("key", "content")
    size = cache.path("key").stat().st_size
    for position in range(size):
        for bit in (0, 3, 7):
            caplog.clear()
            flip(cache.path("key"), position, bit)
            assert cache.read("key") is None
            assert [record.getMessage() for record in caplog.records] == [
                f"{cache.path('key')} is damaged: its content is recomputed."
            ]
            assert not cache.path("key").exists()
            assert cache.fetch("key", lambda: "content") == "content"


@pytest.mark.parametrize("content", [b"", b"\n", b"editlab-cache-1 ", b"{}", b"\xff" * 100])
def test_a_file_of_another_format_counts_as_damaged(tmp_path, content, caplog):
    path = tmp_path / "key.cache"
    path.write_bytes(content)
    assert read_checked(path) is None
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("kept", [0, 1, 20, 60, -1])
def test_a_truncated_file_counts_as_damaged(tmp_path, kept):
    path = tmp_path / "key.cache"
    write_checked(path, b"some content that is long enough")
    path.write_bytes(path.read_bytes()[:kept])
    assert read_checked(path) is None


def test_intact_content_of_another_format_is_recomputed(tmp_path, caplog):
    old, new = DiskCache(tmp_path, TEXT), DiskCache(tmp_path, Codec(json.dumps, json.loads))
    old.write("key", "no JSON")
    assert new.read("key") is None
    assert "is damaged" in caplog.text


def test_an_unreadable_file_does_not_count_as_damaged(tmp_path):
    (tmp_path / "key.cache").mkdir()
    with pytest.raises(OSError, match="directory"):
        read_checked(tmp_path / "key.cache")


def test_only_missing_rows_are_computed(tmp_path):
    asked = []

    def compute(missing):
        asked.append(missing)
        return ROWS[missing]

    cache = RowCache(tmp_path)
    assert torch.equal(cache.fetch([NAMES[1], NAMES[0], NAMES[1]], lambda m: ROWS[[1, 0]]), ROWS[[1, 0, 1]])
    assert torch.equal(cache.fetch(NAMES, compute), ROWS)
    assert torch.equal(RowCache(tmp_path).fetch(NAMES[::-1], lambda m: pytest.fail("recomputed")), ROWS.flip(0))
    assert asked == [[2, 3]]
    assert len(list(tmp_path.iterdir())) == 2  # one file for all rows that were computed together


def test_rows_of_another_run_are_found_and_the_first_one_read_is_used(tmp_path):
    mine, other = RowCache(tmp_path), RowCache(tmp_path)
    mine.fetch(NAMES[:1], lambda missing: ROWS[:1])
    other.fetch(NAMES[1:], lambda missing: ROWS[1:])
    assert torch.equal(mine.fetch(NAMES, lambda missing: pytest.fail("recomputed")), ROWS)


def test_a_non_finite_row_is_returned_and_not_stored(tmp_path):
    spoilt = ROWS.clone()
    spoilt[1, 0] = torch.nan
    got = RowCache(tmp_path).fetch(NAMES, lambda missing: spoilt)
    assert torch.equal(got, spoilt) is False
    assert torch.equal(got[[0, 2, 3]], ROWS[[0, 2, 3]])
    assert torch.equal(RowCache(tmp_path).fetch(NAMES, lambda missing: ROWS[missing] * 2)[1], ROWS[1] * 2)


def test_nothing_is_stored_if_the_computation_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        RowCache(tmp_path).fetch(NAMES, lambda missing: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_one_flipped_bit_never_yields_wrong_rows(tmp_path, caplog):
    RowCache(tmp_path).fetch(NAMES, lambda missing: ROWS)
    path = the_file(tmp_path)
    for position in range(path.stat().st_size):
        flip(path, position, position % 8)
        caplog.clear()
        assert torch.equal(RowCache(tmp_path).fetch(NAMES, lambda missing: ROWS), ROWS)
        assert caplog.text.count("is damaged") == 1


def test_rows_that_another_run_wrote_meanwhile_are_not_overwritten(tmp_path):
    def compute(missing):
        RowCache(tmp_path).fetch(NAMES, lambda also_missing: ROWS)
        return ROWS + 1

    RowCache(tmp_path).fetch(NAMES, compute)
    assert torch.equal(RowCache(tmp_path).fetch(NAMES, lambda missing: pytest.fail("recomputed")), ROWS)


@pytest.mark.parametrize("where", [0.0, 0.002, 0.3, 0.7, 0.999])
def test_a_flipped_byte_in_moments_never_yields_wrong_moments(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    settings = MomentSettings(tokens=200)
    right = second_moments(lm, [1], settings, "tiny")[1]
    path = the_file(tmp_path / "moments")
    flip(path, int(where * path.stat().st_size))
    assert torch.equal(second_moments(lm, [1], settings, "tiny")[1], right)
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    assert torch.equal(second_moments(lm, [1], settings, "tiny")[1], right)
    assert "is damaged" not in caplog.text


def test_a_full_disk_raises_a_clear_error(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(EditLabError, match="no space on the disk"):
        write_checked(tmp_path / "key.cache", b"content")


# ---- folders


def make(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "empty.txt").touch()
    (folder / "inner" / "b.txt").write_text("second")


@pytest.mark.parametrize("name", ["a.txt", "inner/b.txt", "digests.cache"])
def test_a_flipped_bit_in_a_folder_is_detected(tmp_path, caplog, name):
    folder = cached_folder(tmp_path / "thing", make)
    right = (folder / name).read_bytes()
    for position in range(len(right)):
        flip(folder / name, position, position % 8)
        caplog.clear()
        assert cached_folder(folder, make) == folder
        assert [r.getMessage() for r in caplog.records] == [
            f"{folder} is damaged ({name} has changed): it is recreated."
        ]
        assert (folder / name).read_bytes() == right
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_an_intact_folder_is_made_once(tmp_path):
    folder = cached_folder(tmp_path / "thing", make)
    (folder / "notes of the user.txt").write_text("not ours")
    assert cached_folder(folder, lambda _: pytest.fail("made again")) == folder


def test_a_complete_folder_without_digests_gets_them(tmp_path):
    folder = tmp_path / "thing"
    folder.mkdir()
    make(folder)
    assert cached_folder(folder, lambda _: pytest.fail("made again"), [("a.txt", "b.txt")]) == folder
    flip(folder / "a.txt", 0)
    assert (cached_folder(folder, make) / "a.txt").read_text() == "first"


def test_an_incomplete_folder_is_recreated(tmp_path, caplog):
    folder = tmp_path / "thing"
    folder.mkdir()
    assert (cached_folder(folder, make, [("a.txt", "other.txt")]) / "inner" / "b.txt").is_file()
    assert "a.txt is missing" in caplog.text


def test_a_folder_that_could_not_be_made_leaves_no_files(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_folder(tmp_path / "thing", lambda _: 1 / 0)
    assert list(tmp_path.iterdir()) == []
