"""What a caller gives to ``edit_model``, checked before anything is done: the model, the settings and the facts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch import Callback
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.data import Fact
from editlab.data.formats import FIELD, Subjects, UnreadFields, read_all
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.language_model import MERGE_FIRST
from editlab.solver.base import EditMethod
from editlab.solver.post_steps import PostStep
from editlab.values.settings import ValueSettings

log = logging.getLogger(__name__)

KINDS = {
    "method": EditMethod,
    "values": ValueSettings,
    "moments": MomentSettings,
    "contexts": ContextSettings,
    "evaluation": EvaluationSettings,
}
"""Settings that are objects -> their classes."""


def plain_model(model: Any) -> PreTrainedModel:
    """Return the model inside a compiled one, which shares its weights; any other model is returned as it is.

    Raises:
        UserError: It is not a model of transformers.
    """
    model = getattr(model, "_orig_mod", model)
    if type(model).__module__.partition(".")[0] == "peft":
        raise UserError(MERGE_FIRST.format(type(model).__name__))
    if not isinstance(model, PreTrainedModel):
        inside = getattr(model, "module", None)
        fix = "its part .module" if isinstance(inside, PreTrainedModel) else "what AutoModelForCausalLM loads"
        raise UserError(f"The model is a {type(model).__name__}, not a PreTrainedModel of transformers: give {fix}.")
    return model


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Make sure that the tokenizer is fast, gradients can be computed, and settings are of the right classes.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        settings: settings of the editor that were given.

    Raises:
        UserError: One of these is not so.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets: give the "
            "fast one that AutoTokenizer loads, or convert it to a PreTrainedTokenizerFast."
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(
            "Values are found by gradients, which torch.inference_mode() forbids: load the model and call edit_model "
            "outside of it (torch.no_grad() is fine)."
        )
    for name, kind in KINDS.items():
        if name in settings and not isinstance(settings[name], kind):
            example = "EMMET" if kind is EditMethod else kind.__name__
            raise UserError(f"The setting {name} is {settings[name]!r}: give an object, such as {example}().")
    if isinstance(step := settings.get("post_steps"), PostStep):
        raise UserError(f"The setting post_steps is {step!r}: give a list, such as [{step!r}].")


def check_types(layers: Any, callbacks: Any, **numbers: Any) -> None:
    """Make sure that layers are whole numbers, callbacks a list of callbacks, and numbers are numbers.

    Args:
        layers: numbers of layers, or text.
        callbacks: the callbacks.
        numbers: settings that are whole numbers, by name; ``condition_limit`` may be any number, and None is not given.

    Raises:
        UserError: One of these is not so.
    """
    whole = not isinstance(layers, str) and isinstance(layers, Sequence) and all(type(one) is int for one in layers)
    if not (whole or isinstance(layers, str)):
        raise UserError(f"layers is {layers!r}: give a list of whole numbers, such as [4, 5, 6], or 'auto'.")
    if not isinstance(callbacks, Sequence) or not all(isinstance(one, Callback) for one in callbacks):
        raise UserError(f"callbacks is {callbacks!r}: give a list of callbacks, such as [MemoryReplay()].")
    for name, value in numbers.items():
        kinds = (int, float) if name == "condition_limit" else (int,)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise UserError(f"{name} is {value!r}: give a {'' if len(kinds) > 1 else 'whole '}number.")


def check_run(seed: int, folder: str | Path | None) -> None:
    """Make sure that a seed is in bounds, and that a folder is not a file.

    Raises:
        UserError: One of these is not so.
    """
    if not min_seed_value <= seed <= max_seed_value:
        raise UserError(f"seed is {seed}: it must lie between {min_seed_value} and {max_seed_value}.")
    if folder is not None and Path(folder).is_file():
        raise UserError(f"folder is {folder}, a file: give a folder, which need not exist yet.")


def facts_of(given: Sequence[Fact | Mapping[str, Any]], subject: str = FIELD) -> list[Fact]:
    """Return the facts that a caller gives as objects or as dicts, and log the fields that are not read.

    Args:
        given: facts, or dicts in any schema of a fact file.
        subject: what is the subject of a fact (:class:`editlab.data.formats.Subjects`).

    Raises:
        UserError: One of them is not a fact; the message has its index.
    """
    if isinstance(given, str | Mapping | Fact) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise UserError(f"facts is of type {kind}: give a list of Facts, or of dicts with subject, prompt and target.")
    facts, unread, subjects = [], UnreadFields(), Subjects(subject)
    for index, one in enumerate(given):
        if not isinstance(one, Fact | Mapping):
            raise UserError(f"Fact {index} is {one!r}: give a Fact, or a dict with subject, prompt and target.")
        try:
            if isinstance(one, Fact):
                facts.append(subjects.settle(one))
                continue
            record = subjects.record(one)
            facts += read_all(record, index, subjects=subjects)
            unread.add(record)
        except UserError as error:
            raise UserError(f"Fact {index} {error}.") from None
    if sentence := unread.sentence("The list of facts"):
        log.warning("%s", sentence)
    if sentence := subjects.sentence("the list of facts"):
        log.info("%s", sentence)
    if not facts:
        raise UserError("No fact is given: give at least one.")
    return facts
