"""Settings that every Trainer of edits has, whether it is started from the command line or from Python."""

from __future__ import annotations

from typing import Any

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
"""One pass over the facts in their order, with each step logged and no validation before it."""
