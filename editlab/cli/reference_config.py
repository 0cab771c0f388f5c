"""``configs/reference.yaml``: every setting that ``fit`` accepts, with its default and its docstring as a comment.

Only one method, one logger and no callback can be set by default, so the settings of the other classes stand there too,
commented out.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback

from editlab.callback import EditCallback
from editlab.cli.main import load_plugins
from editlab.cli.training import trainer_parsers
from editlab.data.formats import FactFormat
from editlab.runs.logger import RunLogger
from editlab.solver.base import EditMethod
from editlab.solver.post_steps import PostStep
from editlab.utils import compat

HEADER = """\
# editlab validate-config configs/reference.yaml
# editlab fit --config configs/reference.yaml --data.limit 16
#
# Every setting that fit accepts, with its default and what it does. Copy the lines that you want to change into a
# recipe of your own: all others keep these defaults. Only one method and one file format can be chosen at a time, and
# no callback is there by default; the settings of the others are commented out below the ones that are set.
#
# Made from the docstrings by scripts/make_reference_config.py: change those, and run it again. The Trainer's settings
# are those of Lightning {lightning}.
"""

WIDTH = 120
"""Largest length of a line."""

SECTIONS = ("model", "data", "trainer")
"""The sections in their order."""

CLASSES: Mapping[str, type] = {
    "model.method": EditMethod,
    "model.post_steps": PostStep,
    "data.format": FactFormat,
    "trainer.logger": RunLogger,
    "trainer.callbacks": Callback,
}
"""Setting -> base of the classes that it takes, of which editlab's own are shown with their settings."""

LISTS = ("model.post_steps", "trainer.callbacks")
"""Settings of :data:`CLASSES` that take a list of classes."""

TRAINER = "Lightning's Trainer: devices, loggers and callbacks. Most of its settings are for training by gradients."
"""Title of the Trainer's section, in place of Lightning's."""

NO_SETTINGS = ("help", "config", "print_config", "print_shtab")
"""Arguments of the parser that no recipe holds."""
PACKAGES = ("editlab", "callbacks")
"""Packages whose classes are shown."""
FOR_EXPERIMENTS = ("editlab.experiments.", "callbacks.trust.fork")
"""Modules whose classes are not shown: a recipe names them by their full path."""


@dataclass(frozen=True)
class Setting:
    """A setting of ``fit`` or of a class."""

    name: str
    """its name with dots, such as ``model.values.steps``"""
    text: str
    """what it does"""
    default: Any
    """as YAML holds it"""


@dataclass
class _Section:
    """Settings, and sections of further ones, by name."""

    title: str = ""
    below: dict[str, _Section | Setting] = field(default_factory=dict)

    def section(self, path: Sequence[str]) -> _Section:
        """Return the section at the end of a path of names; those on the way are made."""
        if not path:
            return self
        inner = self.below.setdefault(path[0], _Section())
        assert isinstance(inner, _Section), path
        return inner.section(path[1:])


def reference_config() -> str:
    """Return the content of ``configs/reference.yaml``."""
    load_plugins()
    parser, whole = trainer_parsers("fit")["fit"], _Section()
    for name in SECTIONS:
        whole.section([name])
    for setting in settings_of(parser):
        *path, name = setting.name.split(".")
        whole.section(path).below[name] = setting
    for name, group in (parser.groups or {}).items():
        if name.partition(".")[0] in SECTIONS:
            whole.section(name.split(".")).title = plain(group.title or "")
    whole.section(["trainer"]).title = TRAINER
    return "\n".join([HEADER.format(lightning=minor_version()), *_lines(whole)]) + "\n"


def minor_version() -> str:
    """Return the version of Lightning without its last part; its Trainer's settings are the same in all of these."""
    return ".".join(lightning.__version__.split(".")[:2])


def settings_of_class(cls: type) -> list[Setting]:
    """Return the settings of a class that a recipe may name."""
    compat.read_attribute_docstrings()
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        return settings_of(parser)
    finally:
        compat.read_attribute_docstrings(False)


def classes_of(name: str) -> list[type]:
    """Return the classes of editlab that the setting takes, sorted by name; not those of plug-ins or of Lightning."""

    def below(base: type) -> Iterator[type]:
        yield base
        subclasses: list[type] = base.__subclasses__()
        for sub in subclasses:
            yield from below(sub)

    found = {cls for cls in below(CLASSES[name]) if cls.__module__.partition(".")[0] in PACKAGES}
    found = {cls for cls in found if cls is not EditCallback and not issubclass(cls, SaveConfigCallback)}
    # Callbacks of experiments, such as faults on purpose, are there only if something has imported them.
    found = {cls for cls in found if not cls.__module__.startswith(FOR_EXPERIMENTS)}
    return sorted((cls for cls in found if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)


def settings_of(parser: ArgumentParser) -> list[Setting]:
    """Return every setting that a parser reads, in its order."""
    defaults, found = parser.get_defaults(), []
    for argument in compat.arguments_of(parser):
        of_a_section = argument.default == SUPPRESS
        if not of_a_section and argument.dest not in NO_SETTINGS:
            text = f"{argument.help or ''}{' It must be given.' if argument.required else ''}"
            found.append(Setting(argument.dest, plain(text), _as_yaml(defaults.get(argument.dest))))
    return found


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Namespace):
        return _as_yaml(value.as_dict())
    if isinstance(value, Mapping):
        return {name: _as_yaml(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_yaml(one) for one in value]
    return value


def plain(text: str) -> str:
    """Return a docstring's text as one paragraph without reStructuredText's marks, as a whole sentence.

    >>> plain("number of ``steps``; see :mod:`editlab.values`")
    'Number of `steps`; see editlab.values.'
    """
    text = re.sub(r":\w+:`~?(?:[^`<]*<)?([\w.]+)[^`]*`", r"\1", text).replace("``", "`")
    text = " ".join(text.split())
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


# ---- writing ------------------------------------------------------------------------------------------------------


def _lines(section: _Section, indent: str = "") -> Iterator[str]:
    """Yield the settings of a section, and after them the sections in it."""
    for inner in section.below.values():
        if isinstance(inner, Setting):
            yield from _choice(inner, indent) if inner.name in CLASSES else _one(inner, indent)
    for name, inner in section.below.items():
        if isinstance(inner, _Section):
            yield ""
            yield from _comment(inner.title, indent)
            yield f"{indent}{name}:"
            yield from _lines(inner, f"{indent}  ")


def _one(setting: Setting, indent: str, width: int = WIDTH) -> Iterator[str]:
    """Yield the comment of a setting, and the setting."""
    yield from _comment(setting.text, indent, width)
    yield f"{indent}{setting.name.rpartition('.')[2]}: {_value(setting.default)}"


def _comment(text: str, indent: str, width: int = WIDTH) -> Iterator[str]:
    start = f"{indent}# "
    yield from textwrap.wrap(text, width, initial_indent=start, subsequent_indent=start,
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _value(value: Any) -> str:
    """Return a value as YAML writes it within a line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _choice(setting: Setting, indent: str) -> Iterator[str]:
    """Yield a setting that takes classes: the default with its settings, and all others commented out."""
    name = setting.name.rpartition(".")[2]
    others, chosen = classes_of(setting.name), None
    yield from _comment(setting.text, indent)
    if isinstance(setting.default, Mapping):
        chosen = next(cls for cls in others if cls.__name__ == setting.default["class_path"].rpartition(".")[2])
        yield f"{indent}{name}:"
        yield from _class(chosen, f"{indent}  ")
    else:
        yield f"{indent}{name}: {_value(setting.default)}"
    others = [cls for cls in others if cls is not chosen]
    width = WIDTH - len(indent) - len("# ")
    if setting.name in LISTS:
        yield f"{indent}# {name}:"
    for cls in others:
        if setting.name in LISTS:
            first, *rest = _class(cls, "    ", width)
            lines = [first.replace("    ", "  - ", 1), *rest]
        else:
            lines = [f"{name}:", *_class(cls, "  ", width)]
        yield from (f"{indent}# {line}" for line in lines)


def _class(cls: type, indent: str, width: int = WIDTH) -> Iterator[str]:
    """Yield a class with its settings."""
    own = settings_of_class(cls)
    yield f"{indent}class_path: {cls.__name__}"
    if own:
        yield f"{indent}init_args:"
        for setting in own:
            yield from _one(setting, f"{indent}  ", width)
