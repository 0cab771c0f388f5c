"""The tokenizer of a model as the entries of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.gguf.layout import CONVERT

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
"""Regular expression by which a tokenizer splits text -> llama.cpp's name for this way to split."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Put a byte-level BPE tokenizer into a file.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer.
        size: the model's vocabulary, which may have more rows than the tokenizer has tokens.

    Raises:
        UserError: The tokenizer is of another kind, or splits text in a way that llama.cpp has no name for here; or it
            has more tokens than the model.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, way = content["model"], split_name(content)
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or way is None:
        raise UserError(
            "The tokenizer is no byte-level BPE whose way to split text editlab knows in llama.cpp (that of GPT-2, "
            f"SmolLM, Llama 3 or Qwen 2): edit a GGUF file of the model, or {CONVERT}."
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {id_: text for text, id_ in bpe["vocab"].items()} | {id_: token["content"] for id_, token in added.items()}
    if max(tokens) >= size:
        raise UserError(
            f"The tokenizer has {max(tokens) + 1} tokens and the model {size}: resize the model's embeddings first."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(way)
    writer.add_token_list([tokens.get(id_, f"[PAD{id_}]") for id_ in range(size)])
    writer.add_token_types([_kind(id_, tokens, added) for id_ in range(size)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in bpe["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (id_ := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    first, last = _around(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a tokenizer splits text before its merges; None if it has none here.

    Args:
        content: the parsed tokenizer.json.
    """
    normalizer, splitter = content.get("normalizer"), content.get("pre_tokenizer") or {}
    if normalizer is not None and normalizer.get("type") != "NFC":  # llama.cpp has none, and most texts are in NFC
        return None
    steps = splitter.get("pretokenizers", [splitter])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    *before, _ = steps
    if last.get("use_regex", True):  # the regular expression of GPT-2
        digits = [step.get("type") == "Digits" and bool(step.get("individual_digits")) for step in before]
        return {(): "gpt-2", (True,): "smollm"}.get(tuple(digits))
    if len(before) != 1 or before[0].get("type") != "Split" or before[0].get("behavior") != "Isolated":
        return None
    return SPLITS.get(before[0]["pattern"].get("Regex", ""))


def _kind(id_: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> gguf.TokenType:
    if id_ not in tokens:
        return gguf.TokenType.UNUSED
    if id_ not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[id_]["special"] else gguf.TokenType.USER_DEFINED


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts the token of the beginning before each text, and that of the end after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins = bool(whole) and whole[0] == tokenizer.bos_token_id and whole[:1] != bare[:1]
    return begins, bool(whole) and whole[-1] == tokenizer.eos_token_id and whole[-1:] != bare[-1:]
