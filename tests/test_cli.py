"""The command line: a whole run from YAML, and errors that are one sentence with a non-zero exit."""

import json
from pathlib import Path

import pytest
import yaml

from editlab.cli import main
from tests.facts import FACTS, write_counterfact

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch):
    """A recipe for the tiny model, in a folder of its own that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    write_counterfact(tmp_path / "facts.json")
    config = {
        "model": {
            "language_model": str(tiny_folder), "layers": [1, 2], "rule": {"class_path": "EMMET"},
            "values": {"steps": 4}, "moments": {"tokens": 256}, "contexts": {"count": 1, "length": 3},
            "evaluation": {"heldout_tokens": 64},
        },
        "data": {"path": "facts.json", "limit": 4, "batch_size": 2, "only_known": False},
        "trainer": {
            "accelerator": "cpu", "enable_progress_bar": False,
            "callbacks": [{"class_path": "MemoryReplay"}, {"class_path": "ForgettingCurve"}],
        },
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "tiny.yaml"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_validate_and_test(recipe, tmp_path, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    assert {"config.yaml", "metrics.csv", "summary.json", "checkpoints"} <= {p.name for p in run.iterdir()}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["edits"], summary["batches"], summary["recipe"], summary["seed"]) == (4, 2, "tiny", 0)
    shown = capsys.readouterr().out
    assert "4 facts edited in 2 batches" in shown
    assert "retained" in shown
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    for verb in ("validate", "test"):
        assert main([verb, "--config", "tiny.yaml", "--ckpt_path", str(checkpoint)]) == 0


def test_print_config_and_help(recipe, capsys):
    for arguments in (["fit", "--config", "tiny.yaml", "--print_config"], ["fit", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "preserve_prompt_tokens" in shown
    last = shown[shown.rindex("usage:") :]
    assert "{fit,validate,test,export,apply,revert,ask,facts}" in last


@pytest.mark.parametrize("verb", ["export", "apply", "revert", "ask", "facts", "facts check"])
def test_each_verb_has_its_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: editlab {verb}" in capsys.readouterr().out.replace(" [options]", "")


def changed(recipe, **changes):
    """The recipe with sections updated, under another name."""
    config = yaml.safe_load(recipe.read_text())
    for section, values in changes.items():
        config.setdefault(section, {}).update(values) if isinstance(values, dict) else config.update({section: values})
    path = recipe.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


BAD = {
    "unknown layer": ({"model": {"layers": [7]}}, [], 2, "the model's layers are 0 to 3"),
    "misspelt callback": (
        {"trainer": {"callbacks": [{"class_path": "MemoryReply"}]}}, [], 2, "did you mean MemoryReplay?"),
    "misspelt argument": (
        {"trainer": {"callbacks": [{"class_path": "MemoryReplay", "init_args": {"rat": 1}}]}}, [], 2,
        "MemoryReplay has no argument 'rat': did you mean rate?"),
    "misspelt rule": ({"model": {"rule": {"class_path": "EMMETT"}}}, [], 2, "did you mean EMMET?"),
    "unknown section": ({"modle": {"layers": [1]}}, [], 2, "There is no setting 'modle"),
    "unknown flag": ({}, ["--model.layerz", "1"], 2, "There is no setting 'model.layerz'"),
    "wrong type": ({}, ["--data.limit", "many"], 2, "data.limit is 'many': it must be int or null"),
    "out of range": ({}, ["--data.batch_size", "0"], 2, "data.batch_size is 0: it must be at least 1"),
    "missing facts": ({}, ["--data.path", "none.json"], 2, "fact file none.json does not exist"),
    "empty facts": ({}, ["--data.path", "empty.json"], 2, "holds no record"),
    "missing model": ({}, ["--model.language_model", "./nowhere"], 2, "nowhere"),
    "rome in batches": ({"model": {"rule": {"class_path": "ROME"}}}, [], 2, "set data.batch_size to 1"),
    "missing checkpoint": ({}, ["--ckpt_path", "none.ckpt"], 2, "The checkpoint 'none.ckpt' does not exist"),
    "missing text": ({"model": {"moments": {"text": "none.txt"}}}, [], 2, "The text 'none.txt' does not exist"),
    "short text": ({"model": {"evaluation": {"heldout_tokens": 10**6}}}, [], 2, "lower the number of tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_sentence(recipe, tmp_path, capsys, case):
    changes, flags, code, message = BAD[case]
    (tmp_path / "empty.json").write_text("[]")
    assert main(["fit", *changed(recipe, **changes), *flags]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("editlab: ")
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", "none.yaml"], "none.yaml' does not exist: check --config"),
        (["frobnicate"], "There is no verb 'frobnicate': say fit, validate, test, export, apply, revert, ask or facts"),
        (["exprot"], "There is no verb 'exprot': did you mean export?"),
        ([], "A verb is missing: --help lists them"),
        (["facts"], "A verb is missing: --help lists them"),
        (["facts", "chek"], "There is no verb 'chek': did you mean check?"),
        (["facts", "check"], "file is missing: --help"),
        (["facts", "check", "a", "b"], "There is no setting 'b'"),
        (["export"], "ckpt_path and out are missing: --help"),
        (["export", "--ckpt_path"], "--ckpt_path has no value"),
        (["fit", "--config", "broken.yaml"], "not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("model: [1\n  x: 1\n")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_plugin_of_ones_own_is_found(recipe, tmp_path, monkeypatch, capsys):
    # A user's package registers itself in the entry-point group; its callback is then named by its bare class name.
    from importlib import metadata

    (tmp_path / "my_plugin.py").write_text(
        "from editlab.events import EditCallback\n"
        "class Shout(EditCallback):\n"
        "    def on_edit_settled(self, trainer, editor, outcome):\n"
        "        import pathlib; pathlib.Path('shouted').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    group = "editlab.plugins"
    plain = [*metadata.entry_points(group=group), metadata.EntryPoint("mine", "my_plugin", group)]
    monkeypatch.setattr("editlab.cli.entry_points", lambda group: plain)
    assert main(["fit", *changed(recipe, trainer={"callbacks": [{"class_path": "Shout"}]})]) == 0
    assert (tmp_path / "shouted").exists()


def test_a_broken_plugin_is_named(monkeypatch, capsys):
    from importlib import metadata

    broken = metadata.EntryPoint("mine", "no_such_module", "editlab.plugins")
    monkeypatch.setattr("editlab.cli.entry_points", lambda group: [broken])
    assert main(["fit", "--help"]) == 2
    assert "plug-in 'mine'" in capsys.readouterr().err


def test_facts_fixture_is_large_enough():
    assert len(FACTS) >= 6
