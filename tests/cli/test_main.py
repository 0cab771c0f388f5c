"""The command line: a whole run from YAML, and errors that are one sentence with a non-zero exit."""

import csv
import json
import logging.handlers
from pathlib import Path

import pytest
import yaml

from editlab.cli.main import main
from editlab.runs.outcomes import outcome_values, read_outcomes
from tests.facts import FACTS
from tests.recipes import write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch):
    """A recipe for the tiny model, in a folder of its own that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    callbacks = [{"class_path": "MemoryReplay"}, {"class_path": "ForgettingCurve"}]
    settings = {"method": {"class_path": "EMMET"}, "values": {"steps": 4}}
    write_recipe(tmp_path, tiny_folder, model=settings, trainer={"callbacks": callbacks})
    return tmp_path / "tiny.yaml"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_validate_and_test(recipe, tmp_path, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    assert {"config.yaml", "metrics.csv", "outcomes.csv", "summary.json", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["edits"], summary["batches"], summary["recipe"], summary["seed"]) == (4, 2, "tiny", 0)
    shown = capsys.readouterr().out
    assert "4 facts edited in 2 batches" in shown
    assert "retained" in shown
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    before = read_table(run / "metrics.csv")
    outcomes = (run / "outcomes.csv").read_text()
    for verb in ("validate", "test"):
        assert main([verb, "--config", "tiny.yaml", "--ckpt_path", str(checkpoint)]) == 0
        assert f"{'retained' if verb == 'validate' else 'bystanders'}/ES" in capsys.readouterr().out
    # The same facts on the same weights have the same outcomes, whose means are the metrics.
    assert (run / "outcomes.csv").read_text() == outcomes
    rows = read_outcomes(run / "outcomes.csv")
    assert [(row["edit"], row["step"], row["status"]) for row in rows] == [
        (1, 0, "kept"), (2, 0, "kept"), (3, 1, "kept"), (4, 1, "kept"),
    ]  # fmt: skip
    for group in ("before", "immediate", "retained"):
        for name in ("ES", "accuracy", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy"):
            values = outcome_values(rows, name, group).values()
            mean = sum(values) / len(values) if values else None  # not all facts have paraphrases or neighbors
            assert mean == pytest.approx(summary["metrics"].get(f"{group}/{name}"), abs=1e-12), (group, name)
    # The run's own numbers stay; what it had not measured after its four edits, the bystanders, is added there.
    after = read_table(run / "metrics.csv")
    assert [row["edits"] for row in after] == [row["edits"] for row in before]
    kept = [{name: row[name] for name in before[0]} for row in after]
    assert kept == before
    added = set(after[0]) - set(before[0])
    assert {name.partition("/")[0] for name in added} == {"bystanders"}
    assert all(after[-1][name] and not after[0][name] for name in added)


def test_no_message_of_lightning_stands_behind_the_progress_bar(recipe):
    handler = logging.handlers.BufferingHandler(1000)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        assert main(["fit", "--config", "tiny.yaml"]) == 0
    finally:
        logger.removeHandler(handler)
    messages = [record.getMessage() for record in handler.buffer]
    assert any("GPU available" in message for message in messages)
    assert not any("max_epochs" in message for message in messages)


def read_table(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_print_config_and_help(recipe, capsys):
    for arguments in (["fit", "--config", "tiny.yaml", "--print_config"], ["fit", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "preserve_prompt_tokens" in shown
    last = shown[shown.rindex("usage:") :]
    assert "{fit,validate,test,export,apply,revert,log,ask,evaluate,compare,report,facts,sweep,completion}" in last


def test_another_source_has_its_own_step_size(recipe, capsys):
    # What is not given stays so: the default settings' source must not leave its own step size behind.
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--model.values.source", "gradient", "--print_config"])
    values = yaml.safe_load(capsys.readouterr().out)["model"]["values"]
    assert (values["source"], values["lr"]) == ("gradient", None)


VERBS = ["export", "apply", "revert", "log", "ask", "compare", "report", "facts", "facts check", "sweep", "completion"]


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        ([], 1.0),  # of EMMET, the default method
        (["--model.method", "MEMIT"], 15000.0),
        (["--config", "one.yaml"], 15000.0),  # MEMIT without arguments
        (["--config", "emmet.yaml", "--config", "one.yaml"], 15000.0),  # a recipe with lambda 3000, and another method
        (["--config", "emmet.yaml", "--model.method", "EMMET"], 3000.0),  # the same method keeps what the recipe says
    ],
)
def test_another_method_starts_with_its_own_defaults(arguments, weight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    emmet = {"class_path": "EMMET", "init_args": {"covariance_weight": 3000}}
    for name, method in (("one", {"class_path": "MEMIT"}), ("emmet", emmet)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"method": method}}))
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["model"]["method"]
    assert method["init_args"]["covariance_weight"] == weight


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: editlab {verb}" in capsys.readouterr().out.replace(" [options]", "")


def test_a_plugin_of_ones_own_is_found(recipe, tmp_path, monkeypatch, capsys):
    # A user's package registers itself in the entry-point group; its callback is then named by its bare class name.
    from importlib import metadata

    (tmp_path / "my_plugin.py").write_text(
        "from editlab.callback import EditCallback\n"
        "class Shout(EditCallback):\n"
        "    def on_edit_settled(self, trainer, editor, outcome):\n"
        "        import pathlib; pathlib.Path('shouted').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    group = "editlab.plugins"
    plain = [*metadata.entry_points(group=group), metadata.EntryPoint("mine", "my_plugin", group)]
    monkeypatch.setattr("editlab.cli.main.entry_points", lambda group: plain)
    callbacks = json.dumps([{"class_path": "Shout"}])
    assert main(["fit", "--config", "tiny.yaml", "--trainer.callbacks=null", f"--trainer.callbacks={callbacks}"]) == 0
    assert (tmp_path / "shouted").exists()


def test_a_broken_plugin_is_named(monkeypatch, capsys):
    from importlib import metadata

    broken = metadata.EntryPoint("mine", "no_such_module", "editlab.plugins")
    monkeypatch.setattr("editlab.cli.main.entry_points", lambda group: [broken])
    assert main(["fit", "--help"]) == 2
    assert "plug-in 'mine'" in capsys.readouterr().err


def test_facts_fixture_is_large_enough():
    assert len(FACTS) >= 6
