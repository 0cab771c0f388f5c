"""Callbacks that a user chooses in YAML: curves, memory replay, edit trust and LoRA adjustment."""

from callbacks.downstream import DownstreamEval
from callbacks.forgetting import ForgettingCurve
from callbacks.lora.callback import LoRAAdjust
from callbacks.replay.callback import MemoryReplay
from callbacks.trust.callback import TrustRollback

__all__ = ["DownstreamEval", "ForgettingCurve", "LoRAAdjust", "MemoryReplay", "TrustRollback"]
