"""Cells of CSV files with a user's texts, which a spreadsheet must not take for formulas."""

from __future__ import annotations

from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters with which a cell begins that a spreadsheet evaluates: ``=HYPERLINK(...)`` sends data to a server."""


def defused(cell: Any) -> Any:
    """Return a cell with an apostrophe before a text that a spreadsheet would evaluate; numbers stay as they are.

    >>> defused("=1+1"), defused("-0.5"), defused(-0.5), defused("Peru")
    ("'=1+1", '-0.5', -0.5, 'Peru')
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) and not _is_number(cell) else cell


def restored(cell: str) -> str:
    """Return the text that :func:`defused` was given.

    >>> restored("'=1+1"), restored("'tis"), restored("-0.5")
    ('=1+1', "'tis", '-0.5')
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
