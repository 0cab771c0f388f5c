"""One byte flipped in each kind of file that is cached or saved: it is noticed, and made again or refused by name."""

import random
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch

from editlab.errors import UserError
from editlab.runs.checkpoint import AtomicCheckpointIO, read_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.history import History
from editlab.runs.resume import ENTRIES, KEY
from editlab.utils.disk_cache import TENSORS, DiskCache, RowCache, cached_folder, key_of

TOTAL = "edited.1.total"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def read_or_refusal(read, path):
    """What is read, or the sentence with which it is refused."""
    try:
        return read(path)
    except UserError as error:
        return str(error)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the least content, with one sum of updates."""
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    editor = dict.fromkeys(ENTRIES, 0) | {
        "layers": [1], "modules": ["h.1.mlp"], "ledger": [], "dtype": "float32", "weights": "ab", "language_model": "x",
    }  # fmt: skip
    content = {KEY: editor, "global_step": 1, "state_dict": {TOTAL: torch.arange(600.0).reshape(20, 30)}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.fixture
def delta(tmp_path):
    totals = {"h.1.mlp": torch.arange(600.0).reshape(20, 30)}
    made = Delta("x", "ab", torch.float32, [1], totals, History(batches=1))
    made.save(tmp_path / "delta.safetensors")
    return made, tmp_path / "delta.safetensors"


def data_of_sum(path):
    """The range of bytes of the largest entry of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size)
    begin = path.read_bytes().find(torch.arange(600.0).numpy().tobytes())
    return entry.filename.partition("/")[2], range(begin, begin + entry.file_size)


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint, Delta.from_checkpoint])
def test_errors_of_a_flipped_byte_in_a_checkpoint_name_its_entry(checkpoint, read):
    read(checkpoint)
    entry, data = data_of_sum(checkpoint)
    flip(checkpoint, random.Random(0).choice(data))
    with pytest.raises(UserError, match=rf"is damaged \(its entry {entry} has changed"):
        read(checkpoint)


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint, Delta.from_checkpoint])
def test_errors_of_any_flipped_byte_in_a_checkpoint(checkpoint, read):
    whole, before = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)["state_dict"][TOTAL]
    for at in random.Random(1).sample(range(len(whole)), 60):
        flip(checkpoint, at)
        found = read_or_refusal(read, checkpoint)
        if not isinstance(found, str):  # a byte that carries nothing: padding between entries, a date
            total = found.totals["h.1.mlp"] if isinstance(found, Delta) else found["state_dict"][TOTAL]
            assert torch.equal(total, before)
        checkpoint.write_bytes(whole)


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint, Delta.from_checkpoint])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_errors_of_a_truncated_checkpoint(checkpoint, read, kept):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="cannot be read, because it is damaged"):
        read(checkpoint)


def test_errors_of_any_flipped_byte_in_a_delta(delta):
    made, path = delta
    whole = path.read_bytes()
    for at in [*range(40), *random.Random(2).sample(range(len(whole)), 160)]:
        flip(path, at)
        found = read_or_refusal(Delta.load, path)
        if isinstance(found, str):
            assert "export it again" in found or "is no delta" in found
        else:  # a space that pads the header
            assert (found.fingerprint, found.history) == (made.fingerprint, made.history)
            assert torch.equal(found.totals["h.1.mlp"], made.totals["h.1.mlp"])
        path.write_bytes(whole)
    assert Delta.load(path).history == made.history


def test_errors_of_a_flipped_byte_in_a_delta_name_its_entry(delta):
    _, path = delta
    flip(path, path.stat().st_size - 7)
    with pytest.raises(UserError, match=r"its entry h.1.mlp has changed since it was written\): export it again"):
        Delta.load(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_errors_of_sums_that_are_not_finite(checkpoint, delta, tmp_path, bad):
    made, _ = delta
    total = made.totals["h.1.mlp"].clone()
    total[3, 4] = bad
    replace(made, totals={"h.1.mlp": total}).save(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"h.1.mlp in the delta .* holds NaN or infinity"):
        Delta.load(tmp_path / "bad.safetensors")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][TOTAL][3, 4] = bad
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"h.1.mlp in the checkpoint .* holds NaN or infinity"):
        Delta.from_checkpoint(checkpoint)
    assert Delta.from_checkpoint(checkpoint, usable=False).fingerprint == "ab"  # reverting needs no sum


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2), "text", None])
def test_errors_of_sums_that_are_no_matrices(checkpoint, bad):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][TOTAL] = bad
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"has no float32 matrix as edited.1.total: give another"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["moments or text", "values or scores", "converted model"])
def test_a_damaged_cache_is_made_again_with_one_line(tmp_path, caplog, kind):
    made = []

    def tensors():
        made.append(1)
        return {"x": torch.arange(64.0)}

    def rows(missing):
        made.append(1)
        return torch.arange(64.0).reshape(1, 64)

    def folder(path):
        made.append(1)
        (path / "weights").write_bytes(torch.arange(64.0).numpy().tobytes())

    def fetch():
        if kind == "moments or text":
            return DiskCache(tmp_path / "c", TENSORS).fetch("key", tensors)["x"]
        if kind == "values or scores":
            return RowCache(tmp_path / "c").fetch([key_of(a=1)], rows)[0]
        path = cached_folder(tmp_path / "c", folder) / "weights"
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)

    fetch()
    fetch()
    assert len(made) == 1
    damaged = max((path for path in (tmp_path / "c").iterdir()), key=lambda path: path.name == "weights")
    whole = damaged.read_bytes()
    for count, at in enumerate([0, len(whole) // 2, len(whole) - 1], start=1):
        caplog.clear()
        flip(damaged, at)
        assert torch.equal(fetch(), torch.arange(64.0))
        assert len(made) == 1 + count
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "is damaged" in said[0]
    shutil.rmtree(tmp_path / "c")
