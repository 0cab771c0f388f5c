"""The linear maps of a model that an adjustment's adapter is added to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from editlab.errors import UserError
from editlab.lm.anatomy import Anatomy
from editlab.lm.probe import linear_maps

GROUPS = ("edited", "mlp", "attention")


def find_targets(anatomy: Anatomy, targets: str, layers: Sequence[int]) -> list[str]:
    """Paths in the model of the linear maps that get the adapter, layer by layer.

    Args:
        anatomy: anatomy of the model.
        targets: ``edited``: the MLP's output projection; ``mlp``: all maps of the MLP; ``attention``: all maps outside
            of it; or a regular expression that has to match the whole path inside a block (``mlp[.](up|down)_proj``).
        layers: blocks, counted from 0.

    Raises:
        UserError: A layer does not exist, the regular expression is invalid, or it matches nothing; or the MLPs are
            mixtures of experts.
    """
    if anatomy.joint and targets in ("edited", "mlp"):
        raise UserError(
            f"LoRAAdjust.targets is {targets!r}, and the edited layers are mixtures of experts, whose weights are no "
            "linear maps that an adapter could be added to: set attention, or a regular expression."
        )
    mlp = anatomy.edit_path.rpartition(".")[0]
    found: list[str] = []
    for layer in layers:
        if not 0 <= layer < len(anatomy.blocks):
            raise UserError(f"LoRAAdjust.layers names {layer}: the model's layers are 0 to {len(anatomy.blocks) - 1}.")
        paths = list(linear_maps(anatomy.blocks[layer]))
        if targets == "edited":
            chosen = [anatomy.edit_path]
        elif targets in GROUPS:
            chosen = [path for path in paths if (path.rpartition(".")[0] == mlp) == (targets == "mlp")]
        else:
            chosen = [path for path in paths if _expression(targets).fullmatch(path)]
        if not chosen:
            raise UserError(
                f"LoRAAdjust.targets is {targets!r}, which names no linear map of layer {layer}: set "
                f"{', '.join(GROUPS)}, or match some of {', '.join(paths)}."
            )
        found += [f"{anatomy.block_path}.{layer}.{path}" for path in chosen]
    return found


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"LoRAAdjust.targets is {text!r}, which is not a valid regular expression ({error}): correct it."
        ) from error
