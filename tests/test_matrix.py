"""The common tester: every method with every callback, and every family of models with all callbacks at once.

A new method or callback is covered by one more entry in :data:`METHODS` or :data:`CALLBACKS`; a new family of models by
one in ``tests/tiny.py``. What each cell must do does not depend on what a method or a callback computes: weights that
nobody edits stay as they are, each weight is its original plus the sum of its updates, the same seed gives the same
bits, metrics are numbers in their range, and ``revert`` gives the original model back.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from callbacks import DownstreamEval, ForgettingCurve, LoRAAdjust, MemoryReplay, TrustRollback
from editlab import edit_model
from editlab.keys.moments import MomentSettings
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit, BetaEdit, UltraEdit
from editlab.solver.post_steps import PRUNE, RECT, REVIVE, SPHERE
from editlab.training.methods import FineTune, LoRAOnly
from editlab.values.settings import PUBLISHED_SEARCH, ValueSettings
from tests.facts import FACTS
from tests.harness import stand_in
from tests.lm.test_anatomy import EXPECTED
from tests.test_api import SMALL, changed, weights
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

METHODS = {
    "rome": ROME(),
    "emmet": EMMET(),
    "emmet exact": EMMET(gram_ridge=0.0),
    "memit": MEMIT(covariance_weight=10.0),
    "alphaedit": AlphaEdit(threshold=1e9, l2=1.0),  # keys of a random model have a scale of their own
}
FRACTIONS = {"ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy"}
MOMENTS = MomentSettings(tokens=512)
"""Kept in the cache of all tests: sampling the text again for each cell would take half of the time."""
_REPLAY = {"rate": 1.0, "capacity": 4}
_LORA = {"steps": 2, "every_n_batches": 1, "text_tokens": 64, "tolerance": 1e9}
CALLBACKS = {
    "nothing": lambda text: [],
    "curve": lambda text: [ForgettingCurve(every_n_edits=2)],
    "replay sampled": lambda text: [MemoryReplay(**_REPLAY)],
    "replay by loss": lambda text: [MemoryReplay(sampling="loss", **_REPLAY)],
    "replay consolidated": lambda text: [MemoryReplay(memory="consolidated")],
    "replay both": lambda text: [MemoryReplay(memory="both", **_REPLAY)],
    "trust rollback": lambda text: [TrustRollback(heldout=text)],
    "trust scale": lambda text: [TrustRollback(heldout=text, action="scale")],
    "trust search, by edit": lambda text: [TrustRollback(heldout=text, action="search", granularity="edit")],
    "trust firm": lambda text: [TrustRollback(heldout=text, action="firm", perplexity_budget=1.05, score="learned")],
    "lora merged": lambda text: [LoRAAdjust(**_LORA)],
    "lora adapter": lambda text: [LoRAAdjust(mode="adapter", **_LORA)],
    "everything": lambda text: [
        LoRAAdjust(**_LORA), TrustRollback(heldout=text), MemoryReplay(memory="both", **_REPLAY), ForgettingCurve(),
        DownstreamEval(["known"], every_n_edits=2),
    ],
}  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A held-out text for the callbacks that want one, as all facts are edited; a stand-in for the tasks' harness."""
    stand_in(monkeypatch)
    path = tmp_path / "heldout.txt"
    path.write_text("The capital of France is Paris. Oslo lies in Norway. " * 9)
    return str(path)


def edit(family, method, callbacks, **changes):
    """Edits four facts with a method, callbacks and further settings: the model before and after, and the result."""
    model = tiny_model(family)
    before = weights(model)
    layers = [1, 2] if EXPECTED[family][2] else [2]  # a norm after the MLP allows one layer only
    batch_size = method.largest_batch or SMALL["batch_size"]
    settings = {**SMALL, "moments": MOMENTS, "layers": layers, "batch_size": batch_size, "method": method}
    settings |= changes
    _, result = edit_model(model, tiny_tokenizer(), FACTS[:4], callbacks=callbacks, **settings)
    return model, before, result


def check(family, method, make, **changes):
    """What must hold whatever the method and the callbacks; ``make`` gives fresh callbacks."""
    model, before, result = edit(family, method, make(), **changes)
    blocks, module, _ = EXPECTED[family]
    ours = {f"{blocks}.{layer}.{module}.weight" for layer in result.editor.layer_numbers}
    assert set(changed(before, model)) <= ours
    for layer in result.editor.changed_layers:
        total = layer.total if layer.adapter is None else layer.total + layer.adapter
        assert torch.equal(layer.weight, layer.original + (total.T if layer.transposed else total))
    assert len(result.facts) + len(result.rolled_back) == 4
    for group in [result.before, *([result.retained] if result.facts else [])]:  # every batch may be rolled back
        assert group.keys() >= FRACTIONS
        assert all(0 <= group[name] <= 1 for name in FRACTIONS)
        assert all(map(math.isfinite, group.values()))

    again, _, _ = edit(family, method, make(), **changes)
    assert changed(weights(model), again) == []
    result.revert()
    assert changed(before, model) == []


@pytest.mark.parametrize("callbacks", CALLBACKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_callback(method, callbacks, text):
    check("llama", METHODS[method], lambda: CALLBACKS[callbacks](text))


@pytest.mark.parametrize("method", [FineTune(lr=1e-2, epochs=3, mini_batch=1), LoRAOnly(lr=2e-2, epochs=3, rank=2)])
def test_methods_that_train_with_callbacks(method, text):
    def callbacks():
        return [LoRAAdjust(**_LORA), TrustRollback(heldout=text, granularity="edit", action="search"),
                MemoryReplay(sampling="loss", **_REPLAY), ForgettingCurve(every_n_edits=2)]  # fmt: skip

    check("llama", method, callbacks if isinstance(method, FineTune) else list)


@pytest.mark.parametrize("method", ["emmet", "memit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_all_callbacks(family, method, text):
    check(family, METHODS[method], lambda: CALLBACKS["everything"](text))


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (UltraEdit(), ValueSettings(source="gradient", lr=1e-3)),
        (METHODS["memit"], ValueSettings(steps=3, lr=0.5, clamp=3.0, reference="original", anchor_facts=2)),
    ],
    ids=["gradient", "anchored"],
)
def test_every_value_source_with_all_callbacks(method, values, text):
    check("llama", method, lambda: CALLBACKS["everything"](text), values=values)


def test_targets_of_each_layer_with_all_callbacks(text):
    values = replace(SMALL["values"], spread="each", reference="current")
    check("llama", METHODS["memit"], lambda: CALLBACKS["everything"](text), values=values)


def test_betaedit_and_all_post_steps_with_callbacks(text):
    beta = BetaEdit(threshold=1e9, refresh_every=2)
    steps = [SPHERE(), REVIVE(0.3), PRUNE(), RECT(0.5)]
    check("gpt2", beta, lambda: [*CALLBACKS["trust scale"](text), *CALLBACKS["replay both"](text)], post_steps=steps)


def test_a_post_step_sees_the_weight_in_mathematical_orientation():
    # GPT-2 stores its weights transposed; REVIVE leaves the first singular triplet of the original one as it was.
    _, _, result = edit("gpt2", METHODS["memit"], [], post_steps=[REVIVE(0.3)])
    (layer, *_) = result.editor.layers
    left, _, right = torch.linalg.svd(layer.original.T.double())
    assert layer.total.norm() > 0.01
    assert torch.allclose(layer.total.double() @ right[0], torch.zeros(32).double(), atol=1e-6)
    assert torch.allclose(left[:, 0] @ layer.total.double(), torch.zeros(48).double(), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_facts_are_learnt_by_every_method(method):
    """One fact a step at one layer: equality makes each new target likelier than the truth, the others gain on it."""
    values = ValueSettings(**PUBLISHED_SEARCH | {"clamp": 10.0})
    settings = {**SMALL, "layers": [2], "batch_size": 1, "values": values, "method": METHODS[method]}
    _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), FACTS[:4], **settings)
    metrics = result.summary["metrics"]
    if METHODS[method].slack < 1:
        assert metrics["immediate/ES"] == 1.0
    assert metrics["immediate/ES_magnitude"] > metrics["before/ES_magnitude"] + 1e-3
