"""``editlab sweep`` on a tiny model: runs once, failures and stops, resuming, provenance, a user's own experiment."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from editlab import __version__
from editlab.cli.main import main
from editlab.errors import EditLabError, UserError
from editlab.experiments import launch, provenance
from editlab.experiments.csv_files import read_rows
from editlab.experiments.plan import planned
from editlab.experiments.spec import load_experiment
from editlab.experiments.sweep import execute, raise_if_failed
from editlab.experiments.tables import provenance_of, rows_of_runs
from tests.experiments.made_up import finish, options
from tests.facts import FACTS, write_counterfact
from tests.forked import Command

CURVE = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 2, "sample": 4}}


def _fork(processes, command, **options):
    """Starts a run's process by a fork; tests/experiments/test_launch.py starts new interpreters."""
    forked = Command(command, **options)
    processes.running.add(forked)
    return forked


@pytest.fixture
def mine(tmp_path, tiny_folder, monkeypatch):
    """A user's folder with facts and a recipe for the tiny model; writes experiments into it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launch._Processes, "start", _fork)
    write_counterfact(tmp_path / "facts.json", FACTS[:6])
    recipe = {
        "model": {
            "language_model": str(tiny_folder), "layers": [1], "method": "EMMET", "values": {"steps": 2},
            "moments": {"tokens": 256}, "contexts": {"count": 1, "length": 3},
            "evaluation": {"heldout_tokens": 64, "generation": 0, "bystanders": 0},
        },
        "data": {"keep": "all"},
        "trainer": {"accelerator": "cpu"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**content):
        base = {"recipe": "recipe.yaml", "facts": "facts.json", "edits": 4, "batch_size": 2, "seeds": [1]}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**base, **content}, sort_keys=False))
        return tmp_path / "mine.yaml"

    return write


def started(monkeypatch):
    """Names of the cases that are started from now on."""
    names, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda job: (names.append(job.folder.parent.name), start(job))[1])
    return names


def test_a_user_s_experiment_of_two_cases_and_two_seeds_becomes_a_table_and_a_figure(mine, tmp_path, monkeypatch):
    shown = {"plain": {"label": "plain", "color": "black"}, "replay": {"label": "replay", "color": "blue"}}
    replay = {"class_path": "MemoryReplay", "init_args": {"rate": 0.5}}
    experiment = mine(
        seeds=[1, 2],
        cases={"plain": {"callbacks": [CURVE]}, "replay": {"callbacks": [replay, CURVE], "labels": {"rate": 0.5}}},
        tables=[{"file": "mine.csv", "rows": "runs"}, {"file": "means.csv", "rows": "means", "against": "plain"},
                {"file": "curves.csv", "rows": "snapshots"}],
        figures=[{"kind": "curves", "file": "mine", "table": "curves.csv", "rows": [shown]}],
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["sweep", str(experiment), "--workers", "2"]) == 0
    rows = read_rows(tmp_path / "results" / "mine.csv")
    assert [(row["case"], row["seed"], row["edits"]) for row in rows] == [
        (case, seed, "4") for case in ("plain", "replay") for seed in ("1", "2")
    ]
    assert [row.get("rate") for row in rows] == [None, None, "0.5", "0.5"]
    assert {row["recipe"] for row in rows} == {"recipe.yaml"}
    assert len({row["settings"] for row in rows}) == 4
    assert [row["seeds"] for row in read_rows(tmp_path / "results" / "means.csv")] == ["2", "2"]
    assert [row["edits"] for row in read_rows(tmp_path / "results" / "curves.csv")] == ["2", "4"] * 4
    assert {path.name for path in (tmp_path / "figs").iterdir()} == {"mine.png", "mine.pdf"}
    assert not list(elsewhere.iterdir())

    # A second call starts nothing; another seed adds its rows to the table.
    names = started(monkeypatch)
    assert main(["sweep", str(experiment)]) == 0
    assert names == []
    assert main(["sweep", str(experiment), "--only", "plain", "--seeds", "3", "--archive"]) == 0
    assert names == ["plain"]
    assert [path.name for path in (tmp_path / "logs" / "mine").iterdir()] == ["plain-3.tar.gz"]
    assert [row["seed"] for row in read_rows(tmp_path / "results" / "mine.csv")] == ["1", "2", "3", "1", "2"]


def test_failed_runs_are_named_and_stopped_ones_resume(mine, tmp_path, monkeypatch, capsys):
    experiment = mine(cases={"good": {"callbacks": [CURVE]}, "bad": {"flags": {"model.layers": [9]}}})
    assert main(["sweep", str(experiment)]) == 1
    said = capsys.readouterr().err
    assert "editlab: 1 of 2 runs failed (bad, seed 1): see run.log in their folders, and repeat the command" in said
    work = tmp_path / "lightning_logs" / "mine"
    assert "layers are 0 to 3" in (work / "bad" / "version_1" / "run.log").read_text()
    good = work / "good" / "version_1"
    loaded = load_experiment(experiment)
    given = options(tmp_path, work=work, only=["good"])
    (run,) = planned(loaded, given)
    assert sorted(run.curve) == [2, 4]

    # Its provenance is what it was started with.
    versions = {"editlab": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}
    settings = run.job(1).settings
    assert provenance_of(run) == {
        "recipe": "recipe.yaml", "settings": settings, **provenance.provenance(tmp_path), **versions,
    }  # fmt: skip
    (row,) = rows_of_runs([run])
    assert (row["case"], row["seed"], row["edits"]) == ("good", 1, 4)

    # Other settings are refused, whether the run has finished or would resume.
    names = started(monkeypatch)
    written = (good / "metrics.csv").read_text()
    other = ["sweep", str(experiment), "--only", "good", "--callback", "ForgettingCurve.sample=9"]
    assert main(other) == 2
    assert "version_1 was started with other settings: give another --work, or remove" in capsys.readouterr().err
    (good / "summary.json").unlink()
    assert main(other) == 2
    assert names == []
    execute([run], given)
    assert names == ["good"]
    assert (good / "metrics.csv").read_text() == written


def test_a_dry_run_starts_nothing_and_lists_the_runs(mine, tmp_path, capsys, monkeypatch):
    names = started(monkeypatch)
    experiment = mine(cases={"none": {}})
    assert main(["sweep", str(experiment), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "to run  none, seed 1, about 43 s" in said  # 41 + 4 * 0.33 + 2 * 0.32
    assert "1 of 1 runs are missing" in said
    assert names == []
    assert not (tmp_path / "lightning_logs").exists()


def test_tables_alone_start_nothing(mine, tmp_path, monkeypatch):
    names = started(monkeypatch)
    experiment = mine(cases={"none": {}, "other": {}}, tables=[{"file": "t.csv", "rows": "runs"}])
    finish(tmp_path / "lightning_logs" / "mine" / "none" / "version_1")
    assert main(["sweep", str(experiment), "--no-run", "--out", str(tmp_path / "out")]) == 0
    assert [row["case"] for row in read_rows(tmp_path / "out" / "results" / "t.csv")] == ["none"]
    assert names == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["--workers", "0"], "--workers must be at least 1, and is 0"),
    (["--edits", "0"], "--edits must be at least 1, and is 0"),
    (["--edits", "x"], "edits"),
    (["--only", "nome"], "There is no case nome: there are none."),
    (["--callback", "rate=0.5"], "--callback 'rate=0.5' must have the form CLASS.NAME=VALUE"),
    (["--set", "a"], "--set 'a' must have the form NAME=VALUE"),
    (["--where", "a"], "--where 'a' must have the form NAME=VALUE"),
    (["--path", "nowhere.json"], "There is no fact file nowhere.json: name one with --path"),
    (["--quick"], "has no 'quick': name cases with --only"),
    (["--launcher", "bus"], "launcher"),
])  # fmt: skip
def test_bad_arguments_are_one_sentence(mine, arguments, message, capsys):
    assert main(["sweep", str(mine(cases={"none": {}})), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_bad_file_is_one_sentence(mine, capsys):
    assert main(["sweep", str(mine(cases={"none": {}}, seed=[1]))]) == 2
    assert "mine.yaml has an unknown key 'seed': did you mean 'seeds'?" in capsys.readouterr().err


def test_files_of_the_command_line_are_found_from_the_caller_s_folder(mine, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_counterfact(elsewhere / "others.json", FACTS[:6])
    monkeypatch.chdir(elsewhere)
    jobs = []
    monkeypatch.setattr("editlab.experiments.sweep.execute", lambda runs, given: jobs.extend(r.job(1) for r in runs))
    monkeypatch.setattr("editlab.experiments.sweep.raise_if_failed", lambda runs, given: None)
    assert main(["sweep", str(mine(cases={"none": {}})), "--path", "others.json"]) == 0
    assert f"--data.path={(elsewhere / 'others.json').resolve()}" in jobs[0].arguments
    assert jobs[0].project == tmp_path.resolve()


def test_the_first_run_of_each_seed_is_ahead_of_the_others(mine, tmp_path, monkeypatch):
    experiment = load_experiment(mine(cases={"a": {}, "b": {}, "c": {}}, seeds=[1, 2]))
    given = options(tmp_path)
    finish(given.work / "b" / "version_2")  # so seed 2 has its values in the cache already
    seen = {}

    def fake(jobs, workers, after):
        seen.update({(j.folder.parent.name, j.folder.name): after.get(j) for j in jobs})
        return iter(())

    monkeypatch.setitem(launch.LAUNCHERS, "local", fake)
    execute(planned(experiment, given), given)
    waits = {run: job and job.folder.parent.name for run, job in seen.items()}
    assert waits == {
        ("a", "version_1"): None, ("b", "version_1"): "a", ("c", "version_1"): "a",
        ("a", "version_2"): None, ("c", "version_2"): None,
    }  # fmt: skip


def test_all_runs_that_ended_badly_are_named(mine, tmp_path):
    experiment = load_experiment(mine(cases={"bad": {}, "stopped": {}}))
    given = options(tmp_path)
    runs = planned(experiment, given)
    (given.work / "bad" / "version_1").mkdir(parents=True)
    (given.work / "bad" / "version_1" / launch.FAILED).touch()
    said = r"1 of 2 runs failed \(bad, seed 1\), and 1 of 2 runs were stopped \(stopped, seed 1\): see run\.log"
    with pytest.raises(EditLabError, match=said):
        raise_if_failed(runs, given)
    with pytest.raises(EditLabError, match=r"^1 of 2 runs failed \(bad, seed 1\): see run\.log"):
        raise_if_failed(runs, options(tmp_path, no_run=True))  # of which nobody expects that they have ended


def test_quick_takes_built_in_data_and_what_the_experiment_names():
    from editlab.cli.commands.sweep import COMMAND, options_of

    project = Path(__file__).parents[2]
    file = str(project / "configs" / "experiments" / "lora_ablation.yaml")
    experiment = load_experiment(file)
    given = options_of(experiment, COMMAND.parser().parse_args([file, "--quick", "--edits", "8"]))
    assert (given.only, given.seeds, given.edits, given.batch_size) == (("memit", "lora_8"), [1], 8, 4)
    assert (given.facts, given.heldout, given.moments, given.moment_tokens) == ("worldfacts", "builtin", "self", 4096)
    assert given.work == project / "lightning_logs" / "quick" / "runs" / "lora_ablation"
    assert given.out == project / "lightning_logs" / "quick"
    (_, adjusted) = planned(experiment, given)
    assert adjusted.case.callbacks[0]["init_args"] == {"steps": 4}
    usual = options_of(experiment, COMMAND.parser().parse_args([file]))
    assert (usual.work, usual.out) == (project / "lightning_logs" / "lora_ablation", project)


def test_a_wrong_kind_of_summary_is_refused(tmp_path):
    folder = tmp_path / "a" / "version_1"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps([]))
    from editlab.experiments.plan import Case, Run

    with pytest.raises(UserError, match="damaged"):
        _ = Run(Case("a", {}), 1, folder).status
