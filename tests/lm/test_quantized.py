"""Maps with 4- or 8-bit weights: stand-ins like those of bitsandbytes, and bitsandbytes if it is installed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editlab.edits.edited_model import EditedModel
from editlab.errors import UserError
from editlab.lm.fingerprint import fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.lm.loading import load as loading
from editlab.lm.loading.load import load
from editlab.lm.quantized import has_narrow_weight, in_full_precision, is_quantized, keep_layout
from editlab.lm.save import cast, move, save
from editlab.runs.delta import Delta
from editlab.runs.history import History
from tests.tiny import tiny_model, tiny_tokenizer

LAYER = "model.layers.1.mlp.down_proj"


class Narrow(nn.Linear):
    """As bitsandbytes' maps: a Linear by its class, whose weight is of integers with a scale for each row.

    ``packed`` has the shape of 4-bit weights, [numbers / 2, 1]; ``faulty`` products have no gradient.
    """

    def __init__(self, plain: nn.Module, packed: bool, faulty: bool = False) -> None:
        transposed = isinstance(plain, Conv1D)
        matrix = plain.weight.detach().T if transposed else plain.weight.detach()
        super().__init__(matrix.shape[1], matrix.shape[0], bias=plain.bias is not None)
        self.source_cls, self.packed, self.faulty = type(plain), packed, faulty
        steps = 7 if packed else 127
        self.scale = matrix.abs().amax(1, keepdim=True) / steps
        whole = (matrix / self.scale).round().to(torch.int8)
        self.shape = whole.shape
        low, high = (whole.flatten()[half::2] + 8 for half in (0, 1))
        content = (low + 16 * high).to(torch.uint8)[:, None] if packed else whole
        self.weight = nn.Parameter(content, requires_grad=False)
        if plain.bias is not None:
            self.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)

    @property
    def computed(self) -> Tensor:
        """The weights that it computes with, [d_out, d_in]."""
        if not self.packed:
            return self.weight * self.scale
        halves = torch.cat([self.weight % 16, self.weight // 16], 1).to(torch.int8) - 8
        return halves.reshape(self.shape) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.detach() if self.faulty else x, self.computed.to(x), self.bias)


def narrowed(family: str = "llama", packed: bool = True, faulty: bool = False):
    """A tiny model all of whose linear maps inside the blocks are narrow."""
    model = tiny_model(family)
    for path, part in list(model.named_modules()):
        if isinstance(part, nn.Linear | Conv1D) and "lm_head" not in path:
            model.set_submodule(path, Narrow(part, packed, faulty))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("packed", [True, False], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_an_edited_map_gets_the_weights_that_it_computed_with(family, packed):
    """Phi's maps have biases, and GPT-2's are Conv1D; all other maps stay as they are."""
    model = narrowed(family, packed)
    ids = torch.arange(20, 30)[None]
    expected, random = model(ids).logits, torch.get_rng_state()
    lm = LanguageModel(model, tiny_tokenizer())
    path = lm.anatomy.edit_name(1)
    quantized = model.get_submodule(path)
    weight = quantized.computed
    before = fingerprint(model)
    editor = EditedModel("tiny", [1], None, None)
    editor.use(lm)
    assert editor.fingerprint == before  # that of the weights as they were loaded
    plain = lm.anatomy.edit_module(1)
    assert plain is model.get_submodule(path) is editor.layers[0].module
    assert type(plain) is (Conv1D if family == "gpt2" else nn.Linear)
    torch.testing.assert_close(plain.weight.T if family == "gpt2" else plain.weight, weight, rtol=1e-6, atol=1e-6)
    assert plain.weight.dtype == torch.float32
    assert plain.weight.is_contiguous()
    assert not plain.training
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    if quantized.bias is not None:
        assert torch.equal(plain.bias, quantized.bias)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    others = [p for p, part in model.named_modules() if isinstance(part, Narrow)]
    assert len(others) == sum(isinstance(part, nn.Linear | Conv1D) for part in model.modules()) - 2  # and the head
    assert torch.equal(torch.get_rng_state(), random)
    editor.layers[0].add(torch.ones(32, 48))
    assert not torch.equal(model(ids).logits, expected)


def test_the_trainer_leaves_a_quantized_model_as_it_is():
    lm = LanguageModel(narrowed(), tiny_tokenizer())
    assert lm.placed
    lm.to(torch.float16)
    move(lm.model, "meta")
    assert lm.model.model.norm.weight.dtype == torch.float32
    assert not lm.model.model.norm.weight.is_meta
    cast(lm.model, torch.float32)
    with pytest.raises(UserError, match=r"^--dtype is bfloat16, .* keeps the type of the others \(float32\): omit"):
        cast(lm.model, torch.bfloat16)


def test_a_map_without_gradients_is_refused():
    with pytest.raises(UserError, match=rf"^The quantized map {LAYER} has no gradient or a wrong one on cpu"):
        in_full_precision(narrowed(faulty=True), LAYER)


def test_the_configuration_lists_the_map_with_those_that_are_not_quantized():
    """Transformers' own choice, the output embeddings, stays on the list."""
    model = narrowed()
    model.config.quantization_config = how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model.hf_quantizer = type("Quantizer", (), {"modules_to_not_convert": ["lm_head"]})()
    in_full_precision(model, LAYER)
    assert how.llm_int8_skip_modules == ["lm_head", LAYER]
    in_full_precision(model, "model.layers.2.mlp.down_proj")
    assert how.llm_int8_skip_modules == ["lm_head", LAYER, "model.layers.2.mlp.down_proj"]


def test_a_delta_is_put_on_a_quantized_base():
    model, total = narrowed(), torch.randn(32, 48)
    weight = model.get_submodule(LAYER).computed
    Delta("tiny", "", torch.float32, [1], {LAYER: total}, History(1)).put_on(model)
    torch.testing.assert_close(model.get_submodule(LAYER).weight, weight + total)


def test_what_is_quantized():
    plain = tiny_model("llama")
    assert not is_quantized(plain)
    assert not is_quantized(plain.half())
    assert not is_quantized(tiny_model("mixtral"))
    assert not has_narrow_weight(nn.Identity())
    assert is_quantized(narrowed())
    assert in_full_precision(plain, LAYER) is plain.get_submodule(LAYER)


def test_layouts_for_cpus_are_kept():
    model = narrowed()
    part = model.get_submodule(LAYER)
    part.support_avx512bf16_for_cpu = True
    keep_layout(model)
    assert not part.support_avx512bf16_for_cpu
    assert not hasattr(model, "support_avx512bf16_for_cpu")


class TestLoading:
    """The packages that a folder with 4- or 8-bit weights needs, and the real ones."""

    @pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
    def test_without_a_package(self, tmp_path, monkeypatch, missing):
        tiny_model("llama").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(loading, "find_spec", lambda package: None if package == missing else object())
        with pytest.raises(UserError, match=r"need the packages bitsandbytes and accelerate: pip install 'editlab"):
            load(str(tmp_path), torch.float32)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("gpt2", 4), ("llama", 8)])
    def test_a_model_of_bitsandbytes_is_edited_and_saved(self, tmp_path, family, bits):
        """Its 4-bit maps are edited to the bit; those of 8 bits compute in float16."""
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'editlab[quantized]'")
        names = ("n_embd", "n_inner") if family == "gpt2" else ("hidden_size", "intermediate_size")
        widths = dict(zip(names, (64, 128), strict=True))
        tiny_model(family, **widths).save_pretrained(tmp_path / "plain")
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
        )
        quantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
        quantized.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")

        model, tokenizer = load(str(tmp_path / "base"), torch.float32)
        found = fingerprint(model)
        lm = LanguageModel(model, tokenizer)
        path = lm.anatomy.edit_name(1)
        dequantized = load(str(tmp_path / "base"), torch.float32)[0].dequantize().get_submodule(path).weight
        editor = EditedModel("tiny", [1], None, None)
        editor.use(lm)
        assert editor.fingerprint == found
        layer = editor.layers[0]
        torch.testing.assert_close(layer.original_matrix, dequantized, rtol=1e-3, atol=0 if bits == 4 else 1e-4)
        layer.add(0.1 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))

        base = load(str(tmp_path / "base"), torch.float32)[0]
        assert fingerprint(base) == found
        Delta("tiny", found, torch.float32, [1], {path: layer.total}, History(1)).put_on(base)
        (tmp_path / "out").mkdir()
        save(base, tokenizer, tmp_path / "out")
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        keep_layout(exported)
        assert torch.equal(exported.get_submodule(path).weight, layer.weight)
        assert is_quantized(exported)
        ids = torch.arange(20, 30)[None]
        with torch.no_grad():
            torch.testing.assert_close(exported(ids).logits, model(ids).logits)
