"""The recipe that a patch of ``edit_model`` keeps: what its later uses read from it is what the call was given."""

import yaml

from callbacks import MemoryReplay
from editlab import edit_model
from editlab.runs.patched_model import settings_of
from editlab.runs.removal import removal_recipe
from editlab.solver.methods import EMMET
from editlab.solver.post_steps import RECT
from tests.test_api import SMALL
from tests.tiny import tiny_model, tiny_tokenizer

FACT = {"subject": "France", "prompt": "The capital of {} is", "target": "Tokyo"}


def test_a_patch_says_how_its_facts_can_be_taken_out():
    memory = MemoryReplay(memory="consolidated", past_weight=4.0)
    given = {
        **SMALL, "joint": "none", "method": EMMET(covariance_weight=30.0, gram_ridge=0.5), "callbacks": [memory],
        "preserve_prompt_tokens": 0.25, "condition_limit": 1e8,
    }  # fmt: skip
    _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), [FACT], **given)
    delta = result.delta()
    method, moments, removal = removal_recipe(delta)
    assert method == given["method"]
    assert moments == SMALL["moments"]
    assert (removal.hold, removal.context_key_weight, removal.condition_limit) == (4.0, 0.25, 1e8)
    kept = settings_of(delta.history)
    assert kept["data"] == {"joint": "none"}
    assert kept["model"]["layers"] == result.editor.layer_numbers
    assert kept["model"]["values"]["betas"] == list(result.editor.values.betas)  # a tuple is no YAML


def test_settings_without_a_form_in_yaml_are_left_out():
    given = {**SMALL, "post_steps": [RECT(fraction=0.5)]}
    _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), [FACT], **given)
    kept = yaml.safe_load(result.settings)
    assert "trainer" not in kept  # there was no callback
    assert kept["model"]["post_steps"] == [
        {"class_path": f"{RECT.__module__}.RECT", "init_args": {"fraction": 0.5}}
    ]  # fmt: skip
