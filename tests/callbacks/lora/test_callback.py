"""LoRA in real runs of a tiny model: its effect on the weights, the decisions of its guard, and its use with replay."""

import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks.lora.callback
from callbacks import LoRAAdjust, MemoryReplay, TrustRollback
from callbacks.lora.callback import EVENTS, UNFINISHED
from callbacks.lora.draws import draw_edits, known_edits
from callbacks.lora.guard import Health
from callbacks.lora.objective import Objective
from editlab.callback import EditCallback
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.training.adapter import Adapter, between
from editlab.training.rows import edit_rows
from tests.test_editor import Spy, editor, fit, site_now
from tests.tiny import tiny_model, tiny_tokenizer

LENIENT = {"steps": 4, "lr": 1e-2, "rank": 2, "text_tokens": 128, "tolerance": 100.0, "every_n_batches": 2}
"""A short adjustment that the guard never drops."""
needs_sigterm = pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process at SIGTERM unasked")


def run(tmp_path, folder, *others, name="run", limit=6, module=None, **settings):
    """Makes a run with LoRA; returns its module, its callback and its events."""
    lora = LoRAAdjust(**{**LENIENT, **settings})
    module = editor(folder) if module is None else module
    fit(tmp_path, module, callbacks=[*others, lora], name=name, limit=limit)
    path = tmp_path / "logs" / name / "version_0" / EVENTS
    return module, lora, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bits(module):
    return [layer.weight.clone() for layer in module.changed_layers]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0: it must be at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"every_n_batches": 0}, "every_n_batches is 0"),
        ({"alpha": 0.0}, "alpha is 0.0: it must be above 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0: it must lie between 0 and 1"),
        ({"text_tokens": -1}, "text_tokens is -1: it must not be negative"),
        ({"probes": -1}, "probes is -1: it must not be negative"),
        ({"probes": 0, "text_tokens": 31}, "the guard needs held-out edits, or 32 tokens"),
        ({"mode": "fuse"}, "mode is 'fuse': it must be one of merge, adapter"),
        ({"weights": {"kl": 1.0}}, "give edits, before, unedited"),
        ({"weights": {"edits": -1.0}}, "LoRAAdjust.weights.edits is -1.0: it must not be negative"),
        ({"weights": {"edits": math.nan}}, "weights.edits is nan"),
        ({"weights": {"before": math.inf}}, "weights.before is inf: it must be finite"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        LoRAAdjust(**arguments)


def test_independent_batches_are_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="nothing to adjust"):
        run(tmp_path, tiny_folder, module=editor(tiny_folder, restore_between_batches=True))


def test_when_it_is_done_and_what_is_written(tiny_folder, tmp_path):
    # Three batches: after the second, as every second, and after the third, as the last.
    _, lora, events = run(tmp_path, tiny_folder)
    assert [(e["step"], e["edits"], e["decision"]) for e in events] == [(1, 4, "keep"), (2, 6, "keep")]
    assert lora.decisions == {"keep": 2}
    assert set(events[0]["losses"]) == {"edits", "before"}
    assert set(events[0]["before"]) == set(events[0]["after"]) == {"edits", "accuracy", "text", "ES"}
    table = (tmp_path / "logs" / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"lora/ES_before", "lora/ES_after", "lora/text_after", "lora/kept"} <= set(table[0].split(","))
    _, _, events = run(tmp_path, tiny_folder, name="end", every_n_batches=None)
    assert [e["step"] for e in events] == [2]
    _, _, events = run(tmp_path, tiny_folder, name="never", every_n_batches=None, at_end=False)
    assert events == []


def test_no_adjustment_with_too_few_edits_to_hold_one_out(tiny_folder, tmp_path):
    _, lora, events = run(tmp_path, tiny_folder, limit=1)
    assert events == []
    assert not lora.decisions


def test_merging_adds_a_matrix_of_low_rank(tiny_folder, tmp_path):
    # One adjustment, at the end: what it added is all that differs from the run without it.
    plain = editor(tiny_folder)
    fit(tmp_path, plain, name="plain")
    merged, lora, _ = run(tmp_path, tiny_folder, every_n_batches=None)
    for a, b in zip(plain.layers, merged.layers, strict=True):
        added = (b.total - a.total).double()
        singular = torch.linalg.svdvals(added)
        assert singular[1] > 1e-4
        assert singular[2] < 1e-5 * singular[0]  # rank 2
    assert lora.adapter is None
    assert merged.lm.anatomy.edit_module(1).weight is merged.layers[0].weight


@pytest.mark.parametrize("targets", ["edited", "attention"])
def test_both_modes_give_one_model_and_the_adapter_can_be_switched_off(tiny_folder, tmp_path, targets):
    settings = {"every_n_batches": None, "targets": targets}
    merged, _, _ = run(tmp_path, tiny_folder, name="merged", **settings)
    beside, lora, _ = run(tmp_path, tiny_folder, name="beside", mode="adapter", **settings)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(beside.lm.run(ids).logits, merged.lm.run(ids).logits, rtol=1e-4, atol=1e-4)
    plain = editor(tiny_folder)
    fit(tmp_path, plain, name="plain")
    for path in lora.paths:
        assert beside.changed_layer(path).adapter is not None
        beside.changed_layer(path).set_adapter(None)
    assert torch.equal(beside.lm.run(ids).logits, plain.lm.run(ids).logits)


def test_unedited_is_the_original_with_an_adapter_on_other_weights(tiny_folder, tmp_path):
    module = editor(tiny_folder)
    module.configure_model()
    original = {name: tensor.clone() for name, tensor in module.lm.model.state_dict().items()}
    run(tmp_path, tiny_folder, module=module, mode="adapter", targets="attention", layers=[0, 3])
    edited = {name: tensor.clone() for name, tensor in module.lm.model.state_dict().items()}
    changed = {name for name in original if not torch.equal(original[name], edited[name])}
    assert len(changed) == 2 + 2 * 4  # the two edited layers, and four attention maps in each of two others
    with module.unedited():
        assert same(original.values(), module.lm.model.state_dict().values())
    assert same(edited.values(), module.lm.model.state_dict().values())


LOAD = """
import sys, torch
sys.modules["editlab"] = sys.modules["callbacks"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(folder + "/edited")
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, folder + "/logs/run/version_0/adapter").eval()
        adapted = model(ids).logits
        with model.disable_adapter():
            torch.save({"adapted": adapted, "plain": model(ids).logits}, folder + "/out")
"""


def test_the_adapter_loads_with_plain_peft(tmp_path):
    ids, expected = torch.arange(3, 20)[None], {}
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        folder.mkdir()
        tiny_model(family).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        module, _, _ = run(folder, folder / "model", mode="adapter", targets="mlp")
        adapted = module.lm.run(ids).logits
        for layer in module.changed_layers:
            layer.set_adapter(None)
        expected[family] = adapted, module.lm.run(ids).logits
        module.lm.model.save_pretrained(folder / "edited")
        saved = folder / "logs" / "run" / "version_0" / "adapter"
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in saved.iterdir()}
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / family) for family in expected)]
    subprocess.run(command, check=True, capture_output=True)
    for family, (adapted, plain) in expected.items():
        found = torch.load(tmp_path / family / "out")
        assert torch.equal(found["plain"], plain)
        torch.testing.assert_close(found["adapted"], adapted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found["plain"], adapted, atol=1e-3)


@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_an_adjustment_that_makes_it_worse_is_undone_bit_for_bit(tiny_folder, tmp_path, mode):
    plain = editor(tiny_folder)
    fit(tmp_path, plain, name="plain")
    before = bits(plain)
    module, lora, events = run(tmp_path, tiny_folder, tolerance=0.0, lr=10.0, mode=mode)
    assert [e["decision"] for e in events] == ["drop", "drop"]
    assert "held-out edits went from" in events[0]["reason"]
    assert same(bits(module), before)
    assert lora.adapter is None
    assert all(layer.adapter is None for layer in module.layers)


@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_half_of_an_adjustment_is_kept_if_the_whole_does_harm(tiny_folder, tmp_path, monkeypatch, mode):
    # Factors that are zero at first lie halfway at half of what they became; the others are read off the whole run.
    settings = {"every_n_batches": None, "mode": mode}
    learnt = {}
    monkeypatch.setattr(
        "callbacks.lora.guard.between", lambda a, b, share: learnt.update(a=a, b=b) or between(a, b, share)
    )
    run(tmp_path, tiny_folder, name="whole", **settings)
    halves = {name: 0.5 * (learnt["a"][name] + learnt["b"][name]) for name in learnt["b"]}
    tried = iter([1.0, 1.5, 1.0])  # the held-out text: before, with the whole, with half
    monkeypatch.setattr("callbacks.lora.guard.examine", lambda *arguments: Health(-1.0, 0.5, next(tried)))
    module, lora, events = run(tmp_path, tiny_folder, name="half", **settings, tolerance=0.1)
    assert [(e["decision"], e["fraction"]) for e in events] == [("keep", 0.5)]
    plain = editor(tiny_folder)
    fit(tmp_path, plain, name="plain")
    for layer, without, path in zip(module.changed_layers, plain.changed_layers, lora.paths, strict=True):
        a, b = (next(v for k, v in halves.items() if path in k and f"lora_{x}" in k) for x in "AB")
        torch.testing.assert_close(layer.weight - without.weight, 16.0 / 2 * b @ a, rtol=1e-3, atol=1e-6)
    if mode == "adapter":
        assert all(torch.allclose(lora.adapter.factors[name], half) for name, half in halves.items())


def test_no_edits_are_held_out_with_probes_0(tiny_folder, tmp_path, monkeypatch):
    rows, plain = [], callbacks.lora.callback.Objective
    monkeypatch.setattr(
        "callbacks.lora.callback.Objective", lambda edits, *others: rows.append(edits) or plain(edits, *others)
    )
    module, _, events = run(tmp_path, tiny_folder, every_n_batches=None, probes=0)
    (event,) = events
    assert len(module.edited_facts) == 6
    assert len({row.ids for row in edit_rows(module.lm, module.edited_facts, [""])} & {row.ids for row in rows[0]}) == 6
    assert (event["decision"], list(event["before"]), list(event["after"])) == ("keep", ["text"], ["text"])
    # The text is still looked at.
    _, _, events = run(tmp_path, tiny_folder, every_n_batches=None, probes=0, name="harmful", tolerance=0.0, lr=10.0)
    assert events[0]["decision"] == "drop"
    assert "the held-out text went from" in events[0]["reason"]


def test_an_adjustment_that_fails_is_dropped(tiny_folder, tmp_path, monkeypatch):
    def fails(self, *arguments):
        raise FloatingPointError("the loss is nan after 3 steps")

    monkeypatch.setattr("callbacks.lora.training.Training.run", fails)
    _, _, events = run(tmp_path, tiny_folder)
    assert [(e["decision"], e["reason"], e["after"]) for e in events] == 2 * [
        ("drop", "the loss is nan after 3 steps", {})
    ]


def test_an_adjustment_that_makes_the_model_not_finite_is_dropped_and_recorded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Adapter, "updates", lambda self, model: {p: torch.full((32, 48), torch.inf) for p in self.paths}
    )
    module, _, events = run(tmp_path, tiny_folder)
    assert [e["decision"] for e in events] == ["drop", "drop"]
    assert "edits" not in events[0]["after"]
    assert all(torch.isfinite(weight).all() for weight in bits(module))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the run would go on in its folder
def test_a_checkpoint_with_another_adapter_is_refused(tiny_folder, tmp_path):
    fit(tmp_path, editor(tiny_folder), callbacks=[LoRAAdjust(**LENIENT, mode="adapter")], save=True)
    checkpoint = tmp_path / "logs" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    for changes in ({"rank": 3}, {"targets": "mlp"}, {"mode": "merge"}):
        lora = LoRAAdjust(**{**LENIENT, "mode": "adapter", **changes})
        with pytest.raises(UserError, match=r"adapter of rank 2 on \['model.layers.1.mlp.down_proj"):
            fit(tmp_path, editor(tiny_folder), callbacks=[lora], ckpt_path=checkpoint, save=True)


def test_fewer_prompts_than_requested_are_logged(tiny_folder, tmp_path, caplog):
    # Of the 21 facts six are edited and the others are bystanders, so none is left; 0 are there.
    caplog.set_level("INFO")
    said = "of the 5 prompts, as no more facts are neither edited nor bystanders"
    run(tmp_path, tiny_folder, prompts=5)
    assert f"LoRA: 0 {said}" in caplog.text
    caplog.clear()
    run(tmp_path, tiny_folder, prompts=0, name="none")
    assert "prompts asked for" not in caplog.text


def test_held_out_edits_are_not_trained_on(tiny_folder, tmp_path):
    module, lora, _ = run(tmp_path, tiny_folder, limit=10)
    lora.last = 2
    edits = known_edits(module, lora.last, only_stored=False)
    trained, held_out = draw_edits(edits, lora.replayed, lora.probes, random.Random(0))
    assert len(held_out) == 3  # a quarter of ten, rounded up
    assert not {fact.slot for fact in trained} & {fact.slot for fact in held_out}
    assert len(trained) == 7  # replayed is more than there are
    lora.replayed = 1
    trained, _ = draw_edits(edits, lora.replayed, lora.probes, random.Random(0))
    batches = {entry.fact.slot: entry.batch for entry in module.ledger}
    assert sum(batches[fact.slot] <= 2 for fact in trained) == 1


def test_the_adjustment_teaches_the_edits(tiny_folder, tmp_path):
    plain = editor(tiny_folder)
    fit(tmp_path, plain, name="plain")
    taught, _, _ = run(tmp_path, tiny_folder, every_n_batches=None, steps=40, weights={"before": 0.0})
    facts = plain.edited_facts
    gain = score_facts(taught.lm, facts).edit.logp_new.mean() - score_facts(plain.lm, facts).edit.logp_new.mean()
    assert gain > 1.0


def test_memories_follow_the_adjustment(tiny_folder, tmp_path):
    # What replay asks for is the value less what the site gives: the adjustment must not change it.
    class Watch(EditCallback):
        priority = 100

        def __init__(self):
            self.asked = {}

        def note(self, editor, when):
            memories = {m.fact.slot: m for m in replay.buffer.memories}
            self.asked[when] = torch.stack([m.value - site_now(editor, m.fact) for m in memories.values()])
            self.sites = torch.stack([site_now(editor, m.fact) for m in memories.values()])

        def on_edit_settled(self, trainer, editor, outcome):
            self.note(editor, "before")
            self.sites_before = self.sites

        def on_edit_done(self, trainer, editor, outcome):
            self.note(editor, "after")

    replay, watch = MemoryReplay(rate=1.0, cache_keys=True), Watch()
    module = editor(tiny_folder, layers=[1])
    module, _, _ = run(tmp_path, tiny_folder, replay, watch, module=module, targets="mlp", layers=[0, 1])
    assert (watch.sites - watch.sites_before).abs().max() > 1e-2  # it moved what the sites give
    torch.testing.assert_close(watch.asked["after"], watch.asked["before"], atol=1e-4, rtol=1e-3)
    # A map below the edited layer was adjusted too: keys and origins are those of now.
    memories = replay.buffer.memories
    keys = module.solver.read_keys([m.fact for m in memories], 1)
    torch.testing.assert_close(torch.stack([m.key for m in memories]).T, keys.keys.float())
    now = torch.stack([m.origin for m in memories]) + torch.stack([m.key for m in memories]) @ module.layers[0].total.T
    torch.testing.assert_close(now.T, keys.current.float(), atol=1e-4, rtol=1e-4)


def test_the_order_of_callbacks_does_not_matter(tiny_folder, tmp_path):
    (tmp_path / "heldout.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 9)

    def callbacks():
        scales = {"edit_success_gain": [-1.0, 0.2], "update_norm": [50.0, 1.0], "heldout_ppl_delta": [3.0, 3.0]}
        gate = TrustRollback(heldout=str(tmp_path / "heldout.txt"), scales=scales, calibrate=0, budget=None)
        return [MemoryReplay(rate=1.0, sampling="priority"), gate, LoRAAdjust(**LENIENT, dropout=0.1)]

    found = []
    for name, order in (("one", (0, 1, 2)), ("two", (2, 0, 1)), ("three", (1, 2, 0))):
        module, made, spy = editor(tiny_folder), callbacks(), Spy({1: 0.0})
        fit(tmp_path, module, callbacks=[*(made[i] for i in order), spy], name=name, limit=8)
        table = (tmp_path / "logs" / name / "version_0" / "metrics.csv").read_text()
        found.append((bits(module), table, [m.value for m in made[0].buffer.memories]))
        assert made[2].decisions["keep"] == 2
    for weights, table, values in found[1:]:
        assert same(weights, found[0][0])
        assert table == found[0][1]
        assert same(values, found[0][2])


def test_a_run_that_stops_before_its_last_batch_logs_that_nothing_was_adjusted(tiny_folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="callbacks.lora.callback"):
        fit(tmp_path, editor(tiny_folder), callbacks=[LoRAAdjust(**{**LENIENT, "every_n_batches": None})], max_steps=1)
    assert "No LoRA adjustment: the run stopped before its last batch" in caplog.messages
    assert not list(tmp_path.rglob("lora_events.jsonl"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_dropout_is_drawn_alike_after_a_resume(tiny_folder, tmp_path, mode):
    settings = {**LENIENT, "mode": mode, "dropout": 0.3}
    whole = editor(tiny_folder)
    fit(tmp_path, whole, callbacks=[LoRAAdjust(**settings)], name="whole", limit=8)
    fit(tmp_path, editor(tiny_folder), callbacks=[LoRAAdjust(**settings)], name="half", limit=8, max_steps=3, save=True)
    checkpoint = tmp_path / "logs" / "half" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = editor(tiny_folder)
    fit(tmp_path, resumed, callbacks=[LoRAAdjust(**settings)], name="half", limit=8, ckpt_path=checkpoint, save=True)
    assert same(bits(resumed), bits(whole))


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("mode", ["merge", "adapter"])
@pytest.mark.parametrize("told", [False, pytest.param(True, marks=needs_sigterm)])
def test_an_adjustment_stopped_midway_resumes(tiny_folder, tmp_path, monkeypatch, mode, told):
    # Dropout makes every step's gradients another draw of torch's generator.
    settings = {**LENIENT, "steps": 6, "mode": mode, "dropout": 0.3}
    whole = editor(tiny_folder)
    fit(tmp_path, whole, callbacks=[LoRAAdjust(**settings)], name="whole", limit=8)
    if not told:  # one that is told to stop keeps what it has then
        monkeypatch.setattr("callbacks.lora.training.SECONDS", 0.0)
    taken, plain = [], Objective.loss

    def stops_in_the_eleventh(self, *arguments):
        if len(taken) == 6 + 4:  # in the second adjustment, after four of its steps
            if not told:
                raise KeyError("killed")
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(arguments)
        return plain(self, *arguments)

    monkeypatch.setattr(Objective, "loss", stops_in_the_eleventh)
    callbacks = [LoRAAdjust(**settings)]
    with pytest.raises(SIGTERMException if told else KeyError):
        fit(tmp_path, editor(tiny_folder), callbacks=callbacks, name="killed", limit=8, save=True)
    folder = tmp_path / "logs" / "killed" / "version_0"
    assert (folder / UNFINISHED).exists()
    taken.clear()
    resumed, checkpoint = editor(tiny_folder), folder / "checkpoints" / "last.ckpt"
    callbacks = [LoRAAdjust(**settings)]
    fit(tmp_path, resumed, callbacks=callbacks, name="killed", limit=8, ckpt_path=checkpoint, save=True)
    assert len(taken) == (1 if told else 2)
    assert same(bits(resumed), bits(whole))
    assert not (folder / UNFINISHED).exists()


def test_validate_measures_with_the_adapter(tiny_folder, tmp_path):
    lora = LoRAAdjust(**LENIENT, mode="adapter")
    module = editor(tiny_folder)
    trainer = fit(tmp_path, module, callbacks=[lora], save=True)
    expected = bits(module)
    again, other = editor(tiny_folder), LoRAAdjust(**LENIENT, mode="adapter")
    trainer.callbacks = [c if not isinstance(c, LoRAAdjust) else other for c in trainer.callbacks]
    checkpoint = tmp_path / "logs" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    trainer.validate(again, trainer.datamodule, ckpt_path=checkpoint, verbose=False)
    assert same(bits(again), expected)
