"""Value sources: their states, the settings that choose one, and what each refuses."""

from contextlib import nullcontext

import pytest
import torch

from callbacks import MemoryReplay
from editlab.callback import EditCallback
from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET, ROME, UltraEdit
from editlab.values.anchor import anchor_of, parts_of
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings
from editlab.values.sources import AnchoredValues, GradientValues, OptimizedValues, make_source
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer
from tests.values.test_optimize import CONTEXTS, FACTS

GRADIENT = ValueSettings(source="gradient", lr=1e-3, matmul="float32")


def make(**settings):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    chosen = ValueSettings(**{"matmul": "float32", **settings})
    source = make_source(lm, "key", CONTEXTS, chosen, nullcontext, lambda: 0, lambda count: FACTS[:count])
    return lm, Site.of(lm, 1), chosen, source


def test_settings_choose_the_source():
    assert type(make()[-1]) is OptimizedValues
    assert type(make(anchor_facts=3)[-1]) is AnchoredValues
    assert type(make(source="gradient")[-1]) is GradientValues


def test_statistics_of_a_loaded_state_go_on_in_the_same_bits():
    _, site, _, source = make(source="gradient", lr=1e-3)
    source.find(FACTS[:3], site)
    state = source.state_dict()
    whole = source.find(FACTS[3:], site)
    _, site, _, resumed = make(source="gradient", lr=1e-3)
    first = resumed.find(FACTS[3:], site)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.find(FACTS[3:], site), whole)
    assert not torch.equal(first, whole)  # without the first batch the features are normalized otherwise
    assert source.state_dict()["moments"][1]["count"] == 5
    assert state["moments"][1]["count"] == 3


def test_each_layer_has_its_own_statistics():
    lm, _, _, source = make(source="gradient", lr=1e-3)
    alone = source.find(FACTS, Site.of(lm, 2))
    lm, site, _, both = make(source="gradient", lr=1e-3)
    both.find(FACTS, site)
    assert torch.equal(both.find(FACTS, Site.of(lm, 2)), alone)


@pytest.mark.parametrize("reference", ["current", "original"])
def test_anchored_values_have_the_norm_of_the_first_facts(reference):
    settings = {"steps": 2, "lr": 0.5, "clamp": 3.0}
    lm, site, chosen, source = make(anchor_facts=3, reference=reference, **settings)
    found = source.find(FACTS[2:], site)
    plain = optimize_values(lm, FACTS, site, CONTEXTS, chosen).target
    anchor = anchor_of(parts_of(lm, FACTS[:3], site, plain[:3]))
    norms = parts_of(lm, FACTS[2:], site, found).norm(dim=1)
    assert norms.tolist() == pytest.approx([anchor] * 3, rel=1e-4)
    assert source.state_dict() == {"anchors": {1: pytest.approx(anchor, rel=1e-4)}}
    # A loaded anchor is used as it is.
    source.load_state_dict({"anchors": {1: 2 * anchor}})
    again = parts_of(lm, FACTS[2:], site, source.find_now(FACTS[2:], site)).norm(dim=1)
    assert again.tolist() == pytest.approx([2 * anchor] * 3, rel=1e-4)


class RollBackTheSecond(EditCallback):
    """Rolls the second batch back."""

    def on_edit_applied(self, trainer, editor, outcome):
        if outcome.plan.step == 1:
            outcome.roll_back("a test")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_with_gradients_ends_in_the_same_bits(tiny_folder, tmp_path):
    def run(**options):
        module = editor(tiny_folder, method=UltraEdit(), values=GRADIENT)
        return module, fit(tmp_path, module, callbacks=[RollBackTheSecond()], save=True, **options)

    whole, _ = run(name="whole")
    _, part = run(name="part", max_steps=2)
    resumed, _ = run(name="part", ckpt_path=part.checkpoint_callback.best_model_path)
    assert all(
        torch.equal(a.total, b.total) and a.total.any() for a, b in zip(resumed.layers, whole.layers, strict=True)
    )
    # Two facts in each of three batches; those of the rolled-back one left no trace in the statistics.
    assert [one["count"] for one in resumed.targets.source.state_dict()["moments"].values()] == [4]
    assert all(bool(layer.total.any()) for layer in whole.layers)


def test_errors_of_combinations(tiny_folder, tmp_path):
    for changes, message in [
        ({"method": ROME()}, "ROME edits one fact a step: use UltraEdit"),
        ({"layers": "auto"}, "name the layers"),
        ({"restore_between_batches": True}, "turn one of them off"),
    ]:
        with pytest.raises(UserError, match=message):
            editor(tiny_folder, values=GRADIENT, **changes)
    with pytest.raises(UserError, match="to find again: set MemoryReplay"):
        fit(tmp_path, editor(tiny_folder, values=GRADIENT), callbacks=[MemoryReplay(refresh="values")])
    with pytest.raises(UserError, match="has no value to find again"):
        make(source="gradient")[-1].find_now(FACTS, None)
    assert editor(tiny_folder, values=GRADIENT, method=EMMET()).values.source == "gradient"


def test_errors_of_states():
    for settings in ({}, {"anchor_facts": 2}):
        with pytest.raises(UserError, match=r"state of another value source \(moments\)"):
            make(**settings)[-1].load_state_dict({"moments": {}})
    make(source="gradient")[-1].load_state_dict({})  # of a run without one
    with pytest.raises(UserError, match="anchor_facts is -1"):
        ValueSettings(anchor_facts=-1)
