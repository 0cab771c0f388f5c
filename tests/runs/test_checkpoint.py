"""Checkpoints: found by run, written whole or not at all, and small."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from editlab.data import EditDataModule
from editlab.errors import UserError
from editlab.runs.checkpoint import AtomicCheckpointIO, EditCheckpoint, newest_checkpoint, read_checkpoint, run_version
from tests.facts import FACTS, write_counterfact
from tests.test_editor import editor, fit


def test_the_newest_run_counts_by_number_not_by_name(tmp_path):
    for version in ("version_2", "version_10", "version_x"):
        path = tmp_path / version / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "version_11").mkdir()
    assert newest_checkpoint(tmp_path).parts[-3] == "version_10"
    with pytest.raises(UserError, match="no run with a checkpoint"):
        newest_checkpoint(tmp_path / "none")


def test_the_run_that_a_checkpoint_belongs_to(tmp_path):
    assert run_version(tmp_path / "version_3" / "checkpoints" / "last.ckpt", tmp_path) == "version_3"
    assert run_version(Path("elsewhere/last.ckpt"), tmp_path) is None
    assert run_version(tmp_path / "version_3" / "other" / "last.ckpt", tmp_path) is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"a": torch.ones(3)}, path)

    def half(what, path):
        Path(path).write_bytes(b"half")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="killed"):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def edit(model, folder, checkpoint, ckpt_path=None):
    """Edits five facts one by one, with these checkpoints and no logger."""
    facts = str(write_counterfact(folder / "facts.json", FACTS[:5]))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[checkpoint], enable_progress_bar=False, logger=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(editor(model), EditDataModule(facts, batch_size=1, keep="all"), ckpt_path=ckpt_path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_keep_all_keeps_every_checkpoint_even_across_a_kill(tiny_folder, tmp_path):
    checkpoint = EditCheckpoint(every_n_batches=2, keep_all=True)
    edit(tiny_folder, tmp_path, checkpoint)
    folder = Path(checkpoint.dirpath)
    kept = {"batch_2.ckpt": 2, "batch_4.ckpt": 4, "batch_5.ckpt": 5, "last.ckpt": 5}
    assert {p.name: read_checkpoint(p)["global_step"] for p in folder.iterdir()} == kept
    # As if killed right after the fourth was written.
    (folder / "batch_5.ckpt").unlink()
    (folder / "batch_4.ckpt").replace(folder / "last.ckpt")
    edit(tiny_folder, tmp_path, EditCheckpoint(every_n_batches=2, keep_all=True), ckpt_path=folder / "last.ckpt")
    assert {p.name: read_checkpoint(p)["global_step"] for p in folder.iterdir()} == kept


def test_a_disk_without_links_gets_copies(tiny_folder, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("os.link", no_link)
    checkpoint = EditCheckpoint(every_n_batches=5, keep_all=True)
    edit(tiny_folder, tmp_path, checkpoint)
    last, kept = (Path(checkpoint.dirpath) / name for name in ("last.ckpt", "batch_5.ckpt"))
    assert last.read_bytes() == kept.read_bytes()
    assert not last.samefile(kept)


def test_a_checkpoint_every_n_batches_and_at_the_end(tiny_folder, tmp_path):
    checkpoint, saved = EditCheckpoint(every_n_batches=2), []
    plain = checkpoint._save_checkpoint
    checkpoint._save_checkpoint = lambda trainer, path: (saved.append(trainer.global_step), plain(trainer, path))
    edit(tiny_folder, tmp_path, checkpoint)
    assert saved == [2, 4, 5]
    files = list(Path(checkpoint.dirpath).iterdir())
    assert [f.name for f in files] == ["last.ckpt"]
    kept = torch.load(files[0], weights_only=True)
    assert not any(name.startswith("lm.") for name in kept["state_dict"])


def test_the_file_is_no_larger_for_a_deeper_model(tiny_folder, tmp_path):
    from tests.tiny import tiny_model, tiny_tokenizer

    deep = tmp_path / "deep"
    tiny_model("llama", num_hidden_layers=12).save_pretrained(deep)
    tiny_tokenizer().save_pretrained(deep)
    sizes = []
    for folder in (tiny_folder, deep):
        trainer = fit(tmp_path, editor(folder), save=True, name=folder.name)
        sizes.append(Path(trainer.checkpoint_callback.best_model_path).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]  # names and scores may differ by some bytes


def test_bad_settings():
    with pytest.raises(UserError, match="every_n_batches is 0"):
        EditCheckpoint(every_n_batches=0)
