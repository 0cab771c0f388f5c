"""A record that remembers which of its fields were read, so that a misspelt or unknown field is named to the user."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any


class Cell(str):
    """The text of a cell of a CSV or TSV file, in which a list or an object is written as JSON."""

    __slots__ = ()


class Record(dict[str, Any]):
    """A dict that notes the names of the fields that are read from it and from the objects inside it.

    ``in``, ``keys`` and iteration do not count as reading; a lookup counts even if the field is absent. So a format
    need not declare its fields: those that it looks up are known.

    Args:
        content: the fields.
        path: dotted name of this object inside its record, with a dot at the end; "" for the record itself.
        outer: the record that this object is inside of; None for the record itself.
        needs_subject: whether a record without a subject, or with one that is not in its prompt, is an error.
    """

    def __init__(
        self, content: Mapping[str, Any], path: str = "", outer: Record | None = None, needs_subject: bool = True
    ) -> None:
        super().__init__(content)
        self._path = path
        self.names: set[str] = set() if outer is None else outer.names
        """dotted names of all fields that were looked up, shared by a record and the objects inside it"""
        self.left_out: Counter[str] = Counter() if outer is None else outer.left_out
        """dotted names of fields with prompts that have no answer -> number of these prompts"""
        self.needs_subject: bool = needs_subject if outer is None else outer.needs_subject

    def __getitem__(self, name: str) -> Any:
        self.names.add(f"{self._path}{name}")
        return self._inside(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or ``default`` if it is absent."""
        self.names.add(f"{self._path}{name}")
        return self._inside(name, super().__getitem__(name)) if name in self else default

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(record) and **record look fields up by __getitem__

    def values(self) -> Any:
        """Return all fields, which thereby are read."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """Return all names and fields, which thereby are read."""
        return [(name, self[name]) for name in self]

    def unread(self) -> set[str]:
        """Return the dotted names of the fields that are not empty and were not looked up.

        Fields of an inner object count only if at least one of them was looked up; otherwise the object was used whole.
        """
        return set(_unread(dict.items(self), "", self.names))

    def leave_out(self, name: str) -> None:
        """Count a prompt in the field ``name`` that is left out because it has no answer."""
        self.left_out[f"{self._path}{name}"] += 1

    def _inside(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return Record(value, f"{self._path}{name}.", self)
        if isinstance(value, list):
            return [self._inside(name, one) for one in value]
        if isinstance(value, Cell):
            return str(value)
        return value


def _unread(fields: Any, path: str, names: set[str]) -> Iterator[str]:
    for key, value in fields:
        name = f"{path}{key}"
        if name not in names:
            if value not in (None, "", [], {}):
                yield name
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict) and any(looked_up.startswith(f"{name}.") for looked_up in names):
                yield from _unread(part.items(), f"{name}.", names)


class UnreadFields:
    """The fields of a file that its format does not read, with the number of records that have each of them.

    Prompts that are left out because they have no answer are counted too.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._known: set[str] = set()

    def add(self, record: Record) -> None:
        """Count the unread fields of a record that was read."""
        self.counts.update(record.unread())
        self.left_out.update(record.left_out)
        self._known |= record.names

    def sentence(self, source: str) -> str | None:
        """Return a sentence that names each unread field of ``source`` once, with its count; None if there is none.

        A field is followed by the most similar name among those that the format looks up, if one is similar; fields of
        the same name in several objects inside the records, such as groups of tests, are named together. A second
        sentence counts the prompts without an answer, if there are any.
        """
        sentences = []
        if self.counts:
            sentences.append(f"{source} has fields that are not read: {', '.join(self._named())}.")
        if self.left_out:
            named = [f"{count} in {name}" for name, count in sorted(self.left_out.items())]
            fix = "add an answer to each, or ignore this"
            sentences.append(f"{source} has prompts without an answer, which are left out ({', '.join(named)}): {fix}.")
        return " ".join(sentences) or None

    def _named(self) -> Iterator[str]:
        """Yield each unread field with its count; fields of one name in more than two objects are named together."""
        alike: dict[str, list[str]] = {}
        for name in sorted(self.counts):
            alike.setdefault(name.rpartition(".")[2], []).append(name)
        for last, names in alike.items():
            most = max(self.counts[name] for name in names)
            records = f"{most} record{'' if most == 1 else 's'}"
            if len(names) > 2:
                yield f"{last} (in {len(names)} objects, such as {names[0].rpartition('.')[0]}; in up to {records})"
                continue
            for name in names:
                count = self.counts[name]
                yield f"{name} (in {count} record{'' if count == 1 else 's'}{self._nearest(name)})"

    def _nearest(self, name: str) -> str:
        parent, _, last = name.rpartition(".")
        known = [one.rpartition(".")[2] for one in sorted(self._known) if one.rpartition(".")[0] == parent]
        close = difflib.get_close_matches(last, known, n=1, cutoff=0.7)
        return f"; did you mean {close[0]}?" if close else ""
