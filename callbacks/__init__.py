"""Callbacks that a user swaps in YAML (forgetting, replay, trust, LoRA), and the modules that they use."""

from callbacks.forgetting import ForgettingCurve
from callbacks.lora.callback import LoRAAdjust
from callbacks.replay.callback import MemoryReplay
from callbacks.trust.callback import TrustRollback

__all__ = ["ForgettingCurve", "LoRAAdjust", "MemoryReplay", "TrustRollback"]
