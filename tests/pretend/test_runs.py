"""Tests of complete command-line runs on a simulated accelerator: recipes, and verbs that read a run."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from editlab.cli.main import main
from tests.pretend.device import pretend
from tests.pretend.editing import difference, on_device
from tests.runs.test_resume import RECIPES, SAME_PARTS, last, outcome, same, shrunk

pytestmark = on_device
ON_CUDA = [recipe for recipe in RECIPES if recipe.stem not in {*SAME_PARTS, "lora_only", "retrieval"}]
"""All recipes but those that run nothing on the device that other recipes do not run there too."""
WITHOUT_FLOAT64 = ("alphaedit", "memit_consolidated", "rome", "emmet_replay_trust_lora")
"""Recipes that together use every code path to a float64 tensor."""


def small(recipe, folder, tiny, kind="mps"):
    """Write the recipe for two batches of a tiny model on any accelerator; return the arguments of its run.

    Every operation on the simulated device costs Python time, so the run is as short as two batches can be.
    """
    arguments = shrunk(recipe, folder, tiny)
    path = folder / recipe.name
    config = yaml.safe_load(path.read_text())
    config["trainer"]["accelerator"] = "auto"
    if config["model"]["values"].get("source") == "gradient":  # needs a deviation over the facts of a batch
        config["data"] |= {"limit": 4, "batch_size": 2}
        config["trainer"]["precision"] = "64-true"  # of two facts it is often little more than rounding
    else:
        config["data"] |= {"limit": 2, "batch_size": 1}
        config["model"]["values"]["steps"] = 2
    (folder / "moments.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 20)
    config["model"]["moments"] = {"text": "moments.txt", "tokens": 128}  # sampling it takes a pass a token
    config["model"]["evaluation"] = {
        "heldout_tokens": 32,
        "generated_texts": 0,
        "generation": int(recipe.stem == "emmet_replay"),  # a pass a token, so once
        "bystanders": int(recipe.stem == "emmet_replay"),
        "neighbors": 1,
    }
    for callback in config["trainer"]["callbacks"]:
        callback.setdefault("init_args", {})
        if callback["class_path"] == "LoRAAdjust":
            # Devices draw dropout differently, and Adam's first steps turn rounding of a gradient into a whole step,
            # unless the device has float64.
            callback["init_args"] |= {"dropout": 0.0, "every_n_batches": 2, "steps": 2}
            callback["init_args"] |= {"text": "moments.txt", "text_tokens": 32}
            if kind == "cuda":
                config["trainer"]["precision"] = "64-true"
    if config["model"]["method"]["class_path"] == "FineTune":  # Adam, as above
        config["trainer"]["precision"] = "64-true"
    path.write_text(yaml.safe_dump(config))
    return arguments


def run(arguments, folder, monkeypatch, kind="cpu"):
    """Run a command in a folder on a device; return the updates in the last checkpoint."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDITLAB_CACHE", str(folder / "cache"))
    if kind == "cpu":
        assert main(arguments) == 0
    else:
        with pretend(kind):
            assert main(arguments) == 0
    return list(torch.load(last(folder), weights_only=True)["state_dict"].values()) if last(folder) else None


IN_SHORT = {"emmet_replay", "emmet_replay_trust_lora", "alphaedit", "betaedit", "finetune", "ultraedit"}
"""Recipes that run on CUDA's pretend device in every test run; the others with ``--thorough``."""


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        *(pytest.param(r, "cuda", marks=() if r.stem in IN_SHORT else pytest.mark.thorough) for r in ON_CUDA),
        *((r, "mps") for r in RECIPES if r.stem in WITHOUT_FLOAT64),
    ],
    ids=lambda x: getattr(x, "stem", x),
)
def test_a_recipe_gives_the_results_of_the_cpu(recipe, kind, tiny_folder, tmp_path, monkeypatch):
    sums = []
    for name in ("cpu", kind):
        folder = tmp_path / name
        folder.mkdir()
        sums.append(run(small(recipe, folder, tiny_folder, kind), folder, monkeypatch, name))
    assert difference(sums[1], sums[0]) < (5e-2 if "LoRAAdjust" in recipe.read_text() and kind == "mps" else 1e-4)


def test_bf16_true(tiny_folder, tmp_path, monkeypatch):
    recipe = next(r for r in RECIPES if r.stem == "emmet_replay")
    arguments = [*small(recipe, tmp_path, tiny_folder), "--trainer.precision", "bf16-true"]
    assert all(total.isfinite().all() for total in run(arguments, tmp_path, monkeypatch, "cuda"))


def test_a_run_is_resumed_and_read(tiny_folder, tmp_path, monkeypatch, capsys):
    recipe = next(r for r in RECIPES if r.stem == "emmet_replay")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    run(small(recipe, whole, tiny_folder), whole, monkeypatch, "cuda")
    arguments = small(recipe, parted, tiny_folder)
    run([*arguments, "--trainer.max_steps", "1"], parted, monkeypatch, "cuda")
    run([*arguments, "--ckpt_path", "last"], parted, monkeypatch, "cuda")
    assert same(outcome(parted)["weights"], outcome(whole)["weights"])
    checkpoint = str(last(parted))
    run(["validate", *arguments[1:], "--ckpt_path", checkpoint], parted, monkeypatch, "cuda")
    run(["export", "--ckpt_path", checkpoint, "--out", "here", "--device", "cuda"], parted, monkeypatch, "cuda")
    run(["export", "--ckpt_path", checkpoint, "--out", "there"], parted, monkeypatch)
    assert Path("here/model.safetensors").read_bytes() == Path("there/model.safetensors").read_bytes()
    run(["report", str(Path(checkpoint).parents[1]), "--device", "cuda"], parted, monkeypatch, "cuda")
    answers = []
    for kind in ("cuda", "cpu"):
        capsys.readouterr()
        ask = ["ask", "--ckpt_path", checkpoint, "Oslo lies in", "--new_tokens", "3", "--json", "--device", kind]
        run(ask, parted, monkeypatch, kind)
        answers.append(json.loads(capsys.readouterr().out)[0]["after"]["continuation"])
    assert answers[0] == answers[1]


def test_a_missing_device_is_rejected(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for device in ("cuda:7", "toaster"):
        assert main(["export", "--ckpt_path", "none", "--out", "x", "--device", device]) != 0
        assert "--device" in capsys.readouterr().err
