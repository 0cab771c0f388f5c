"""Digests of a model's weights, and of all that computing with it depends on: keys of what was computed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from editlab.lm.placement import weights_of

_NO_MATTER = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a configuration that logits do not depend on, or that the weights' types tell already."""
_WORD = 8
_HALF = (1 << 32) - 1
_CHUNK = 1 << 20
"""Words (of 8 bytes) that are summed at once; few enough that their factors stay in the processor's cache."""


def fingerprint(model: nn.Module) -> str:
    """Hex digest (SHA-256, 64 characters) of all parameters and persistent buffers of ``model``.

    It covers each tensor's name, shape, data type and bytes: a changed bit always shows, and so do swapped
    elements and a renamed, cast or reshaped tensor. Tensors are read as integers of four bytes and summed with
    fixed odd factors modulo 2^64, which is exact in any order: neither the device (or whether a tensor is
    offloaded) nor the number of threads matters. (Of eight bytes, two changed signs could cancel.)
    It is made to notice changes, not to withstand someone who forges weights.
    """
    digest = hashlib.sha256()
    factors = _factors(_CHUNK)
    for name, tensor in weights_of(model):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_sums(tensor, factors))
    return digest.hexdigest()


def architecture(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a transformers model says of how it computes, as JSON has it; {} where it has none.

    Models of equal weights may differ in it: the base of their rotary positions, say, or a soft cap.
    """
    config: Any = getattr(model, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in told.items() if name not in _NO_MATTER and not name.startswith("_")}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return found


def model_key(weights: str, model: nn.Module) -> str:
    """Hex digest of all that computing with ``model`` depends on: weights, architecture, and the type of its device.

    ``weights`` is their fingerprint. What a GPU computes differs in the last bits from what a CPU does, so neither
    finds in the cache what the other has put there.
    """
    told = f"{weights} {json.dumps(architecture(model), sort_keys=True)}"
    kinds = {parameter.device.type for parameter in model.parameters()} - {"cpu", "meta"}
    return hashlib.sha256(" ".join([told, *sorted(kinds)]).encode()).hexdigest()


def _factors(count: int) -> Tensor:
    """Make ``[count]`` odd int64 numbers without a pattern, by arithmetic alone and so alike everywhere."""
    mixed = torch.arange(1, count + 1) * 0x1E3779B97F4A7C15
    mixed ^= mixed >> 29
    mixed *= 0x3F58476D1CE4E5B9
    return (mixed ^ (mixed >> 32)) | 1


def _sums(tensor: Tensor, factors: Tensor) -> bytes:
    """Compute two 8-byte sums for each chunk of the tensor's bytes in row-major order: of its words' halves.

    An odd factor has an inverse modulo 2^64, so no sum can stay the same when a single word changes.
    """
    if tensor.numel() == 0:
        return b""
    factors = factors.to(tensor.device)
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    sums = []
    for chunk in content.split(_CHUNK * _WORD):
        words, fixed = _words(chunk), factors[: chunk.numel() // _WORD + 1]
        sums += [(half * fixed[: words.numel()]).sum() for half in (words & _HALF, (words >> 32) & _HALF)]
    return torch.stack(sums).cpu().numpy().tobytes()


def _words(chunk: Tensor) -> Tensor:
    """View the bytes of ``chunk`` as int64, zeros filled in at the end."""
    missing = -chunk.numel() % _WORD
    if missing:
        chunk = torch.cat([chunk, chunk.new_zeros(missing)])
    elif chunk.storage_offset() % _WORD:
        chunk = chunk.clone()
    return chunk.view(torch.int64)
