"""The edited model without a Trainer: which weights may change, and that the original can always be restored."""

import pytest
import torch

from editlab.edits.edited_model import EditedModel
from editlab.errors import UserError
from tests.tiny import tiny_model, tiny_tokenizer


def loaded(folder, layers=(1, 2)):
    model = EditedModel(str(folder), layers if layers == "auto" else list(layers), None, None)
    model.configure_model()
    return model


def test_the_model_is_loaded_once(tiny_folder):
    model = loaded(tiny_folder)
    lm = model.lm
    model.configure_model()  # Lightning asks before each verb
    assert model.lm is lm


@pytest.mark.parametrize(("layers", "message"), [([], "at least one layer"), ([1, 1], "each once"), ([9], "0 to 3")])
def test_invalid_layers_are_refused(tiny_folder, layers, message):
    with pytest.raises(UserError, match=message):
        loaded(tiny_folder, layers)


def test_layers_may_be_named_later(tiny_folder):
    model = loaded(tiny_folder, "auto")
    assert model.layers == []
    model.edit_at([2, 1])
    assert model.layer_numbers == [1, 2]
    assert [layer.weight for layer in model.layers] == [model.lm.anatomy.edit_module(n).weight for n in (1, 2)]


def test_a_weight_has_one_layer_whatever_path_leads_to_it(tiny_folder):
    model = loaded(tiny_folder)
    assert model.changed_layer("model.layers.1.mlp.down_proj") is model.layers[0]
    other = model.changed_layer("model.layers.1.mlp.up_proj")
    assert model.changed_layer("model.layers.1.mlp.up_proj") is other
    assert model.changed_layers == [*model.layers, other]


def test_the_original_is_at_hand_and_known_by_its_own_fingerprint(tiny_folder):
    model, untouched = loaded(tiny_folder), loaded(tiny_folder)
    original = [layer.weight.clone() for layer in model.layers]
    for layer in model.layers:
        layer.add(torch.ones_like(layer.total))
    assert model.fingerprint == untouched.fingerprint
    assert model.model_key == untouched.model_key
    with model.unedited():
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.layers, original, strict=True))
    for layer, weight in zip(model.layers, original, strict=True):
        assert torch.equal(layer.weight, weight + 1)  # the sum of updates is all ones


def test_a_norm_after_the_mlp_allows_one_layer_only(tmp_path):
    # Gemma 2 norms what its MLP gives before the stream takes it up, so that layers' shares of a target do not add up.
    tiny_model("gemma2").save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(UserError, match="give one layer"):
        loaded(tmp_path / "gemma")
    assert not loaded(tmp_path / "gemma", [1]).site.in_stream
