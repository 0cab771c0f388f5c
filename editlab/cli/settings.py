"""The settings of a recipe for a verb that edits without a run: parsed like those of ``fit``, without a Trainer.

The words of such a verb's command line are of two kinds: its own, and those that ``fit`` takes, too (``--config`` and
the settings of a recipe). The second kind goes through the parser of ``fit`` itself, so that recipes mean the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import Callback

from editlab.api import RECOMMENDED
from editlab.editor import SequentialEditor
from editlab.errors import UserError
from editlab.solver.methods import EMMET

UNSET = -1
"""Layer that stands for layers which neither a recipe nor a flag names; no model has it."""
_NO_WEIGHT = 0.0001220703125
_UNNAMED = {"class_path": f"{EMMET.__module__}.{EMMET.__name__}", "init_args": {"covariance_weight": _NO_WEIGHT}}
"""Method that stands for one which no recipe names."""

_CONFIG = ("--config", "-c")
_OF_RECIPE = re.compile(r"(--(model|data|trainer)\.[\w.+]+|--seed_everything|--config|-c)")
_OF_DATA = ("batch_size", "joint", "subject")
"""Settings of ``data`` that say how facts are edited; the others say which facts of a file."""
_OF_TRAINER = ("callbacks", "precision", "enable_progress_bar")
_DTYPES = {
    None: torch.float32, "32-true": torch.float32, "32": torch.float32, "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class EditSettings:
    """The settings of a recipe as :func:`editlab.edit_model` takes them."""

    language_model: str
    layers: list[int] | str | None
    """None if neither a recipe nor a flag names them"""
    dtype: torch.dtype
    """type in which the model is loaded, from ``trainer.precision``"""
    callbacks: list[Callback]
    arguments: dict[str, Any]
    """the other arguments of :func:`editlab.edit_model`, by name"""


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a verb's own words, and the words of a recipe, each setting with its value.

    >>> split_words(["a", "--model", "gpt2", "--config", "memit.yaml", "--model.values.steps=5", "b"])
    (['a', '--model', 'gpt2', 'b'], ['--config', 'memit.yaml', '--model.values.steps=5'])
    """
    own: list[str] = []
    recipe: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if _OF_RECIPE.fullmatch(name):
            recipe += [word] if equals else [word, *([value] if (value := next(rest, None)) is not None else [])]
        else:
            own.append(word)
    return own, recipe


def edit_settings(words: Sequence[str], defaults: Mapping[str, Any], verb: str) -> EditSettings:
    """Parse the words of a recipe, and create the objects that it names.

    Without a recipe that names a method, the settings of :func:`editlab.edit_model` are the defaults
    (:data:`editlab.api.RECOMMENDED`); with one, those of ``fit`` are, so that a recipe means the same here.

    Args:
        words: as :func:`split_words` returns them.
        defaults: dotted names of further settings -> their defaults, in place of those of ``fit``.
        verb: the verb, for messages.

    Raises:
        UserError: A setting has no effect on the verb, or the verb cannot do what it says.
        ArgumentError: A setting is unknown or has a wrong value.
    """
    for word in words:
        _require_effect(word.partition("=")[0], verb)
    own = {} if _names_method(words) else _recommended()
    found = _parsed(words, {"model.layers": [UNSET], **own, **defaults})
    for section in ("model", "data", "trainer"):
        if found.get(section) is None:
            raise UserError(f"{section} is null: write its settings under it, or leave it out.")
    model = {name: found.model[name] for name in inspect.signature(SequentialEditor).parameters}
    data, trainer = found.data, found.trainer
    if model.pop("device_map", None) is not None:
        raise UserError(f"model.device_map is set, and editlab {verb} edits on one device: leave it out; see --device.")
    if trainer["precision"] not in _DTYPES:
        known = ", ".join(name for name in _DTYPES if name is not None)
        raise UserError(f"trainer.precision is {trainer['precision']}: editlab {verb} takes {known}.")
    if isinstance(found.seed_everything, bool) or found.seed_everything is None:
        raise UserError(f"seed_everything is {found.seed_everything}: editlab {verb} needs a number, such as 0.")
    layers, callbacks = model.pop("layers"), trainer["callbacks"] or []
    return EditSettings(
        model.pop("language_model"),
        None if layers == [UNSET] else layers,
        _DTYPES[trainer["precision"]],
        callbacks if isinstance(callbacks, list) else [callbacks],
        {
            **model,
            **{name: data[name] for name in _OF_DATA},
            "seed": found.seed_everything,
            "progress": trainer["enable_progress_bar"] is not False,
        },
    )


def _parsed(words: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    """Return what :func:`editlab.cli.training.parsed_recipe` does, which needs the list of verbs."""
    return import_module("editlab.cli.training").parsed_recipe(words, defaults)  # by name, as verbs are loaded


def _names_method(words: Sequence[str]) -> bool:
    """Return whether a recipe among the words, not a flag, names the method."""
    files = [
        part
        for i, word in enumerate(words)
        if word.partition("=")[0] in _CONFIG
        for part in (words[i : i + 1] if "=" in word else words[i : i + 2])
    ]
    if not files:
        return False
    model = _parsed(files, {"model.method": _UNNAMED}).model
    return model is not None and getattr(model.method, "covariance_weight", None) != _NO_WEIGHT


def _recommended() -> dict[str, Any]:
    """Return the default settings of ``edit_model`` as the parser takes them."""
    method = RECOMMENDED["method"]
    return {
        "model.method": {
            "class_path": f"{type(method).__module__}.{type(method).__name__}",
            "init_args": asdict(method),
        },
        "model.values.reference": RECOMMENDED["values"].reference,
        "model.preserve_prompt_tokens": RECOMMENDED["preserve_prompt_tokens"],
    }


def _require_effect(name: str, verb: str) -> None:
    section, _, setting = name.removeprefix("--").partition(".")
    known = {"data": _OF_DATA, "trainer": _OF_TRAINER}.get(section)
    if known is not None and setting.partition(".")[0].rstrip("+") not in known:
        taken = ", ".join(f"{section}.{one}" for one in known)
        raise UserError(f"{name} has no effect on editlab {verb}, which takes {taken}: leave it out.")
