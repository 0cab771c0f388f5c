"""Facts taken out of a run, patches stacked, and the log of both; each result is a new folder, and no run changes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from editlab.cli.main import main
from editlab.errors import UserError
from editlab.experiments.removals import measure_removals
from editlab.lm.language_model import LanguageModel
from editlab.runs.delta import Delta
from editlab.runs.edit_log import read_log
from editlab.runs.patched_model import PatchedModel, read_patch
from editlab.runs.removal import FactRemover
from editlab.runs.stack import contradictions, stack
from tests.cli.commands.runs import FATES, files, same_bits, save_tiny, weights
from tests.facts import FACTS
from tests.recipes import write_recipe

JAPAN, PERU = "Japan|The capital of {} is", "Peru|The capital of {} is"
"""Of the run's edits the second, which was kept, and the fourth, which was scaled to a half."""


def editlab(*arguments):
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def taken(runs, tmp_path_factory):
    """A folder with one fact taken out of the run on llama, as a model."""
    out = tmp_path_factory.mktemp("taken") / "out"
    before = {path: path.read_bytes() for path in runs("llama").folder.rglob("*") if path.is_file()}
    assert editlab("revert", runs("llama").folder, "--facts", JAPAN, "--out", out) == 0
    assert {path: path.read_bytes() for path in runs("llama").folder.rglob("*") if path.is_file()} == before
    return out


@pytest.fixture(scope="module")
def model(runs):
    return PatchedModel(read_patch(str(runs("llama").folder)))


# ---- facts taken out ----------------------------------------------------------------------------------------------


def test_the_layers_output_the_original_at_the_fact_that_was_taken_out(runs, taken, model):
    from editlab.keys.subject_keys import Site, read_keys

    run, delta = Delta.from_checkpoint(runs("llama").checkpoint), read_patch(str(taken))
    model.put(delta.totals)
    for layer, name in zip((1, 2), delta.totals, strict=True):
        site = Site(layer, False, model.lm.anatomy.edit_module(layer))
        key = read_keys(model.lm, [FACTS[1]], layer, site, [""], "bare").keys
        assert (delta.totals[name].double() @ key).norm() < 1e-4 * (run.totals[name].double() @ key).norm()
        assert (delta.totals[name] - run.totals[name]).norm() < run.totals[name].norm()  # the others are still there


def test_the_model_is_the_base_with_the_delta_inside_it(runs, taken):
    assert {"model.safetensors", "config.json", "README.md", "edits.json", "delta"} <= {p.name for p in taken.iterdir()}
    found, base = weights(taken), weights(runs("llama").base)
    totals = weights(taken / "delta")
    assert {name for name in base if not torch.equal(found[name], base[name])} == {f"{name}.weight" for name in totals}
    for name, total in totals.items():
        assert torch.equal(found[f"{name}.weight"], base[f"{name}.weight"] + total)
    card = (taken / "README.md").read_text()
    assert "| removed |" in card
    assert "1 superseded, 1 removed, 2 scaled, 2 rolled back, 2 kept." in card


def test_a_second_removal_starts_from_the_first(taken, tmp_path):
    assert editlab("revert", taken, "--facts", PERU, "--hold", 100, "--out", tmp_path / "d", "--delta-only") == 0
    history = read_patch(str(tmp_path / "d")).history
    assert [edit.fate for edit in history.edits] == [
        "removed" if i in (1, 3) else fate for i, fate in enumerate(FATES)
    ]  # fmt: skip
    assert [one.edits for one in history.removals] == [(2,), (4,)]
    assert history.removals[1].measured["others"] == 3
    assert history.metrics == {}  # those of the run are no longer true
    with pytest.raises(UserError, match=r"not in the weights \(removed\)"):
        FactRemover.remove(_Named(history), [JAPAN])


class _Named:
    """As much of a remover as a wrong name needs."""

    def __init__(self, history):
        self.delta, self.model = type("D", (), {"history": history}), None


def test_all_facts_taken_out_one_by_one_are_all_gone(runs, model):
    delta = Delta.from_checkpoint(runs("llama").checkpoint)
    remover = FactRemover(model, delta)
    names = [f"{edit.subject}|{edit.prompt}" for edit in delta.history.edits if edit.stands]
    for name in names:
        remover.remove([name], sample=2)
    assert len(remover.delta.history.removals) == len(names) == 5
    # Each removal holds those before it: the outputs at all five keys are the original ones.
    facts = [edit.fact for edit in remover.delta.history.edits if edit.fate == "removed"]
    model.put(remover.delta.totals)
    now = model.answers(facts)
    model.put({})
    assert now == model.answers(facts)


def test_removals_are_measured_against_the_edited_and_the_unedited_model(runs, model):
    rows = measure_removals(str(runs("llama").folder), count=2)
    assert [row["removed"] for row in rows] == [1, 2]
    assert [row["others"] for row in rows] == [3, 3]  # of five standing facts
    delta = Delta.from_checkpoint(runs("llama").checkpoint)
    model.put(delta.totals)
    subjects = {row["subject"] for row in rows}
    others = [edit.fact for edit in delta.history.edits if edit.stands and edit.subject not in subjects]
    assert rows[0]["held_before"] == sum(model.hits(others))
    assert rows[1]["answers_back"] <= 2


def test_mistakes_write_nothing(runs, tmp_path, capsys):
    run = runs("llama").folder
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    capsys.readouterr()  # the bars of the writer
    bare = tmp_path / "bare"  # a checkpoint without the run's recipe beside it
    shutil.copytree(run / "checkpoints", bare / "checkpoints")
    for arguments, message in (
        ([run, "--facts", "Atlantis|{} is"], "No edit is 'Atlantis|{} is'"),
        ([run, "--facts", JAPAN, "--to_step", 1], "give one of the two"),
        ([run, "--facts", JAPAN, "--hold=-1"], "hold"),
        ([run, "--facts", JAPAN, "--sample=-1"], "sample"),
        ([run, "--facts", JAPAN, "--delta-only", "--dtype", "float16"], "a delta is always float32"),
        ([run, "--hold", 1], "settings of --facts"),
        ([], "revert needs one run"),
        ([run, "--ckpt_path", run, "--facts", JAPAN], "revert needs one run"),
        ([runs("llama").base, "--facts", JAPAN], "a model without the delta of its edits"),
        ([bare, "--facts", JAPAN], "recipe of the edits is not known"),
        ([run, "--facts", JAPAN, "--model", other], "differ from it"),
    ):
        assert editlab("revert", *arguments, "--out", tmp_path / "no") == 2
        said = [line for line in capsys.readouterr().err.strip().splitlines() if "Loading weights" not in line]
        assert len(said) == 1, said
        assert message in said[0]
    assert not (tmp_path / "no").exists()


# ---- patches on top of each other ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(runs, tmp_path_factory):
    """Two patches on one base: a run's delta, and one whose only standing fact is another."""
    folder = tmp_path_factory.mktemp("pair")
    first = Delta.from_checkpoint(runs("llama").checkpoint)
    edits = tuple(replace(e, fate="kept" if i == 6 else "rolled back") for i, e in enumerate(first.history.edits))
    edits = tuple(replace(e, subject="Cuba") if i == 6 else e for i, e in enumerate(edits))
    totals = {name: 0.5 * total for name, total in first.totals.items()}
    second = replace(first, totals=totals, history=replace(first.history, edits=edits))
    for name, delta in (("a", first), ("b", second)):
        (folder / name).mkdir()
        delta.save(folder / name / "delta.safetensors")
    return folder


def save(delta, folder, **changes):
    folder.mkdir()
    replace(delta, **changes).save(folder / "delta.safetensors")
    return folder


def test_two_patches_are_added(runs, pair, tmp_path, capsys):
    assert editlab("apply", "--model", runs("llama").base, pair / "a", pair / "b", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "overlap" in said.out + said.err
    found, base, totals = weights(tmp_path / "out"), weights(runs("llama").base), weights(pair / "a")
    for name, total in totals.items():
        assert torch.equal(found[f"{name}.weight"], base[f"{name}.weight"] + (total + 0.5 * total))
    delta = read_patch(str(tmp_path / "out"))
    assert (delta.history.batches, len(delta.history.edits)) == (8, 16)
    assert [edit.fate for edit in delta.history.edits[:8]] == FATES
    assert delta.history.edits[14].batch == 8
    # The stack is a patch too, and a fact of it can be taken out.
    assert editlab("revert", tmp_path / "out", "--facts", JAPAN, "--out", tmp_path / "less", "--delta-only") == 0


def test_the_overlap_is_the_share_of_the_output_that_the_other_patch_moves(pair, model):
    first, second = read_patch(str(pair / "a")), read_patch(str(pair / "b"))
    (found,) = stack(model, [first, second], ["a", "b"]).interference
    assert found.overlap == pytest.approx(0.5, rel=1e-6)  # the second patch is half of the first
    assert found.largest == pytest.approx(0.5, rel=1e-6)
    assert (found.below_before.facts, found.own.facts) == (5, 1)
    none = replace(second, totals={name: torch.zeros_like(total) for name, total in second.totals.items()})
    (found,) = stack(model, [first, none], ["a", "b"]).interference
    assert found.overlap == found.largest == 0
    assert found.below_before == found.below_after


def test_one_patch_alone_is_what_export_writes(runs, pair, tmp_path):
    assert editlab("apply", "--model", runs("llama").base, pair / "a", "--out", tmp_path / "one") == 0
    assert editlab("export", "--ckpt_path", runs("llama").folder, "--out", tmp_path / "whole") == 0
    assert files(tmp_path / "one") == files(tmp_path / "whole")


def test_a_patch_is_exported_as_a_run_is(runs, pair, tmp_path):
    """Of the patch that ``revert --facts --delta-only`` wrote, and of the delta inside a model's folder."""
    assert editlab("export", "--model", runs("llama").base, "--ckpt_path", pair / "a", "--out", tmp_path / "one") == 0
    assert editlab("apply", "--model", runs("llama").base, pair / "a", "--out", tmp_path / "other") == 0
    assert same_bits(weights(tmp_path / "one"), weights(tmp_path / "other"))
    assert editlab("revert", runs("llama").folder, "--facts", JAPAN, "--out", tmp_path / "without") == 0
    again = ["--ckpt_path", tmp_path / "without", "--out", tmp_path / "again"]
    assert editlab("export", "--model", runs("llama").base, *again) == 0
    assert same_bits(weights(tmp_path / "again"), weights(tmp_path / "without"))


def test_patches_that_contradict_are_refused_or_the_last_one_wins(runs, pair, tmp_path, capsys):
    first = read_patch(str(pair / "a"))
    edits = tuple(replace(e, target_new="Rome") if i == 1 else e for i, e in enumerate(first.history.edits))
    save(first, tmp_path / "c", history=replace(first.history, edits=edits))
    assert editlab("apply", "--model", runs("llama").base, pair / "a", tmp_path / "c", "--out", tmp_path / "no") == 2
    said = capsys.readouterr().err.strip()
    assert f"{pair / 'a'} says {JAPAN} -> {FACTS[1].target_new}, and {tmp_path / 'c'} says Rome" in said
    assert "\n" not in said
    assert not (tmp_path / "no").exists()
    arguments = [pair / "a", tmp_path / "c", "--last-wins", "--delta-only", "--out", tmp_path / "yes"]
    assert editlab("apply", "--model", runs("llama").base, *arguments) == 0
    history = read_patch(str(tmp_path / "yes")).history
    assert (history.edits[1].fate, history.edits[9].fate) == ("removed", "kept")
    # What the last patch says can be taken out in turn, although the earlier one's fact has the same key.
    assert editlab("revert", tmp_path / "yes", "--facts", JAPAN, "--out", tmp_path / "less", "--delta-only") == 0
    assert f"another target: {JAPAN}" in "".join(capsys.readouterr())


def test_one_target_in_two_unicode_forms_is_no_contradiction(pair, tmp_path):
    first = read_patch(str(pair / "a"))
    forms = [
        tuple(replace(e, target_new=text) for e in first.history.edits) for text in ("Zu\u0308rich", "Z\u00fcrich")
    ]
    one, other = (replace(first, history=replace(first.history, edits=edits)) for edits in forms)
    assert contradictions([one, other], ["a", "b"]) == []


def test_a_fact_of_both_patches_stands_once(pair, model):
    first = read_patch(str(pair / "a"))
    history = stack(model, [first, first], ["a", "a"]).delta.history
    assert [edit.fate for edit in history.edits].count("kept") == 3  # both kept facts of the second; none of the first
    assert history.edits[1].fate == "superseded by edit 10"
    assert history.edits[8].fate == "superseded by edit 15"  # its own number, moved


def test_patches_of_other_bases_and_modules_are_refused(runs, pair, tmp_path, capsys):
    first = read_patch(str(pair / "a"))
    totals = {name.replace("down_proj", "up_proj"): total for name, total in first.totals.items()}
    for name, changes, message in (
        ("base", {"fingerprint": "other"}, "different base models"),
        ("type", {"dtype": torch.bfloat16}, "different base models"),
        ("module", {"totals": totals}, "edit different modules"),
    ):
        other = save(first, tmp_path / name, **changes)
        assert editlab("apply", "--model", runs("llama").base, pair / "a", other, "--out", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
    for name, settings, message in (
        ("joint", {"data": {"joint": "none"}}, "data.joint auto and none"),
        ("chat", {"model": {"chat_template": "both"}}, "model.chat_template none and both"),
    ):
        other = save(first, tmp_path / name, history=replace(first.history, settings=json.dumps(settings)))
        assert editlab("apply", "--model", runs("llama").base, pair / "a", other, "--out", tmp_path / "no") == 2
        assert f"read prompts differently ({message})" in capsys.readouterr().err
    assert editlab("apply", "--model", runs("llama").base, "--out", tmp_path / "no") == 2
    assert "apply needs a patch" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_patches_at_different_layers_have_no_overlap(pair, model):
    first = read_patch(str(pair / "a"))
    one, other = (
        replace(first, layers=[layer], totals={name: first.totals[name]})
        for layer, name in zip((1, 2), first.totals, strict=True)
    )
    found = stack(model, [other, one], ["a", "b"])
    assert found.interference[0].overlap is None
    assert (found.delta.layers, list(found.delta.totals)) == ([1, 2], list(first.totals))
    assert same_bits(found.delta.totals, first.totals)


# ---- the log ------------------------------------------------------------------------------------------------------


def test_the_log_of_a_run_says_what_became_of_each_edit(runs, capsys):
    assert editlab("log", runs("llama").folder) == 0
    lines = "".join(capsys.readouterr()).splitlines()
    assert "8 edits of" in lines[0]
    assert "(1 superseded, 3 kept, 2 scaled, 2 rolled back)" in lines[0]
    row = next(line for line in lines if JAPAN in line)
    assert row.split()[0] == "2"
    assert "  kept" in row


def test_the_log_of_a_result_says_when_facts_were_taken_out(taken, capsys):
    assert editlab("log", taken) == 0
    said = "".join(capsys.readouterr())
    assert "1 removed" in said
    assert "taken out: 2; original answer back for" in said


def test_the_log_of_a_folder_of_patches_lists_each(pair, capsys):
    assert editlab("log", pair, "--json") == 0
    logs = json.loads(capsys.readouterr().out)
    assert [log["path"] for log in logs] == [str(pair / "a"), str(pair / "b")]
    assert [edit["fate"] for edit in logs[0]["edits"]] == FATES
    assert logs[0]["edits"][1]["number"] == 2


def test_the_log_of_an_export_and_of_a_run_without_a_checkpoint(runs, tmp_path):
    run = runs("llama").folder
    assert editlab("export", "--ckpt_path", run, "--out", tmp_path / "out") == 0
    (export,) = read_log(str(tmp_path / "out"))
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    event = {"step": 2, "kind": "batch", "reason": "perplexity"}
    (tmp_path / "run" / "trust_events.jsonl").write_text(json.dumps(event) + "\n")
    (bare,) = read_log(str(tmp_path / "run"))
    assert [edit.fate for edit in export.edits] == FATES
    assert [edit.fate.split()[0] for edit in bare.edits] == [fate.split()[0] for fate in FATES]
    rows = [line for line in bare.to_text().splitlines() if "perplexity" in line]
    assert len(rows) == 2  # both facts of the third batch, which was rolled back


def test_the_log_of_a_run_that_changes_no_weight(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, tiny_folder, model={"method": "Retrieval"})
    assert editlab("fit", "--config", "tiny.yaml") == 0
    (log,) = read_log("lightning_logs/tiny")
    assert [edit.fate for edit in log.edits] == ["kept"] * 4
    assert editlab("export", "--ckpt_path", log.path, "--out", "no") == 2
    assert "changes no weight" in capsys.readouterr().err


def test_a_checkpoint_elsewhere_has_no_settings_of_the_run_around_it(runs, tmp_path):
    """A copy in a folder of another name may lie in another run's."""
    (tmp_path / "keep").mkdir()
    shutil.copy(runs("llama").checkpoint, tmp_path / "keep" / "a.ckpt")
    (tmp_path / "config.yaml").write_text("model: {method: MEMIT}\n")
    (tmp_path / "summary.json").write_text('{"recipe": "other"}')
    history = Delta.from_checkpoint(tmp_path / "keep" / "a.ckpt").history
    assert (history.settings, history.recipe, history.when) == ("", None, "")


def test_folders_without_edits_are_refused(runs, tmp_path, capsys):
    (tmp_path / "edits.json").write_text("no")
    for folder, message in (
        (tmp_path / "none", "There is no"),
        (runs("llama").base, "holds no edits"),
        (tmp_path, "not one that editlab"),
        (tmp_path / "edits.json", "holds no edits"),
    ):
        assert editlab("log", folder) == 2
        assert message in capsys.readouterr().err


def test_a_language_model_is_not_needed_for_the_log(runs, monkeypatch):
    monkeypatch.setattr(LanguageModel, "__init__", None)
    assert editlab("log", runs("llama").folder) == 0
