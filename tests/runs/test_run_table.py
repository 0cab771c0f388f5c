"""Runs with other loggers than the default one: in each, the run's folder and its table are what they always are."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import mlflow, wandb

from editlab.cli.main import main
from editlab.errors import UserError
from editlab.runs.folders import RunFolder
from editlab.runs.run_table import CSVRunLogger, read_table
from tests.recipes import write_recipe

SETTINGS = {
    "layers": [1],
    "contexts": {"count": 0},
    "evaluation": {"heldout_tokens": 0, "generation": 0, "bystanders": 0},
}


class Noted:
    """What a service would have got: pairs of step and numbers, and the settings of the run."""

    def __init__(self):
        self.numbers, self.settings, self.ended = [], {}, None

    def at(self, step):
        found = {}
        for when, numbers in self.numbers:
            if when == step:
                found.update(numbers)
        return found


@pytest.fixture
def weights_and_biases(monkeypatch):
    """A package wandb that sends nothing, for Lightning's own logger."""
    noted = Noted()

    class Run:
        id = "made_up"
        config = SimpleNamespace(update=lambda given, allow_val_change: noted.settings.update(given))

        def log(self, numbers):
            numbers = dict(numbers)
            noted.numbers.append((numbers.pop("trainer/global_step"), numbers))

        def define_metric(self, *_, **__):
            pass

    def init(**given):
        noted.given = given
        return Run()

    parts = {
        "wandb": SimpleNamespace(init=init, run=None),
        "wandb.sdk": SimpleNamespace(),
        "wandb.sdk.lib": SimpleNamespace(RunDisabled=type("RunDisabled", (), {})),
        "wandb.wandb_run": SimpleNamespace(Run=Run),
    }
    install(monkeypatch, parts)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    return noted


@pytest.fixture
def ml_flow(monkeypatch):
    """A package mlflow that stores nothing."""
    noted = Noted()

    class Client:
        def __init__(self, uri):
            noted.uri = uri

        def get_experiment_by_name(self, name):
            return SimpleNamespace(lifecycle_stage="active", experiment_id="7")

        def create_run(self, experiment_id, tags):
            return SimpleNamespace(info=SimpleNamespace(run_id="made_up"))

        def get_run(self, run_id):
            return run_id

        def log_batch(self, run_id, metrics=(), params=()):
            noted.settings.update({param.key: param.value for param in params})
            noted.numbers += [(metric.step, {metric.key: metric.value}) for metric in metrics]

        def set_terminated(self, run_id, status):
            noted.ended = status

    parts = {
        "mlflow": SimpleNamespace(set_tracking_uri=lambda uri: None),
        "mlflow.tracking": SimpleNamespace(MlflowClient=Client),
        "mlflow.entities": SimpleNamespace(Metric=SimpleNamespace, Param=SimpleNamespace),
    }
    install(monkeypatch, parts)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(mlflow, "_get_resolve_tags", lambda: lambda tags: tags)
    return noted


def install(monkeypatch, parts):
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(vars(content))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def fit(tiny_folder, tmp_path, monkeypatch):
    """Runs the tiny recipe with a logger as YAML has it, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(logger, *flags, verb="fit"):
        write_recipe(tmp_path, tiny_folder, model=SETTINGS, trainer={"logger": logger})
        return main([verb, "--config", "tiny.yaml", *flags])

    return run


def folder(tmp_path, version=0):
    return tmp_path / "lightning_logs" / "tiny" / f"version_{version}"


def names(run):
    return {path.name for path in run.iterdir()} - {".lock"}


def test_the_table_alone(fit, tmp_path, capsys):
    """A run in two parts, its last evaluation, its report and its comparison, without any other logger."""
    assert fit("CSVRunLogger", "--trainer.max_steps", "1") == 0
    assert fit("CSVRunLogger", "--ckpt_path", "last") == 0
    said = capsys.readouterr().out
    assert "metrics.csv, outcomes.csv, summary.json in lightning_logs/tiny/version_0" in said
    assert "tensorboard" not in said
    run = folder(tmp_path)
    assert names(run) == {"checkpoints", "config.yaml", "metrics.csv", "outcomes.csv", "summary.json"}
    assert sorted(read_table(run / "metrics.csv")) == [2, 4]
    before = (run / "metrics.csv").read_bytes()
    assert fit("CSVRunLogger", "--ckpt_path", "last", verb="validate") == 0
    assert (run / "metrics.csv").read_bytes() == before  # all was measured already
    # What report and compare read of a run:
    assert RunFolder(run).curve.keys() == {2, 4}
    assert {"retained/accuracy", "edits", "seconds"} <= RunFolder(run).measures().keys()


def same_numbers(noted, run):
    """Whether a service got every number of the run's table at its number of edits, and no other one."""
    table = read_table(run / "metrics.csv")
    got = {step: {k: v for k, v in noted.at(step).items() if k != "epoch"} for step in table}
    return got == table and {step for step, _ in noted.numbers} == set(table)


def test_weights_and_biases_next_to_the_default_logger(fit, tmp_path, weights_and_biases):
    given = {"class_path": "WandbLogger", "init_args": {"project": "edits", "offline": True}}
    assert fit([given, "RunLogger"]) == 0
    run = folder(tmp_path)
    assert {"metrics.csv", "summary.json", "outcomes.csv", "config.yaml"} <= names(run)
    assert any(name.startswith("events.out") for name in names(run))
    assert same_numbers(weights_and_biases, run)
    assert weights_and_biases.given["project"] == "edits"
    assert weights_and_biases.given["id"] is None  # of no version_0, which many runs have
    assert weights_and_biases.settings["model.values.steps"] == 2
    assert weights_and_biases.settings["model.layers"] == "[1]"
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert [one["class_path"].rpartition(".")[2] for one in saved] == ["RunLogger", "WandbLogger"]
    assert json.loads((run / "summary.json").read_text())["recipe"] == "tiny"


def test_ml_flow_and_a_resumed_run(fit, tmp_path, ml_flow):
    assert fit("MLFlowLogger", "--trainer.max_steps", "1") == 0
    assert fit("MLFlowLogger", "--ckpt_path", "last") == 0
    run = folder(tmp_path)
    assert json.loads((run / "summary.json").read_text())["edits"] == 4
    assert sorted(read_table(run / "metrics.csv")) == [2, 4]
    assert ml_flow.at(4).items() >= read_table(run / "metrics.csv")[4].items()
    assert ml_flow.uri == "file:./mlruns"  # MLflow's own, and not the folder of the runs
    assert ml_flow.settings["model.values.steps"] == "2"
    assert ml_flow.ended == "FINISHED"
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert [one["class_path"].rpartition(".")[2] for one in saved] == ["CSVRunLogger", "MLFlowLogger"]
    ml_flow.numbers.clear()
    assert fit("MLFlowLogger", "--ckpt_path", "last", verb="validate") == 0
    assert {step for step, _ in ml_flow.numbers} == {4}  # edits, and not batches
    assert ml_flow.at(4)["retained/accuracy"] == read_table(run / "metrics.csv")[4]["retained/accuracy"]


def test_two_tables_are_refused(fit, tmp_path, capsys):
    assert fit(["CSVRunLogger", "RunLogger"]) == 2
    assert "trainer.logger has several of RunLogger and CSVRunLogger" in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs").exists()


def test_a_logger_alone(tmp_path):
    logger = CSVRunLogger(str(tmp_path), name="a")
    assert logger.experiment == {}
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"b": 0.5, "epoch": 1.0}, step=2)
    logger.save()
    with (tmp_path / "a" / "version_0" / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"edits": "2", "b": "0.5"}]
    again = CSVRunLogger(str(tmp_path), name="a", version=0)
    assert again.rows == {2: {"b": 0.5}}
    again.resume({}, 0)
    again.finalize("failed")  # with what was measured before it stands the folder
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in its way"):
        CSVRunLogger(str(tmp_path / "file")).version  # noqa: B018


@pytest.mark.filterwarnings("ignore")  # of the packages themselves
@pytest.mark.skipif(not wandb._WANDB_AVAILABLE, reason="the package wandb is not installed")
def test_the_real_weights_and_biases_offline(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = {"class_path": "WandbLogger", "init_args": {"save_dir": "lightning_logs", "offline": True}}
    assert fit(given) == 0
    assert list((tmp_path / "lightning_logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert read_table(folder(tmp_path) / "metrics.csv")


@pytest.mark.filterwarnings("ignore")  # of the packages themselves
@pytest.mark.skipif(not mlflow._MLFLOW_AVAILABLE, reason="the package mlflow is not installed")
def test_the_real_ml_flow_in_a_file(fit, tmp_path):
    assert fit({"class_path": "MLFlowLogger", "init_args": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}}) == 0
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    table = read_table(folder(tmp_path) / "metrics.csv")
    assert found.data.metrics["immediate/accuracy"] == table[4]["immediate/accuracy"]
    assert found.data.params["model.layers"] == "[1]"
