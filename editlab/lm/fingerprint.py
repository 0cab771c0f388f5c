"""Digests of a model's weights and architecture, which are part of the key of every cached result."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from editlab.lm.placement import weights_of

_IRRELEVANT = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a configuration that do not affect logits, or that repeat the data types of the weights."""


def fingerprint(model: nn.Module) -> str:
    """Return a digest (64 hexadecimal digits) of all parameters and persistent buffers of ``model``.

    It covers each tensor's name, shape, data type and bytes in row-major order, and depends neither on the device (or
    whether a tensor is offloaded) nor on the number of threads. The bytes are hashed by XXH3 (128 bits), which runs at
    the speed of memory: it detects accidental changes, but does not protect against deliberate forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in weights_of(model):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_hash(tensor))
    return digest.hexdigest()


def architecture(model: nn.Module) -> dict[str, Any]:
    """Return the entries of a model's configuration that affect its logits, as JSON values; {} without configuration.

    Models with equal weights may differ in them, for example in the base of their rotary positions or in a soft cap.
    """
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in entries.items() if name not in _IRRELEVANT and not name.startswith("_")}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return found


def model_key(weights: str, model: nn.Module) -> str:
    """Return a hex digest of everything that affects the model's results: weights, architecture and device type.

    ``weights`` is the fingerprint of the weights. The results of a GPU and a CPU differ in the last bits, so the two
    do not share cached results.
    """
    description = f"{weights} {json.dumps(architecture(model), sort_keys=True)}"
    kinds = {parameter.device.type for parameter in model.parameters()} - {"cpu", "meta"}
    return hashlib.sha256(" ".join([description, *sorted(kinds)]).encode()).hexdigest()


def _hash(tensor: Tensor) -> bytes:
    """Hash the bytes of a tensor in row-major order; a contiguous CPU tensor is not copied."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_128_digest(content.numpy().data)
