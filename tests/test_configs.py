"""Every committed recipe loads, opens with the command that runs it, and a preset loads over a recipe."""

from pathlib import Path

import pytest
import yaml

from editlab.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "reference")


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


def test_a_preset_loads_over_a_recipe(capsys):
    """One of them: tests/lm/test_presets.py checks that all have the same keys, and that each fits its architecture."""
    path = CONFIGS / "models" / "qwen3-8b.yaml"
    model, preset = load(capsys, CONFIGS / "emmet.yaml", path)["model"], yaml.safe_load(path.read_text())["model"]
    assert preset.keys() <= model.keys()
    assert {name: model[name] for name in ("language_model", "made_for", "layers")} == {
        name: preset[name] for name in ("language_model", "made_for", "layers")
    }
    assert preset["values"].items() <= model["values"].items()
    assert preset["moments"].items() <= model["moments"].items()
    assert model["method"]["class_path"].endswith("EMMET")  # the recipe's own setting stays
