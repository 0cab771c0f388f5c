"""``data.columns``: the names that the fields of a fact have in a user's table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from editlab.data.formats.plain import Plain
from editlab.errors import UserError

SAME = {"target_new": "target", "target_true": "truth"}
"""Names of the fields of a :class:`~editlab.data.Fact` -> their names in :class:`~editlab.data.Plain`."""
COLUMNS = (
    "subject", "prompt", "target", "truth", "paraphrases", "neighbors", "aliases", "truth_aliases", "portability", "id",
)  # fmt: skip
"""Fields of a fact that can be given another name; those of :data:`SAME` can be used too."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Check the names on our side of the map.

    Raises:
        UserError: A name is no field of a fact, or one field has two names.
    """
    known = (*COLUMNS, *SAME)
    for ours, theirs in columns.items():
        if ours not in known:
            raise UserError(f"data.columns gives a name to {ours!r}, which is no field of a fact: {_fix(ours, known)}")
        if not isinstance(theirs, str) or not theirs:
            raise UserError(f"data.columns.{ours} is {theirs!r}: write the name of a field of the file.")
    for ours, other in SAME.items():
        if ours in columns and other in columns:
            raise UserError(f"data.columns has {ours} and {other}, which are the same field: leave one of them.")


def format_by(columns: Mapping[str, str], present: Collection[str], source: str) -> Plain:
    """Return the schema of a file whose fields have other names.

    Args:
        columns: our name -> the file's name. Fields that are not in it are read by their usual names.
        present: names of all fields in the file.
        source: name of the file, for the message of an error.

    Raises:
        UserError: A name on either side is unknown.
    """
    check_columns(columns)
    for ours, theirs in columns.items():
        if present and theirs not in present:
            fix = _fix(theirs, sorted(present))
            raise UserError(f"data.columns.{ours} is {theirs!r}, which is no field of {source}: {fix}")
    names = {SAME.get(ours, ours): theirs for ours, theirs in columns.items()}
    if "target" not in present and "target_new" in present:
        names.setdefault("target", "target_new")
    return Plain(**names)


def _fix(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
