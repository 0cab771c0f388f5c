"""GGUF files of tiny models: read by gguf and by transformers alone, against the tensors that were to be written."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from editlab.errors import UserError
from editlab.lm.gguf import check, write
from editlab.lm.gguf.export import Origin, export_gguf
from editlab.lm.gguf.layout import rope, stored
from editlab.lm.gguf.vocabulary import SPLITS, split_name
from editlab.lm.loading.gguf import SAMPLE, read_gguf
from tests.ggufs import write_gguf
from tests.tiny import tiny_model, tiny_tokenizer

NEW = Origin(None, (), torch.float32)
GPT2 = {"n_inner": 128, "n_positions": 1024}  # what transformers assumes of every GPT-2 in a GGUF file
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},  # every Qwen3 has width 128
    "gpt2": GPT2,
}
PROMPTS = ["The capital of France is", "Oslo"]


@pytest.fixture
def read_back(monkeypatch):
    """The model and tokenizer that each export has read back, in a list; reading a file again would take longer."""
    found = []

    def reading(file):
        found.append(read_gguf(file))
        return found[-1]

    monkeypatch.setattr(check, "read_gguf", reading)
    return found


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_a_folder_comes_back_to_the_bit(family, tmp_path, read_back):
    model, tokenizer = tiny_model(family, **FAMILIES[family]), tiny_tokenizer(bos=True)
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    export_gguf(tmp_path / "a.gguf", model, tokenizer, NEW, "about", PROMPTS)
    ((read, vocabulary),) = read_back
    expected = tiny_model(family, **FAMILIES[family]).state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in read.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, logits, rtol=1e-5, atol=1e-5)
    for text in (SAMPLE, *PROMPTS):
        assert vocabulary(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["general.description"].contents() == "about"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_matrices_have_the_given_type_and_vectors_float32(dtype, kind, tmp_path):
    model = tiny_model("llama").to(dtype)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    if dtype == torch.bfloat16:
        export_gguf(tmp_path / "a.gguf", model, tiny_tokenizer(), NEW, "", PROMPTS[:1])
    else:
        write.write_new(tmp_path / "a.gguf", model, tiny_tokenizer(), dtype, "")  # without reading it back
    found = tensors(tmp_path / "a.gguf")
    assert found["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert found["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    down = expected["model.layers.1.mlp.down_proj.weight"]
    raw = np.ascontiguousarray(found["blk.1.ffn_down.weight"].data).tobytes()
    assert raw == down.view(torch.uint8).numpy().tobytes()  # the very bits of torch


def test_rows_of_a_query_are_stored_pair_by_pair():
    # Two heads of width 4: transformers has the first halves of a head's two pairs, then the second ones.
    model = tiny_model("llama", num_attention_heads=2)
    weight = torch.arange(8.0)[:, None]
    llama, qwen = write.STORED["llama"], write.STORED["qwen2"]
    assert stored(weight, "blk.0.attn_q.weight", llama, model.config).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert stored(weight, "blk.0.attn_v.weight", llama, model.config).ravel().tolist() == list(range(8))
    assert stored(weight, "blk.0.attn_q.weight", qwen, model.config).ravel().tolist() == list(range(8))


class TestCopies:
    """A model that came from a GGUF file."""

    CHANGED = "model.layers.1.mlp.down_proj.weight"

    def source(self, tmp_path: Path) -> Path:
        write_gguf(tmp_path / "base.gguf", quantization=gguf.GGMLQuantizationType.Q8_0, intermediate_size=64)
        return tmp_path / "base.gguf"

    def test_only_the_changed_tensors_are_replaced(self, tmp_path, read_back):
        source = self.source(tmp_path)
        model, tokenizer = read_gguf(source)
        changed = [self.CHANGED, "model.layers.2.self_attn.q_proj.weight"]  # by LoRA, for the second
        for name in changed:
            model.get_parameter(name).data += 0.125
        expected = {name: weight.clone() for name, weight in model.state_dict().items()}
        export_gguf(tmp_path / "a.gguf", model, tokenizer, Origin(source, changed, torch.float32), "x", PROMPTS[:1])
        before, after = tensors(source), tensors(tmp_path / "a.gguf")
        replaced = [n for n in before if before[n].data.tobytes() != after[n].data.tobytes()]
        assert list(before) == list(after)
        assert sorted(replaced) == ["blk.1.ffn_down.weight", "blk.2.attn_q.weight"]
        assert {after[n].tensor_type.name for n in replaced} == {"F32"}
        ((again, _),) = read_back
        assert all(torch.equal(weight, expected[n]) for n, weight in again.state_dict().items())
        fields = [gguf.GGUFReader(file).fields for file in (source, tmp_path / "a.gguf")]
        kept = [k for k in fields[0] if not k.startswith("GGUF.")]
        assert all(fields[1][k].contents() == fields[0][k].contents() for k in kept)
        assert set(fields[1]) - set(fields[0]) == {"general.description"}

    def test_a_run_in_bfloat16_keeps_the_blocks(self, tmp_path, read_back):
        source = self.source(tmp_path)
        model, tokenizer = read_gguf(source)
        model.to(torch.bfloat16)
        model.get_parameter(self.CHANGED).data += 0.125
        changed = model.get_parameter(self.CHANGED).detach().clone()
        export_gguf(
            tmp_path / "a.gguf", model, tokenizer, Origin(source, [self.CHANGED], torch.bfloat16), "x", PROMPTS[:1]
        )
        found = tensors(tmp_path / "a.gguf")
        assert {t.tensor_type.name for n, t in found.items() if "norm" not in n} == {"Q8_0", "BF16"}
        ((again, _),) = read_back
        assert torch.equal(again.get_parameter(self.CHANGED), changed.float())

    def test_a_weight_that_the_file_lacks(self, tmp_path):
        source, model, tokenizer = self.source(tmp_path), tiny_model("llama"), tiny_tokenizer()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400))
        with pytest.raises(UserError, match=r"has no tensor output\.bias"):
            export_gguf(tmp_path / "a.gguf", model, tokenizer, Origin(source, ["lm_head.bias"], torch.float32), "")


class TestReadBack:
    """What was lost in the file is noticed."""

    @pytest.fixture
    def written(self, tmp_path):
        model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
        write.write_new(tmp_path / "a.gguf", model, tokenizer, torch.float32, "")
        return tmp_path / "a.gguf", model, tokenizer

    def refused(self, file, model, tokenizer, expected=lambda name, read: True):
        with pytest.raises(UserError) as caught:
            check.compare(file, model, tokenizer, expected, PROMPTS)
        return str(caught.value)

    def test_a_weight(self, written):
        said = self.refused(*written, expected=lambda name, read: not name.endswith("2.mlp.up_proj.weight"))
        assert "(the weight model.layers.2.mlp.up_proj.weight differs when it is read)" in said

    def test_a_tokenizer(self, written):
        file, model, _ = written
        assert "(the tokens of " in self.refused(file, model, tiny_tokenizer(bos=False))

    def test_a_setting(self, written):
        file, model, tokenizer = written
        model.config.rms_norm_eps = 0.1
        assert "(the answer to 'The capital of France is' differs" in self.refused(file, model, tokenizer)


class TestRefused:
    """Models that cannot be written: one sentence with what to do."""

    def refused(self, tmp_path, model, tokenizer=None):
        with pytest.raises(UserError) as caught:
            export_gguf(tmp_path / "a.gguf", model, tokenizer or tiny_tokenizer(), NEW, "")
        assert "\n" not in str(caught.value)
        assert "edit a GGUF file of" in str(caught.value)
        assert not (tmp_path / "a.gguf").exists()
        return str(caught.value)

    def test_another_architecture(self, tmp_path):
        assert "written of llama, mistral, qwen2, qwen3, gpt2 models" in self.refused(tmp_path, tiny_model("gptj"))

    def test_scaled_positions(self, tmp_path):
        model = tiny_model("llama")
        model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
        assert rope(model.config) == ("linear", 500.0)
        assert "scales its rotary positions (linear)" in self.refused(tmp_path, model)

    def test_a_window(self, tmp_path):
        model = tiny_model("mistral", sliding_window=16)
        assert "attends to a window of 16 tokens" in self.refused(tmp_path, model)

    def test_a_way_to_split_that_has_no_name(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        assert "no byte-level BPE whose way to split" in self.refused(tmp_path, tiny_model("llama"), tokenizer)

    def test_a_type_that_is_not_written(self):
        with pytest.raises(UserError, match="--dtype is float64, and tensors of a GGUF file are written as float32"):
            write.require_kind(torch.float64)

    def test_more_tokens_than_rows(self, tmp_path):
        model = tiny_model("llama", vocab_size=100)
        with pytest.raises(UserError, match=r"The tokenizer has \d+ tokens and the model 100"):
            export_gguf(tmp_path / "a.gguf", model, tiny_tokenizer(), NEW, "")


def test_ways_to_split():
    split = {"type": "Split", "pattern": {"Regex": next(iter(SPLITS))}, "behavior": "Isolated"}
    plain, bare = {"type": "ByteLevel", "add_prefix_space": False}, {"type": "ByteLevel", "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}

    def name(*steps, normalizer=None):
        return split_name({"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})

    assert name(plain) == "gpt-2"
    assert name(digits, plain) == "smollm"
    assert name(split, bare) == "llama-bpe"
    assert name(split, bare, normalizer={"type": "NFC"}) == "llama-bpe"
    assert name(plain, normalizer={"type": "Lowercase"}) is None
    assert name({"type": "Metaspace"}) is None
    assert name({**split, "pattern": {"String": " "}}, bare) is None
    assert json.loads(tiny_tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"
