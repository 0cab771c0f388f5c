"""The base model of a patch in memory: patches are put on it and taken off again, and their facts are asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlab.data.chat import as_evaluated
from editlab.data.fact import Fact
from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.lm.chat import NONE, Chat
from editlab.lm.generate import continue_rows
from editlab.lm.joints import AUTO as AUTO_JOINT
from editlab.lm.language_model import LanguageModel
from editlab.metrics.functional.editing import efficacy_score, neighborhood_score
from editlab.runs.checkpoint import find_checkpoint
from editlab.runs.delta import FILE, Delta, target_of
from editlab.runs.history import History

PATCH = "delta"
"""Folder inside an exported model that holds the delta of its edits."""


def read_patch(path: str) -> Delta:
    """The delta that a path means: of a run, of an export with its delta, or a delta itself.

    Args:
        path: a run's folder or checkpoint; a folder that ``editlab revert --facts``, ``editlab apply`` of several
            patches or ``editlab export --delta-only`` wrote; or a delta's file.

    Raises:
        UserError: It is none of them, or damaged.
    """
    given = Path(path).expanduser()
    for found in (given / FILE, given / PATCH / FILE):
        if found.is_file():
            return Delta.load(found)
    if given.suffix == ".safetensors":
        return Delta.load(given)
    if given.is_dir() and (given / "config.json").is_file():
        raise UserError(
            f"{path} is a model without the delta of its edits: give the run's folder, or a folder that editlab revert "
            "--facts, editlab apply of several patches or editlab export --delta-only wrote."
        )
    return Delta.from_checkpoint(find_checkpoint(path))


def settings_of(history: History) -> dict[str, Any]:
    """The sections of the run's recipe that a history holds; {} if it holds none."""
    try:
        found = yaml.safe_load(history.settings) if history.settings else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def joint_of(history: History) -> str:
    """What stands between prompt and target in a run: its ``data.joint``."""
    return _text(settings_of(history), "data", "joint", AUTO_JOINT)


def template_of(history: History) -> str:
    """Which prompts of a run are the user's turn of a chat: its ``model.chat_template``."""
    return _text(settings_of(history), "model", "chat_template", NONE)


def chat_of(tokenizer: PreTrainedTokenizerBase, history: History) -> Chat | None:
    """The chat template of a run's prompts; None if they are plain."""
    return Chat.of(tokenizer, template_of(history))


@dataclass(frozen=True)
class Answers:
    """How right a model is about some facts; a mean over no prompts is None."""

    facts: int
    accuracy: float | None
    """fraction of the edit prompts at which the argmax is right at every token of the new target"""
    neighbors: float | None
    """mean over facts of the fraction of their neighbors that are answered with their own truth"""


class PatchedModel:
    """The base model of a patch, with the maps that patches change.

    Args:
        delta: the patch; its recipe says how prompts and targets are joined.
        base: name, folder or file of the base model; default: the one that the run used.
        device: device of the model.

    Raises:
        UserError: The base model cannot be loaded, or is not the one that was edited.
    """

    def __init__(self, delta: Delta, base: str | None = None, device: torch.device | None = None) -> None:
        model, tokenizer = delta.base(base)
        model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
        self.lm = LanguageModel(model, tokenizer, delta.edit_module)
        self.lm.joint, self.lm.chat = joint_of(delta.history), chat_of(tokenizer, delta.history)
        self.maps: dict[str, EditedLayer] = {}
        """path of each map that a patch has changed -> the map"""

    def put(self, totals: Mapping[str, Tensor]) -> None:
        """Makes these sums of updates (:attr:`~editlab.runs.delta.Delta.totals`) all that is in the weights."""
        for name, total in totals.items():
            if name not in self.maps:  # its weight is the original one until here
                self.maps[name] = EditedLayer(*target_of(self.lm.model, name, total))
        for name, layer in self.maps.items():
            layer.restore(totals[name] if name in totals else torch.zeros_like(layer.total))

    def layers(self, delta: Delta) -> dict[int, EditedLayer]:
        """Number of each layer that a patch on the model edits -> the layer, from the lowest up."""
        return {number: self.maps[name] for number, name in zip(delta.layers, delta.totals, strict=False)}

    def ask(self, facts: Sequence[Fact], neighbors: int = 0) -> Answers:
        """How right the model is about facts, and about this many of the neighbors of each."""
        if not facts:
            return Answers(0, None, None)
        scores = score_facts(self.lm, as_evaluated(facts, self.lm.chat), paraphrases=False, neighbors=neighbors)
        near = None if scores.neighbors is None else float(neighborhood_score(scores.neighbors, "accuracy"))
        right = float(efficacy_score(scores.edit, "accuracy"))
        return Answers(len(facts), right, None if near is None or math.isnan(near) else near)

    def hits(self, facts: Sequence[Fact]) -> list[bool]:
        """Whether the argmax is right at every token of each fact's new target."""
        if not facts:
            return []
        scores = score_facts(self.lm, as_evaluated(facts, self.lm.chat), paraphrases=False, neighbors=0)
        return [bool(hit) for hit in scores.edit.hit_new]

    def answers(self, facts: Sequence[Fact]) -> list[list[int]]:
        """The model's own greedy answer to each edit prompt, as token ids: as many as the fact's truth has.

        The new target's length counts where the fact names no truth.
        """
        found = []
        for fact in as_evaluated(facts, self.lm.chat):
            encoding, start = self.lm.encode_pair(fact.question, fact.target_true or fact.target_new)
            ids = list(encoding.ids)
            found.append(continue_rows(self.lm.model, [ids[:start]], len(ids) - start, stop=True)[0])
        return found


def _text(recipe: Mapping[str, Any], section: str, name: str, default: str) -> str:
    found = recipe.get(section)
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) else default


def with_fates(history: History, fates: Mapping[int, str]) -> History:
    """A history in which edits, by their index from 0, have other fates; the metrics of the run are no longer its."""
    edits = tuple(replace(e, fate=fates[i]) if i in fates else e for i, e in enumerate(history.edits))
    return replace(history, edits=edits, metrics={})
