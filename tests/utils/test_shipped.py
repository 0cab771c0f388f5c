"""What ships with editlab: each file has a name of its own and says what it is; names become paths."""

import logging
from pathlib import Path

import pytest

from editlab.errors import EditLabError, UserError
from editlab.utils import shipped as module
from editlab.utils.shipped import (
    EXPERIMENTS,
    KINDS,
    MODELS,
    RECIPES,
    SETTINGS,
    about,
    chosen,
    copy,
    find,
    resolve,
    shipped,
    shipped_folder,
    unknown,
)  # fmt: skip

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_are_those_of_configs():
    assert shipped_folder() == CONFIGS
    found = {one.path for kind in KINDS for one in shipped(kind)}
    assert found == set(CONFIGS.rglob("*.yaml"))


def test_no_two_files_have_one_name():
    names = [one.name for kind in KINDS for one in shipped(kind)]
    assert len(set(names)) == len(names)


def test_each_file_says_what_it_is_in_a_sentence():
    said = [one.about for kind in KINDS for one in shipped(kind)]
    assert [text for text in said if not text.endswith((".", "?")) or "editlab " in text or "\n" in text] == []


def test_a_checkout_and_a_wheel_have_them_in_other_folders(folder, monkeypatch):
    # The module lies in PACKAGE/utils; a wheel has configs in the package, a checkout next to it.
    monkeypatch.setattr(module, "__file__", str(folder / "lib" / "editlab" / "utils" / "shipped.py"))
    with pytest.raises(EditLabError, match="install editlab again"):
        shipped_folder()
    for where, checkout in (("lib/configs", True), ("lib/editlab/configs", False)):
        for kind in (MODELS, EXPERIMENTS):
            (folder / where / kind).mkdir(parents=True)
        assert shipped_folder() == folder / where
        assert module.in_checkout() == checkout


@pytest.mark.parametrize(
    ("name", "kinds", "path"),
    [
        ("rome", KINDS, "rome.yaml"),
        ("configs/rome.yaml", KINDS, "rome.yaml"),
        ("gpt2-xl", SETTINGS, "models/gpt2-xl.yaml"),
        ("models/gpt2-xl", SETTINGS, "models/gpt2-xl.yaml"),
        ("configs/models/gpt2-xl.yaml", SETTINGS, "models/gpt2-xl.yaml"),
        ("targets", (EXPERIMENTS,), "experiments/targets.yaml"),
        ("targets", SETTINGS, None),
        ("experiments/targets", SETTINGS, None),
        ("models/rome", KINDS, None),
        ("rome.yaml", KINDS, None),  # a file of the working folder
        ("mine/rome", KINDS, None),
        ("", KINDS, None),
    ],
)
def test_a_name_is_found(name, kinds, path):
    found = find(name, kinds)
    assert (found and found.path) == (path and CONFIGS / path)


def said(caplog, name, kinds=SETTINGS):
    caplog.clear()
    with caplog.at_level(logging.INFO, "editlab"):
        path = resolve(name, kinds)
    return path, [record.getMessage() for record in caplog.records]


@pytest.fixture
def _heard(monkeypatch):
    monkeypatch.setattr(logging.getLogger("editlab"), "propagate", True)


@pytest.mark.usefixtures("_heard")
def test_a_file_of_the_folder_wins_and_the_log_says_which_was_taken(folder, caplog):
    rome = str(CONFIGS / "rome.yaml")
    assert said(caplog, "rome") == (rome, [f"--config rome: the recipe that ships with editlab, {rome}"])
    (folder / "rome").mkdir()  # a folder of that name, such as a model's, is no recipe
    assert resolve("rome") == rome
    (folder / "rome.yaml").write_text("")
    other = ", and not the recipe that ships with editlab"
    assert said(caplog, "rome") == ("rome.yaml", [f"--config rome: the file rome.yaml of this folder{other}"])
    assert said(caplog, "rome.yaml") == ("rome.yaml", [])
    (folder / "memit").write_text("")
    assert said(caplog, "memit") == ("memit", [f"--config memit: the file memit of this folder{other}"])
    assert said(caplog, rome) == (rome, [])
    assert said(caplog, "nothing") == ("nothing", [])


@pytest.mark.parametrize("name", ["{model: {passes: 2}}", "a\0b", "x" * 5000, "~nobody-of-that-name/x", "targets"])
def test_what_is_no_name_stays_as_it_is(name):
    assert chosen(name) == name


@pytest.mark.parametrize(
    ("name", "kinds", "end"),
    [
        ("emmet_reply", SETTINGS, "did you mean emmet_replay"),
        ("targets.yaml", SETTINGS, "targets is the name of an experiment, for editlab sweep targets."),
        ("memit", (EXPERIMENTS,), "memit is the name of a recipe, for editlab fit --config memit."),
        ("gpt2-xl", (EXPERIMENTS,), "gpt2-xl is the name of a preset, for editlab fit --config gpt2-xl."),
        ("qqqq", KINDS, "editlab ls lists those that ship with editlab."),
    ],
)
def test_an_unknown_name(name, kinds, end):
    assert unknown(name, kinds).startswith(end)


def test_a_copy_is_the_file_and_overwrites_nothing_unasked(folder):
    original = (CONFIGS / "models" / "gpt2-xl.yaml").read_bytes()
    for name, target, path in [
        ("gpt2-xl", ".", "gpt2-xl.yaml"),
        ("configs/models/gpt2-xl.yaml", "deep/er", "deep/er/gpt2-xl.yaml"),
        ("gpt2-xl.yaml", "mine.yaml", "mine.yaml"),
    ]:
        assert copy(name, target) == Path(path)
        assert (folder / path).read_bytes() == original
    (folder / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"^mine\.yaml exists, and is not overwritten: name another folder, or use"):
        copy("rome", "mine.yaml")
    assert (folder / "mine.yaml").read_text() == "mine"
    copy("rome", "mine.yaml", force=True)
    assert (folder / "mine.yaml").read_bytes() == (CONFIGS / "rome.yaml").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "gpt2-xl.yaml", "mine.yaml"]


def test_what_cannot_be_copied(folder):
    with pytest.raises(UserError, match=r"No recipe, preset or experiment is called 'emet': did you mean emmet"):
        copy("emet")
    (folder / "rome.yaml").mkdir()
    with pytest.raises(UserError, match=r"rome\.yaml is a folder"):
        copy("rome", force=True)
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="in its way"):
        copy("rome", "file")


def test_the_first_sentence_of_a_comment_that_is_no_command():
    assert about("# editlab fit -c x\n# editlab fit\n#\n# A, e.g. b. C\n# d.\nmodel: {}\n# E.") == "A, e.g. b."
    assert about("# A\n# b.\n#\n#   editlab sweep x\n") == "A b."
    assert about("model: {}\n# A.") == ""


def test_kinds():
    assert (RECIPES, MODELS, EXPERIMENTS) == KINDS
