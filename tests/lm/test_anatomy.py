"""Tests of the anatomy of many families against their source code, and that the probes leave models unchanged."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from editlab.errors import UserError
from editlab.lm.anatomy import read_anatomy
from tests.tiny import FAMILIES, OTHERS, tiny_model

# Read off the modeling files of transformers: the list of blocks, the last map of the MLP, and whether its
# output is added to the residual stream as it is (Gemma 2 and 3 put a norm in between).
EXPECTED = {
    "gpt2": ("transformer.h", "mlp.c_proj", True),
    "gptj": ("transformer.h", "mlp.fc_out", True),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", True),
    "llama": ("model.layers", "mlp.down_proj", True),
    "mistral": ("model.layers", "mlp.down_proj", True),
    "qwen2": ("model.layers", "mlp.down_proj", True),
    "qwen3": ("model.layers", "mlp.down_proj", True),
    "gemma2": ("model.layers", "mlp.down_proj", False),
    "gemma3": ("model.layers", "mlp.down_proj", False),
    "phi": ("model.layers", "mlp.fc2", True),
    "opt": ("model.decoder.layers", "fc2", True),
}
TINY = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
BLOOM = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
# As OPT-350M has it: norms after each half of a block, and embeddings narrower than the blocks.
OPT_350M = transformers.OPTConfig(
    vocab_size=100, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
    num_attention_heads=4, do_layer_norm_before=False,
)  # fmt: skip
# DeepSeek's first blocks are dense, all other blocks are mixtures of experts.
DEEPSEEK = transformers.DeepseekV3Config(
    **{**TINY, "num_key_value_heads": 4, "head_dim": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip


def test_every_tiny_family_is_expected():
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_probe_finds_what_peft_lists(family):
    """Compare with PEFT's table of MLP output projections by model type."""
    model = tiny_model(family)
    listed = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type)
    if listed is None:
        pytest.skip(f"PEFT does not list {model.config.model_type}")
    assert f".{read_anatomy(model).edit_path}".endswith(tuple(f".{name}" for name in listed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", EXPECTED)
def test_the_parts_of_each_family(family, dtype):
    model = tiny_model(family).to(dtype)
    anatomy = read_anatomy(model)
    assert (anatomy.block_path, anatomy.edit_path, anatomy.additive) == EXPECTED[family]
    assert anatomy.blocks is model.get_submodule(anatomy.block_path)
    assert anatomy.head is model.get_output_embeddings()
    assert len(anatomy.blocks) == 4
    for layer in range(4):
        assert anatomy.edit_module(layer) is anatomy.blocks[layer].get_submodule(anatomy.edit_path)
        assert anatomy.transposed(layer) is (family == "gpt2")
        assert (anatomy.key_size(layer), anatomy.value_size(layer)) == (48, 32)


@pytest.mark.parametrize("family", EXPECTED)
def test_default_initial_weights(family):
    """Default weights are small (standard deviation 0.02), so a block hardly changes its input."""
    model = tiny_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        assert read_anatomy(model.to(dtype)).edit_path == EXPECTED[family][1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "phi", "gpt2", "gptj", "opt"])
def test_an_mlp_as_wide_as_the_residual_stream(family):
    """The queries, the attention output and all maps of the MLP have the same shape."""
    widths = {"gpt2": "n_inner", "gptj": "n_inner", "opt": "ffn_dim"}
    model = tiny_model(family, **{widths.get(family, "intermediate_size"): 32})
    anatomy = read_anatomy(model)
    assert (anatomy.edit_path, anatomy.additive) == EXPECTED[family][1:]
    assert anatomy.key_size(0) == anatomy.value_size(0) == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 12},
        {"head_dim": 4},
        {"mlp_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attentions_of_other_shapes(family, changes):
    changes = {key: value for key, value in changes.items() if family == "llama" or key != "mlp_bias"}
    assert read_anatomy(tiny_model(family, **changes)).edit_path == "mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "path", "additive"),
    [
        (transformers.Olmo2Config(**TINY), "mlp.down_proj", False),  # norms after, not before
        (transformers.CohereConfig(**TINY), "mlp.down_proj", True),  # attention and MLP side by side
        (transformers.Phi3Config(**TINY), "mlp.down_proj", True),  # fused gate and up, fused q, k and v
        (transformers.GraniteConfig(**TINY, residual_multiplier=0.2), "mlp.down_proj", False),
        (transformers.Starcoder2Config(**TINY), "mlp.c_proj", True),
        (BLOOM, "mlp.dense_4h_to_h", True),
        (OPT_350M, "fc2", False),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_other_layouts(config, path, additive):
    anatomy = read_anatomy(AutoModelForCausalLM.from_config(config).eval())
    assert (anatomy.edit_path, anatomy.additive) == (path, additive)


@pytest.mark.parametrize("family", EXPECTED)
def test_additive_agrees_with_the_effect_of_an_edit(family):
    """Check the effect on a longer text, by a changed bias or weight of the map, at every layer."""
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    ids = torch.arange(20, 30)[None]
    for layer in range(4):
        shift = torch.randn(32, generator=torch.Generator().manual_seed(layer))
        before = block_output(model, anatomy.blocks[layer], ids)
        handle = anatomy.edit_module(layer).register_forward_hook(lambda _, args, out, shift=shift: out + shift)
        arrived = (block_output(model, anatomy.blocks[layer], ids) - before)[0]
        handle.remove()
        assert torch.allclose(arrived, shift.expand_as(arrived), atol=1e-4) is anatomy.additive


def block_output(model, block, ids):
    outputs = []
    handle = block.register_forward_hook(lambda _, args, out: outputs.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj"])
def test_a_few_huge_entries_do_not_mislead(family, dtype):
    """Trained models carry entries thousands of times larger than the rest at a few indices of the stream."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = 1000
    anatomy = read_anatomy(model.to(dtype))
    assert (anatomy.edit_path, anatomy.additive) == EXPECTED[family][1:]


class TestNamedByTheUser:
    """The setting model.edit_module."""

    @pytest.mark.parametrize("name", ["mlp.c_proj", "transformer.h.{}.mlp.c_proj"])
    def test_a_path(self, name):
        anatomy = read_anatomy(tiny_model("gpt2"), name)
        assert (anatomy.block_path, anatomy.edit_path, anatomy.additive) == EXPECTED["gpt2"]

    def test_another_named_map_is_used(self):
        anatomy = read_anatomy(tiny_model("gemma2"), "self_attn.o_proj")
        assert (anatomy.edit_path, anatomy.additive) == ("self_attn.o_proj", False)

    @pytest.mark.parametrize(
        "name",
        [
            "mlp.nothing",
            "mlp",
            "",
            "mlp.up_proj",
            "model.layers.0.mlp.down_proj",
            "other.{}.mlp.down_proj",
            "{}",
        ],
    )
    def test_an_error_for_a_wrong_path_lists_the_right_ones(self, name):
        with pytest.raises(UserError) as caught:
            read_anatomy(tiny_model("llama"), name)
        assert str(caught.value) == (
            f"model.edit_module: {name!r} is not a linear map onto the residual stream; in a block of "
            "model.layers these are self_attn.q_proj, self_attn.o_proj, mlp.down_proj"
        )


class TestMixturesOfExperts:
    """Experts that are separate modules are no single map; those that are stacked are in tests/lm/test_experts.py."""

    @pytest.mark.parametrize("shared", [False, True])
    def test_experts_kept_as_separate_maps(self, shared):
        """The MLP of a hand-made block sends the first token to one expert, and all other tokens to another."""
        model = tiny_model("llama")
        for block in model.model.layers:
            block.mlp = Experts(shared)
        with pytest.raises(UserError, match=r"residual stream are .*mlp\.experts\.1"):
            read_anatomy(model)
        assert not read_anatomy(model, "mlp.experts.1").additive

    def test_a_named_shared_expert(self):
        config = transformers.Qwen2MoeConfig(**TINY, num_experts=4, shared_expert_intermediate_size=16)
        model = AutoModelForCausalLM.from_config(config).eval()
        anatomy = read_anatomy(model, "model.layers.{}.mlp.shared_expert.down_proj")
        assert anatomy.key_size(1) == 16
        assert not anatomy.additive  # its output is gated

    def test_blocks_that_differ(self):
        anatomy = read_anatomy(AutoModelForCausalLM.from_config(DEEPSEEK).eval())
        assert anatomy.edit_module(0).in_features == 48
        with pytest.raises(UserError, match=r"layer 1 has no linear map mlp\.down_proj \(layers \[0\] have\)"):
            anatomy.edit_module(1)


class Experts(nn.Module):
    """A mixture of two experts with a fixed choice, and optionally a map that acts on every token."""

    def __init__(self, shared):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.shared = nn.Linear(32, 32) if shared else nn.Identity()

    def forward(self, x):
        return self.shared(x) + torch.cat([self.experts[0](x[:, :1]), self.experts[1](x[:, 1:])], dim=1)


@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_an_unknown_layer_names_the_valid_range(layer):
    anatomy = read_anatomy(tiny_model("gpt2"))
    with pytest.raises(UserError, match=rf"there is no layer {layer}: the model's layers are 0 to 3"):
        anatomy.edit_module(layer)


def test_models_without_blocks_or_head_are_rejected():
    headless = transformers.AutoModel.from_config(transformers.LlamaConfig(**TINY))
    with pytest.raises(UserError, match="LlamaModel has no output embeddings"):
        read_anatomy(headless)
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="has no list of 7 modules"):
        read_anatomy(model)
    model = tiny_model("llama")
    model.extra = nn.ModuleList([nn.Identity() for _ in range(4)])
    with pytest.raises(UserError, match="has 2 lists of 4 modules"):
        read_anatomy(model)


def test_state_space_models_are_rejected():
    config = transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match=r"no single MLP output projection .*mixer\.out_proj"):
        read_anatomy(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", EXPECTED)
def test_the_model_is_left_unchanged(family, training):
    dropout = {"gpt2": {"resid_pdrop": 0.5}, "opt": {"dropout": 0.5}, "llama": {"attention_dropout": 0.5}}
    model = tiny_model(family, **dropout.get(family, {})).train(training)
    model.get_input_embeddings().train(not training)  # a mode of its own, to be restored as well
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    # Anatomies do not depend on the mode, because the probes run in evaluation mode.
    assert read_anatomy(model).edit_path == EXPECTED[family][1]
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_a_failure_leaves_the_model_unchanged():
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.act_fn = None  # makes the forward pass fail in the middle of the block
    with pytest.raises(TypeError):
        read_anatomy(model)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_gpt2_maps_are_read_in_their_own_layout():
    model = tiny_model("gpt2")
    anatomy = read_anatomy(model)
    module = anatomy.edit_module(2)
    assert isinstance(module, Conv1D)
    assert module.weight.shape == (anatomy.key_size(2), anatomy.value_size(2))
