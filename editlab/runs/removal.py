"""Taking single facts out of a patch: what ``editlab revert --facts`` does (:mod:`editlab.edits.removal`).

A run's delta holds the sums of updates, its facts with their fates and the recipe of the run. Everything else that a
removal needs is computed again: keys from the model, second moments from the recipe's text (or the cache). So the
result of one removal is a patch from which the next one starts, and its ledger is the list of fates and removals.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import composed
from editlab.edits.removal import RemovalSettings, take_out
from editlab.errors import UserError
from editlab.keys.moments import MomentSettings, second_moments
from editlab.runs.delta import Delta
from editlab.runs.history import NEIGHBORS, Edit, Removed, utc
from editlab.runs.patched_model import Answers, PatchedModel, settings_of, with_fates
from editlab.solver import methods
from editlab.solver.methods import Method
from editlab.solver.preservation import Preservation

log = logging.getLogger(__name__)
REMOVED = "removed"
"""Fate of an edit that was taken out."""
SAMPLE = 256
"""Most facts whose answers are compared before and after a removal."""


@dataclass(frozen=True)
class Removal:
    """The result of one removal."""

    delta: Delta
    """the patch without the facts"""
    edits: tuple[Edit, ...]
    """the facts that were taken out"""
    back: tuple[bool, ...]
    """for each of them, whether the model gives its original answer again: the greedy one of the unedited model, as
    long as the fact's truth"""
    gone: tuple[bool, ...]
    """for each of them, whether the new target is no longer the argmax at every token"""
    before: Answers
    """a sample of the other facts before the removal"""
    after: Answers
    """the same sample after it"""
    update_norms: dict[int, float]
    """layer -> norm of the removal's update over that of the weight"""

    @property
    def measured(self) -> dict[str, float]:
        """The numbers that the ledger keeps, by name."""
        found = {
            "original_answers": sum(self.back), "targets_gone": sum(self.gone), "others": self.before.facts,
            "accuracy_before": self.before.accuracy, "accuracy_after": self.after.accuracy,
            "neighbors_before": self.before.neighbors, "neighbors_after": self.after.neighbors,
        }  # fmt: skip
        return {name: float(value) for name, value in found.items() if value is not None}


def find_edits(edits: Sequence[Edit], names: Sequence[str]) -> list[int]:
    """Indices of the standing edits that a user names.

    Args:
        edits: all edits of a patch.
        names: each ``subject|prompt``, with the prompt as a template or with the subject in it; or the subject alone,
            if one standing edit has it.

    Raises:
        UserError: A name fits no standing edit, or several.
    """
    found: list[int] = []
    for name in names:
        wanted = _one_line(name)
        fitting = [i for i, edit in enumerate(edits) if wanted in _names(edit)]
        standing = [i for i in fitting if edits[i].stands]
        if not standing and fitting:
            raise UserError(
                f"The fact {name!r} is not in the weights ({edits[fitting[-1]].fate}): name one that editlab log "
                "shows as kept or scaled."
            )
        if not standing:
            raise UserError(f"No edit is {name!r}: name each fact as subject|prompt, as editlab log shows it.")
        if len(standing) > 1:
            one, other = (f"{edits[i].subject}|{edits[i].prompt}" for i in standing[:2])
            raise UserError(f"Several edits are {name!r}, such as {one} and {other}: name one as subject|prompt.")
        if standing[0] not in found:
            found.append(standing[0])
    return sorted(found)


def _names(edit: Edit) -> set[str]:
    return {
        _one_line(text)
        for text in (edit.subject, f"{edit.subject}|{edit.prompt}", f"{edit.subject}|{edit.fact.question}")
    }


def _one_line(text: str) -> str:
    """A text as ``editlab log`` shows it: a prompt may hold line breaks, and end in white space."""
    return composed(" ".join(text.split()))


def removal_recipe(delta: Delta, hold: float | None = None) -> tuple[Method, MomentSettings, RemovalSettings]:
    """The method, the second moments and the settings of a removal, from the recipe of a patch.

    Args:
        delta: the patch.
        hold: weight of each held key in the metric; default: that of the run's memory, which is 1 / slack if the recipe
            does not set it (:class:`callbacks.replay.callback.MemoryReplay`), or 1 without slack.

    Raises:
        UserError: The patch does not hold its recipe, or its method solves no closed form; or something apart from the
            method has changed the weights.
    """
    recipe = settings_of(delta.history)
    model = recipe.get("model")
    if not isinstance(model, Mapping):
        raise UserError(
            "The recipe of the edits is not known, so their method cannot take one out: give the run's folder with its "
            "config.yaml, or a single run's delta."
        )
    if len(delta.totals) > len(delta.layers) or delta.history.adapted:
        raise UserError(
            "LoRAAdjust has changed the weights too, and its changes belong to no single fact: take facts out of a run "
            "without it, or go back to an earlier batch by --to_step."
        )
    method = _method(model.get("method"))
    known = {field.name for field in fields(MomentSettings)}
    given = model.get("moments")
    moments = MomentSettings(**{k: v for k, v in given.items() if k in known} if isinstance(given, Mapping) else {})
    if hold is None:
        hold = _past_weight(recipe) or (1 / method.slack if method.slack else 1.0)
    settings = RemovalSettings(
        hold, float(model.get("preserve_prompt_tokens") or 0.0), float(model.get("condition_limit") or 1e10),
        str(model.get("solver_device") or "auto"),
    )  # fmt: skip
    return method, moments, settings


def _method(named: Any) -> Method:
    """The method of a recipe; nothing that the recipe names is imported, because a run's folder is only data."""
    path = named.get("class_path", "") if isinstance(named, Mapping) else ""
    package, _, name = str(path).rpartition(".")
    kind = getattr(methods, name, None) if package in ("", methods.__name__) else None
    if not (isinstance(kind, type) and issubclass(kind, Method)) or kind is Method:
        raise UserError(
            f"The edits were made by the method {name or 'unknown'}, and single facts can only be taken out of edits "
            "by editlab's own closed forms: go back to an earlier batch by --to_step."
        )
    try:
        return kind(**(named.get("init_args") or {}))
    except TypeError as error:
        raise UserError(
            f"The recipe of the edits gives {name} settings that this version of editlab does not have ({error}): take "
            "facts out with the version that made the edits."
        ) from error


def _past_weight(recipe: Mapping[str, Any]) -> float | None:
    trainer = recipe.get("trainer")
    for callback in (trainer.get("callbacks") if isinstance(trainer, Mapping) else None) or ():
        if isinstance(callback, Mapping) and str(callback.get("class_path", "")).endswith("MemoryReplay"):
            weight = (callback.get("init_args") or {}).get("past_weight")
            return float(weight) if weight else None
    return None


class FactRemover:
    """Takes facts out of one patch, one removal after the other.

    Args:
        model: the patch's base model; nothing is put on it yet.
        delta: the patch.
        hold: as for :func:`removal_recipe`.

    Raises:
        UserError: As for :func:`removal_recipe`, or the second moments cannot be read.
    """

    def __init__(self, model: PatchedModel, delta: Delta, hold: float | None = None) -> None:
        method, moments, self.settings = removal_recipe(delta, hold)
        self.model, self.delta = model, delta
        self.metrics = self._metrics(method, moments)

    def _metrics(self, method: Method, moments: MomentSettings) -> dict[int, Preservation]:
        lm, layers = self.model.lm, self.delta.layers
        device = self.settings.device_of(lm, layers)
        if not method.needs_moments:
            sizes = {layer: lm.anatomy.key_size(layer) for layer in layers}
            return {layer: method.preservation(_shape_only(size), device) for layer, size in sizes.items()}
        self.model.put({})  # C0 is of the unedited weights
        found = second_moments(lm, layers, moments, self.delta.language_model, device)
        return {layer: method.preservation(found.pop(layer), device) for layer in list(found)}

    def remove(self, names: Sequence[str], sample: int = SAMPLE) -> Removal:
        """Takes facts out together; later calls start from the result.

        Args:
            names: as for :func:`find_edits`.
            sample: most other facts whose answers are compared.

        Raises:
            UserError: As for :func:`find_edits`, or a held fact has the key of one to take out.
        """
        history, model = self.delta.history, self.model
        chosen = find_edits(history.edits, names)
        edits = tuple(history.edits[i] for i in chosen)
        facts = [edit.fact for edit in edits]
        others = [edit.fact for i, edit in enumerate(history.edits) if edit.stands and i not in chosen]
        slots = {fact.slot for fact in (*facts, *others)}  # a later patch may have edited it again
        gone_before = [e.fact for e in history.edits if e.fate == REMOVED and e.fact.slot not in slots]
        asked = random.Random(0).sample(others, min(sample, len(others)))
        model.put({})
        original = model.answers(facts)
        model.put(self.delta.totals)
        before = model.ask(asked, NEIGHBORS)
        layers = model.layers(self.delta)
        updates = take_out(model.lm, layers, facts, others, self.metrics, self.settings, gone_before)
        after = model.ask(asked, NEIGHBORS)
        back = tuple(now == then for now, then in zip(model.answers(facts), original, strict=True))
        gone = tuple(not hit for hit in model.hits(facts))
        norms = {n: float(u.norm() / layers[n].original.float().norm()) for n, u in updates.items()}
        totals = {name: model.maps[name].total.clone().cpu() for name in self.delta.totals}
        removal = Removal(self.delta, edits, back, gone, before, after, norms)
        entry = Removed(utc(time.time()), tuple(i + 1 for i in chosen), removal.measured)
        history = with_fates(history, dict.fromkeys(chosen, REMOVED))
        self.delta = replace(self.delta, totals=totals, history=replace(history, removals=(*history.removals, entry)))
        return replace(removal, delta=self.delta)


def _shape_only(size: int) -> Tensor:
    return torch.empty(size, size, device="meta")
