"""The settings of a recipe without a run: which words belong to it, and whose defaults hold."""

import pytest
import torch

from editlab.api import RECOMMENDED
from editlab.cli.main import load_plugins
from editlab.cli.settings import edit_settings, split_words
from editlab.errors import UserError
from editlab.solver.methods import MEMIT, ROME


@pytest.fixture(autouse=True)
def _plugins(tmp_path, monkeypatch):
    load_plugins()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rome.yaml").write_text("model: {layers: [6], method: {class_path: ROME}}\ndata: {batch_size: 1}\n")
    (tmp_path / "large.yaml").write_text("model: {language_model: org/large, layers: [13], values: {steps: 20}}\n")
    (tmp_path / "trusted.yaml").write_text("trainer: {callbacks: [TrustRollback], precision: bf16-true, devices: 2}\n")


def test_words_of_a_recipe_take_their_values_along():
    words = ["-", "--model", "m", "-c", "a.yaml", "--trainer.callbacks+=X", "--seed_everything", "3", "--dry-run"]
    own, recipe = split_words([*words, "--data.joint"])
    assert own == ["-", "--model", "m", "--dry-run"]
    assert recipe == ["-c", "a.yaml", "--trainer.callbacks+=X", "--seed_everything", "3", "--data.joint"]


def test_without_a_recipe_the_settings_are_those_of_edit_model():
    found = edit_settings([], {"model.evaluation.heldout_tokens": 64}, "set")
    assert {name: found.arguments[name] for name in RECOMMENDED} == RECOMMENDED
    assert (found.language_model, found.layers, found.callbacks) == ("smollm2-135m", None, [])
    assert found.dtype == torch.float32
    assert found.arguments["evaluation"].heldout_tokens == 64


@pytest.mark.parametrize(
    ("words", "method", "weight"),
    [
        (["--config", "rome.yaml"], ROME(), 0.0),  # as fit reads the recipe
        (["--config=large.yaml"], MEMIT(300), 1.0),  # a preset names no method
        (["--model.method.covariance_weight", "7"], MEMIT(7), 1.0),
    ],
)
def test_a_recipe_that_names_a_method_means_the_same_as_for_fit(words, method, weight):
    found = edit_settings(words, {}, "set")
    assert found.arguments["method"] == method
    assert found.arguments["preserve_prompt_tokens"] == weight
    assert found.layers == {"rome": [6], "large": [13]}.get(words[-1].rpartition("=")[2].partition(".")[0])


def test_callbacks_and_precision_of_a_recipe():
    found = edit_settings(["--config", "trusted.yaml", "--seed_everything=5"], {}, "set")
    assert [type(callback).__name__ for callback in found.callbacks] == ["TrustRollback"]
    assert found.dtype == torch.bfloat16
    assert found.arguments["seed"] == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.path", "x.csv"], r"--data\.path has no effect on editlab set, which takes data\.batch_size"),
        (["--trainer.devices=2"], r"--trainer\.devices has no effect on editlab set"),
        (["--seed_everything", "true"], "seed_everything is True: editlab set needs a number"),
        (["--trainer.precision", "16-mixed"], r"trainer\.precision is 16-mixed: editlab set takes 32-true"),
        (["--model.device_map", "auto"], r"model\.device_map is set, and editlab set edits on one device"),
    ],
)
def test_what_has_no_effect_is_refused(words, sentence):
    with pytest.raises(UserError, match=sentence):
        edit_settings(words, {}, "set")
