"""The examples of CONTRIBUTING and of the pages on extensions run as they stand, with their own imports alone."""

import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from editlab.cli.commands import Verb
from editlab.cli.main import PLUGINS, load_plugins
from editlab.data import Fact
from editlab.data.formats import FactFormat, read_record
from editlab.errors import UserError

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def module(page, name, number=0):
    """A block of a page as a module that has nothing but what the block itself imports."""
    made = ModuleType(name)
    exec(compile(blocks(page, "python")[number], f"{page.name}:{name}", "exec"), made.__dict__)
    return made


def keeps_its_state(callback):
    fresh = type(callback)()
    fresh.load_state_dict(callback.state_dict())
    return fresh.state_dict() == callback.state_dict()


def test_the_package_of_contributing(monkeypatch):
    page = ROOT / "CONTRIBUTING.md"
    (text,) = blocks(page, "toml")
    name, value = re.search(r'\[project\.entry-points\."(.+?)"\]\n(.*)', text).groups()
    assert name == PLUGINS
    point = metadata.EntryPoint(*value.split(" = ")[:1], value.split('"')[1], PLUGINS)
    assert f'py-modules = ["{point.value}"]' in text
    made = module(page, point.value)
    monkeypatch.setitem(sys.modules, point.value, made)
    monkeypatch.setattr("editlab.cli.main.entry_points", lambda group: [point])
    load_plugins()
    callback, outcome = made.Counted(), SimpleNamespace(measured={})
    callback.on_edit_done(None, None, outcome)
    assert outcome.measured == {"counted/batches": 1.0}
    assert keeps_its_state(callback)
    record = {"of": "Berlin", "ask": "{} lies in", "say": "Peru"}
    assert issubclass(made.Pairs, FactFormat)
    assert made.Pairs().matches(record)
    assert read_record(record, 3, made.Pairs()) == Fact("Berlin", "{} lies in", "Peru", id=3)


def test_the_callback():
    callback = module(HOW_TO / "add-a-callback.md", "norm_limit").NormLimit(0.1)
    scaled = []
    outcome = SimpleNamespace(
        diagnostics={"layer_4/update_norm": 0.2}, measured={}, scale=lambda factor, why: scaled.append(factor)
    )
    callback.on_edit_applied(None, SimpleNamespace(layer_numbers=[4]), outcome)
    assert scaled == [0.5]
    assert outcome.measured == {"norm_limit/scaled": 1.0}
    assert keeps_its_state(callback)


def test_the_format_and_errors_in_it():
    triples = module(HOW_TO / "add-a-data-format.md", "triples").Triples()
    record = {"s": "Berlin", "question": "Berlin lies in", "o": "Peru"}
    assert triples.matches(record)
    assert read_record(record, 0, triples) == Fact("Berlin", "{} lies in", "Peru")
    with pytest.raises(UserError, match="has an empty 'o'"):
        read_record({**record, "o": ""}, 0, triples)


def test_the_method():
    ridge = module(HOW_TO / "add-a-method.md", "ridge").Ridge(l2=0.5)
    assert ridge.slack == 0.5
    # As the solver calls it (editlab/edits/batch.py): with the device of the factorization.
    assert ridge.preservation(torch.eye(3, dtype=torch.float64), torch.device("cpu")) is not None
    (text,) = blocks(HOW_TO / "add-a-method.md", "toml")
    assert f'[project.entry-points."{PLUGINS}"]\nridge = "ridge"' in text


def test_the_verb(caplog):
    page = HOW_TO / "add-a-verb.md"
    caplog.set_level("INFO")
    command = module(page, "count").COMMAND
    command.run(["worldfacts"])
    assert "356 facts" in caplog.text
    line = eval(blocks(page, "python")[1], {"Verb": Verb})
    assert (line.name, line.help) == (command.name, command.help)
