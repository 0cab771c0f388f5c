"""Check that a model is a causal language model."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from editlab.errors import UserError


def require_causal(name: str, config: PretrainedConfig) -> None:
    """Reject models that do not predict text from left to right.

    Raises:
        UserError: The model ``name`` is an encoder or an encoder-decoder.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name!r} is an encoder-decoder model ({kind}): choose a causal (decoder-only) one")
    # Encoders such as BERT can be built as decoders; transformers also loads those that were not.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name!r} is not a causal language model ({kind}): choose one that continues text")
