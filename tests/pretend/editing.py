"""Small runs of editlab on the simulated accelerator and on the CPU, and the difference of their updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editlab import edit_model
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS
from tests.pretend.device import AVAILABLE, REASON, pretend
from tests.tiny import tiny_model, tiny_tokenizer

on_device = [
    pytest.mark.skipif(not AVAILABLE, reason=REASON),
    pytest.mark.filterwarnings("default"),  # Lightning gives advice for GPUs
]
"""Marks of a test module that needs the simulated accelerator."""

TEXT = str(Path(__file__).with_name("text.txt"))
"""A text for the second moments and for LoRA: a model that samples its own takes a pass a token, as one test does."""
SMALL = {
    "layers": [1, 2], "batch_size": 2, "progress": False,
    "values": ValueSettings(steps=3, lr=0.5, clamp=3.0, reference="original", matmul="float32"),
    "moments": MomentSettings(text=TEXT, tokens=128, cache=False), "contexts": ContextSettings(count=1, length=3),
    "evaluation": EvaluationSettings(heldout_tokens=0, generation=0, bystanders=0),
}  # fmt: skip


def edited(kind, family="llama", dtype=torch.float32, facts=FACTS[:4], callbacks=(), **settings):
    """Edit a tiny model; return the layers' sums of updates, on the CPU.

    Args:
        kind: ``cpu``, or the accelerator to simulate.
        family: family of the model.
        dtype: data type of its weights.
        facts: facts to edit.
        callbacks: callbacks of the run.
        **settings: settings that override :data:`SMALL`.
    """
    model = tiny_model(family).to(dtype)
    if kind == "cpu":
        return _totals(edit_model(model, tiny_tokenizer(), facts, callbacks=callbacks, **{**SMALL, **settings}))
    with pretend(kind) as device:
        model.to(device.name)
        found = edit_model(model, tiny_tokenizer(), facts, callbacks=callbacks, **{**SMALL, **settings})
        assert {p.device for p in model.parameters()} == {device.name}
        with found[1].editor.unedited():  # this fails if an adapter is not on the layer's device
            pass
        return _totals(found)


def _totals(result):
    return [layer.total.cpu() for layer in result[1].editor.changed_layers]


def difference(found, expected):
    """Return the largest norm of a difference of layer updates, relative to the norm of the expected update."""
    assert len(found) == len(expected)
    pairs = [(getattr(a, "content", a), b) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
