"""The whole path on a tiny model of each family: fit, measure, export, and reload with transformers alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from editlab.cli.main import main
from editlab.metrics.names import LANGUAGE, of_group
from tests.cli.commands.runs import edited
from tests.lm.test_anatomy import EXPECTED
from tests.tiny import OTHERS

# As in EXPECTED: read off the modeling files of transformers.
EXPECTED_OTHERS = {
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", True),
    "cohere": ("model.layers", "mlp.down_proj", True),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", True),
    "gemma": ("model.layers", "mlp.down_proj", True),
    "granite": ("model.layers", "mlp.down_proj", False),
    "olmo2": ("model.layers", "mlp.down_proj", False),
    "opt_350m": ("model.decoder.layers", "fc2", False),
    "phi3": ("model.layers", "mlp.down_proj", True),
    "stablelm": ("model.layers", "mlp.down_proj", True),
    "starcoder2": ("model.layers", "mlp.c_proj", True),
}
ALL = {**EXPECTED, **EXPECTED_OTHERS}


def test_every_other_family_is_expected():
    assert EXPECTED_OTHERS.keys() == OTHERS.keys()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("family", ALL)
def test_the_whole_path(family, tmp_path):
    """The exported model is the base plus the sums in the checkpoint, added by hand where the source says."""
    blocks, module, additive = ALL[family]
    layers = [1, 2] if additive else [2]
    text = tmp_path / "text.txt"  # each model would take as long to sample its own as to be edited
    text.write_text("The capital of France is Paris. Oslo lies in Norway, and Lima lies in Peru. " * 20)
    run = edited(tmp_path, family, layers=layers, moments={"text": str(text), "tokens": 256})
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["edits"], summary["rolled_back"]) == (6, 2)  # Verdicts rolls one batch of four back
    measured = {group: of_group(summary["metrics"], group).keys() for group in ("before", "immediate", "retained")}
    assert "ES" in measured["before"]
    assert measured["before"] - set(LANGUAGE) == measured["immediate"]
    assert measured["before"] == {name for name in measured["retained"] if not name.startswith("accuracy_age")}
    recipe = ["--config", str(tmp_path / "tiny.yaml"), "--ckpt_path", str(run.checkpoint)]
    assert main(["validate", *recipe]) == 0
    out = tmp_path / "out"
    assert main(["export", "--ckpt_path", str(run.folder), "--out", str(out)]) == 0

    expected = AutoModelForCausalLM.from_pretrained(run.base)
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    with torch.no_grad():
        for layer in layers:
            part = expected.get_submodule(f"{blocks}.{layer}.{module}")
            total = state[f"edited.{layer}.total"]
            assert total.any()
            part.weight += total.T if isinstance(part, Conv1D) else total
        ids = AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt").input_ids
        assert ids[0, 0] == 1  # the special token that a text begins with
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected(ids).logits)
        assert not torch.equal(AutoModelForCausalLM.from_pretrained(run.base)(ids).logits, expected(ids).logits)
