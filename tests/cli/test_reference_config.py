"""configs/reference.yaml: up to date, complete, and a valid recipe that changes nothing."""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import yaml

from editlab.cli.main import main
from editlab.cli.reference_config import CLASSES, classes_of, minor_version, plain, reference_config
from editlab.cli.training import trainer_parsers
from editlab.utils import compat

FILE = Path(__file__).parents[2] / "configs" / "reference.yaml"
TEXT = FILE.read_text(encoding="utf-8")
SAME_LIGHTNING = f"Lightning {minor_version()}." in TEXT


def own(text):
    """The part that does not depend on the version of Lightning."""
    return text[text.index("\nmodel:") : text.index("\ntrainer:")]


@pytest.mark.parametrize("part", [own, *([str] if SAME_LIGHTNING else [])])
def test_it_is_up_to_date(made, part):
    assert part(made) == part(TEXT), "run python scripts/make_reference_config.py"


@pytest.fixture(scope="module")
def made():
    return reference_config()


def keys(mapping, above=""):
    """Every key of nested mappings, with dots, down to the settings of classes."""
    for name, value in mapping.items():
        path = f"{above}{name}"
        if isinstance(value, dict) and "class_path" not in value:
            yield from keys(value, f"{path}.")
        else:
            yield path


def test_every_setting_is_there_once_with_its_comment():
    parser = trainer_parsers("fit")["fit"]
    wanted = {
        argument.dest
        for argument in compat.arguments_of(parser)
        if type(argument).__name__ == "ActionTypeHint" and (SAME_LIGHTNING or not argument.dest.startswith("trainer."))
    }
    assert len(wanted) > 90
    found = list(keys(yaml.safe_load(TEXT)))
    assert wanted <= set(found)
    assert len(found) == len(set(found))
    lines = TEXT.splitlines()
    # The line above a setting, or above what is commented out, is a comment; that of a class is its setting's.
    bare = [
        line for above, line in itertools.pairwise(lines)
        if re.match(r" *\w+:", line) and not above.lstrip().startswith("#")
        and not re.match(r" *(class_path|init_args):", line)
    ]  # fmt: skip
    assert bare == []


def block(cls):
    """The commented-out settings of a class, as YAML; None for the class that is the default."""
    found = re.search(rf"^( *)# (?:  - |  )class_path: {cls.__name__}\n((?:\1#   (?!- ).*\n)*)", TEXT, re.MULTILINE)
    return found and yaml.safe_load("\n".join(line.strip()[2:] for line in found[2].splitlines()))


@pytest.mark.parametrize(("name", "cls"), [(name, cls) for name in CLASSES for cls in classes_of(name)])
def test_every_class_is_there_with_its_settings(name, cls):
    section, setting = name.split(".")
    default = yaml.safe_load(TEXT)[section][setting]
    chosen = isinstance(default, dict) and default["class_path"] == cls.__name__
    content = default if chosen else block(cls)
    signature = inspect.signature(cls).parameters.values()
    wanted = {one.name: one.default for one in signature if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    given = (content or {}).get("init_args", {})
    assert given.keys() == wanted.keys()
    for key, value in given.items():
        assert value == wanted[key] or wanted[key] is inspect.Parameter.empty or isinstance(wanted[key], (tuple, list))


def test_what_yaml_may_name_is_shown():
    shown = {name: {cls.__name__ for cls in classes_of(name)} for name in CLASSES}
    assert {"ROME", "MEMIT", "EMMET", "AlphaEdit", "Retrieval"} <= shown["model.method"]
    assert {"MemoryReplay", "TrustRollback", "LoRAAdjust", "ForgettingCurve"} <= shown["trainer.callbacks"]
    assert shown["trainer.logger"] == {"RunLogger"}
    assert not {"EditCallback", "SaveConfig", "EditMethod", "Method"} & set().union(*shown.values())


@pytest.mark.skipif(not SAME_LIGHTNING, reason="the Trainer's settings are those of another Lightning")
def test_it_is_the_defaults(capsys):
    printed = []
    for arguments in ([], ["--config", str(FILE)]):
        with pytest.raises(SystemExit):
            main(["fit", *arguments, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]


@pytest.mark.skipif(not SAME_LIGHTNING, reason="the Trainer's settings are those of another Lightning")
def test_it_is_valid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["validate-config", "reference"]) == 0
    assert "valid: edits all facts of worldfacts" in capsys.readouterr().out


def test_marks_of_docstrings_are_removed():
    assert plain(":class:`a <b.C>` and :func:`~x.y`\n ``z``") == "B.C and x.y `z`."
    assert plain("") == ""
