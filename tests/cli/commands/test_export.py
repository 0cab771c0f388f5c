"""Export and apply: the model that plain transformers loads against the weights and logits of the run itself."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from editlab.cli.main import main
from editlab.lm.fingerprint import fingerprint
from editlab.runs.delta import FORMAT, WITHOUT_DIGESTS
from tests.cli.commands.runs import EDITS, FATES, MODELS, files, same_bits, save_tiny, weights

PROMPT = "The capital of France is"

LOGITS = """
import sys
sys.modules["editlab"] = None  # importing it would now fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save(model(ids).logits, folder + ".logits.pt")
"""


def by_hand(run, dtype=torch.float32):
    """The edited model by the definition: each edited weight of the base plus its sum, computed without editlab."""
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype)
    sums = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in (1, 2):
        mlp = blocks[layer].mlp
        module = mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj
        total = sums[f"edited.{layer}.total"]
        total = total.T if isinstance(module, Conv1D) else total
        assert total.any()
        module.weight.data = (module.weight.data.float() + total).to(dtype)
    return model.eval()


def export(*arguments):
    return main(["export", *map(str, arguments)])


def test_transformers_alone_loads_what_the_runs_have_made(runs, tmp_path, capfd):
    folders = [tmp_path / name for name in MODELS]
    for folder in folders:
        assert export("--ckpt_path", runs(folder.name).folder, "--out", folder) == 0
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, PROMPT, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for folder in folders:
        run = runs(folder.name)
        tokenizer = AutoTokenizer.from_pretrained(run.base)
        with torch.no_grad():
            expected = by_hand(run)(tokenizer(PROMPT, return_tensors="pt").input_ids).logits
        assert torch.equal(torch.load(f"{folder}.logits.pt"), expected)


def test_what_an_export_consists_of(run, tmp_path):
    out = tmp_path / "out"
    assert export("--ckpt_path", run.folder, "--out", out) == 0
    names = set(files(out))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert same_bits(weights(out), weights_of(by_hand(run), tmp_path))
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def weights_of(model, tmp_path):
    """The tensors that transformers writes of a model."""
    model.save_pretrained(tmp_path / "by_hand")
    return weights(tmp_path / "by_hand")


def test_delta_and_apply_make_the_same_folder(run, tmp_path):
    whole, delta, applied = (tmp_path / name for name in ("whole", "delta", "applied"))
    assert export("--ckpt_path", run.checkpoint, "--out", whole) == 0
    assert export("--ckpt_path", run.checkpoint, "--out", delta, "--delta-only") == 0
    assert main(["apply", "--delta", str(delta), "--model", str(run.base), "--out", str(applied)]) == 0
    assert files(applied) == files(whole)
    assert not same_bits(weights(whole), weights(run.base))


def test_metadata_of_the_delta(run, tmp_path):
    assert export("--ckpt_path", run.checkpoint, "--out", tmp_path / "d", "--delta-only") == 0
    sums = torch.load(run.checkpoint, weights_only=True)
    with safe_open(tmp_path / "d" / "delta.safetensors", "pt") as file:
        said = file.metadata()
    modules, layers = json.loads(said["modules"]), json.loads(said["layers"])
    assert layers == [1, 2]
    assert (said["base_model"], said["dtype"], said["orientation"]) == (str(run.base), "float32", "[d_v, d_k]")
    assert said["fingerprint"] == sums["editor"]["weights"]
    model = AutoModelForCausalLM.from_pretrained(run.base)
    found = weights(tmp_path / "d")
    assert set(found) == set(modules)
    for layer, module in zip(layers, modules, strict=True):
        assert f".{layer}." in module
        assert model.get_submodule(module).weight.numel() == found[module].numel()
        assert torch.equal(found[module], sums["state_dict"][f"edited.{layer}.total"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_rounded_once(runs, tmp_path, dtype):
    run = runs("gpt2")
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out", "--dtype", dtype) == 0
    kind = getattr(torch, dtype)
    model = by_hand(run)
    if kind == torch.float64:  # the sum is taken in the wider type
        model = by_hand(run, torch.float64)
        for layer in (1, 2):
            base = AutoModelForCausalLM.from_pretrained(run.base).double().transformer.h[layer].mlp.c_proj.weight
            total = torch.load(run.checkpoint, weights_only=True)["state_dict"][f"edited.{layer}.total"]
            model.transformer.h[layer].mlp.c_proj.weight.data = base.data + total.T
    assert same_bits(weights(tmp_path / "out"), weights_of(model.to(kind), tmp_path))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind


def test_a_run_in_bfloat16(runs, tmp_path):
    # The float32 run's sums, as if they had come about in bfloat16.
    run, checkpoint = runs("llama"), tmp_path / "half.ckpt"
    saved = torch.load(run.checkpoint, weights_only=True)
    half = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16)
    saved["editor"] |= {"dtype": "bfloat16", "weights": fingerprint(half)}
    torch.save(saved, checkpoint)
    assert export("--ckpt_path", checkpoint, "--out", tmp_path / "half") == 0
    assert same_bits(weights(tmp_path / "half"), weights_of(by_hand(run, torch.bfloat16), tmp_path))
    # In float32 the sum is not rounded, but the base weights are those that the run had.
    assert export("--ckpt_path", checkpoint, "--out", tmp_path / "whole", "--dtype", "float32") == 0
    found, base = weights(tmp_path / "whole"), weights(run.base)
    total = torch.load(run.checkpoint, weights_only=True)["state_dict"]["edited.1.total"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], base[name].bfloat16().float() + total)


def test_updates_that_lora_merged_into_other_weights_are_exported(runs, tmp_path):
    run = runs("llama", lora="merge")
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out") == 0
    sums = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    found, base = weights(tmp_path / "out"), weights(run.base)
    changed = [name for name in base if not torch.equal(found[name], base[name])]
    assert changed == [
        f"model.layers.{n}.mlp.{part}_proj.weight" for n in (1, 2) for part in ("down", "gate", "up")
    ]  # in the order of names
    total = sums["adjusted.model/layers/1/mlp/up_proj.total"]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"] + total)
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "d", "--delta-only") == 0
    assert len(weights(tmp_path / "d")) == 6
    assert main(["apply", "--delta", str(tmp_path / "d"), "--model", str(run.base), "--out", str(tmp_path / "a")]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "out")


def test_a_separate_adapter_is_named(runs, tmp_path, capsys):
    run = runs("llama", lora="adapter")
    capsys.readouterr()
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out") == 0
    assert "an adapter next to the weights of 6 modules, which a delta does not include" in capsys.readouterr().out
    assert "a separate adapter for 6 modules" in (tmp_path / "out" / "README.md").read_text()
    # On the exported model the run's adapter gives the weights that the run had: the sums, and what it adds.
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(plain.get_submodule(name).weight, by_hand(run).get_submodule(name).weight)
    adapted = PeftModel.from_pretrained(plain, run.folder / "adapter")
    assert adapted.base_model.model.get_submodule(name).get_delta_weight("default").any()
    assert main(["ask", "--ckpt_path", str(run.folder), "Oslo", "--new_tokens", "1", "--json"]) == 0
    json.loads(capsys.readouterr().out)  # the message is not in it


def test_a_large_model_goes_to_several_files(runs, tmp_path):
    run = runs("llama")
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out", "--max_shard_size", "100kb") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert same_bits(weights(tmp_path / "out"), weights_of(by_hand(run), tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded["model.layers.2.mlp.down_proj.weight"], by_hand(run).model.layers[2].mlp.down_proj.weight)


def test_the_card_names_the_edits(runs, tmp_path):
    run = runs("gpt2")
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((run.folder / "summary.json").read_text())
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and line.split()[1].isdigit()]
    assert [row[-1].rstrip(" |") for row in rows] == FATES
    assert [int(row[-2]) for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    for row, fact in zip(rows, EDITS, strict=True):
        assert fact.prompt.replace("{}", f"**{fact.subject}**") in row[1]
        assert [row[2], row[3]] == [fact.target_new, fact.target_true]
    es = [f"{summary['metrics'][f'{group}/ES']:.3f}" for group in ("before", "immediate", "retained")]
    assert f"| ES | {' | '.join(es)} |" in card
    assert f"| held-out perplexity | {summary['metrics']['before/perplexity']:.2f} |" in card
    for said in (
        "Recipe `tiny`",
        "seed 0",
        "transformers ",
        "class_path: editlab.solver.methods.EMMET",
        "library_name",
    ):
        assert said in card
    assert "base_model:" not in card  # a folder on this machine is nothing on the hub


def test_a_checkpoint_outside_a_run_is_exported_without_metrics(runs, tmp_path):
    alone = tmp_path / "somewhere" / "else" / "alone.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(runs("gpt2").checkpoint.read_bytes())
    assert export("--ckpt_path", alone, "--out", tmp_path / "out", "--delta-only") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The run has no summary of this number of batches" in card
    assert "| ES |" not in card
    assert "seed" not in card


def test_the_base_model_may_have_moved(runs, tmp_path, capsys):
    run = runs("tied")
    moved = save_tiny(tmp_path / "moved", "tied")
    delta, text = tmp_path / "d", run.checkpoint
    assert export("--ckpt_path", text, "--out", tmp_path / "out", "--model", moved) == 0
    assert export("--ckpt_path", text, "--out", delta, "--delta-only", "--model", tmp_path / "not looked at") == 0
    other = save_tiny(tmp_path / "other", "tied", seed=1)
    for verb in (["export", "--ckpt_path", str(text)], ["apply", "--delta", str(delta)]):
        assert main([*verb, "--model", str(other), "--out", str(tmp_path / "no")]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("editlab: The edits belong to ")
        assert "weights of" in said
        assert not (tmp_path / "no").exists()


def spoilt(delta, path, metadata=None, tensors=None):
    """A copy of a delta with some of its metadata and tensors changed, in the format that has no digests."""
    with safe_open(delta, "pt") as file:
        said = {**file.metadata(), "format": WITHOUT_DIGESTS}
    save_file({**load_file(delta), **(tensors or {})}, path, {**said, **(metadata or {})})
    return path


def test_bad_deltas(runs, tmp_path, capsys):
    run = runs("llama")
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "d", "--delta-only") == 0
    good = tmp_path / "d" / "delta.safetensors"
    name = "model.layers.1.mlp.down_proj"
    (tmp_path / "text").write_text("no delta")
    (tmp_path / "half").write_bytes(good.read_bytes()[:-100])
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    renamed = json.dumps([name, "model.layers.9.mlp.down_proj"])
    nine = {"model.layers.9.mlp.down_proj": torch.zeros(32, 48)}
    cases = {
        tmp_path / "none": "does not exist: check --delta",
        tmp_path / "text": "damaged or no safetensors file",
        tmp_path / "half": "damaged or no safetensors file",
        tmp_path / "foreign": "is no delta",
        run.base / "model.safetensors": "is no delta",
        spoilt(good, tmp_path / "1", {"modules": "[]"}): "tensors that its metadata does not name",
        spoilt(good, tmp_path / "9", {"format": FORMAT, "layers": "[2]"}): "its entry layers has changed since it was",
        spoilt(good, tmp_path / "2", {"modules": renamed}): "lacks some of its metadata or tensors",
        spoilt(good, tmp_path / "3", {"dtype": "int8"}): "lacks some of its metadata or tensors",
        spoilt(good, tmp_path / "4", {"fingerprint": "0"}): "weights of",
        spoilt(good, tmp_path / "5", tensors={name: torch.zeros(48, 32)}): "must be float32 [32, 48]",
        spoilt(good, tmp_path / "6", tensors={name: torch.zeros(32, 48).half()}): "is float16 [32, 48] and must be",
        spoilt(good, tmp_path / "7", {"history": "{}"}): "history is not one that editlab wrote",
        spoilt(
            good, tmp_path / "8", {"modules": json.dumps([name, "model.layers.2.mlp.down_proj", *nine])}, nine
        ): "model.layers.9.mlp.down_proj, which LlamaForCausalLM does not have",
    }  # fmt: skip
    for path, message in cases.items():
        assert main(["apply", "--delta", str(path), "--model", str(run.base), "--out", str(tmp_path / "no")]) == 2, path
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("editlab: ")
        assert message in said
        assert not (tmp_path / "no").exists()


def test_bad_arguments(runs, tmp_path, capsys):
    run = runs("gpt2")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    out, ckpt = ["--out", tmp_path / "no"], ["--ckpt_path", run.folder]
    old = torch.load(run.checkpoint, weights_only=True)
    del old["editor"]["modules"]
    torch.save(old, tmp_path / "old.ckpt")
    lacking = [tmp_path / f"{name}.ckpt" for name in ("ledger", "layers", "global_step", "edited.1.total")]
    for path in lacking:
        part = torch.load(run.checkpoint, weights_only=True)
        for place in (part, part["editor"], part["state_dict"]):
            place.pop(path.stem, None)
        torch.save(part, path)
    for arguments, message in (
        (out, "ckpt_path is missing"),
        (ckpt, "out is missing"),
        ([*out, "--ckpt_path", tmp_path / "none.ckpt"], "none.ckpt' does not exist: check --ckpt_path"),
        ([*out, "--ckpt_path", full], "holds no checkpoints/last.ckpt"),
        ([*out, "--ckpt_path", tmp_path / "text.ckpt"], "cannot be read"),
        ([*out, "--ckpt_path", tmp_path / "foreign.ckpt"], "is not editlab's"),
        ([*out, "--ckpt_path", tmp_path / "list.ckpt"], "is not editlab's"),
        ([*out, "--ckpt_path", tmp_path / "old.ckpt"], "too old to export from"),
        *(([*out, "--ckpt_path", path], f"lacks {path.stem}, as one of another version") for path in lacking),
        ([*ckpt, "--out", full], "is not empty, and nothing is overwritten"),
        ([*ckpt, "--out", full / "mine.txt"], "is a file"),
        ([*ckpt, *out, "--dtype", "int8"], "--dtype is 'int8': it must be float32, bfloat16, float16 or float64"),
        ([*ckpt, *out, "--max_shard_size", "huge"], "--max_shard_size is 'huge': give a size such as 500MB"),
        ([*ckpt, *out, "--max_shard_size", "0GB"], "--max_shard_size is '0GB'"),
        ([*ckpt, *out, "--delta-only", "--dtype", "bfloat16"], "a delta is always float32"),
        ([*ckpt, *out, "--sharded", "1"], "no setting 'sharded'"),
    ):
        assert export(*arguments) == 2, arguments
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith("editlab: ")
        assert message in said[0]
    assert files(full) == {"mine.txt": b"mine"}
    assert not (tmp_path / "no").exists()


def test_a_failed_write_leaves_nothing(runs, tmp_path, monkeypatch):
    run = runs("gpt2")

    def fail(self, folder, **settings):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert export("--ckpt_path", run.folder, "--out", tmp_path / "out") == 1
    assert list(tmp_path.iterdir()) == []
