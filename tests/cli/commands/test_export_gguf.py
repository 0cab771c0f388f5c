"""``export --format gguf``: what is written of a run on a folder and of one on a GGUF file, and what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch

from editlab.cli.main import main
from editlab.lm.fingerprint import fingerprint
from editlab.lm.loading.gguf import read_gguf
from editlab.lm.loading.load import gguf_source
from tests.cli.commands.runs import EDITS, files, weights
from tests.ggufs import write_gguf


def export(*arguments):
    return main(["export", "--format", "gguf", *map(str, arguments)])


def test_a_run_on_a_folder(runs, tmp_path, capsys):
    run, out = runs("tied"), tmp_path / "out"
    assert export("--ckpt_path", run.folder, "--out", out) == 0
    assert "model.gguf: GGUF, read back and equal, " in capsys.readouterr().out
    assert set(files(out)) == {"README.md", "edits.json", "model.gguf"}
    model, _ = read_gguf(out / "model.gguf")
    total = torch.load(run.checkpoint, weights_only=True)["state_dict"]["edited.1.total"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), weights(run.base)[name] + total)
    card = (out / "README.md").read_text()
    assert "as a GGUF file, in float32. It loads with llama.cpp (`llama-cli -m model.gguf`)" in card
    assert EDITS[0].target_new in card
    about = gguf.GGUFReader(out / "model.gguf").fields["general.description"].contents()
    assert about == f"{run.base} with 3 fact edits by editlab"


def test_a_run_on_a_gguf_file_is_a_copy_of_it(runs, tmp_path):
    # The run's model, as if it had been loaded from a GGUF file: only the name and the fingerprint are of that file.
    run, source = runs("tied"), tmp_path / "base.gguf"
    write_gguf(source, quantization=gguf.GGMLQuantizationType.Q4_0, intermediate_size=64)
    base, _ = read_gguf(source)
    saved = torch.load(run.checkpoint, weights_only=True)
    saved["editor"] |= {"language_model": str(source), "weights": fingerprint(base)}
    for layer in (1, 2):
        saved["state_dict"][f"edited.{layer}.total"] = torch.full((32, 64), 0.125)
    torch.save(saved, tmp_path / "run.ckpt")
    assert export("--ckpt_path", tmp_path / "run.ckpt", "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {name for name, kind in kinds.items() if kind == "BF16"} == {f"blk.{n}.ffn_down.weight" for n in (1, 2)}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the edited tensors in bfloat16, all others as in the base model's file" in card


def test_what_is_refused_leaves_nothing(runs, tmp_path, capsys):
    run, out = runs("gpt2"), ["--out", tmp_path / "out"]
    for arguments, message in (
        (["--delta-only"], "--format gguf writes the whole model as one file: leave --delta-only out."),
        (["--max_shard_size", "1GB"], "leave --max_shard_size out."),
        (["--dtype", "float64"], "--dtype is float64, and tensors of a GGUF file are written as float32"),
        ([], "does not give it back"),  # GPT-2's inner width is no setting that transformers reads
    ):
        assert export("--ckpt_path", run.folder, *out, *arguments) == 2, arguments
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("editlab: ")
        assert message in said
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_the_built_in_model_comes_from_a_file():
    assert gguf_source("smollm2-135m").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
