"""A sweep of two tiny runs: results once, failures kept, a stopped run resumed; its table."""

import csv
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from editlab.utils.files import atomic_file
from tests.facts import FACTS, write_counterfact

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import launch
import run_all_baselines as baselines
import run_forgetting as forgetting
import run_lora_ablation as lora_ablation
import run_replay_ablation as ablation
import sweep
import tables

FINISHED = {"edits": 8, "immediate": {}, "retained": {}}
"""The least that a summary has."""


@pytest.fixture
def options(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = write_counterfact(tmp_path / "facts.json", FACTS[:6])
    found = sweep.parser(None, work=tmp_path / "runs", path=str(facts), seeds=[1]).parse_args([])
    found.flags = {
        "data.path": str(facts), "data.only_known": False, "data.batch_size": 2, "data.limit": 4,
        "model.language_model": str(tiny_folder), "model.layers": [1], "model.values.steps": 2,
        "model.moments.tokens": 256, "model.contexts.count": 1, "model.contexts.length": 3,
        "model.evaluation.heldout_tokens": 64, "trainer.accelerator": "cpu",
    }  # fmt: skip
    return found


def run_all(cases, recipe, options):
    """Those of the cases that have a result once the others have been run."""
    return sweep.run_all(sweep.planned(cases, recipe, options), options)


def exit_where_failed(cases, options):
    sweep.exit_where_failed(sweep.planned(cases, "", options), options)


def test_runs_once_and_goes_on(options, tmp_path, capsys, monkeypatch):
    curve = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 2}}
    good = sweep.Case("none", options.flags, [curve], {"rate": 0})
    bad = sweep.Case("bad", {**options.flags, "model.layers": [9]})
    runs = run_all([good, bad], "configs/emmet.yaml", options)
    assert [run.case.name for run in runs] == ["none"]
    (run,) = runs
    assert sorted(run.curve()) == [2, 4]
    assert "layers are 0 to 3" in (options.work / "bad" / "version_1" / "run.log").read_text()
    assert [run.status for run in sweep.planned([good, bad], "", options)] == ["done", "failed"]
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed \(bad, seed 1\): see run\.log"):
        exit_where_failed([good, bad], options)
    exit_where_failed([good], options)
    stopped = sweep.Case("stopped", {})
    with pytest.raises(SystemExit, match=r"1 of 2 runs did not come to their end \(stopped, seed 1\)"):
        exit_where_failed([good, stopped], options)
    options.no_run = True  # then nobody wanted it to
    exit_where_failed([good, stopped], options)
    options.no_run = False
    # What has a result is not started again; what was stopped goes on from its checkpoint.
    written = (run.folder / "metrics.csv").read_text()
    started = []
    plain = launch.start
    monkeypatch.setattr(launch, "start", lambda job: (started.append(job.folder.parent.name), plain(job))[1])
    run_all([good], "configs/emmet.yaml", options)
    assert started == []
    other = good.given([("ForgettingCurve", "sample", 9)])
    with pytest.raises(SystemExit, match=r"version_1 was begun with other settings: give another --work, or remove"):
        run_all([other], "configs/emmet.yaml", options)
    (run.folder / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"version_1 was begun with other settings"):  # not gone on with, either
        run_all([other], "configs/emmet.yaml", options)
    assert started == []
    assert len(run_all([good], "configs/emmet.yaml", options)) == 1
    assert started == ["none"]
    assert (run.folder / "metrics.csv").read_text() == written

    tables.write_rows(tables.table_rows(runs), tmp_path / "results" / "table.csv")
    with (tmp_path / "results" / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    summary = run.summary
    assert (row["case"], row["rate"], row["seed"], row["edits"]) == ("none", "0", "1", "4")
    assert float(row["retained_ES"]) == pytest.approx(summary["retained"]["ES"], abs=1e-4)
    ratio = summary["perplexity"]["after"] / summary["perplexity"]["before"]
    assert float(row["perplexity_ratio"]) == pytest.approx(ratio, abs=1e-4)


def test_what_the_recipe_gives_its_callback_does_not_stand(tmp_path):
    case = ablation.replay("random", sampling="random", rate=0.5)
    recipe = str(sweep.ROOT / "configs" / "emmet_consolidated.yaml")  # whose MemoryReplay has memory: both
    command = [sys.executable, "-m", "editlab.cli.main", *case.arguments(recipe, 1, tmp_path), "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=sweep.ROOT).stdout
    replay, curve = yaml.safe_load(printed)["trainer"]["callbacks"]
    given = {name: replay["init_args"][name] for name in ("memory", "sampling", "rate", "capacity")}
    assert given == {"memory": "sampled", "sampling": "random", "rate": 0.5, "capacity": 200}
    assert curve["class_path"].endswith("ForgettingCurve")


def test_settings_of_callbacks_reach_the_cases_that_have_them(options, capsys):
    options = sweep.parser(None, work=options.work).parse_args(["--callback", "MemoryReplay.rate=0.5", "Other.a=b"])
    with_it, without = sweep.Case("a", {}, [{"class_path": "callbacks.MemoryReplay"}]), sweep.Case("b", {})
    found = [run.case.callbacks for run in sweep.planned([with_it, without], "", options) if run.seed == 1]
    assert found == [[{"class_path": "callbacks.MemoryReplay", "init_args": {"rate": 0.5}}], []]
    assert options.callback[1] == ("Other", "a", "b")
    for given, said in ((["--callback", "rate=0.5"], "is no CLASS.NAME=VALUE"), (["--set", "a"], "is no NAME=VALUE")):
        with pytest.raises(SystemExit):
            sweep.parser(None).parse_args(given)
        assert said in capsys.readouterr().err


def test_settings_of_all_cases_stand_over_their_own(options, tmp_path):
    given = ["--set", "model.layers=[2]", "model.moments.text=a=b"]
    options = sweep.parser(None, work=tmp_path, seeds=[1]).parse_args(given)
    (run,) = sweep.planned([sweep.Case("a", {"model.layers": [1], "data.limit": 4})], "a.yaml", options)
    assert run.case.flags == {"model.layers": "[2]", "data.limit": 4, "model.moments.text": "a=b"}
    assert {"--model.layers=[2]", "--data.limit=4"} <= set(run.job(1).arguments)


def test_files_are_found_from_the_folder_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.csv").touch()
    found = sweep.parser(None).parse_args(["--path", "facts.csv"])
    assert found.path == str(tmp_path.resolve() / "facts.csv")
    assert sweep.parser(None).parse_args(["--path", "worldfacts"]).path == "worldfacts"


def test_dry_run_and_missing_file(options, capsys):
    options.dry_run = True
    case = sweep.Case("none", options.flags)
    assert run_all([case], "configs/emmet.yaml", options) == []
    assert "to run  none, seed 1" in capsys.readouterr().out
    options.only = ["nome"]
    with pytest.raises(SystemExit, match="There is no case nome: there are none, some"):
        run_all([sweep.Case("none", {}), sweep.Case("some", {})], "configs/emmet.yaml", options)
    options.only, options.path = None, "nowhere.json"
    with pytest.raises(SystemExit, match=r"nowhere\.json is not there"):
        run_all([], "configs/emmet.yaml", options)


def test_lora_cases_have_the_bases_that_they_are_held_against():
    names = [case.name for case in lora_ablation.cases(500)]
    assert len(names) == len(set(names))
    assert set(lora_ablation.BASE) | set(lora_ablation.BASE.values()) <= set(names)
    assert {"lora_4", "lora_8", "lora_16", "emmet", "replay", "replay_lora_8"} <= set(names)
    assert set(lora_ablation.SHOWN) <= set(names)


def test_forgetting_cases_have_the_bases_that_they_are_held_against():
    names = {case.name for case in forgetting.cases(2000)}
    base = forgetting.EXPERIMENT.base
    assert {forgetting.EXPERIMENT.otherwise, *base, *base.values(), *forgetting.RULES, *forgetting.CALLBACKS} <= names


def test_the_cases_cover_what_was_asked():
    names = [case.name for case in ablation.cases(500)]
    assert len(names) == len(set(names))
    for sampling in ("random", "priority"):
        for rate in (0.1, 0.3, 0.5):
            for capacity in (50, 100, 200):
                assert f"{sampling}_{rate}_{capacity}" in names
    assert {"none", "consolidated", "joint"} <= set(names)
    assert set(ablation.SHOWN) <= set(names)


@pytest.mark.parametrize(("name", "method"), [("memit", "MEMIT"), ("alphaedit", "AlphaEdit"), ("emmet", "EMMET")])
def test_a_rule_takes_the_place_of_the_recipe_s(name, method, tmp_path):
    case = next(case for case in forgetting.cases(2000) if case.name == name)
    recipe = str(sweep.ROOT / forgetting.EXPERIMENT.recipe)
    command = [sys.executable, "-m", "editlab.cli.main", *case.arguments(recipe, 1, tmp_path), "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=sweep.ROOT).stdout
    found = yaml.safe_load(printed)["model"]["method"]
    assert found["class_path"].rpartition(".")[2] == method
    weights = {"memit": 15000, "emmet": 1000}
    assert found["init_args"].get("covariance_weight") == weights.get(name)


def test_the_recipe_for_thousands_is_the_case_that_was_measured(tmp_path):
    case = next(case for case in forgetting.cases(2000) if case.name == "consolidated_looser_lora")

    def settings(*arguments):
        command = [sys.executable, "-m", "editlab.cli.main", *arguments, "--print_config"]
        found = yaml.safe_load(subprocess.run(command, capture_output=True, check=True, cwd=sweep.ROOT).stdout)
        return [found["model"][name] for name in ("layers", "method", "preserve_prompt_tokens", "values")], [
            one for one in found["trainer"]["callbacks"] if not one["class_path"].endswith("EditCheckpoint")
        ]

    recipe = settings("fit", "--config", "configs/emmet_thousands.yaml")
    assert settings(*case.arguments(forgetting.EXPERIMENT.recipe, 1, tmp_path)) == recipe
    assert forgetting.thorough(500)["init_args"]["replayed"] == 500


def test_a_run_says_what_it_was_started_with(options):
    (run,) = run_all([sweep.Case("none", options.flags)], "configs/emmet.yaml", options)
    found = tables.provenance_of(run)
    versions = {name: version(name) for name in ("editlab", "torch", "transformers", "peft")}
    settings = run.job(1).settings
    assert found == {"recipe": "configs/emmet.yaml", "settings": settings, **launch.provenance(), **versions}
    assert found["machine"].split(" x ")[0] == str(launch.cores())
    assert tables.provenance_of_all([found, found]) == found
    other = sweep.Run(run.case, 2, options.work, "configs/memit.yaml")
    assert (
        tables.provenance_of_all([found, tables.provenance_of(other)])["recipe"]
        == "configs/emmet.yaml | configs/memit.yaml"
    )


def test_every_baseline_runs_both_ways_and_one_pair_is_one_method(tmp_path):
    found = {case.name: case for case in baselines.cases()}
    assert set(found) == {f"{name}_{way}" for name in baselines.METHODS for way in ("sequential", "independent")}
    recipe = str(sweep.ROOT / baselines.RECIPE)
    command = [sys.executable, "-m", "editlab.cli.main", *found["rome_independent"].arguments(recipe, 1, tmp_path)]
    printed = subprocess.run([*command, "--print_config"], capture_output=True, text=True, check=True, cwd=sweep.ROOT)
    config = yaml.safe_load(printed.stdout)
    assert config["model"]["method"]["class_path"].endswith("ROME")
    assert config["model"]["restore_between_batches"] is True
    assert config["data"]["batch_size"] == 1
    assert config["trainer"]["callbacks"] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--workers", "0"], "0 is under 1"), (["--workers", "x"], "invalid"), (["--edits", "0"], "0 is under 1")],
)
def test_bad_arguments(flags, said, capsys):
    with pytest.raises(SystemExit):
        sweep.parser(None).parse_args(flags)
    assert said in capsys.readouterr().err


def test_a_seed_that_is_named_twice_is_one(options):
    options.seeds = [2, 1, 2]
    assert [run.seed for run in sweep.planned([sweep.Case("none", {})], "", options)] == [2, 1]


def test_a_run_of_unknown_or_two_settings(options):
    (run,) = sweep.planned([sweep.Case("none", {})], "a.yaml", options)
    now = run.job(1).settings
    (run.folder / "checkpoints").mkdir(parents=True)
    for settings, other in ((now, False), (f"unknown | {now}", False), (f"0123abcd | {now}", True), ("0123abcd", True)):
        (run.folder / launch.PROVENANCE).write_text(json.dumps({"settings": settings}))
        assert not run.other_settings  # it would begin anew
        (run.folder / "checkpoints" / "last.ckpt").touch()
        assert run.other_settings == other
        (run.folder / "checkpoints" / "last.ckpt").unlink()


def test_all_that_ended_badly_is_named(options):
    failed, stopped = sweep.Case("bad", {}), sweep.Case("stopped", {})
    (options.work / "bad" / "version_1").mkdir(parents=True)
    (options.work / "bad" / "version_1" / launch.FAILED).touch()
    said = r"1 of 2 runs failed \(bad, seed 1\), and 1 of 2 runs did not come to their end \(stopped, seed 1\)"
    with pytest.raises(SystemExit, match=said):
        exit_where_failed([failed, stopped], options)


def test_a_dry_run_measures_by_all_finished_runs_and_waits_for_the_longest(options, capsys):
    # The formula gives 40 facts in batches of 4 41 + 13.2 + 3.2 = 57.4 s. A finished run took 104.8 - 10 for as much,
    # so what is left takes twice its formula; it is one run, so a second worker does not help. What is no run's
    # folder is passed over.
    case = sweep.Case("none", {"data.limit": "40", "data.batch_size": 4})
    done = options.work / "none" / "version_1"
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps({**FINISHED, "seconds": 2 * 57.4 - 10}))
    (options.work / "none" / "version_1_old").mkdir()
    options.seeds, options.dry_run, options.workers = [2], True, 2
    wanted = [sweep.Case("other", case.flags)]
    known = sweep.at_hand([case, *wanted], "", options)
    assert [(run.case.name, run.seed) for run in known] == [("none", 1)]
    assert sweep.run_all(sweep.planned(wanted, "", options), options, known) == []
    said = capsys.readouterr().out
    assert "to run  other, seed 2, about 2 min" in said
    assert "1 of 1 runs are to be made: about 2 min, 2 at a time (measured on 1 finished runs)" in said
    with pytest.raises(SystemExit, match=r"needs a number for data\.limit, and it is null"):
        sweep.run_all(sweep.planned([sweep.Case("a", {**case.flags, "data.limit": "null"})], "", options), options)


def test_errors_of_our_own_come_as_a_sentence(tmp_path):
    @sweep.in_a_sentence
    def main(folder):
        with atomic_file(folder / "table.csv"):
            pass

    (tmp_path / "results").touch()
    with pytest.raises(SystemExit, match="results"):
        main(tmp_path / "results")


def test_tables_alone_run_nothing(options, monkeypatch):
    monkeypatch.setattr(launch, "start", lambda job: 1 / 0)
    done = options.work / "none" / "version_1"
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps(FINISHED))
    options.no_run = True
    runs = run_all([sweep.Case("none", {}), sweep.Case("other", {})], "configs/emmet.yaml", options)
    assert [run.case.name for run in runs] == ["none"]


@pytest.mark.parametrize("script", [baselines, forgetting, ablation, lora_ablation])
def test_tables_go_where_they_are_wanted(script, tmp_path, monkeypatch):
    (case,) = script.cases()[:1] if script is baselines else script.cases(8)[:1]
    folder = tmp_path / "runs" / case.name / "version_1"
    folder.mkdir(parents=True)
    summary = {"edits": 8, "retained": {"accuracy": 0.5, "ES": 1.0, "NS": 0.7}, "before": {"NS": 0.8}, "immediate": {},
               "perplexity": {"before": 20.0, "after": 22.0}, "delta_norm": {"6": 0.25}, "seconds": 8.0,
               "peak_memory_mb": 100.0, "versions": {"torch": "2"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    given = ["--no-run", "--path", "worldfacts", "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["script", *given])
    script.main()
    written = list((tmp_path / "out" / "results").iterdir())
    assert written
    for table in written:
        with table.open() as file:
            for row in csv.DictReader(file):
                if row.get("seeds") == "0":
                    continue  # a case that was not run
                assert row["recipe"] == (script.RECIPE if script is baselines else script.EXPERIMENT.recipe)
                assert row["torch"] == "2"
