"""How llama.cpp names a model's settings and stores its weights: the parts that differ by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from editlab.errors import UserError

CONVERT = "export the folder and convert it with llama.cpp's own convert_hf_to_gguf.py"
"""What to do about a model that cannot be written as GGUF."""

_COMMON = {
    "add_block_count": "num_hidden_layers",
    "add_context_length": "max_position_embeddings",
    "add_embedding_length": "hidden_size",
    "add_head_count": "num_attention_heads",
    "add_vocab_size": "vocab_size",
}
_LLAMA_LIKE = {
    **_COMMON,
    "add_feed_forward_length": "intermediate_size",
    "add_head_count_kv": "num_key_value_heads",
    "add_layer_norm_rms_eps": "rms_norm_eps",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp."""

    name: str
    """its name in the file"""
    settings: Mapping[str, str]
    """method of ``gguf.GGUFWriter`` -> the name of the setting in the configuration of transformers"""
    rotary: bool = True
    """whether positions are rotary"""
    swapped_pairs: bool = False
    """whether the rows of the query and key projections are stored in the order of interleaved rotary pairs"""
    transposed: tuple[str, ...] = ()
    """tensors that transformers stores transposed (Conv1D)"""


_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA_LIKE, swapped_pairs=True),
    "mistral": Architecture("llama", _LLAMA_LIKE, swapped_pairs=True),
    "qwen2": Architecture("qwen2", _LLAMA_LIKE),
    "qwen3": Architecture("qwen3", _LLAMA_LIKE),
    "gpt2": Architecture(
        "gpt2", {**_COMMON, "add_layer_norm_eps": "layer_norm_epsilon"}, rotary=False, transposed=_CONV1D
    ),
}
"""``model_type`` of a configuration -> the architecture that editlab writes for it."""

STORED: Mapping[str, Architecture] = {one.name: one for one in ARCHITECTURES.values()}
"""Name of an architecture in a file -> the architecture."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture that a model is written as.

    Raises:
        UserError: GGUF files of such a model cannot be written, or not with this configuration.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise UserError(
            f"GGUF files are written of {', '.join(ARCHITECTURES)} models and of any model that came from a GGUF file, "
            f"and this one is {config.model_type}: edit a GGUF file of it, or {CONVERT}."
        )
    if known.rotary and rope(config)[0] != "default":
        raise UserError(
            f"The model scales its rotary positions ({rope(config)[0]}), which editlab does not write into a GGUF "
            f"file: edit a GGUF file of it, or {CONVERT}."
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise UserError(
            f"The model attends to a window of {window} tokens, which a GGUF file of the architecture {known.name} "
            f"does not say: edit a GGUF file of it, or {CONVERT}."
        )
    return known


def rope(config: PretrainedConfig) -> tuple[str, float]:
    """Kind of scaling and base of a model's rotary positions, which versions of transformers name differently."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = found.get("rope_type", found.get("type", "default"))
    return kind, float(found.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def head_width(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_settings(writer: gguf.GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> None:
    """Put the settings of a model into a file."""
    for method, name in architecture.settings.items():
        getattr(writer, method)(getattr(config, name))
    if "add_feed_forward_length" not in architecture.settings:  # GPT-2's may be left open
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    if architecture.rotary:
        width = head_width(config)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(rope(config)[1])


class TensorNames:
    """Names of a model's tensors in a GGUF file.

    Args:
        architecture: its name in the file.
        layers: number of blocks.

    Raises:
        UserError: The package ``gguf`` does not know the architecture.
    """

    def __init__(self, architecture: str, layers: int) -> None:
        found = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
        if not found:
            raise UserError(f"The installed package gguf does not know {architecture} models: upgrade it with pip.")
        self._map = gguf.get_tensor_name_map(found[0], layers)

    def __call__(self, name: str) -> str:
        """The name in the file of a parameter of transformers.

        Raises:
            UserError: It has none.
        """
        known = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"GGUF files have no tensor for the weight {name}: {CONVERT}.")
        return str(known)


def stored(weight: Tensor, name: str, architecture: Architecture | None, config: PretrainedConfig) -> np.ndarray:
    """A weight in the layout in which a GGUF file has it, as float32.

    Args:
        weight: the weight as transformers has it.
        name: its name in the file.
        architecture: of the file; None for one whose weights have the layout of transformers.
        config: of the model.
    """
    content = weight.detach().float().contiguous().numpy()
    part = name.split(".")[-2] if name.count(".") > 1 else ""
    if architecture is None:
        return content
    if part in architecture.transposed and content.ndim == 2:
        return np.ascontiguousarray(content.T)
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}.get(part)
    if not (architecture.swapped_pairs and heads):
        return content
    # A head's rows are its first halves of the rotary pairs and then the second ones; llama.cpp has each pair together.
    halves = content.reshape(heads, 2, len(content) // heads // 2, *content.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(content.shape))
