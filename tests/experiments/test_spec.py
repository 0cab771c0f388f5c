"""The schema of experiments: all committed ones are valid, and each mistake is one sentence that says how to fix it."""

import re
from pathlib import Path

import pytest

from editlab.cli.validation import validate
from editlab.errors import UserError
from editlab.experiments.plan import Options, cases
from editlab.experiments.spec import load_experiment
from editlab.utils.shipped import copy

PROJECT = Path(__file__).parents[2]
FILES = sorted((PROJECT / "configs" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_experiments_are_valid(file):
    experiment = load_experiment(file)
    assert experiment.project == PROJECT
    assert experiment.question.endswith("?")
    assert experiment.quick is not None
    assert cases(experiment, Options(), 1)


def kinds(experiment):
    """One case for each set of settings and callbacks that cases have; they differ in numbers alone."""
    found = {}
    for case in cases(experiment, Options(), 1):
        classes = [one["class_path"] for one in case.callbacks]
        found.setdefault(str((sorted(case.flags), case.labels.get("method"), classes)), case)
    return list(found.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_kind_of_case_is_a_recipe_that_fit_accepts(file, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    experiment = load_experiment(file)
    for case in kinds(experiment):
        _, _, recipe, *settings = case.arguments(experiment.recipe, 1, tmp_path)
        there = ["--data.path=worldfacts", "--model.moments.text=self", "--model.evaluation.heldout=builtin"]
        assert " facts of worldfacts" in validate([recipe], [*settings, *there]), case.name


def load(folder, text, recipe=True):
    if recipe:
        (folder / "recipe.yaml").write_text("")
    (folder / "my.yaml").write_text(text)
    return load_experiment(folder / "my.yaml")


CASES = "recipe: recipe.yaml\ncases: {a: {}, b: {}}\n"


@pytest.mark.parametrize(("text", "message"), [
    ("recipe: recipe.yaml\ncase: {a: {}}", r"unknown key 'case': did you mean 'cases'\?"),
    ("cases: {a: {}}", r"lacks the key 'recipe': add it"),
    ("recipe: recipe.yaml", r"has no cases: add at least one"),
    ("- a", r"must be a mapping of recipe, cases, .*, and is \['a'\]"),
    ("recipe: [", r"is not valid YAML \(see line 1\): correct it"),
    ("recipe: other.yaml\ncases: {a: {}}", r"there is no recipe 'other\.yaml' in .*: correct its path"),
    ("recipe: recipe.yaml\ncases: {a: {callback: []}}", r"cases: a has an unknown key 'callback': did you mean"),
    ("recipe: recipe.yaml\ncases: {a: {callbacks: [{init_args: {}}]}}",
     r"cases: a: callbacks: item 1 lacks the key 'class_path'"),
    (CASES + "seeds: 1", r"seeds must be a list, and is 1: write it in brackets"),
    (CASES + "seeds: [one]", r"seeds: item 1 must be a whole number, and is 'one'"),
    (CASES + "seeds: []", r"seeds is empty: give at least one"),
    (CASES + "edits: true", r"edits must be a whole number, and is True"),
    (CASES + "edits: 0", r"edits must be at least 1, and is 0"),
    (CASES + "flags: [a]", r"flags must be a mapping, and is \['a'\]"),
    (CASES + "tables: [{file: t.csv, rows: means, against: a}]", r"the table t\.csv needs a table of runs above it"),
    (CASES + "figures: [{kind: pie, file: f, table: t.csv}]", r"needs a 'kind' among curves, .*, and has 'pie'"),
    (CASES + "figures: [{kind: roc, file: f, table: t.csv}]", r"the figure f is of t\.csv, which is no file under"),
    (CASES + "tables: [{file: t.csv, rows: snapshots}]\n"
     "figures: [{kind: curves, file: f, table: t.csv, rows: [{a: {label: A, color: red}}]}]",
     r"rows: item 1: a: color must be one of blue, .*, and is 'red'"),
])  # fmt: skip
def test_each_mistake_is_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "my.yaml"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("logger", ["WandbLogger", "[RunLogger]", "{class_path: MLFlowLogger}", "false"])
def test_a_recipe_with_another_logger_is_refused(tmp_path, logger):
    (tmp_path / "recipe.yaml").write_text(f"trainer: {{logger: {logger}}}")
    with pytest.raises(UserError, match=r"by one RunLogger or CSVRunLogger: leave trainer\.logger out of the recipe"):
        load(tmp_path, CASES, recipe=False)
    for own in ("editlab.runs.logger.RunLogger", "{class_path: CSVRunLogger}", "null"):
        (tmp_path / "recipe.yaml").write_text(f"trainer: {{logger: {own}}}")
        assert load(tmp_path, CASES, recipe=False).recipe == "recipe.yaml"


def test_a_missing_file():
    with pytest.raises(UserError, match=r"There is no experiment file 'nowhere\.yaml': editlab ls lists those"):
        load_experiment("nowhere.yaml")


@pytest.mark.parametrize(("text", "message"), [
    ("tables: [{file: t.csv, rows: runs}, {file: m.csv, rows: means, against: c}]",
     r"the table m\.csv names the case 'c': there are a, b\."),
    ("tables: [{file: t.csv, rows: runs}, {file: m.csv, rows: means}]", r"m\.csv of means needs 'against'"),
    ("tables: [{file: m.csv, rows: runs}]\n"
     "figures: [{kind: frontier, file: f, table: m.csv, x: x, xlabel: x, families: {A: {c: C}}, panels: {y: y}}]",
     r"the figure f names the case 'c'"),
    ("quick: {only: [c]}", r"quick names the case 'c': there are a, b\."),
    ("copies: [{file: x.jsonl, case: c}]", r"the copied file x\.jsonl names the case 'c'"),
    ("flags: {data.limit: '{edits}'}", r"a: \{edits\} stands for nothing: use one of .*seed.*, or set edits"),
    ("grids: [{name: '{x}_{y}', axes: {x: [1]}}]", r"the name '\{x\}_\{y\}' of a grid must be of its axes x"),
    ("grids: [{name: '{x}', axes: {x: [1]}, cells: nowhere.at_all}]", r"no function 'nowhere\.at_all': correct"),
])  # fmt: skip
def test_each_wrong_reference_is_one_sentence(tmp_path, text, message):
    experiment = load(tmp_path, CASES + text)
    with pytest.raises(UserError, match=message):
        cases(experiment, Options(), 1)


def test_a_recipe_is_found_from_the_experiment_s_folder_upward_or_from_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "recipe.yaml").write_text("")
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    text = "recipe: configs/recipe.yaml\ncases: {a: {}}"
    assert load(tmp_path / "mine" / "deep", text, recipe=False).project == tmp_path
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert load(elsewhere, text, recipe=False).project == tmp_path


def test_yaml_anchors_and_typed_values(tmp_path):
    experiment = load(
        tmp_path,
        """
recipe: recipe.yaml
definitions: {replay: &replay {class_path: MemoryReplay, init_args: {rate: 0.3}}}
cases: {a: {callbacks: [*replay]}}
heldout: [nowhere/text.txt, builtin]
tables: [{file: t.csv, rows: snapshots}]
figures: [{kind: curves, file: f, table: t.csv, rows: [{a: {label: A}}]}]
""",
    )
    (callback,) = experiment.cases["a"].callbacks
    assert (callback.class_path, callback.init_args) == ("MemoryReplay", {"rate": 0.3})
    assert experiment.seeds == (1, 2, 3)
    (figure,) = experiment.figures
    assert figure.rows[0]["a"].color == "black"


OTHER = """
recipe: recipe.yaml
definitions: {replay: &replay {class_path: MemoryReplay}}
flags: {model.layers: [1], data.split: test}
cases: {a: {callbacks: [*replay]}, b: {}}
edits: 20
"""


def test_an_experiment_may_be_like_another(tmp_path):
    (tmp_path / "other.yaml").write_text(OTHER)
    for name in ("other", "other.yaml", str(tmp_path / "other.yaml")):
        experiment = load(tmp_path, f"like: {name}\nedits: 30\nflags: {{data.keep: known, data.split: dev}}")
        assert experiment.name == "my"
        assert experiment.edits == 30  # its own key counts
        assert list(experiment.cases) == ["a", "b"]
        assert experiment.cases["a"].callbacks[0].class_path == "MemoryReplay"
        assert experiment.flags == {"model.layers": [1], "data.split": "dev", "data.keep": "known"}
    (tmp_path / "between.yaml").write_text("like: other\nseeds: [7]")
    experiment = load(tmp_path, "like: between")
    assert (experiment.seeds, experiment.edits) == ((7,), 20)


def test_an_experiment_may_be_like_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = load(tmp_path, "like: preferred_counterfact\nfacts: mine.json", recipe=False)
    assert experiment.facts == "mine.json"
    assert list(experiment.cases) == list(load_experiment("preferred_counterfact").cases)
    assert experiment.project == tmp_path


@pytest.mark.parametrize(("text", "message"), [
    ("like: nowhere", "There is no experiment file 'nowhere'"),
    ("like: [other]", r"like must be the name of an experiment or the path of its file, and is \['other'\]"),
    ("like: my", r"like leads from my\.yaml back to itself"),
    ("like: back", r"like leads from my\.yaml back to itself"),
    ("like: list", r"is like .*list\.yaml, which is no experiment"),
    ("like: broken", r"broken\.yaml is not valid YAML"),
    ("like: other\nflags: [1]", r"flags must be a mapping"),
])  # fmt: skip
def test_what_an_experiment_cannot_be_like(tmp_path, text, message):
    others = {"other": OTHER, "back": "like: my", "list": "[1]", "broken": "a: ["}
    for name, content in others.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_a_shipped_experiment_starts_its_runs_where_the_user_stands(tmp_path, monkeypatch):
    """Only its path in a checkout means that project; a copy belongs to its own folder."""
    monkeypatch.chdir(tmp_path)
    shipped = PROJECT / "configs" / "experiments" / "targets.yaml"
    assert load_experiment("targets").project == tmp_path
    assert load_experiment("configs/experiments/targets.yaml").project == tmp_path
    assert load_experiment(shipped).project == PROJECT
    copied = copy("targets", "mine")
    assert load_experiment(copied).project == tmp_path / "mine"
    monkeypatch.setattr("editlab.experiments.spec.in_checkout", lambda: False)  # as from a wheel
    assert load_experiment(shipped).project == tmp_path


def test_a_recipe_may_be_a_name_that_ships(tmp_path):
    assert load(tmp_path, "recipe: rome\ncases: {a: {}}", recipe=False).project == tmp_path


@pytest.mark.parametrize(("name", "end"), [
    ("target", "did you mean targets?"), ("rome", "rome is the name of a recipe, for editlab fit --config rome."),
])  # fmt: skip
def test_an_unknown_name_of_an_experiment(name, end):
    with pytest.raises(UserError, match=f"There is no experiment file '{name}': {re.escape(end)}"):
        load_experiment(name)
