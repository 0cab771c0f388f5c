"""Every committed recipe loads, opens with the command that runs it, and the presets fit their architectures."""

from pathlib import Path

import pytest
import yaml

from editlab.cli.main import main
from editlab.lm.language_model import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "reference")
PRESETS = sorted((CONFIGS / "models").glob("*.yaml"))
FAMILY = {"gpt2-xl": ("gpt2", "n_layer"), "gpt-j-6b": ("gptj", "n_layer"), "llama-2-7b": ("llama", "num_hidden_layers"),
          "llama-3-8b": ("llama", "num_hidden_layers")}  # fmt: skip
DEPTH = {"gpt2-xl": 48, "gpt-j-6b": 28, "llama-2-7b": 32, "llama-3-8b": 32}


def load(capsys, *paths):
    """What the command line makes of the files, with all defaults filled in."""
    flags = [flag for path in paths for flag in ("--config", str(path))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *flags, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_load(path, capsys):
    config = load(capsys, path)
    assert config["model"]["language_model"] == "smollm2-135m"
    names = [c["class_path"].rsplit(".", 1)[-1] for c in config["trainer"]["callbacks"]]
    assert ("ForgettingCurve" in names) != config["model"]["restore_between_batches"]
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith(f"# editlab fit --config configs/{path.name}")
    assert second.startswith(first + " --")


@pytest.mark.parametrize("name", ["MemoryReplay", "TrustRollback", "LoRAAdjust", "ForgettingCurve"])
def test_a_line_taken_out_is_a_part_that_is_off(name, tmp_path, capsys):
    lines = (CONFIGS / "emmet_replay_trust_lora.yaml").read_text().splitlines(keepends=True)
    left = [line for line in lines if line.startswith("#") or name not in line]
    assert len(left) == len(lines) - 1
    (tmp_path / "recipe.yaml").write_text("".join(left))
    names = [
        [c["class_path"].rsplit(".", 1)[-1] for c in load(capsys, path)["trainer"]["callbacks"]]
        for path in (CONFIGS / "emmet_replay_trust_lora.yaml", tmp_path / "recipe.yaml")
    ]
    assert names[1] == [n for n in names[0] if n != name]


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_load_over_a_recipe_and_fit_their_architecture(path, capsys):
    config = load(capsys, CONFIGS / "emmet.yaml", path)
    family, depth_name = FAMILY[path.stem]
    lm = LanguageModel(tiny_model(family, **{depth_name: DEPTH[path.stem]}), tiny_tokenizer())
    layers = config["model"]["layers"]
    assert all(lm.anatomy.edit_module(layer) is not None for layer in layers)
    assert config["model"]["language_model"] != "smollm2-135m"
    assert config["model"]["values"]["steps"] >= 20
    assert path.read_text().startswith(f"# editlab fit --config configs/emmet.yaml --config configs/models/{path.name}")
