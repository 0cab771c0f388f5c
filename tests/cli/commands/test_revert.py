"""Revert: the base model to the bit, or the state after an earlier batch, as an export of that batch's checkpoint."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from editlab.cli.main import main
from editlab.lm.fingerprint import fingerprint
from tests.cli.commands.runs import files, same_bits, weights


def revert(*arguments):
    return main(["revert", *map(str, arguments)])


def test_all_edits_taken_out_leave_the_base_model(run, tmp_path):
    assert revert("--ckpt_path", run.folder, "--out", tmp_path / "out") == 0
    assert same_bits(weights(tmp_path / "out"), weights(run.base))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the 8 fact edits in 4 batches by editlab are removed" in card
    assert "| 1 |" not in card


def test_a_negative_zero_stays_one(runs, tmp_path):
    # Adding a sum of zeros would turn it into 0.0.
    run = runs("llama")
    base, name = tmp_path / "base", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(run.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name][0, 0] = -0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    saved = torch.load(run.checkpoint, weights_only=True)
    from transformers import AutoModelForCausalLM

    saved["editor"]["weights"] = fingerprint(AutoModelForCausalLM.from_pretrained(base))
    torch.save(saved, tmp_path / "zero.ckpt")
    assert revert("--ckpt_path", tmp_path / "zero.ckpt", "--model", base, "--out", tmp_path / "out") == 0
    assert torch.signbit(weights(tmp_path / "out")[name][0, 0])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_back_to_a_batch(runs, tmp_path, step):
    run = runs("gpt2")
    kept = run.folder / "checkpoints" / f"batch_{step}.ckpt"
    assert revert("--ckpt_path", run.folder, "--out", tmp_path / "back", "--to_step", step) == 0
    assert main(["export", "--ckpt_path", str(kept), "--out", str(tmp_path / "then")]) == 0
    assert same_bits(weights(tmp_path / "back"), weights(tmp_path / "then"))
    # By the definition, from the sums that were there after so many batches.
    total = torch.load(kept, weights_only=True)["state_dict"]["edited.2.total"]
    name = "transformer.h.2.mlp.c_proj.weight"
    assert torch.equal(weights(tmp_path / "back")[name], weights(run.base)[name] + total.T)
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"{2 * step} fact edits in {step} batch" in card
    assert ("| ES |" in card) == (step == 4)  # the summary is of the end


def test_a_batch_that_was_rolled_back_changes_nothing(runs, tmp_path):
    for step in (2, 3):
        assert revert("--ckpt_path", runs("gpt2").folder, "--out", tmp_path / str(step), "--to_step", step) == 0
    assert same_bits(weights(tmp_path / "2"), weights(tmp_path / "3"))


def test_a_state_that_was_not_kept_is_reported_with_a_fix(runs, tmp_path, capsys):
    run = runs("llama")
    kept = tmp_path / "checkpoints"
    shutil.copytree(run.folder / "checkpoints", kept)
    (kept / "batch_3.ckpt").unlink()
    (kept / "half.ckpt").write_bytes(b"half")
    other = torch.load(kept / "batch_2.ckpt", weights_only=True)
    other["editor"]["ledger"][0]["fact"]["target_new"] = "Oslo"  # of a run with other edits
    torch.save(other, kept / "batch_2.ckpt")
    for step, message in (
        (3, "state after batch 3 (there are those after 1, 4): run again with EditCheckpoint's keep_all"),
        (2, "state after batch 2 (there are those after 1, 4)"),
        (5, "--to_step is 5: "),
        (-1, "--to_step is -1: "),
        ("two", "to_step is 'two': it must be int"),
    ):
        assert revert("--ckpt_path", kept / "last.ckpt", "--out", tmp_path / "no", f"--to_step={step}") == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert message in said[0]
    assert not (tmp_path / "no").exists()
    before = files(kept)
    assert revert("--ckpt_path", kept, "--out", tmp_path / "yes", "--to_step", 1) == 0
    assert files(kept) == before


def test_kept_checkpoints_share_the_bytes_of_the_last(runs):
    folder = runs("llama").folder / "checkpoints"
    assert sorted(os.listdir(folder)) == [f"batch_{n}.ckpt" for n in (1, 2, 3, 4)] + ["last.ckpt"]
    assert os.path.samefile(folder / "batch_4.ckpt", folder / "last.ckpt")
    assert not os.path.samefile(folder / "batch_3.ckpt", folder / "last.ckpt")
    steps = [torch.load(folder / f"batch_{n}.ckpt", weights_only=True)["global_step"] for n in (1, 2, 3, 4)]
    assert steps == [1, 2, 3, 4]


def test_the_fates_of_independent_batches(runs, tmp_path):
    run = runs("llama", restore_between_batches=True)
    assert main(["export", "--ckpt_path", str(run.folder), "--out", str(tmp_path / "d"), "--delta-only"]) == 0
    from safetensors import safe_open

    with safe_open(tmp_path / "d" / "delta.safetensors", "pt") as file:
        edits = json.loads(file.metadata()["history"])["edits"]
    out = "taken out before the next batch"
    assert [edit["fate"] for edit in edits] == [out, out, out, out, "rolled back", "rolled back", "kept", "kept"]
