"""Cells of CSV files with a user's texts, which a spreadsheet must not take for formulas."""

from __future__ import annotations

from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters with which a cell begins that a spreadsheet evaluates: ``=HYPERLINK(...)`` sends data to a server."""


def defused(cell: Any) -> Any:
    """Return a cell with an apostrophe before a text that a spreadsheet would evaluate; numbers stay as they are.

    A text that begins with an apostrophe before such a character gets another one, so that it can be told apart.

    >>> defused("=1+1"), defused("'=x"), defused("-0.5"), defused(-0.5), defused("Peru")
    ("'=1+1", "''=x", '-0.5', -0.5, 'Peru')
    """
    return f"'{cell}" if isinstance(cell, str) and _is_marked(cell) and not _is_number(cell) else cell


def restored(cell: str) -> str:
    """Return the text that :func:`defused` was given.

    >>> restored("'=1+1"), restored("''=x"), restored("'tis"), restored("-0.5")
    ('=1+1', "'=x", "'tis", '-0.5')
    """
    return cell[1:] if cell.startswith("'") and _is_marked(cell) else cell


def _is_marked(text: str) -> bool:
    """Whether a text begins with a character of a formula, after any number of apostrophes."""
    return text.lstrip("'").startswith(FORMULA)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
