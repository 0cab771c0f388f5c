"""Tiny random models of many architectures and a tiny tokenizer, made on the spot: no network, no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The capital of France is Paris. The capital of Japan is Tokyo. Danielle Darrieux speaks French.",
    "The mother tongue of Tove Jansson is Swedish. Oslo lies in Norway, and Lima lies in Peru.",
    "The official language of Brazil is Portuguese; the currency of India is the rupee.",
]

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2_LIKE),
    "gptj": ("GPTJConfig", {**_GPT2_LIKE, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE),
    "phi": ("PhiConfig", _LLAMA_LIKE),
    "opt": ("OPTConfig", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 4,
                          "num_attention_heads": 4, "max_position_embeddings": 128}),
}  # fmt: skip

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),  # no positions: biases by distance
    "cohere": ("CohereConfig", _LLAMA_LIKE),  # attention and MLP side by side, scaled logits
    "falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "gemma": ("GemmaConfig", _LLAMA_LIKE),  # tied and scaled embeddings
    "granite": ("GraniteConfig", {**_LLAMA_LIKE, "residual_multiplier": 0.2, "embedding_multiplier": 12.0}),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),  # norms after, none before
    "opt_350m": ("OPTConfig", {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 4,
                               "num_attention_heads": 4, "max_position_embeddings": 128,
                               "do_layer_norm_before": False}),  # embeddings narrower than the stream
    "phi3": ("Phi3Config", _LLAMA_LIKE),  # fused gate and up
    "stablelm": ("StableLmConfig", _LLAMA_LIKE),
    "starcoder2": ("Starcoder2Config", _LLAMA_LIKE),
}  # fmt: skip
"""Structures that :data:`FAMILIES` lacks; too many for every test."""

_MIXTURE: dict[str, Any] = {**_LLAMA_LIKE, "num_hidden_layers": 3, "num_experts_per_tok": 2}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_MIXTURE, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MIXTURE, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
                                     "moe_intermediate_size": 16}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 16,
                                     "shared_expert_intermediate_size": 16}),  # and an expert of every token
    "olmoe": ("OlmoeConfig", {**_MIXTURE, "num_experts": 4}),
    "phimoe": ("PhimoeConfig", {**_MIXTURE, "num_local_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", {**_MIXTURE, "num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {**_MIXTURE, "num_local_experts": 4, "layer_types": ["full_attention"] * 3,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
}  # fmt: skip
"""Mixtures of experts; those of GPT-OSS have biases and store their weights transposed."""


def tiny_tokenizer(
    *, bos: bool = False, padding_side: str = "right", texts: Sequence[str] = TEXT, vocabulary: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over ``texts``; with ``bos`` it puts a special token before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = (
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        if bos
        else processors.ByteLevel(trim_offsets=True)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
    )


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random small model of ``family`` (in :data:`FAMILIES`, :data:`OTHERS` or :data:`MIXTURES`), in eval mode."""
    config_name, settings = {**FAMILIES, **OTHERS, **MIXTURES}[family]
    config = getattr(transformers, config_name)(
        **{"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, **settings, **changes}
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # The default init (std 0.02) makes all logits alike; larger weights let a test see a difference.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()
