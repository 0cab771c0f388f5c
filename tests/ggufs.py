"""Tiny GGUF files, written from models by the rules of llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    quantization: gguf.GGMLQuantizationType | None = None,
    without: str = "",
    **changes: Any,
) -> PreTrainedModel:
    """Writes a tiny model, whose tokenizer puts ``<s>`` before each text, to ``path``, and returns the model.

    Args:
        path: the file.
        family: a key of :data:`ARCHITECTURES`.
        quantization: of matrices; float32 where not given.
        without: a tensor that is left out.
        changes: ``architecture``, ``tokenizer`` or ``parts`` as the file shall say, or settings of the model.
    """
    named = changes.pop("architecture", family)
    tokenizer, parts = changes.pop("tokenizer", "gpt2"), changes.pop("parts", 1)
    model = tiny_model(family, **changes)
    writer = gguf.GGUFWriter(path, named)
    _write_config(writer, model.config)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    _write_tokenizer(writer, tiny_tokenizer(bos=True), tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == without or (key == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None
        content = _as_stored(family, key, tensor.numpy(), model.config)
        if quantization is not None and content.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(content, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, kind: str, size: int) -> None:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    special = len(tokenizer.all_special_ids)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [f"[unused{i}]" for i in range(size - len(tokens))])
    writer.add_token_types([3] * special + [1] * (size - special))  # control and normal tokens
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _as_stored(family: str, key: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """What llama.cpp's converter makes of a weight of transformers."""
    if family == "gemma2":
        return weight + 1 if "norm" in key else weight
    if family == "qwen2":
        return weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return weight
    # Rotary halves side by side there, one after the other here.
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
