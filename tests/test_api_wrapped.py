"""edit_model of models in a wrapper, and of models that do not match their tokenizer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from editlab import edit_model
from editlab.errors import UserError
from tests.test_api import PLAIN, SMALL, assert_same, changed, weights
from tests.tiny import tiny_model, tiny_tokenizer

# ---- models in a wrapper


def by_torch_compile(model):
    return torch.compile(model, backend="eager")


def by_its_own_compile(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [by_torch_compile, by_its_own_compile])
def test_a_compiled_model_is_edited_inside(wrap):
    model, plain = tiny_model("llama"), tiny_model("llama")
    before = weights(model)
    wrapped = wrap(model)
    call = model._compiled_call_impl
    edited, result = edit_model(wrapped, tiny_tokenizer(), PLAIN, **SMALL)
    assert edited is wrapped
    assert model._compiled_call_impl is call
    edit_model(plain, tiny_tokenizer(), PLAIN, **SMALL)
    assert_same(weights(model), weights(plain))
    result.revert()
    assert changed(before, model) == []


def with_adapters(model):
    return get_peft_model(model, LoraConfig(target_modules=["down_proj"]))


def with_adapters_inside(model):
    with_adapters(model)
    return model


def with_adapters_of_transformers(model):
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def with_a_compiled_part(model):
    model.model.layers[3] = torch.compile(model.model.layers[3], backend="eager")
    return model


def with_replicas(model):
    """A DataParallel without its constructor, which asks every device that other tests may have registered."""
    wrapped = torch.nn.DataParallel.__new__(torch.nn.DataParallel)
    torch.nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (with_adapters, r"PeftModel\w* has PEFT adapters, .* merge them first by model = model\.merge_and_unload\(\)"),
        (with_adapters_inside, r"LlamaForCausalLM has PEFT adapters, .* model\.merge_and_unload\(\)"),
        (with_adapters_of_transformers, r"LlamaForCausalLM has PEFT adapters, .* model\.merge_and_unload\(\)"),
        (with_a_compiled_part, r"A part of the model is compiled \(model\.layers\.3\): compile it after the edit\."),
        (with_replicas, r"The model is a DataParallel, not a PreTrainedModel .*: give its part \.module\."),
        (lambda model: "gpt2", r"The model is a str, not a PreTrainedModel .*: give what AutoModelForCausalLM loads\."),
        (lambda model: None, r"The model is a NoneType, not a PreTrainedModel"),
    ],
)
def test_errors_of_a_wrapped_model(wrap, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        edit_model(wrap(tiny_model("llama")), tiny_tokenizer(), PLAIN, **SMALL)
    assert str(caught.value).count(". ") == 0


def test_errors_of_a_tokenizer_with_more_tokens_than_the_model():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["Zyzzxq"])
    with pytest.raises(UserError, match=rf"has {len(tokenizer)} tokens .* {len(tokenizer) - 1}: .*resize_token_embed"):
        edit_model(model, tokenizer, PLAIN, **SMALL)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    edit_model(model, tokenizer, PLAIN, **SMALL)
