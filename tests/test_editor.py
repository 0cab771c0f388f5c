"""The editor in a real Trainer on a tiny model: the effect of a step on the weights, the counters and the files."""

import csv
import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from callbacks import ForgettingCurve, LoRAAdjust, MemoryReplay, TrustRollback
from editlab.callback import EditCallback
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.edits.plan import Addition
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.keys.subject_keys import locate
from editlab.lm.forward import reading
from editlab.runs.checkpoint import EditCheckpoint
from editlab.runs.logger import RunLogger
from editlab.solver.methods import EMMET, MEMIT, ROME
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS, write_counterfact
from tests.tiny import tiny_model, tiny_tokenizer


def editor(folder, **changes):
    settings = {
        "layers": [1, 2],
        "values": ValueSettings(steps=6, lr=0.5, clamp=3.0),
        "moments": MomentSettings(tokens=512),
        "contexts": ContextSettings(count=2, length=4),
        "evaluation": EvaluationSettings(heldout_tokens=64, generation=0, bystanders=0),
        **changes,
    }
    return SequentialEditor(str(folder), **settings)


def fit(
    tmp_path,
    module,
    *,
    callbacks=(),
    limit=6,
    batch_size=2,
    ckpt_path=None,
    max_steps=-1,
    save=False,
    name="run",
    path=None,
    keep_repeats=False,
    precision=None,
):
    data = EditDataModule(
        str(path or write_counterfact(tmp_path / "facts.json")),
        limit=limit,
        batch_size=batch_size,
        keep_repeats=keep_repeats,
        keep="all",
        shuffle=False,
    )
    saving = [EditCheckpoint()] if save else []
    trainer = L.Trainer(
        max_epochs=1, max_steps=max_steps, accelerator="cpu", logger=RunLogger(str(tmp_path / "logs"), name, version=0),
        callbacks=[*callbacks, *saving], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        num_sanity_val_steps=0, use_distributed_sampler=False, enable_checkpointing=save, precision=precision,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def site_now(module, fact):
    """The site's output at the subject's last token of the bare prompt, by a plain hook on a whole forward pass."""
    encoding, last = locate(module.lm, fact)
    with torch.no_grad(), reading({"site": (module.site.module, "output")}) as seen:
        module.lm.model(input_ids=torch.tensor([encoding.ids]))
    return seen["site"][0, last]


class Spy(EditCallback):
    """Records plans and outcomes, and makes the requests that it is given."""

    def __init__(self, factors=()):
        self.factors, self.plans, self.outcomes = dict(factors), [], []

    def on_edit_planned(self, trainer, editor, plan):
        self.plans.append(plan)

    def on_edit_applied(self, trainer, editor, outcome):
        if outcome.plan.step in self.factors:
            outcome.scale(self.factors[outcome.plan.step], "because")

    def on_edit_settled(self, trainer, editor, outcome):
        self.outcomes.append(outcome)


def test_one_hard_edit_gives_exactly_its_value(tiny_folder, tmp_path):
    # With slack 0 and one layer the site's output must become v* itself: W k + (v* - W k), read off a whole forward.
    spy = Spy()
    module = editor(tiny_folder, layers=[1], method=ROME())
    trainer = fit(tmp_path, module, callbacks=[spy], limit=1, batch_size=1)
    assert trainer.global_step == 1
    wanted = spy.plans[0].targets.first[0]
    assert torch.allclose(site_now(module, FACTS[0]), wanted, atol=1e-4)


def test_spreading_reaches_the_same_value_over_two_layers(tiny_folder, tmp_path):
    # The lower layer takes half of the residual, the upper one all that is left of it: the sum is v* again.
    spy = Spy()
    module = editor(tiny_folder, layers=[0, 2], method=ROME())
    fit(tmp_path, module, callbacks=[spy], limit=1, batch_size=1)
    assert torch.allclose(site_now(module, FACTS[0]), spy.plans[0].targets.first[0], atol=1e-4)
    assert set(spy.outcomes[0].updates) == {0, 2}
    assert all(update.abs().max() > 0 for update in spy.outcomes[0].updates.values())


def test_each_pass_asks_for_what_the_one_before_left(tiny_folder, tmp_path):
    # At one layer a pass leaves the share s / (k^T C^-1 k + s) of the residual, so two leave the square of one.
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original")
    shares = []
    for passes in (1, 2):
        spy, method = Spy(), MEMIT(covariance_weight=10.0)
        module = editor(tiny_folder, layers=[1], method=method, values=values, passes=passes)
        fit(tmp_path, module, callbacks=[spy], limit=1, batch_size=1)
        wanted, now = spy.plans[0].targets.first[0], site_now(module, FACTS[0])
        with module.unedited():
            shares.append(float((wanted - now).norm() / (wanted - site_now(module, FACTS[0])).norm()))
        (layer,) = module.layers
        torch.testing.assert_close(spy.outcomes[0].updates[1], layer.total)  # that of the batch, not of its last pass
    assert 0.05 < shares[0] < 0.95
    assert shares[1] == pytest.approx(shares[0] ** 2, abs=1e-4)


def test_only_the_edited_weights_change_and_steps_are_counted(tiny_folder, tmp_path):
    module = editor(tiny_folder)
    module.configure_model()
    before = {name: p.clone() for name, p in module.lm.named_parameters()}
    trainer = fit(tmp_path, module)
    changed = {name for name, p in module.lm.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    assert trainer.global_step == 3  # 6 facts in batches of 2
    for number, layer in zip(module.layer_numbers, module.layers, strict=True):
        start = before[f"model.model.layers.{number}.mlp.down_proj.weight"]
        assert torch.equal(layer.weight, start + layer.total)


def test_a_precision_that_scales_gradients_is_refused(tiny_folder, tmp_path):
    # Lightning gives a scaler to 16-mixed on a GPU; on a CPU it takes bf16-mixed in its place.
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = L.Trainer(plugins=[scaled], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, default_root_dir=tmp_path)  # fmt: skip
    data = EditDataModule(str(write_counterfact(tmp_path / "facts.json")), limit=2, keep="all")
    with pytest.raises(UserError, match="set bf16-mixed or 16-true"):
        trainer.fit(editor(tiny_folder), data)


def test_independent_batches_start_from_the_original_weights(tiny_folder, tmp_path):
    spy = Spy()
    module = editor(tiny_folder, restore_between_batches=True)
    fit(tmp_path, module, callbacks=[spy])
    assert module.evaluation.retained == {}  # the batches are not in the weights together
    for number, layer in zip(module.layer_numbers, module.layers, strict=True):
        assert torch.equal(layer.total, spy.outcomes[-1].updates[number])


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_rolled_back_or_scaled(tiny_folder, tmp_path, factor):
    # Batch 1 of 0, 1, 2 is (partly) taken back; with 0, batches 0 and 2 alone give the same bits.
    spy = Spy({1: factor})
    module = editor(tiny_folder, layers=[1])
    fit(tmp_path, module, callbacks=[spy])
    first, second, third = (outcome.updates[1] for outcome in spy.outcomes)
    expected = torch.zeros_like(first) + first
    if factor:
        expected = expected + factor * second
    expected = expected + third
    assert torch.equal(module.layers[0].total, expected)
    assert [entry.factor for entry in module.ledger] == [1, 1, factor, factor, 1, 1]
    assert len(module.edited_facts) == (6 if factor else 4)


def test_every_callback_hears_each_event_before_the_next(tiny_folder, tmp_path):
    heard = []

    class One(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            heard.append((type(self).__name__, "planned"))

        def on_edit_applied(self, trainer, editor, outcome):
            heard.append((type(self).__name__, "applied"))

        def on_edit_settled(self, trainer, editor, outcome):
            heard.append((type(self).__name__, "settled"))

        def on_edit_adjust(self, trainer, editor, outcome):
            heard.append((type(self).__name__, "adjust"))

        def on_edit_done(self, trainer, editor, outcome):
            heard.append((type(self).__name__, "done"))

    class Two(One):
        pass

    for order in ([One(), Two()], [Two(), One()]):
        heard.clear()
        fit(tmp_path, editor(tiny_folder), callbacks=order, limit=1, batch_size=1)
        assert heard == [(n, e) for e in ("planned", "applied", "settled", "adjust", "done") for n in ("One", "Two")]


def test_callbacks_are_called_by_priority_whatever_their_names_and_their_order_in_the_list(tiny_folder, tmp_path):
    called = []

    class Named(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            called.append(type(self).__name__)

    class Zeta(Named):
        priority = -1

    class Beta(Named):
        pass

    class Alpha(Named):
        priority = 60

    class Gamma(Named):
        pass

    callbacks = [Gamma(), Alpha(), Zeta(), Beta()]
    for order in (callbacks, callbacks[::-1]):
        called.clear()
        fit(tmp_path, editor(tiny_folder), callbacks=order, limit=1, batch_size=1)
        assert called == ["Zeta", "Beta", "Gamma", "Alpha"]  # equal priorities by state_key


def test_our_callbacks_have_priorities_of_their_own():
    order = sorted((ForgettingCurve, LoRAAdjust, MemoryReplay, TrustRollback), key=lambda kind: kind.priority)
    assert [kind.__name__ for kind in order] == ["ForgettingCurve", "LoRAAdjust", "MemoryReplay", "TrustRollback"]
    assert len({EditCallback.priority, *(kind.priority for kind in order)}) == 5


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the run goes on in its folder
def test_other_weights_may_be_changed_and_are_part_of_a_checkpoint(tiny_folder, tmp_path):
    path = "model.layers.0.self_attn.q_proj"

    class Change(EditCallback):
        def on_edit_adjust(self, trainer, editor, outcome):
            editor.changed_layer(path).add(torch.full((32, 32), 0.25))

    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[Change()], save=True)
    assert module.changed_layer("model.layers.2.mlp.down_proj") is module.layers[1]
    assert module.changed_layers == [*module.layers, module.changed_layer(path)]
    weight = module.lm.model.get_submodule(path).weight
    other = editor(tiny_folder)
    other.configure_model()
    original = other.lm.model.get_submodule(path).weight.clone()
    assert torch.equal(weight, original + 0.75)  # three batches
    with module.unedited():
        assert torch.equal(weight, original)
    checkpoint = tmp_path / "logs" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    fit(tmp_path, other, ckpt_path=checkpoint, save=True)
    assert torch.equal(other.lm.model.get_submodule(path).weight, weight)


def test_added_constraints_hold_and_may_not_move(tiny_folder, tmp_path):
    # An infinitely weighted addition is an equality: its fact's site output is its target after the step.
    target = torch.zeros(32)

    class Add(EditCallback):
        def on_edit_planned(self, trainer, editor, plan):
            plan.add([Addition(FACTS[4], target, weight=math.inf)])

    module = editor(tiny_folder, layers=[1])
    fit(tmp_path, module, callbacks=[Add()], limit=2, batch_size=2)
    assert torch.allclose(site_now(module, FACTS[4]), target, atol=1e-3)


def test_files_of_a_run(tiny_folder, tmp_path):
    trainer = fit(tmp_path, editor(tiny_folder), callbacks=[ForgettingCurve(every_n_edits=2, sample=3)])
    folder = tmp_path / "logs" / "run" / "version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["edits"] for row in rows] == ["2", "4", "6"]
    assert all(row["immediate/ES"] and row["before/ES"] and row["retained/ES"] for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["edits"] == 6
    assert summary["batches"] == trainer.global_step == 3
    names = ("ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy")
    groups = ("before", "immediate", "retained")
    metrics = summary["metrics"]
    assert {f"{group}/{name}" for group in groups for name in names} <= set(metrics)
    assert {"before/perplexity", "retained/perplexity", "before/generation_entropy"} <= set(metrics)
    retained = {name: value for name, value in metrics.items() if name.startswith("retained/")}
    assert {name: float(rows[-1][name]) for name in retained} == retained  # one spelling, one value


def test_same_seed_same_bits(tiny_folder, tmp_path):
    totals = []
    for name in ("a", "b"):
        module = editor(tiny_folder)
        fit(tmp_path, module, callbacks=[MemoryReplay(rate=1.0)], name=name)
        totals.append([layer.total.clone() for layer in module.layers])
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_in_the_same_bits(tiny_folder, tmp_path):
    whole = editor(tiny_folder)
    fit(tmp_path, whole, callbacks=[MemoryReplay(rate=1.0)], name="whole")
    part = fit(tmp_path, editor(tiny_folder), callbacks=[MemoryReplay(rate=1.0)], max_steps=2, save=True, name="part")
    path = part.checkpoint_callback.best_model_path
    kept = torch.load(path, weights_only=True)
    assert not any(name.startswith("lm.") for name in kept["state_dict"])
    rows = (tmp_path / "logs" / "part" / "version_0" / "metrics.csv").read_text()
    resumed = editor(tiny_folder)
    trainer = fit(tmp_path, resumed, callbacks=[MemoryReplay(rate=1.0)], save=True, ckpt_path=path, name="part")
    assert trainer.global_step == 3
    # The table goes on in the same folder: the rows up to the resume as they were, and one more.
    steps = [
        line.split(",")[0]
        for line in (tmp_path / "logs" / "part" / "version_0" / "metrics.csv").read_text().splitlines()
    ]
    assert steps == ["edits", "2", "4", "6"]
    assert rows.splitlines()[1].split(",")[0] == "2"
    assert [e.fact for e in resumed.ledger] == [e.fact for e in whole.ledger]
    assert all(torch.equal(a.total, b.total) for a, b in zip(resumed.layers, whole.layers, strict=True))
    assert resumed.evaluation.compute("immediate") == whole.evaluation.compute("immediate")


def test_values_on_the_original_weights_are_computed_once(tiny_folder, tmp_path, monkeypatch):
    found = []
    from editlab.values import sources as module_under_test

    plain = module_under_test.optimize_values
    monkeypatch.setattr(
        module_under_test,
        "optimize_values",
        lambda lm, facts, *a, **k: found.extend(facts) or plain(lm, facts, *a, **k),
    )
    values = ValueSettings(steps=5, lr=0.5, reference="original")
    first, again = (editor(tiny_folder, values=values) for _ in range(2))
    fit(tmp_path, first, name="first")
    assert len(found) == 6
    fit(tmp_path, again, name="again")
    assert len(found) == 6
    assert all(torch.equal(a.total, b.total) for a, b in zip(first.layers, again.layers, strict=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validate_and_test_measure_a_checkpoint(tiny_folder, tmp_path):
    trainer = fit(tmp_path, editor(tiny_folder), save=True)
    data = EditDataModule(str(tmp_path / "facts.json"), keep="all", shuffle=False)
    path = trainer.checkpoint_callback.best_model_path
    other = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False)
    (measured,) = other.validate(editor(tiny_folder), data, ckpt_path=path, verbose=False)
    assert measured["retained/ES"] == pytest.approx(trainer.model.evaluation.retained["retained/ES"])
    (bystanders,) = other.test(editor(tiny_folder), data, ckpt_path=path, verbose=False)
    assert 0 <= bystanders["bystanders/ES"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": "median"}, "bare, mean"),
        ({"preserve_prompt_tokens": -1.0}, "must not be negative"),
        ({"passes": 0}, "model.passes is 0: it must be at least 1"),
        ({"method": ROME()}, "set data.batch_size to 1"),
    ],
)
def test_invalid_settings_are_refused(tiny_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, editor(tiny_folder, **changes))


def test_a_norm_after_the_mlp_is_edited_through(tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    module = editor(tmp_path / "gemma", layers=[1], method=ROME())
    spy = Spy()
    fit(tmp_path, module, callbacks=[spy], limit=1, batch_size=1)
    assert torch.allclose(site_now(module, FACTS[0]), spy.plans[0].targets.first[0], atol=1e-3)


def test_memit_leaves_a_residual_and_emmet_none(tiny_folder, tmp_path):
    left = {}
    for method in (EMMET(gram_ridge=0.0), MEMIT(covariance_weight=100.0)):
        spy = Spy()
        fit(tmp_path, editor(tiny_folder, layers=[1], method=method), callbacks=[spy], limit=2)
        left[type(method)] = spy.outcomes[0].diagnostics["layer_1/residual_left"]
    assert left[EMMET] < 1e-6
    assert left[MEMIT] > 1e-2


def test_half_precision_is_the_model_s_alone(tiny_folder, tmp_path):
    spy = Spy()
    module = editor(tiny_folder, values=ValueSettings(steps=6, lr=0.5, clamp=3.0, matmul="float32"))
    fit(tmp_path, module, callbacks=[spy], precision="bf16-true")
    assert module.lm.model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert {outcome.plan.targets.first.dtype for outcome in spy.outcomes} == {torch.float32}
    scores = [module.evaluation.scores(group).edit for group in ("before", "immediate", "retained")]
    assert {one.logp_new.dtype for one in scores} == {torch.float32}
    for layer in module.layers:
        assert layer.total.dtype == torch.float32
        assert bool(layer.total.any())
        # Summed in float32 and rounded once.
        assert torch.equal(layer.weight, (layer.original.float() + layer.total).bfloat16())
    # bfloat16 has 8 bits: the updates are those of float32 but for rounding in the model's passes.
    exact = editor(tiny_folder, values=ValueSettings(steps=6, lr=0.5, clamp=3.0, matmul="float32"))
    fit(tmp_path, exact, name="exact")
    for rounded, layer in zip(module.layers, exact.layers, strict=True):
        assert (rounded.total - layer.total).norm() < 0.5 * layer.total.norm()
