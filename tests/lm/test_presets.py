"""Tests that the presets of published models can be read and fit their models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "models").glob("*.yaml"))
# Number of layers, from the published configuration of each model.
DEPTH = {"gpt2-xl": 48, "gpt-j-6b": 28, "llama-2-7b": 32, "llama-3-8b": 32}


def test_every_preset_is_tested():
    assert {path.stem for path in PRESETS} == DEPTH.keys()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_its_command_and_fits_its_model(path):
    first, second = path.read_text().splitlines()[:2]
    command = f"# editlab fit --config configs/emmet.yaml --config configs/models/{path.name}"
    assert first == command
    assert second.startswith(f"{command} --")
    content = yaml.safe_load(path.read_text())
    assert content.keys() == {"model"}
    model = content["model"]
    assert model.keys() == {"language_model", "layers", "values", "moments"}
    assert model["layers"] == list(range(model["layers"][0], model["layers"][-1] + 1))
    assert model["layers"][-1] < DEPTH[path.stem] // 2  # facts are recalled in the lower half, as the papers found
    numbers = model["values"]
    assert numbers.keys() == {"steps", "lr", "weight_decay", "kl_factor", "clamp", "loss_threshold"}
    assert all(isinstance(number, (int, float)) and number > 0 for number in numbers.values())
    assert model["moments"]["tokens"] == 100_000
    assert model["moments"]["text"].startswith("hub:")
