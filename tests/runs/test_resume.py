"""Every recipe, killed at random points and resumed, ends in the bits of a run never touched."""

import json
import random
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from editlab.cli.main import main
from editlab.data import Question
from editlab.edits.conventions import Conventions
from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.runs.resume import RunIdentity, require_facts
from tests.facts import FACTS, write_counterfact

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "reference")
SAME_PARTS = {"memit", "memit_replay", "memit_trust", "memit_lora", "emmet_trust_firm"}
"""Recipes with the callbacks of an ``emmet`` recipe, which is killed in their place."""
SAME_STATE = {
    "encore": "memit_consolidated",
    "rlsedit": "memit_consolidated",
    "prune": "rect",
    "revive": "rect",
    "sphere": "rect",
}
"""Recipes -> the recipe with the same state between batches, which is killed in their place."""
STATELESS = {"finetune", "lora_only", "retrieval"}
"""Recipes whose methods keep nothing between batches but sums and ledger; test_trained_batch.py resumes such runs."""
IN_SHORT = {"emmet_replay_trust_lora", "memit_consolidated", "betaedit", "rect", "ultraedit"}
"""Recipes that are killed in every test run: they have every kind of state; the others with ``--thorough``."""
KILLS = 4

needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


def shrunk(recipe, folder, tiny, **changes):
    """The recipe on a tiny model and 8 facts, written to ``folder`` under its own name; returns its arguments."""
    config = yaml.safe_load(recipe.read_text())
    one = config["model"]["method"]["class_path"] == "ROME"
    text = "self"  # sampling texts takes a third of a run; the scales of trust below are for moments of sampled text
    if "trust" not in recipe.stem:
        text = "text.txt"
        (folder / text).write_text("The capital of France is Paris. Oslo lies in Norway, and Lima lies in Peru. " * 20)
    values = config["model"].get("values", {})
    if values.get("source") != "gradient":  # which searches nothing
        values["steps"] = 3
    config["model"] |= {
        "language_model": str(tiny), "layers": [1, 2] if len(config["model"]["layers"]) > 1 else [1],
        "values": values, "moments": {"text": text, "tokens": 128},
        "contexts": {"count": 1, "length": 3},
        "evaluation": {
            "heldout_tokens": 64, "generated_texts": 1, "generated_tokens": 4, "generation": 2,
            "snapshot_generation": 1, "bystanders": 2,
        },
    }  # fmt: skip
    if config["model"]["method"]["class_path"] == "AlphaEdit":
        config["model"]["method"]["init_args"] = {"threshold": 1e9}  # the tiny model's keys have scales of their own
    if config["model"]["method"]["class_path"] == "FineTune":
        config["model"]["method"]["init_args"] |= {"epochs": 2, "mini_batch": 1}
    facts = write_counterfact(folder / "facts.json", FACTS[:4] if one else FACTS[:8])
    config["data"] |= {"path": str(facts), "limit": None, "batch_size": 1 if one else 2, "keep": "all"}
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    named = [c if isinstance(c, dict) else {"class_path": c} for c in config["trainer"]["callbacks"]]
    config["trainer"]["callbacks"] = named
    for callback in named:
        if callback["class_path"] == "LoRAAdjust":
            callback["init_args"] |= {
                "every_n_batches": 2,
                "layers": None,
                "steps": 3,
                "text": text,
                "text_tokens": 64,
                "tolerance": 0.05,
                "dropout": 0.1,
            }
        if callback["class_path"] == "TrustRollback":
            (folder / "heldout.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 9)
            # A random model's updates are as large as its weights; with these, some of its edits stay and some do not.
            by_fact = "replay" in recipe.stem
            scales = {"edit_success_gain": [-0.1, 0.2], "update_norm": [3.0, 1.0]}
            callback["init_args"] |= {
                "heldout": "heldout.txt", "scales": scales, "calibrate": 2, "threshold": 0.5,
                "granularity": "edit" if by_fact else "batch",
            }  # fmt: skip
    for section, values in changes.items():
        config[section] |= values
    (folder / recipe.name).write_text(yaml.safe_dump(config))
    return ["fit", "--config", recipe.name]


def last(folder):
    """The newest run's checkpoint; None if there is none yet."""
    found = sorted(folder.glob("lightning_logs/*/version_*/checkpoints/last.ckpt"))
    return found[-1] if found else None


def outcome(folder):
    """Everything that must be equal: weights, ledger, scores, random states, callbacks' states, tables, events."""
    path = last(folder)
    saved = torch.load(path, weights_only=True)
    for times in ("seconds", "costs"):
        saved["editor"]["evaluation"].pop(times)
    states = {name: state for name, state in saved["callbacks"].items() if "Checkpoint" not in name}
    table = (path.parents[1] / "metrics.csv").read_text()
    outcomes = (path.parents[1] / "outcomes.csv").read_text()
    lines = [json.loads(line) for file in path.parents[1].glob("*.jsonl") for line in file.read_text().splitlines()]
    events = [{k: v for k, v in event.items() if k != "seconds"} for event in lines]
    found = {"weights": saved["state_dict"], "editor": saved["editor"], "callbacks": states, "table": table}
    found["outcomes"] = outcomes
    return {**found, "events": events}


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def test_same_sees_a_changed_bit():
    state = {"a": [torch.zeros(2), {"b": 1.0}], "c": float("nan")}
    assert same(state, {"a": [torch.zeros(2), {"b": 1.0}], "c": float("nan")})
    assert not same(state, {"a": [torch.tensor([0.0, 1e-30]), {"b": 1.0}], "c": float("nan")})
    assert not same(state, {"a": [torch.zeros(2), {"b": 1.1}], "c": float("nan")})
    assert not same(state, {"a": [torch.zeros(2)], "c": float("nan")})


USED = asdict(Conventions(site="stream"))
IDENTITY = RunIdentity("a", "w", "float32", [1, 2], 4, {"eps": 1}, "32-true", conventions=USED)


def test_an_identity_agrees_with_itself_and_with_what_it_saved():
    saved = RunIdentity.of({**asdict(IDENTITY), "ledger": [], "rng": {}})
    assert saved == IDENTITY
    saved.require_model(IDENTITY)
    saved.require_settings(IDENTITY)
    older = {"language_model": "b", "weights": "w", "dtype": "float32", "layers": [1, 2], "batch_size": 4}
    RunIdentity.of(older).require_model(IDENTITY)  # the name is for messages; what older versions lack is not compared
    RunIdentity.of(older).require_settings(IDENTITY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1]}, r"edits layers \[1, 2\] and this run layers \[1\]"),
        ({"dtype": "bfloat16"}, "in float32 and this run's in bfloat16"),
        ({"weights": "x"}, "whose weights differ"),
        ({"architecture": {"eps": 2}}, "has 1 as eps in its config.json and this run's 2"),
        ({"precision": "bf16-true"}, "trainer.precision 32-true and this one has bf16-true"),
        ({"batch_size": 8}, "of 4 facts and this run's of 8"),
        ({"split": "dev"}, "data.split all and this one has dev: set it to the checkpoint's"),
        ({"spread": "each"}, "values.spread residual and this one has each: set it to the checkpoint's"),
        ({"joint": "none"}, "data.joint auto and this one has none: set it to the checkpoint's"),
        ({"conventions": USED | {"kl_at": "subject"}}, "model.values.kl_at prompt and this one has subject"),
        ({"conventions": USED | {"keys": "templates"}}, "model.keys bare and this one has templates"),
        ({"conventions": USED | {"site": "mlp"}}, "model.site stream and this one has mlp"),
        ({"conventions": USED | {"bare_denominator": True}}, "bare_denominator .* False and this one has True"),
    ],
)
def test_each_part_of_an_identity_is_compared(changes, message):
    run = replace(IDENTITY, **changes)
    check = (
        IDENTITY.require_settings
        if changes.keys() <= {"precision", "batch_size", "joint", "split", "conventions", "spread"}
        else IDENTITY.require_model
    )
    with pytest.raises(UserError, match=message):
        check(run)


def test_the_facts_begin_with_those_edited():
    ledger = Ledger()
    ledger.add(FACTS[:2], 0, [1.0, 0.0])
    require_facts(ledger, FACTS[:3], "facts.json")
    more = [replace(fact, aliases=("A",), portability=(Question("g", "p", ("a",)),)) for fact in FACTS[:3]]
    require_facts(ledger, more, "facts.json")  # a later version may read more of the same file
    with pytest.raises(UserError, match=r"Fact 1 of the checkpoint is .* in facts\.json it is"):
        require_facts(ledger, [FACTS[0], FACTS[2]], "facts.json")
    with pytest.raises(UserError, match=r"has edited 2 facts and facts\.json gives 1"):
        require_facts(ledger, FACTS[:1], "facts.json")


@needs_sigkill
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, id=r.stem, marks=() if r.stem in IN_SHORT else pytest.mark.thorough)
        for r in RECIPES
        if r.stem not in {*SAME_PARTS, *SAME_STATE, *STATELESS}
    ],
)
def test_killed_anywhere_and_resumed(recipe, tiny_folder, tmp_path):
    from tests import killed

    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    whole = folder("whole")
    arguments = shrunk(recipe, whole, tiny_folder)
    points = killed.run(arguments, whole, tmp_path / "cache_whole")
    expected = outcome(whole)
    decisions = {event["decision"] for event in expected["events"]}
    assert len(decisions) > 1 or "trust" not in recipe.stem  # not all are kept, nor none
    draw = random.Random(recipe.stem)
    # The first kills are in the middle of a checkpoint's bytes, between a solve and its update, and in an adjustment.
    aimed = [draw.choice([i for i, p in enumerate(points, 1) if p == name])
             for name in (killed.HALF, "after solve", "after loss") if name in points]  # fmt: skip
    kills, chains = 0, 0
    while kills < KILLS or chains < len(aimed):
        # A chain of runs, each killed on its way, up to twice; where one gets through, the next chain begins.
        here = folder(f"chain_{chains}")
        shrunk(recipe, here, tiny_folder)
        chains += 1
        die_at = aimed[chains - 1] if chains <= len(aimed) else draw.randint(1, len(points))
        finished, stop = False, min(KILLS, kills + 2)
        while not finished:
            going_on = ["--ckpt_path", "last"] if last(here) else []
            finished = killed.run([*arguments, *going_on], here, tmp_path / f"cache_{chains}", die_at) is not None
            kills += not finished
            die_at = draw.randint(1, len(points) // 2) if kills < stop else None
        assert same(outcome(here), expected), f"after {kills} kills"
    assert chains >= len(aimed)


@needs_sigkill
def test_event_files_are_continued(tiny_folder, tmp_path):
    from tests import killed

    recipe, steps = ROOT / "configs" / "emmet_replay.yaml", {}
    for name in ("whole", "killed"):
        here = tmp_path / name
        here.mkdir()
        arguments = shrunk(recipe, here, tiny_folder)
        if name == "whole":
            points = killed.run(arguments, here, tmp_path / name)
        else:
            # Right after the third batch's rows went to the logger, with its checkpoint not yet begun.
            third = [i for i, point in enumerate(points, 1) if point == "after _log_step"][2]
            assert killed.run(arguments, here, tmp_path / name, die_at=third) is None
            killed.run([*arguments, "--ckpt_path", "last"], here, tmp_path / name)
        steps[name] = {}
        for group in (".", "before", "immediate", "retained"):
            events = EventAccumulator(str(last(here).parents[1] / group)).Reload()
            for tag in events.Tags()["scalars"]:
                steps[name][group, tag] = [e.step for e in events.Scalars(tag)]
    assert steps["whole"]["immediate", "scores/ES"] == [2, 4, 6, 8]
    assert steps["whole"][".", "weights/layer_1/delta_norm"] == [2, 4, 6, 8]
    assert steps["killed"] == steps["whole"]


@needs_sigkill
def test_a_finished_run_resumed_changes_nothing(tiny_folder, tmp_path):
    from tests import killed

    recipe = ROOT / "configs" / "emmet_replay.yaml"
    arguments = shrunk(recipe, tmp_path, tiny_folder)
    killed.run(arguments, tmp_path, tmp_path / "cache")
    before = outcome(tmp_path)
    summary = last(tmp_path).parents[1] / "summary.json"
    summary.unlink()  # as if it had been killed just before
    killed.run([*arguments, "--ckpt_path", "last"], tmp_path, tmp_path / "cache")
    assert same(outcome(tmp_path), before)
    assert summary.exists()


def test_a_finished_run_whose_last_batch_came_between_two_checkpoints(tiny_folder, tmp_path, monkeypatch):
    # The Trainer then passes over its start, and comes to its end all the same.
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "configs" / "emmet_replay_trust_lora.yaml"
    arguments = shrunk(recipe, tmp_path, tiny_folder)
    settings = yaml.safe_load((tmp_path / recipe.name).read_text())
    settings["trainer"]["callbacks"].append({"class_path": "EditCheckpoint", "init_args": {"every_n_batches": 3}})
    (tmp_path / recipe.name).write_text(yaml.safe_dump(settings))
    assert main(arguments) == 0
    summary = last(tmp_path).parents[1] / "summary.json"
    summary.unlink()
    assert main([*arguments, "--ckpt_path", "last"]) == 0
    assert summary.exists()


@pytest.fixture
def run_once(tiny_folder, tmp_path, monkeypatch):
    """Makes a finished run in the working directory; returns a function that runs it again with changes."""
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "configs" / "emmet_replay.yaml"
    arguments = shrunk(recipe, tmp_path, tiny_folder)
    assert main(arguments) == 0

    def again(**changes):
        shrunk(recipe, tmp_path, changes.pop("folder", tiny_folder), **changes)
        return main([*arguments, "--ckpt_path", "last"])

    return again


def test_differences_from_the_checkpoint_are_named(run_once, tiny_folder, tmp_path, capsys):
    from tests.tiny import tiny_model, tiny_tokenizer

    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    turned = tmp_path / "turned"
    shutil.copytree(tiny_folder, turned)
    config = json.loads((turned / "config.json").read_text())
    (turned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    facts = write_counterfact(tmp_path / "others.json", [*FACTS[:3], *FACTS[4:8]])
    for changes, said in (
        ({"model": {"layers": [1]}}, "edits layers [1, 2] and this run layers [1]"),
        ({"folder": other}, "whose weights differ"),
        ({"folder": turned}, "model has 1e-06 as rms_norm_eps in its config.json and this run's 0.5"),
        ({"trainer": {"precision": "bf16-mixed"}}, "run had trainer.precision 32-true and this one has bf16-mixed"),
        ({"data": {"path": str(facts)}}, "Fact "),
        ({"data": {"batch_size": 4}}, "batches are of 2 facts and this run's of 4"),
        ({"data": {"seed": 1}}, "Fact "),
        ({"data": {"limit": 4}}, "has edited 8 facts"),
        ({"trainer": {"precision": "bf16-true"}}, "in float32 and this run's in bfloat16: set trainer.precision"),
    ):
        assert run_once(**changes) == 2, changes
        last_line = capsys.readouterr().err.strip().splitlines()[-1]
        assert last_line.startswith("editlab: ")
        assert said in last_line


def test_no_checkpoint_to_resume_from(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = shrunk(ROOT / "configs" / "emmet.yaml", tmp_path, tiny_folder)
    assert main([*arguments, "--ckpt_path", "last"]) == 2
    assert "no run with a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("hello world")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "foreign.ckpt").read_bytes()[:100])
    for name, said in (
        ("foreign", "is not editlab's"), ("half", "cannot be read"), ("text", "cannot be read"),
    ):  # fmt: skip
        assert main([*arguments, "--ckpt_path", f"{name}.ckpt"]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
