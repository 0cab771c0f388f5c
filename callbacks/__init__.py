"""Callbacks that a user swaps in YAML; ``buffer`` and ``consolidated`` are what ``replay`` remembers with."""

from callbacks.forgetting import ForgettingCurve
from callbacks.replay import MemoryReplay

__all__ = ["ForgettingCurve", "MemoryReplay"]
