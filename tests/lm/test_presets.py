"""Tests that the presets of published models can be read, say where they come from, and fit their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from editlab.edits.batch import BatchSolver
from editlab.edits.edited_model import EditedModel
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET
from editlab.values.spread import Targets
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "models").glob("*.yaml"))
KINDS = {
    "gemma-2-2b": ("gemma2", 26), "gemma-3-1b": ("gemma3", 26), "gemma-3-270m": ("gemma3", 18),
    "gpt-j-6b": ("gptj", 28), "gpt2-xl": ("gpt2", 48), "llama-2-7b": ("llama", 32), "llama-3-8b": ("llama", 32),
    "llama-3.1-8b": ("llama", 32), "llama-3.2-1b": ("llama", 16), "llama-3.2-3b": ("llama", 28),
    "mistral-7b-v0.3": ("mistral", 32), "olmo-2-1b": ("olmo2", 16), "olmo-2-7b": ("olmo2", 32),
    "phi-4": ("phi3", 40), "qwen2.5-0.5b": ("qwen2", 24), "qwen2.5-7b": ("qwen2", 28),
    "qwen3-0.6b": ("qwen3", 28), "qwen3-8b": ("qwen3", 36),
}  # fmt: skip
"""Preset -> the tiny family of its architecture, and its number of layers, from the model's published configuration."""
ONE_LAYER = ("gemma2", "gemma3", "olmo2")
"""Families with a norm after the MLP, of which one layer is edited."""
GUESSED = ("qwen3-8b", "qwen3-0.6b", "qwen2.5-0.5b", "phi-4", "llama-3.2-1b", "gemma-2-2b", "gemma-3-1b", "olmo-2-1b",
           "olmo-2-7b")  # fmt: skip
"""Presets whose layers are scaled from those of other models."""


def model_settings(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert content.keys() == {"model"}
    return content["model"]


def built(family: str, depth: int) -> LanguageModel:
    """A random model of the given number of layers."""
    name = "n_layer" if family.startswith("gpt") else "num_hidden_layers"
    return LanguageModel(tiny_model(family, **{name: depth}), tiny_tokenizer())


def test_every_preset_is_tested_and_listed_in_the_docs():
    assert {path.stem for path in PRESETS} == KINDS.keys()
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for path in PRESETS:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{path.stem}` |"))
        layers = model_settings(path)["layers"]
        shown = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])
        assert row.split("|")[3].strip() == shown
        assert row.split("|")[2].strip().split(", ")[1].split()[0] == str(KINDS[path.stem][1])
        assert ("guess" in row) == (path.stem in GUESSED)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_its_commands_and_settings(path):
    text = path.read_text()
    commands = [line for line in text.splitlines() if line.startswith("# editlab")]
    base = f"# editlab fit --config configs/emmet.yaml --config configs/models/{path.name}"
    assert commands == text.splitlines()[: len(commands)]
    assert commands[0] == base
    assert commands[-1] == f"{base} --model.layers auto"  # the search is offered with every preset
    model = model_settings(path)
    assert model.keys() == {"language_model", "made_for", "layers", "values", "moments"}
    family, depth = KINDS[path.stem]
    assert model["layers"] == list(range(model["layers"][0], model["layers"][-1] + 1))
    assert model["layers"][-1] < depth // 2  # facts are recalled in the lower half, as the papers found
    assert (len(model["layers"]) == 1) == (family in ONE_LAYER)
    numbers = model["values"]
    # Step sizes that fall were measured on the built-in model alone: the others keep the published search.
    unchanged = {name: numbers.pop(name) for name in ("lr_end", "betas", "contexts_a_step")}
    assert unchanged == {"lr_end": 1.0, "betas": [0.9, 0.999], "contexts_a_step": None}
    assert numbers.keys() == {"steps", "lr", "weight_decay", "kl_factor", "clamp", "loss_threshold"}
    assert all(isinstance(number, (int, float)) and number > 0 for number in numbers.values())
    assert model["moments"]["tokens"] == 100_000
    assert model["moments"]["text"].startswith("hub:")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_its_source_or_its_rule(path):
    """Guessed layers follow the stated rule: 4 to 8 of 32, and 5 of 32 for one layer, scaled and rounded down."""
    text = " ".join(path.read_text().replace("#", " ").split())
    guessed = path.stem in GUESSED
    assert ("is a guess" in text or "are a guess" in text) == guessed
    assert ("Rule of scaling" in text) == guessed
    if not guessed:
        assert any(phrase in text for phrase in ("Source of the settings", "our own search"))
        return
    family, depth = KINDS[path.stem]
    rule = [5 * depth // 32] if family in ONE_LAYER else list(range(depth // 8, depth // 4 + 1))
    assert model_settings(path)["layers"] == rule


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_edits_a_model_of_its_architecture(path):
    """With equality the site outputs the target after the edit; blocks far above it are left out to save time."""
    model, (family, depth) = model_settings(path), KINDS[path.stem]
    assert model["made_for"]["num_hidden_layers"] == depth
    kept = min(depth, model["layers"][-1] + 2)
    lm = built(family, kept)
    editor = EditedModel("tiny", model["layers"], None, None, made_for={**model["made_for"], "num_hidden_layers": kept})
    editor.use(lm)
    assert editor.layer_numbers == model["layers"]
    solver = BatchSolver.at(lm, model["layers"], [""], SolveSettings(EMMET(gram_ridge=0)))
    solver.set_moments({layer: torch.eye(48, dtype=torch.float64) for layer in model["layers"]})
    before = solver.read_outputs(FACTS[:1])[:, 0]
    target = before + 0.1 * torch.ones_like(before)
    solver.solve(EditOutcome(EditPlan(0, FACTS[:1], Targets(FACTS[:1], {model["layers"][-1]: target.float()}))))
    torch.testing.assert_close(solver.read_outputs(FACTS[:1])[:, 0], target, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, target, atol=1e-2)


@pytest.mark.parametrize(("family", "depth"), [("qwen2", 4), ("llama", 4)])
def test_a_preset_for_another_model_is_refused(family, depth):
    """Another architecture, and another depth of the same one."""
    model = model_settings(next(path for path in PRESETS if path.stem == "llama-3.1-8b"))
    editor = EditedModel("other", model["layers"], None, None, made_for=model["made_for"])
    with pytest.raises(UserError) as caught:
        editor.use(built(family, depth))
    assert str(caught.value) == (
        "The settings were chosen for a model with model_type llama and num_hidden_layers 32 (model.made_for), and "
        f"other has model_type {family} and num_hidden_layers {depth}: use the preset of this model, if configs/models "
        "has one, or set model.made_for to null and model.layers to auto."
    )


def test_layers_that_the_model_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"no layer 8: .* are 0 to 3; name others in model\.layers, or set it to auto"):
        EditedModel("other", [8], None, None).use(built("llama", 4))
