"""Tests of the number of waits of the host, which docs/results/performance.md states."""

import pytest
import torch

from callbacks.trust.probes import largest_singular_value
from editlab.edits.edited_layer import EditedLayer
from editlab.keys.moments import accumulate
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.values.optimize import ValueSettings, optimize_values
from tests.facts import FACTS
from tests.pretend.device import pretend
from tests.pretend.editing import on_device
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = on_device
CONTEXTS = ["", "Oslo lies in Norway. "]


@pytest.fixture
def device():
    with pretend() as found:
        yield found


@pytest.fixture
def lm(device):
    return LanguageModel(tiny_model("llama").requires_grad_(False).to(device.name), tiny_tokenizer())


def counted(device, work):
    """Return the waits and launches of ``work``."""
    device.counts.reset()
    work()
    return device.counts.waits.total(), device.counts.launches.total()


@pytest.mark.parametrize("layer", [1, 2])
def test_a_step_of_the_values_waits_once(device, lm, layer):
    def find(steps):
        settings = ValueSettings(steps=steps, loss_threshold=0, matmul="float32")
        optimize_values(lm, FACTS[:4], Site.of(lm, layer), CONTEXTS, settings)

    (few, launches), (many, more) = (counted(device, lambda steps=steps: find(steps)) for steps in (2, 12))
    assert (many - few) / 10 == 1
    blocks = len(lm.anatomy.blocks) - 1 - layer
    assert (more - launches) / 10 <= 120 + 140 * blocks


def test_dropping_finished_facts_causes_no_wait(device, lm):
    def find(steps, threshold):
        settings = ValueSettings(steps=steps, loss_threshold=threshold, matmul="float32")
        return optimize_values(lm, FACTS[:4], Site.of(lm, 1), CONTEXTS, settings)

    threshold = float(find(4, 0).loss.median())  # which some facts are under by then
    staying, _ = counted(device, lambda: find(8, 0))
    found = {}
    waits, _ = counted(device, lambda: found.update(steps=find(8, threshold).steps))
    assert len(set(found["steps"].tolist())) > 1  # they finished at different steps
    assert waits <= staying


def test_keys_are_read_without_a_wait_for_each_row(device, lm):
    waits = [
        counted(device, lambda facts=facts: read_keys(lm, facts, 1, Site.of(lm, 2), CONTEXTS, "bare"))[0]
        for facts in (FACTS[:2], FACTS[:8])
    ]
    assert waits[0] == waits[1]


def test_moments_are_copied_to_the_host_once(device, lm):
    def to_host(windows):
        device.counts.reset()
        accumulate(lm, [1, 2], [[5 + i % 300 for i in range(w, w + 16)] for w in range(windows)])
        return sum(n for where, n in device.counts.waits.items() if "keys/moments" in where and "to host" in where)

    assert to_host(40) == to_host(80) == 2


def test_the_power_iteration_waits_once(device, lm):
    layer = EditedLayer(lm.anatomy.edit_module(1), False)
    start = torch.ones(layer.total.shape[1], device=device.name)
    assert counted(device, lambda: largest_singular_value(layer, start, 20))[0] == 1
