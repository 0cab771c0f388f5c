"""Tests of the probe against the same block run by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.lm.probe import TOKENS, keeps_only_kv_cache, linear_maps, random_signs, run_block
from tests.tiny import FAMILIES, OTHERS, tiny_model, tiny_tokenizer


def unaltered(path, output, scale):
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_holds_what_the_model_computes(family):
    model = tiny_model(family)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)[1]
    trace = run_block(model, block, 2, unaltered)
    seen = {}
    for path, part in linear_maps(block).items():
        part.register_forward_hook(lambda _, args, out, path=path: seen.update({path: args[0]}))
    block.register_forward_hook(lambda _, args, out: seen.update(block=out))
    with torch.no_grad():
        model(torch.arange(200, 200 + TOKENS).expand(2, -1))  # the middle of the vocabulary of 400
    output = seen.pop("block")
    assert torch.equal(trace.output, output if isinstance(output, torch.Tensor) else output[0])
    assert trace.inputs.keys() == seen.keys()
    assert all(torch.equal(trace.inputs[path], seen[path].view(2, TOKENS, -1)) for path in seen)


def test_an_altered_output_is_used():
    model = tiny_model("llama")
    block = model.model.layers[0]
    plain = run_block(model, block, 1, unaltered)
    without = run_block(model, block, 1, lambda path, out, _: out * (path != "mlp.down_proj"))
    with torch.no_grad():
        mlp = block.mlp.down_proj(plain.inputs["mlp.down_proj"])
    assert torch.allclose(plain.output - without.output, mlp, atol=1e-5)


def test_the_scale_is_that_of_the_larger_of_output_and_stream():
    model = tiny_model("llama")
    stream = model.model.embed_tokens(torch.arange(200, 200 + TOKENS)).square().mean().sqrt().item()
    seen = {}
    run_block(model, model.model.layers[0], 1, lambda path, out, scale: seen.update({path: (out, scale)}) or out)
    for out, scale in seen.values():
        assert scale == pytest.approx(max(stream, out.square().mean().sqrt().item()), rel=1e-5)


def test_the_blocks_above_do_not_run():
    model = tiny_model("llama")
    model.model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    run_block(model, model.model.layers[1], 1, unaltered)


@pytest.mark.parametrize("times", [2, 3])
def test_a_map_that_runs_more_than_once_is_not_recorded(times):
    model = tiny_model("llama", intermediate_size=32)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.Sequential(*[mlp.gate_proj] * (times - 1))
    inputs = run_block(model, model.model.layers[0], 1, unaltered).inputs
    assert "mlp.down_proj" in inputs
    assert "mlp.gate_proj" not in inputs


def test_a_block_that_is_not_run_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="LlamaForCausalLM does not run its blocks"):
        run_block(model, tiny_model("llama").model.layers[0], 1, unaltered)


def test_random_signs_have_both_signs_and_the_given_type():
    signs = random_signs(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert signs.shape == (64,)
    assert signs.dtype is torch.bfloat16
    assert set(signs.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_models_with_attention_keep_only_a_kv_cache(family, dtype):
    model = tiny_model(family).to(dtype).train()
    assert keeps_only_kv_cache(model)
    assert model.training


TINY = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"] * 2),  # short convolutions
        transformers.OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=4, n_head=4),  # keeps no state
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_models_with_another_state_are_rejected(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not keeps_only_kv_cache(model)
    with pytest.raises(UserError, match="keeps more of earlier tokens than a KV cache"):
        LanguageModel(model, tiny_tokenizer())
