"""How much a run keeps of its other edits while some are taken out one by one, and whether original answers return."""

from __future__ import annotations

import logging
import random
from typing import Any

from editlab.experiments.csv_files import Row
from editlab.runs.patched_model import PatchedModel, read_patch
from editlab.runs.removal import FactRemover

log = logging.getLogger(__name__)


def measure_removals(run: str, count: int = 10, seed: int = 0, hold: float | None = None) -> list[Row]:
    """Takes some facts of a run out one by one, and measures the model after each removal.

    Args:
        run: as for :func:`editlab.runs.patched_model.read_patch`.
        count: number of facts to take out.
        seed: seed of their choice among the standing facts.
        hold: as for :func:`editlab.runs.removal.removal_recipe`.

    Returns:
        A row for each removal. ``others`` is the number of facts that are never taken out, ``held_before`` how many of
        them the edited model got right at every token before the first removal, ``held`` how many of these it still
        gets right, and ``held_fraction`` their ratio. ``answers_back`` counts the facts taken out so far to which the
        model gives the original answer again, and ``targets_gone`` those whose new target is no longer the argmax.
    """
    delta = read_patch(run)
    model = PatchedModel(delta)
    remover = FactRemover(model, delta, hold)
    standing = [edit.fact for edit in delta.history.edits if edit.stands]
    chosen = random.Random(seed).sample(standing, count)
    others = [fact for fact in standing if fact not in chosen]
    model.put({})
    original = model.answers(chosen)
    model.put(delta.totals)
    before, neighbors = model.hits(others), model.ask(others, 2).neighbors
    rows: list[Row] = []
    for number, fact in enumerate(chosen, start=1):
        removal = remover.remove([f"{fact.subject}|{fact.prompt}"], sample=0)
        done = chosen[:number]
        now = sum(a and b for a, b in zip(before, model.hits(others), strict=True))
        back = sum(a == b for a, b in zip(model.answers(done), original, strict=False))
        row = {
            "seed": seed, "removed": number, "subject": fact.subject, "hold": remover.settings.hold,
            "others": len(others), "held_before": sum(before), "held": now,
            "held_fraction": round(now / max(1, sum(before)), 4), "answers_back": back,
            "targets_gone": sum(not hit for hit in model.hits(done)),
            "update_norm": round(max(removal.update_norms.values()), 5),
        }  # fmt: skip
        log.info("%s", row)
        rows.append(row)
    rows[-1] |= {"neighbors_before": _rounded(neighbors), "neighbors_after": _rounded(model.ask(others, 2).neighbors)}
    return rows


def _rounded(number: float | None) -> Any:
    return None if number is None else round(number, 4)
