"""Messages of the configuration parser and the Trainer about a mistake, replaced by one sentence with a fix."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from editlab.data.formats import FactFormat
from editlab.errors import causes
from editlab.solver.base import EditMethod
from editlab.solver.post_steps import PostStep
from editlab.utils.shipped import SETTINGS, unknown

_NO_TRAINER = re.compile(
    r"You selected an invalid (accelerator|strategy)|Precision .* is invalid|The strategy `\w+` requires"
)
"""Beginnings of the Trainer's plain errors about its arguments."""

_NAMED_IN_YAML: tuple[type, ...] = (EditMethod, PostStep, FactFormat, Callback, Logger)


def explain(error: Exception) -> str | None:
    """Return one sentence for a mistake in the configuration; None for an error of another kind."""
    if isinstance(error, FileNotFoundError) and "heckpoint" in str(error):
        return f"The checkpoint {str(error).split(': ')[-1]!r} does not exist: check --ckpt_path."
    if isinstance(error, MisconfigurationException) or _NO_TRAINER.search(str(error)):
        return _line(str(error)) + "."
    text, known = str(error), isinstance(error, ArgumentError)
    found_elsewhere = _beyond_a_reader(error) or (None if known else _missing_package(error) or _refusal(error))
    if found_elsewhere:
        return found_elsewhere
    for pattern, sentence in _SENTENCES if known else _TRAINER_SENTENCES:
        found = re.search(pattern, text, re.DOTALL)
        if found is not None:
            return sentence(found)
    return _line(text) if known else None


def _missing_package(error: Exception) -> str | None:
    """Explain the error of a class, such as a logger, whose package is not installed; None for any other error."""
    for link in causes(error):
        if isinstance(link, ModuleNotFoundError):
            found = _PACKAGE.search(str(link))
            name = link.name or (found.group(1) if found else None)
            if name and name.partition(".")[0] not in _OWN_PACKAGES:
                return _install(name)
    return None


def _refusal(error: Exception) -> str | None:
    """Explain the error that a class raised about its settings, which the parser has wrapped; None for another one."""
    if not str(error).startswith("Does not validate against any of the Union subtypes"):
        return None
    # Of a list only the first type's error is a cause; what a class in the list has raised stands in the text alone.
    *_, innermost = causes(error)
    reasons = [_CLASS.sub("", item) for item in str(error).split("\n  - ")[1:] if not _OF_TYPES.match(item)]
    reason = " ".join((reasons or [str(innermost)])[0].split())
    found = _PACKAGE.match(reason)
    if found is not None:
        return _install(found.group(1))
    return f"A class that the recipe names refuses its settings: {_line(reason)}."


def _install(package: str) -> str:
    """Tell how to install a package."""
    extra = f"'editlab[{package}]'" if package in EXTRAS else package
    return f"This needs the package {package}, which is not installed: pip install {extra}."


def _beyond_a_reader(error: Exception) -> str | None:
    """Explain the limits of the readers of JSON and YAML; None for any other error."""
    for link in causes(error):
        if isinstance(link, ValueError) and "integer string conversion" in str(link):
            return "A number in what was read has more digits than Python reads (4300): shorten it."
        if isinstance(link, RecursionError) and _module_of(link) in ("json", "yaml", "jsonargparse"):
            return "What was read holds lists or mappings inside each other too deeply: flatten it."
    return None


def _module_of(error: BaseException) -> str:
    """Return the name of the package whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0]


_PACKAGE = re.compile(r"(?:[Mm]odule not found: |Requirement |No module named |pip install (?:-U )?)['\"]?([\w.-]+)")
"""Where the message of a missing package names it."""

_OF_TYPES = re.compile("Not a valid subclass|Expected ")
"""Beginnings of the parser's errors about the type of a value, in its list of errors."""

_CLASS = re.compile(r"^Problem with given class_path '[^']+':\s*")
"""Beginning of its errors that a class has raised."""

EXTRAS = ("wandb", "mlflow")
"""Packages that are an extra of editlab's own."""

_OWN_PACKAGES = ("editlab", "callbacks")


def _wrong_argument(found: re.Match[str]) -> str:
    """Explain an unknown argument of a known class."""
    path, argument = found.groups()
    name = path.rsplit(".", 1)[-1]
    cls = _classes().get(name)
    known = [p for p in inspect.signature(cls).parameters if p != "kwargs"] if cls is not None else []
    takes = f"; it takes {', '.join(known)}" if known else ""
    return f"{name} has no argument {argument!r}{_did_you_mean(argument, known)}{takes}."


def _unknown_class(found: re.Match[str]) -> str:
    name = found.group(1)
    near = _did_you_mean(name.rsplit(".", 1)[-1], _classes())
    return f"There is no class named {name!r}{near or '; name a class of editlab, Lightning or a plug-in'}."


def _wrong_kind(found: re.Match[str]) -> str:
    key, path, kind = found.groups()
    return f"{key} names {path or 'a class'}, which is not a {kind}: name one of editlab, Lightning or a plug-in."


def _unknown_setting(found: re.Match[str]) -> str:
    name = found.group(1).lstrip("-").partition("=")[0]
    return f"There is no setting {name!r}: --help after the verb lists them all."


def _wrong_value(found: re.Match[str]) -> str:
    key, rest = found.groups()
    kinds = list(dict.fromkeys(re.findall(r"Expected a <class '(?:\w+\.)*(\w+)'>", rest)))
    given = re.search(r"(?:Given|Got) value: (.*)", rest)
    if kinds and given:
        words = [word for listed in re.findall(r"typing\.Literal\[([^\]]+)\]", rest) for word in _listed(listed)]
        wanted = ["null" if kind == "NoneType" else kind for kind in kinds] + list(dict.fromkeys(words))
        return f"{key} is {given.group(1).strip()!r}: it must be {' or '.join(wanted)}."
    return f"{key} has a wrong value: {_line(rest)}."


def _unknown_verb(found: re.Match[str]) -> str:
    verb, known = found.groups()
    return f"There is no verb {verb!r}{_did_you_mean(verb, _listed(known)) or f': use {_either(known)}.'}"


def _missing(found: re.Match[str]) -> str:
    names = [name.rsplit(".", 1)[-1] for name in found.group(1).split(", ")]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing: --help after the verb shows more."


def _listed(text: str) -> list[str]:
    """Return the names in a list that argparse has printed."""
    return re.findall(r"[\w-]+", text)


def _either(text: str) -> str:
    *first, last = _listed(text)
    return f"{', '.join(first)} or {last}" if first else last


_SENTENCES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"\bonly_known\b",
     lambda m: "data.only_known is now data.keep: preferred in place of true (the model finds the truth likelier than "
               "the new target), all in place of false, or known (the model itself says the truth)."),
    (r'"config": File does not exist: \'([^\']+)\'',
     lambda m: f"The configuration file {m.group(1)!r} does not exist: check --config; "
               f"{unknown(m.group(1), SETTINGS)}"),
    (r"Unexpected config: ", lambda m: "The configuration is not a mapping: write sections, such as model: and data:."),
    (r"Problems parsing config: (.*)", lambda m: f"The configuration is not valid YAML: {_line(m.group(1))}."),
    (r"Problem with given class_path '([^']+)':\s*Option '([^']+)' is not accepted", _wrong_argument),
    (r"Problem with given class_path '([^']+)':\s*(No module named '[^']+'|module '[^']+' has no attribute '[^']+')",
     lambda m: f"{m.group(1)} cannot be imported ({_line(m.group(2))}): check the path, or install its package."),
    (r'Parser key "([^"]+)".*Import path (?:(\S+) )?does not correspond to a subclass of (\w+)', _wrong_kind),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"unrecognized arguments: (\S+)", _unknown_setting),
    (r"does not accept option '([^']+)'", _unknown_setting),
    (r"argument subcommand: invalid choice: '([^']+)' \(choose from (.*)\)", _unknown_verb),
    (r'expected "subcommand" to be one of', lambda m: "A verb is missing: --help lists them."),
    (r"argument (--\S+): invalid choice: '([^']*)' \(choose from (.*)\)",
     lambda m: f"{m.group(1)} is {m.group(2)!r}: it must be {_either(m.group(3))}."),
    (r"argument (--\S+): expected one argument", lambda m: f"{m.group(1)} has no value: write one after it."),
    (r"following arguments are required: (.*)", _missing),
    (r'Parser key "([^"]+)":?\s*(.*)', _wrong_value),
)  # fmt: skip
"""Patterns of the parser's messages, the most specific first, and the sentence for each."""


_TRAINER_SENTENCES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"^Found more than one stateful callback of type `(\w+)`",
     lambda m: f"trainer.callbacks has {m.group(1)} more than once: leave one of them."),
    (r"^(-?\d+) is not in bounds, numpy accepts from (\d+) to (\d+)",
     lambda m: f"seed_everything is {m.group(1)}: it must lie between {m.group(2)} and {m.group(3)}."),
    (r"^Early stopping conditioned on metric `([^`]+)` which is not available",
     lambda m: f"EarlyStopping watches {m.group(1)}, which this run did not log: name a column of metrics.csv."),
    (r"^`Trainer\(barebones=True",
     lambda m: "trainer.barebones turns off the logger and checkpoints, without which a run is lost: leave it out."),
)  # fmt: skip
"""Patterns of plain errors that Lightning raises about a recipe, and the sentence for each."""


def _line(text: str) -> str:
    """Return the first 300 characters of a message, on one line."""
    return " ".join(text.split())[:300].rstrip(".")


def _classes() -> dict[str, type]:
    """Return every class that YAML may name, by its bare name."""

    def below(base: type) -> Iterable[type]:
        sub: type
        for sub in base.__subclasses__():
            yield sub
            yield from below(sub)

    return {cls.__name__: cls for base in _NAMED_IN_YAML for cls in below(base)}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
