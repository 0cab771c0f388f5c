"""Readers of fact files (JSON, JSONL, CSV, TSV), record by record, so that a bad record can be named and skipped."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from editlab.data.fact import Fact
from editlab.data.formats import (
    FIELD,
    FORMATS,
    FactFormat,
    Record,
    Subjects,
    UnreadFields,
    check_columns,
    format_by,
    format_of,
    other_format,
    read_all,
)
from editlab.data.formats.record import Cell
from editlab.errors import UserError
from editlab.utils.files import require_end

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


def read_facts(
    path: str,
    fact_format: FactFormat | None = None,
    skip_bad: bool = False,
    *,
    columns: Mapping[str, str] | None = None,
    subject: str = FIELD,
) -> list[Fact]:
    """Return the facts of a file, and log the fields that are not read, and the subjects that are inferred.

    Args:
        path: a JSON array, JSONL, CSV or TSV file, or ``worldfacts`` for the built-in facts.
        fact_format: its schema; default: the schema that the first record matches.
        skip_bad: skip records that cannot be read as facts, and log them.
        columns: names of a fact's fields -> their names in the file (:mod:`editlab.data.formats.columns`).
        subject: what is the subject of a fact whose record names none (:class:`editlab.data.formats.Subjects`).

    Raises:
        UserError: The file cannot be read, or a record is not a fact; the message names the record's index.
    """
    facts: list[Fact] = []
    bad: list[str] = []
    unread, subjects = UnreadFields(), Subjects(subject)
    for where, fact, fault, record in find_facts(path, fact_format, columns=columns, subjects=subjects):
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
    for sentence in filter(None, (unread.sentence(path), subjects.sentence(path))):
        log.info("%s", sentence)
    if not facts:
        raise UserError(f"The fact file {path} holds no record that can be used.")
    return facts


def find_facts(
    path: str,
    fact_format: FactFormat | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    subjects: Subjects | None = None,
) -> Iterator[Found]:
    """Yield the fact or the fault of each record of a file.

    Args:
        path: as for :func:`read_facts`.
        fact_format: as for :func:`read_facts`.
        columns: as for :func:`read_facts`.
        subjects: what gives the facts their subjects, and counts how; default: each record must name its own.

    Raises:
        UserError: The file as a whole cannot be read, or holds no record, or ``columns`` does not fit it.
    """
    file = BUILTIN if path == "worldfacts" else Path(path).expanduser()
    given = fact_format is not None or columns is not None
    raws: Iterable[_Raw]
    if columns is None:
        raws = _records(file, path, FORMATS if fact_format is None else (fact_format,))
    else:
        if fact_format is not None:
            raise UserError("data.columns and data.format are both set: leave one of them out.")
        check_columns(columns)
        raws = list(_records(file, path, None))
        present = dict.fromkeys(name for raw in raws if isinstance(raw.content, dict) for name in raw.content)
        fact_format = format_by(columns, present, path)
    # The built-in facts name their relations, which no format reads.
    yield from _found(raws, f"The fact file {path}", fact_format, given, subjects or Subjects(), file != BUILTIN)


def facts_in(text: str, name: str, subject: str = FIELD) -> list[Fact]:
    """Return the facts of a text that was read elsewhere, in JSON, one record on each line or all in a list.

    Args:
        text: the text.
        name: what it is called in messages, such as ``standard input``.
        subject: what is the subject of a fact whose record names none (:class:`editlab.data.formats.Subjects`).

    Raises:
        UserError: A record is not a fact; the message has its line.
    """
    facts: list[Fact] = []
    unread, subjects = UnreadFields(), Subjects(subject)
    for where, fact, fault, record in _found(_json_records(text, name), name, None, False, subjects):
        if record is not None:
            unread.add(record)
        if fact is None:
            raise UserError(f"{where} of {name} {fault}.")
        facts.append(fact)
    for sentence in filter(None, (unread.sentence(name), subjects.sentence(name))):
        log.info("%s", sentence[0].upper() + sentence[1:])
    return facts


def _found(
    raws: Iterable[_Raw],
    name: str,
    fact_format: FactFormat | None,
    given: bool,
    subjects: Subjects,
    noted: bool = True,
) -> Iterator[Found]:
    """Yield the fact or the fault of each record.

    Args:
        raws: the records.
        name: name of the file, as the beginning of a sentence.
        fact_format: their schema; None for that of the first record.
        given: whether the user has named the schema, so that other records are not of another one.
        subjects: as for :func:`find_facts`.
        noted: whether the fields that were not read are of interest.
    """
    empty = True
    for index, raw in enumerate(raws):
        empty = False
        try:
            if raw.fault is not None:
                raise UserError(raw.fault)
            if not isinstance(raw.content, dict):
                raise UserError(f"is a {type(raw.content).__name__} and not an object with fields: give it subject, "
                                "prompt and target")  # fmt: skip
            fact_format = fact_format or format_of(raw.content)
            if not given and (other := other_format(raw.content, fact_format)):
                raise UserError(f"has the schema {type(other).__name__}, and records before it have "
                                f"{type(fact_format).__name__}: put it into a file of its own")  # fmt: skip
            record = subjects.record(raw.content)
            facts = read_all(record, index, fact_format, subjects)
        except UserError as error:
            yield Found(raw.where, None, str(error))
            continue
        notes = [record if noted else None, *[None] * len(facts)]
        yield from (Found(raw.where, fact, None, note) for fact, note in zip(facts, notes, strict=False))
    if empty:
        raise UserError(f"{name[0].upper()}{name[1:]} holds no record.")


def _records(path: Path, name: str, formats: Sequence[FactFormat] | None) -> Iterable[_Raw]:
    """Return the records of a file; the header of a table must match one of ``formats``, or any if this is None."""
    text = _read(path, name)
    if path.suffix.lower() in TABLES:
        return _table(text, name, formats)
    return _json_records(text, f"The fact file {name}")


def _json_records(text: str, name: str) -> Iterable[_Raw]:
    """Return the records of a text in JSON; ``name`` begins a sentence about it."""
    name = name[0].upper() + name[1:]
    if text.lstrip()[:1] != "[":
        if _is_one_object(text):
            raise UserError(f"{name} is one JSON object over many lines: write its records as a list.")
        return _lines(text)
    try:
        array = _parsed(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON ({error}): correct it at that position.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} holds {_beyond_json(error)}.") from error
    return (_Raw(f"Record {index}", content) for index, content in enumerate(array))


def _parsed(text: str) -> Any:
    """Return the content of a JSON text, in which NaN, as pandas writes an absent value, is null."""
    return json.loads(text, parse_constant=lambda _: None)


def require_file(path: str) -> None:
    """Make sure that a fact file exists, without reading it.

    Raises:
        UserError: It does not exist.
    """
    if not Path(path).expanduser().exists():
        raise _missing(path)


def _missing(name: str) -> UserError:
    return UserError(f"The fact file {name} does not exist: check the path.")


def _read(path: Path, name: str) -> str:
    try:
        require_end(path, f"The fact file {name}")
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark before the text
    except FileNotFoundError as error:
        raise _missing(name) from error
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
            yield _Raw(where, _parsed(line))
        except json.JSONDecodeError as error:
            yield _Raw(where, None, f"is not valid JSON ({error.msg} at column {error.colno}): correct the line")
        except (ValueError, RecursionError) as error:
            yield _Raw(where, None, f"holds {_beyond_json(error)}")


def _table(text: str, name: str, formats: Sequence[FactFormat] | None) -> Iterator[_Raw]:
    """Yield the records of a CSV or TSV text; the first line names the columns, and empty cells are ignored."""
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey=_EXTRA_CELLS, strict=True)
    try:
        columns = [str(column).strip() for column in rows.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"The first line of {name} is not CSV ({error}): write subject,prompt,target there.") from error
    fits = formats is None or "subject" in columns or any(one.matches(dict.fromkeys(columns)) for one in formats)
    if not fits:
        raise UserError(f"The first line of {name} must name its columns: write subject,prompt,target there.")
    repeated = next((column for column in columns if column and columns.count(column) > 1), None)
    if repeated is not None:
        raise UserError(f"The first line of {name} has two columns {repeated!r}: give each column a name of its own.")
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
