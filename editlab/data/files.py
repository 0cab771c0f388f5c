"""Readers of fact files (JSON, JSONL, CSV, TSV), record by record, so that a bad record can be named and skipped."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from editlab.data.fact import Fact
from editlab.data.formats import FORMATS, FactFormat, Record, UnreadFields, format_of, read_all
from editlab.data.formats.record import Cell
from editlab.errors import UserError
from editlab.utils.files import require_regular

log = logging.getLogger(__name__)

BUILTIN = Path(__file__).with_name("worldfacts.json")
"""File of the built-in facts; in recipes their path is ``worldfacts``."""

TABLES = (".csv", ".tsv")
_DELIMITERS = ",;\t"
_EXTRA_CELLS = "more cells than columns"


class Found(NamedTuple):
    """The result of reading one fact of a record: the fact, or a description of the record's fault."""

    where: str
    """name of the record, such as ``Record 3 (line 4)``; records are counted from 0, lines from 1"""
    fact: Fact | None
    fault: str | None
    """what is wrong and how to fix it, as a predicate whose subject is :attr:`where`"""
    record: Record | None = None
    """the record, which knows the fields that were read; None for a fault, and for a record's second and later facts"""


class _Raw(NamedTuple):
    where: str
    content: Any
    fault: str | None = None


def read_facts(path: str, fact_format: FactFormat | None = None, skip_bad: bool = False) -> list[Fact]:
    """Return the facts of a file, and log the fields that are not read.

    Args:
        path: a JSON array, JSONL, CSV or TSV file, or ``worldfacts`` for the built-in facts.
        fact_format: its schema; default: the schema that the first record matches.
        skip_bad: skip records that cannot be read as facts, and log them.

    Raises:
        UserError: The file cannot be read, or a record is not a fact; the message names the record's index.
    """
    facts: list[Fact] = []
    bad: list[str] = []
    unread = UnreadFields()
    for where, fact, fault, record in find_facts(path, fact_format):
        if record is not None:
            unread.add(record)
        if fact is not None:
            facts.append(fact)
        elif skip_bad:
            bad.append(f"{where} {fault}")
        else:
            raise UserError(f"{where} of {path} {fault}, or set data.skip_bad to true to skip it.")
    if bad:
        log.warning("%d records of %s are skipped: %s", len(bad), path, "; ".join(bad[:5]))
    if sentence := unread.sentence(path):
        log.info("%s", sentence)
    if not facts:
        raise UserError(f"The fact file {path} holds no record that can be used.")
    return facts


def find_facts(path: str, fact_format: FactFormat | None = None) -> Iterator[Found]:
    """Yield the fact or the fault of each record of a file; the arguments are those of :func:`read_facts`.

    Raises:
        UserError: The file as a whole cannot be read, or holds no record.
    """
    file = BUILTIN if path == "worldfacts" else Path(path).expanduser()
    empty = True
    for index, raw in enumerate(_records(file, path, fact_format)):
        empty = False
        try:
            if raw.fault is not None:
                raise UserError(raw.fault)
            if not isinstance(raw.content, dict):
                raise UserError(f"is a {type(raw.content).__name__} and not an object with fields: give it subject, "
                                "prompt and target")  # fmt: skip
            fact_format = fact_format or format_of(raw.content)
            record = Record(raw.content)
            facts = read_all(record, index, fact_format)
        except UserError as error:
            yield Found(raw.where, None, str(error))
            continue
        notes = [None if file == BUILTIN else record, *[None] * len(facts)]  # the built-in facts name their relations
        yield from (Found(raw.where, fact, None, note) for fact, note in zip(facts, notes, strict=False))
    if empty:
        raise UserError(f"The fact file {path} holds no record.")


def _records(path: Path, name: str, fact_format: FactFormat | None) -> Iterable[_Raw]:
    text = _read(path, name)
    if path.suffix.lower() in TABLES:
        return _table(text, name, fact_format)
    if text.lstrip()[:1] != "[":
        if _is_one_object(text):
            raise UserError(f"The fact file {name} is one JSON object over many lines: write its records as a list.")
        return _lines(text)
    try:
        array = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"The fact file {name} is not valid JSON ({error}): correct it at that position.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The fact file {name} holds {_beyond_json(error)}.") from error
    return (_Raw(f"Record {index}", content) for index, content in enumerate(array))


def _read(path: Path, name: str) -> str:
    try:
        require_regular(path, f"The fact file {name}")
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark before the text
    except FileNotFoundError as error:
        raise UserError(f"The fact file {name} does not exist: check the path.") from error
    except (OSError, ValueError) as error:  # a ValueError is about the encoding, or a path with a null character
        raise UserError(f"The fact file {name} cannot be read ({error}): give a UTF-8 file of JSON or CSV.") from error


def _is_one_object(text: str) -> bool:
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _beyond_json(error: Exception) -> str:
    """Return what Python's JSON reader could not take although it is valid JSON, as an object of ``holds``."""
    if isinstance(error, RecursionError):
        return "lists or objects inside each other too deeply to be read: remove what is no fact"
    return "a number with more digits than Python reads (4300): shorten it, or write it as a text"


def _lines(text: str) -> Iterator[_Raw]:
    """Yield the records of a JSONL text, one from each line."""
    # Not splitlines(): it also splits at characters that may occur inside a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        where = f"Record {index} (line {number})"
        try:
            yield _Raw(where, json.loads(line))
        except json.JSONDecodeError as error:
            yield _Raw(where, None, f"is not valid JSON ({error.msg} at column {error.colno}): correct the line")
        except (ValueError, RecursionError) as error:
            yield _Raw(where, None, f"holds {_beyond_json(error)}")


def _table(text: str, name: str, fact_format: FactFormat | None) -> Iterator[_Raw]:
    """Yield the records of a CSV or TSV text; the first line names the columns, and empty cells are ignored."""
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey=_EXTRA_CELLS, strict=True)
    try:
        columns = [str(column).strip() for column in rows.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"The first line of {name} is not CSV ({error}): write subject,prompt,target there.") from error
    known = [fact_format] if fact_format else FORMATS
    if "subject" not in columns and not any(one.matches(dict.fromkeys(columns)) for one in known):
        raise UserError(f"The first line of {name} must name its columns: write subject,prompt,target there.")
    rows.fieldnames = columns
    index = 0
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # where the next record begins is unknown
            fault = f"is not valid CSV ({error}): close every quote, and double those inside a cell"
            if "field limit" in str(error):
                fault = (
                    f"has a cell of more than {csv.field_size_limit()} characters: shorten it, or, if it is not meant "
                    "to be that long, close the quote that begins it"
                )
            yield _Raw(f"Record {index} (line {begin})", None, fault)
            return
        yield _row(f"Record {index} (line {rows.line_num})", row, len(columns))
        index += 1


def _row(where: str, row: dict[str, Any], columns: int) -> _Raw:
    if _EXTRA_CELLS in row:
        cells = columns + len(row[_EXTRA_CELLS])
        return _Raw(where, None, f'has {cells} cells for {columns} columns: put texts with a comma in "quotes"')
    return _Raw(where, {column: Cell(cell) for column, cell in row.items() if cell is not None and cell.strip()})
