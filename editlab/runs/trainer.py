"""What a Trainer of edits needs, from the command line or from Python."""

from __future__ import annotations

from typing import Any

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
"""One pass over the facts, each step logged, no validation before it, and the stream in one piece."""
