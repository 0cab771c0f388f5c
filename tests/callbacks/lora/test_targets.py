"""The linear maps that an adjustment's adapter is added to."""

import pytest
import torch

from callbacks.lora.targets import find_targets
from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer


def language_model(family):
    return LanguageModel(tiny_model(family).requires_grad_(False), tiny_tokenizer())


# The paths are those that the architectures' modules have, read off their source.
@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", "edited", {"mlp.down_proj"}),
        ("llama", "mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("llama", "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("llama", "mlp[.](up|down)_proj", {"mlp.up_proj", "mlp.down_proj"}),
        ("gpt2", "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("opt", "mlp", {"fc1", "fc2"}),
        ("opt", "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
    ],
)
def test_targets_by_group_or_expression(family, targets, expected):
    lm = language_model(family)
    found = find_targets(lm.anatomy, targets, [1, 3])
    assert {path.split(".", lm.anatomy.block_path.count(".") + 2)[-1] for path in found} == expected
    assert len(found) == 2 * len(expected)
    assert all(isinstance(lm.model.get_submodule(path).weight, torch.Tensor) for path in found)


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        ("edited", [4], "names 4: the model's layers are 0 to 3"),
        ("mlp.nothing", [1], "names no linear map of layer 1: set edited, mlp, attention, or match some of"),
        ("mlp.(", [1], "not a valid regular expression"),
    ],
)
def test_targets_that_are_not_there(targets, layers, message):
    with pytest.raises(UserError, match=message):
        find_targets(language_model("llama").anatomy, targets, layers)
