"""A write that fails with a full disk, at each point of each command: a sentence, an exit code, and no half file.

The writes of a tiny run are counted and one of them fails after half of its bytes. A command makes dozens of writes;
those tried are the first, the last and some at even distances between them.
"""

import builtins
import csv
import errno
import io
import json
import os
import threading
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from matplotlib.figure import Figure

from editlab.cli.main import main
from tests.experiments.made_up import SCORES, finish
from tests.recipes import write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLE = 6
"""Number of points tried in each command."""


class Disk:
    """Counts the writes below a folder; the one with the number ``full_at`` fails after half of its bytes.

    The writes are those of Python's files, of ``torch.save`` and of safetensors. After the failure the disk stays full
    if ``stays`` is set.
    """

    def __init__(self, root, full_at=None, stays=False):
        self.root, self.full_at, self.stays = str(root), full_at, stays
        self.count = 0
        self.lock = threading.Lock()  # TensorBoard writes from a thread of its own

    def write(self, whole, half):
        """Carry out a write with ``whole``, or fail after ``half``."""
        with self.lock:
            self.count += 1
            fails = self.full_at is not None and (
                self.count >= self.full_at if self.stays else self.count == self.full_at
            )
        if fails:
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole()

    def holds(self, path):
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root)


class Watched:
    """A file whose writes are those of a :class:`Disk`."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        return self._disk.write(lambda: self._file.write(data), lambda: self._file.write(data[: len(data) // 2]))

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)


@pytest.fixture
def watch(monkeypatch):
    """Puts a :class:`Disk` below everything that writes."""
    plain_open, plain_save = io.open, torch.save
    plain_tensors = safetensors.torch.serialize_file

    def watch(disk):
        def opened(path, mode="r", *args, **kwargs):
            file = plain_open(path, mode, *args, **kwargs)
            return Watched(file, disk) if set(mode) & set("wax+") and disk.holds(path) else file

        def saved(what, path, *args, **kwargs):
            if not disk.holds(path):
                return plain_save(what, path, *args, **kwargs)
            return disk.write(
                lambda: plain_save(what, path, *args, **kwargs), lambda: Path(path).write_bytes(b"PK half")
            )

        def serialized(tensors, path, *args, **kwargs):
            whole = lambda: plain_tensors(tensors, path, *args, **kwargs)
            return disk.write(whole, lambda: Path(path).write_bytes(b"half")) if disk.holds(path) else whole()

        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(torch, "save", saved)
        monkeypatch.setattr(safetensors.torch, "serialize_file", serialized)

    return watch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a tiny model, a finished run, its delta, and a made-up experiment."""
    root = tmp_path_factory.mktemp("finished")
    tiny_model("llama").save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    settings = {"method": {"class_path": "EMMET"}, "layers": [1], "evaluation": {"heldout_tokens": 0}}
    write_recipe(root, root / "base", model=settings, trainer={"callbacks": [CURVE]})
    recipe = yaml.safe_load((root / "tiny.yaml").read_text())
    recipe["data"]["path"] = str(root / "facts.json")
    recipe["trainer"]["logger"] = {"class_path": "RunLogger", "init_args": {"save_dir": str(root / "runs")}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["fit", "--config", str(root / "tiny.yaml")]) == 0
        run = root / "runs" / "tiny" / "version_0"
        assert main(["export", "--ckpt_path", str(run), "--delta-only", "--out", str(root / "delta")]) == 0
    content = {
        "recipe": "tiny.yaml", "facts": "facts.json", "edits": 4, "batch_size": 2, "seeds": [1],
        "cases": {"one": {}, "two": {}},
        "tables": [{"file": "mine.csv", "rows": "runs"}, {"file": "means.csv", "rows": "means", "against": "one"}],
    }  # fmt: skip
    (root / "mine.yaml").write_text(yaml.safe_dump(content))
    for case in ("one", "two"):
        folder = root / "work" / case / "version_1"
        finish(folder, SCORES, edits=4, seconds=1.0)
    return root


CURVE = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 2, "sample": 2}}

COMMANDS = {
    "fit": "fit --config {root}/tiny.yaml --trainer.logger.init_args.save_dir {out}",
    "fit without a logger": "fit --config {root}/tiny.yaml --trainer.logger false --trainer.default_root_dir {out}",
    "export": "export --ckpt_path {root}/runs/tiny/version_0 --out {out}/model",
    "export a delta": "export --ckpt_path {root}/runs/tiny/version_0 --delta-only --out {out}/delta",
    "apply": "apply --delta {root}/delta --model {root}/base --out {out}/model",
    "report": "report {root}/runs/tiny/version_0 --out {out}/report.html",
    "sweep": "sweep {root}/mine.yaml --no-run --work {root}/work --out {out}",
}


def complete(path):
    """Read a file as its kind is read; raises an error if it is not complete."""
    if path.name in (".lock", "README.md", "chat_template.jinja") or path.name.startswith("events.out"):
        return  # event files are appended to, and TensorBoard reads them up to the last whole record
    text = path.read_text() if path.suffix in (".json", ".yaml", ".csv", ".html", ".jsonl") else ""
    match path.suffix:
        case ".json":
            json.loads(text)
        case ".jsonl":
            assert all(json.loads(line) for line in text.splitlines())
        case ".yaml":
            assert path.name == "hparams.yaml" or yaml.safe_load(text).keys() >= {"model", "data", "trainer"}
        case ".csv":
            assert text.endswith("\n")
            assert len({len(row) for row in csv.reader(io.StringIO(text))}) == 1
        case ".html":
            assert text.rstrip().endswith("</html>")
        case ".ckpt":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
        case ".safetensors":
            assert safetensors.torch.load_file(path)
        case ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        case ".pdf":
            assert path.read_bytes().rstrip().endswith(b"%%EOF")
        case other:
            raise AssertionError(f"{path.name} is of the kind {other!r}, which is not known here")


def kind(name):
    """A file's name without the time and process in that of an event file."""
    name = Path(name).name
    return "events" if name.startswith("events.out") else name


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_errors_of_a_full_disk_at_each_write(finished, tmp_path, watch, capsys, command):
    def run(out, **full):
        out.mkdir()
        disk = Disk(out, **full)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(out)
            watch(disk)
            patch.setattr("callbacks.forgetting.forgetting_figure", lambda *_: Figure((1, 1)))  # drawing takes longest
            code = main(COMMANDS[command].format(root=finished, out=out).split())
        return code, disk.count

    code, count = run(tmp_path / "whole")
    assert code == 0, capsys.readouterr().err
    assert count
    everything = files(tmp_path / "whole")
    chosen = sorted({1 + round(index * (count - 1) / (SAMPLE - 1)) for index in range(SAMPLE)})
    for index, number in enumerate(chosen):
        capsys.readouterr()
        out = tmp_path / f"full_at_{number}"
        code, _ = run(out, full_at=number, stays=bool(index % 2))
        error = capsys.readouterr().err
        said = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("editlab: ")]
        assert code == 1, (number, code, error)
        assert len(said) == 1, (number, error)
        assert "space" in said[0], (number, error)
        assert "should not happen" not in said[0], (number, error)
        assert "Traceback" not in error, (number, error)
        left = files(out)
        assert not [name for name in left if name.endswith(".part")], (number, left)
        if command not in ("fit", "fit without a logger", "sweep"):
            assert not left, (number, left)
        assert {kind(name) for name in left} <= {kind(name) for name in everything}, (number, left)
        for name in left:
            complete(out / name)
