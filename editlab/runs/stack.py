"""Patches of one base model put on it one after the other, with a check of what each does to the facts of the others.

The sums of updates are added. That is exact for the weights, and says nothing about the facts: a patch was made on the
base model and knows nothing of the keys of the others. So two patches that give one prompt different targets are
refused, and for every other pair the interference is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from torch import Tensor

from editlab.data.fact import Fact, composed
from editlab.errors import UserError
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.precision import widened
from editlab.runs.delta import Delta
from editlab.runs.history import Edit, History
from editlab.runs.patched_model import Answers, PatchedModel, joint_of, settings_of, template_of, with_fates
from editlab.runs.removal import FactRemover

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interference:
    """What one patch of a stack does to the facts of the patches below it."""

    overlap: float | None
    """mean over the facts below and the layers of ||T k|| / ||S k||, with T the sums of this patch, S those below it
    and k a fact's key: 0 if the patch does not touch what the others have edited; None without a common layer"""
    largest: float | None
    """the largest of these fractions"""
    below_before: Answers
    """the facts below, without this patch"""
    below_after: Answers
    """the same facts with it"""
    own_alone: Answers
    """the patch's own facts, with it alone"""
    own: Answers
    """the same facts with all patches up to it"""


@dataclass(frozen=True)
class Stack:
    """Several patches as one."""

    delta: Delta
    interference: list[Interference] = field(default_factory=list)
    """of every patch but the first"""
    taken_out: list[str] = field(default_factory=list)
    """facts that were taken out of a patch because a later one gives their prompt another target"""


def standing(delta: Delta) -> list[Fact]:
    """The facts that a patch puts into the weights."""
    return [edit.fact for edit in delta.history.edits if edit.stands]


def require_one_base(deltas: Sequence[Delta], names: Sequence[str]) -> None:
    """Make sure that patches can be added: of the same weights, the same kind of module, and prompts read alike.

    Raises:
        UserError: They are not.
    """
    first = deltas[0]
    for delta, name in zip(deltas, names, strict=True):
        if (delta.fingerprint, delta.dtype) != (first.fingerprint, first.dtype):
            raise UserError(
                f"The patches {names[0]} and {name} are of different base models ({first.language_model} and "
                f"{delta.language_model}): stack patches that were made on one model, in one type."
            )
        if delta.edit_module != first.edit_module:
            raise UserError(
                f"The patches {names[0]} and {name} edit different modules ({first.edit_module} and "
                f"{delta.edit_module}): make both with the same model.edit_module."
            )
        for setting, read in (("data.joint", joint_of), ("model.chat_template", template_of)):
            one, other = read(first.history), read(delta.history)
            if one != other:
                raise UserError(
                    f"The patches {names[0]} and {name} read prompts differently ({setting} {one} and {other}): make "
                    "both with the same."
                )


def contradictions(deltas: Sequence[Delta], names: Sequence[str], last_wins: bool = False) -> list[tuple[int, str]]:
    """The facts that a later patch gives another target: number of the earlier patch, and ``subject|prompt``.

    Raises:
        UserError: There is one, and ``last_wins`` is not set.
    """
    found: list[tuple[int, str]] = []
    for later in range(len(deltas)):
        own = {fact.slot: fact for fact in standing(deltas[later])}
        for earlier in range(later):
            for fact in standing(deltas[earlier]):
                other = own.get(fact.slot)
                if other is None or composed(other.target_new) == composed(fact.target_new):
                    continue
                name = f"{fact.subject}|{fact.prompt}"
                if not last_wins:
                    raise UserError(
                        f"The patches contradict each other: {names[earlier]} says {name} -> {fact.target_new}, and "
                        f"{names[later]} says {other.target_new}: give --last-wins to take the fact out of the "
                        "earlier one, or leave one of the patches out."
                    )
                if (earlier, name) not in found:
                    found.append((earlier, name))
    return found


def stack(model: PatchedModel, deltas: Sequence[Delta], names: Sequence[str], last_wins: bool = False) -> Stack:
    """Adds patches in their order, and measures what each does to those below it.

    Args:
        model: their base model; afterwards all patches are on it.
        deltas: the patches, at least one.
        names: what the user called them.
        last_wins: take a fact out of its patch if a later one gives its prompt another target.

    Raises:
        UserError: As for :func:`require_one_base` and :func:`contradictions`; or a fact cannot be taken out.
    """
    require_one_base(deltas, names)
    taken_out = contradictions(deltas, names, last_wins)
    cleared = []
    for number, delta in enumerate(deltas):
        facts = [name for earlier, name in taken_out if earlier == number]
        cleared.append(FactRemover(model, delta).remove(facts, sample=0).delta if facts else delta)
    whole, found = cleared[0], []
    for delta in cleared[1:]:
        found.append(_interference(model, whole, delta))
        whole = _joined(whole, delta)
    model.put(whole.totals)
    return Stack(whole, found, [f"{name} (of {names[number]})" for number, name in taken_out])


def _interference(model: PatchedModel, below: Delta, delta: Delta) -> Interference:
    facts, own = standing(below), standing(delta)
    model.put(below.totals)
    before, shares = model.ask(facts), _overlaps(model, below, delta, facts)
    model.put(delta.totals)
    alone = model.ask(own)
    model.put(_joined(below, delta).totals)
    return Interference(
        float(shares.mean()) if shares.numel() else None, float(shares.max()) if shares.numel() else None,
        before, model.ask(facts), alone, model.ask(own),
    )  # fmt: skip


def _overlaps(model: PatchedModel, below: Delta, delta: Delta, facts: Sequence[Fact]) -> Tensor:
    """||T k|| / ||S k|| for each fact and common layer, with the patches below on the model, float64 [layers * n]."""
    common = sorted({*below.layers} & {*delta.layers})
    if not facts:
        return torch.empty(0)
    found = [torch.empty(0, dtype=torch.float64)]
    for layer in common:
        lm = model.lm
        site = Site(layer, False, lm.anatomy.edit_module(layer))
        keys = read_keys(lm, facts, layer, site, [""], "bare").keys
        name = lm.anatomy.edit_name(layer)
        moved, held = ((widened(d.totals[name], keys.device) @ keys).norm(dim=0) for d in (delta, below))
        found.append((moved / held.clamp_min(1e-300)).cpu())
    return torch.cat(found)


def _joined(below: Delta, delta: Delta) -> Delta:
    """Two patches as one: the edited modules first, lowest layer first."""
    layers = sorted({*below.layers, *delta.layers})
    edited = {n: name for d in (below, delta) for n, name in zip(d.layers, d.totals, strict=False)}
    order = dict.fromkeys([*(edited[n] for n in layers), *below.totals, *delta.totals])
    totals = {}
    for name in order:
        parts = [d.totals[name].float() for d in (below, delta) if name in d.totals]
        totals[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return replace(below, layers=layers, totals=totals, history=_one_history(below.history, delta.history))


def _one_history(below: History, own: History) -> History:
    """One history of two patches; what only one of them had, such as metrics, is no longer true of the whole."""
    shift, count = below.batches, len(below.edits)
    numbers = {e.fact.slot: count + i + 1 for i, e in enumerate(own.edits) if e.stands}
    again = {i: e.fact.slot for i, e in enumerate(below.edits) if e.stands and e.fact.slot in numbers}
    below = with_fates(below, {i: f"superseded by edit {numbers[slot]}" for i, slot in again.items()})
    removals = [replace(one, edits=tuple(n + count for n in one.edits)) for one in own.removals]
    return replace(
        below,
        batches=below.batches + own.batches,
        adapted=max(below.adapted, own.adapted),
        edits=(*below.edits, *(_moved(edit, shift, count) for edit in own.edits)),
        settings=_shared_settings(below, own),
        removals=(*below.removals, *removals),
        recipe=below.recipe if below.recipe == own.recipe else None,
        seed=below.seed if below.seed == own.seed else None,
        versions=below.versions if below.versions == own.versions else {},
        when=max(below.when, own.when),
    )


def _shared_settings(below: History, own: History) -> str:
    """The recipe's parts that decide how facts are asked and taken out; empty if the two patches differ in them."""

    def parts(history: History) -> dict[str, Any]:
        recipe = settings_of(history)
        data = recipe.get("data")
        joint = data.get("joint") if isinstance(data, dict) else None
        return {"model": recipe.get("model"), "data": {"joint": joint}, "trainer": recipe.get("trainer")}

    if not below.settings or parts(below) != parts(own):
        return ""
    return yaml.safe_dump(parts(below), sort_keys=False, allow_unicode=True)


def _moved(edit: Edit, batches: int, edits: int) -> Edit:
    fate = edit.fate
    if fate.startswith("superseded by edit "):
        fate = f"superseded by edit {int(fate.rpartition(' ')[2]) + edits}"
    return replace(edit, batch=edit.batch + batches, fate=fate)
