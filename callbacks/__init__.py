"""Callbacks that a user chooses in YAML: forgetting curves, memory replay, edit trust and LoRA adjustment."""

from callbacks.forgetting import ForgettingCurve
from callbacks.lora.callback import LoRAAdjust
from callbacks.replay.callback import MemoryReplay
from callbacks.trust.callback import TrustRollback

__all__ = ["ForgettingCurve", "LoRAAdjust", "MemoryReplay", "TrustRollback"]
