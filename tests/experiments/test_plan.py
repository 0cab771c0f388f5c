"""From an experiment to its runs: cases, placeholders, grids, overrides, and what ``editlab`` is called with."""

import json
from pathlib import Path

import pytest
import yaml

from editlab.cli.main import main
from editlab.errors import UserError
from editlab.experiments import launch, provenance
from editlab.experiments.plan import Case, Options, Run, cases, finished, planned
from editlab.experiments.spec import load_experiment
from tests.experiments.made_up import finish, options

PROJECT = Path(__file__).parents[2]


def load(name):
    return load_experiment(PROJECT / "configs" / "experiments" / f"{name}.yaml")


def cases_of(name, **values):
    return {case.name: case for case in cases(load(name), Options(**values), 1)}


def write(folder, text):
    (folder / "recipe.yaml").write_text("")
    (folder / "my.yaml").write_text("recipe: recipe.yaml\n" + text)
    return load_experiment(folder / "my.yaml")


@pytest.mark.parametrize(("name", "runs"), [
    ("baselines", 10), ("replay_ablation", 111), ("lora_ablation", 42), ("forgetting", 72), ("batch_experiments", 228),
    ("trust_eval", 33), ("trust_graded", 24), ("trust_budget", 27), ("trust_labels", 4), ("tuning", 173),
])  # fmt: skip
def test_the_experiments_have_their_cases_and_seeds(name, runs):
    assert len(planned(load(name), Options(work=PROJECT))) == runs


def test_a_command_line_as_a_whole(tmp_path):
    """Written out by hand: the order counts, as the digest of the settings depends on it."""
    experiment = load("lora_ablation")
    wanted = Options(only=["lora_8_often"], seeds=[2], facts="worldfacts", heldout="builtin", moments="self",
                     flags={"model.evaluation.heldout_tokens": "512"}, work=tmp_path)  # fmt: skip
    (run,) = planned(experiment, wanted)
    lora = {"class_path": "LoRAAdjust", "init_args": {"every_n_batches": 4, "steps": 15}}
    curve = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 128, "sample": 64}}
    assert list(run.job(1).arguments) == [
        "fit", "--config", "configs/memit_lora.yaml", "--data.seed=2", "--seed_everything=2",
        "--trainer.enable_progress_bar=false", "--data.path=worldfacts", "--data.limit=500", "--data.batch_size=32",
        "--model.evaluation.immediate=edits", "--model.evaluation.neighbors=3", "--model.evaluation.heldout=builtin",
        "--model.evaluation.generated_texts=0", "--model.moments.text=self", "--model.moments.tokens=24576",
        "--model.evaluation.heldout_tokens=512", "--trainer.callbacks=null",
        f"--trainer.callbacks={json.dumps([lora, curve])}",
        f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.logger.init_args.name=lora_8_often",
        "--trainer.logger.init_args.version=version_2",
    ]  # fmt: skip
    assert run.job(1).project == PROJECT


def test_placeholders_have_the_type_and_the_value_of_what_they_stand_for(tmp_path):
    experiment = write(
        tmp_path,
        """
edits: 40
cases:
  joint:
    flags: {data.batch_size: "{edits}", other: "{edits} facts"}
    callbacks: [{class_path: A, init_args: {seed: "{seed}", nested: [{n: "{edits}"}]}}]
""",
    )
    found = {run.seed: run.case for run in planned(experiment, Options(seeds=[7, 8], edits=50, work=tmp_path))}
    assert found[7].flags == {"data.limit": 50, "data.batch_size": 50, "other": "{edits} facts"}
    assert [case.callbacks[0]["init_args"] for case in found.values()] == [
        {"seed": seed, "nested": [{"n": 50}]} for seed in (7, 8)
    ]


def test_settings_that_the_experiment_leaves_out_are_the_recipe_s(tmp_path):
    (run,) = planned(write(tmp_path, "cases: {a: {}}"), Options(seeds=[1], work=tmp_path))
    assert run.case.flags == {}


def test_texts_are_the_first_that_exist_or_what_editlab_has(tmp_path):
    (tmp_path / "text.txt").write_text("")
    experiment = write(tmp_path, "heldout: [nowhere.txt, text.txt, builtin]\nmoments: [nowhere.txt, self]\n"
                                 "facts: facts/nowhere.csv\ncases: {a: {}}")  # fmt: skip
    (run,) = planned(experiment, Options(seeds=[1], work=tmp_path))
    assert run.case.flags == {
        "data.path": str(tmp_path / "facts" / "nowhere.csv"),  # so that a message can name it
        "model.evaluation.heldout": str(tmp_path / "text.txt"),
        "model.moments.text": "self", "model.moments.tokens": 24576,
    }  # fmt: skip
    (run,) = planned(experiment, Options(seeds=[1], work=tmp_path, moments="a.txt"))
    assert run.case.flags["model.moments.tokens"] == 160000


def test_grids_leave_out_what_the_cases_have_and_callbacks_that_are_off(tmp_path):
    experiment = write(
        tmp_path,
        """
label_settings: {Replay: [rate]}
cases: {"1_0.0": {labels: {own: true}}}
grids:
  - name: "{a}_{rate}"
    axes: {a: [1, 2], rate: [0.0, 0.5]}
    flags: {n: "{a}"}
    callbacks: [{class_path: x.Replay, init_args: {rate: "{rate}"}, when: "{rate}"}]
""",
    )
    found = cases(experiment, Options(), 1)
    assert [case.name for case in found] == ["1_0.0", "1_0.5", "2_0.0", "2_0.5"]
    assert found[0].labels == {"own": True}
    assert (found[1].flags, found[1].labels) == ({"n": 1}, {"rate": 0.5})
    assert found[1].callbacks == [{"class_path": "x.Replay", "init_args": {"rate": 0.5}}]
    assert found[2].callbacks == []


def test_settings_of_callbacks_reach_the_cases_that_have_them(tmp_path):
    experiment = write(tmp_path, "cases: {a: {callbacks: [{class_path: callbacks.MemoryReplay}]}, b: {}}")
    given = Options(seeds=[1], callback_settings=[("MemoryReplay", "rate", 0.5), ("Other", "a", "b")], work=tmp_path)
    assert [run.case.callbacks for run in planned(experiment, given)] == [
        [{"class_path": "callbacks.MemoryReplay", "init_args": {"rate": 0.5}}], [],
    ]  # fmt: skip


def test_settings_of_the_command_line_override_those_of_cases(tmp_path):
    experiment = write(tmp_path, "edits: 4\ncases: {a: {flags: {model.layers: [1]}}}")
    flags = {"model.layers": "[2]", "model.moments.text": "a=b"}
    (run,) = planned(experiment, Options(seeds=[1], flags=flags, work=tmp_path))
    assert run.case.flags == {"data.limit": 4, "model.layers": "[2]", "model.moments.text": "a=b"}
    assert {"--model.layers=[2]", "--data.limit=4"} <= set(run.job(1).arguments)


def test_a_seed_that_is_named_twice_is_one_and_unknown_cases_are_refused(tmp_path):
    experiment = write(tmp_path, "cases: {none: {}, some: {}}")
    runs = planned(experiment, Options(seeds=[2, 1, 2], only=["none"], work=tmp_path))
    assert [(run.case.name, run.seed) for run in runs] == [("none", 2), ("none", 1)]
    with pytest.raises(UserError, match=r"There is no case nome: there are none, some\."):
        planned(experiment, Options(only=["nome"], work=tmp_path))


def test_cases_by_their_labels(tmp_path):
    experiment = load("batch_experiments")

    def chosen(**where):
        given = Options(where=where, seeds=[1], edits=1024, work=tmp_path)
        return {run.case.name for run in planned(experiment, given)}

    assert chosen(batch_size=["8"], lora_rank=["none"], replay_rate=["0", "0.3"]) == {
        "batch_8_rate_0_lora_none", "batch_8_rate_0.3_lora_none",
    }  # fmt: skip
    assert chosen(batch_size=["1"], replay_rate=["0.3"], lora_rank=["8"]) == {
        "batch_1_rate_0_lora_8"
    }  # which it shares
    with pytest.raises(UserError, match="No case has the labels that --where asks for"):
        chosen(batch_size=["7"])


def test_labels_of_every_kind_can_be_asked_for(tmp_path):
    first, second = "{layers: [4, 5], rank: null, rate: 5.0}", "{layers: 6, rank: 8, rate: none}"
    experiment = write(tmp_path, f"cases:\n  a: {{labels: {first}}}\n  b: {{labels: {second}}}\n")

    def chosen(**where):
        return [run.case.name for run in planned(experiment, Options(where=where, seeds=[1], work=tmp_path))]

    assert chosen(layers=["[4, 5]"]) == chosen(rank=["None"]) == ["a"]
    assert chosen(rate=["none", "5"]) == ["a", "b"]


def test_a_run_of_another_content_of_its_recipe(tmp_path):
    (run,) = planned(write(tmp_path, "cases: {none: {}}"), Options(seeds=[1], work=tmp_path / "runs"))
    recipe = run.project / run.recipe
    recipe.write_text("model: {layers: [4]}")
    job = run.job(1)
    made = {"settings": job.settings, provenance.RECIPE_CONTENT: job.recipe_content}
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").touch()
    (run.folder / provenance.FILE).write_text(json.dumps(made))
    recipe.write_text("# a comment\nmodel:\n  layers: [4]\n")
    assert not run.settings_differ
    recipe.write_text("model: {layers: [5]}")
    assert run.settings_differ
    recipe.unlink()
    assert run.job(1).recipe_content == "unknown"


def test_a_run_of_unknown_or_two_settings(tmp_path):
    (run,) = planned(write(tmp_path, "cases: {none: {}}"), Options(seeds=[1], work=tmp_path / "runs"))
    now = run.job(1).settings
    (run.folder / "checkpoints").mkdir(parents=True)
    for settings, other in ((now, False), (f"unknown | {now}", False), (f"0123abcd | {now}", True), ("0123abcd", True)):
        (run.folder / provenance.FILE).write_text(json.dumps({"settings": settings}))
        assert not run.settings_differ  # it would start again
        (run.folder / "checkpoints" / "last.ckpt").touch()
        assert run.settings_differ == other
        (run.folder / "checkpoints" / "last.ckpt").unlink()


def test_finished_runs_of_all_cases_and_seeds(tmp_path):
    experiment = write(tmp_path, "cases: {none: {}, other: {}}")
    given = options(tmp_path, only=["other"], seeds=[2])
    assert finished(experiment, given) == []
    finish(given.work / "none" / "version_5")
    (given.work / "none" / "version_1_old").mkdir()  # no folder of a run
    assert [(run.case.name, run.seed) for run in finished(experiment, given)] == [("none", 5)]


def test_the_states_of_a_run(tmp_path):
    run = Run(Case("a", {}), 1, tmp_path / "a" / "version_1")
    assert run.status == "to run"
    run.folder.mkdir(parents=True)
    (run.folder / launch.FAILED).touch()
    assert run.status == "failed"
    finish(run.folder)
    assert run.status == "done"


# ---- the committed experiments --------------------------------------------------------------------------------------


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Returns the whole configuration of a case, as ``editlab`` reads it."""
    monkeypatch.chdir(PROJECT)

    def read(case, recipe):
        with pytest.raises(SystemExit) as stop:
            main([*case.arguments(recipe, 1, tmp_path), "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return read


def test_settings_of_the_recipe_s_callback_do_not_stay(printed):
    case = cases_of("replay_ablation", facts="worldfacts")["random_0.5_50"]
    found = printed(case, "configs/memit_consolidated.yaml")  # whose MemoryReplay has memory: both
    (replay,) = found["trainer"]["callbacks"]
    given = {name: replay["init_args"][name] for name in ("memory", "sampling", "rate", "capacity")}
    assert given == {"memory": "sampled", "sampling": "random", "rate": 0.5, "capacity": 50}


def test_the_replay_ablation_covers_its_grid():
    names = set(cases_of("replay_ablation"))
    grid = {f"{s}_{r}_{c}" for s in ("random", "priority") for r in (0.1, 0.3, 0.5) for c in (50, 100, 200)}
    assert grid | {"none", "consolidated", "joint"} <= names


@pytest.mark.parametrize(("name", "method"), [("memit", "MEMIT"), ("alphaedit", "AlphaEdit")])
def test_a_case_s_method_replaces_the_recipe_s(name, method, printed):
    found = printed(cases_of("forgetting")[name], load("forgetting").recipe)["model"]["method"]
    assert found["class_path"].rpartition(".")[2] == method
    assert found["init_args"].get("covariance_weight") == {"memit": 15000}.get(name)


def test_the_recipe_for_thousands_is_the_case_that_was_measured():
    recipe = yaml.safe_load((PROJECT / "configs" / "memit_thousands.yaml").read_text())
    case = cases_of("forgetting")["consolidated_looser_lora"]
    callbacks = [{"class_path": one["class_path"], "init_args": one.get("init_args", {})}
                 for one in recipe["trainer"]["callbacks"]]  # fmt: skip
    assert callbacks == [json.loads(json.dumps(one)) for one in case.callbacks]
    assert case.flags["model.preserve_prompt_tokens"] == recipe["model"]["preserve_prompt_tokens"]
    fewer = cases_of("forgetting", edits=500)["lora_alone"]
    assert fewer.callbacks[0]["init_args"]["replayed"] == 500
    assert fewer.flags["data.batch_size"] == 500


def test_faults_have_the_seed_of_their_run():
    experiment = load("trust_eval")
    runs = planned(experiment, Options(seeds=[4, 6], only=["faulty"], work=PROJECT))
    assert [run.case.callbacks[0]["init_args"]["seed"] for run in runs] == [4, 6]
