"""Base class of all schemas of fact files, which recognize a record and read the fact in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from editlab.data.fact import Fact


class FactFormat(ABC):
    """One schema of fact files.

    The messages of its errors are predicates, such as ``lacks 'subject': add it``; the caller prepends the record's
    name.
    """

    @abstractmethod
    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether a record has this schema."""

    @abstractmethod
    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Return the fact of a record; ``index`` becomes its id unless the record has an id.

        Raises:
            UserError: A field is missing or wrong; the message is a predicate.
        """

    def read_all(self, record: dict[str, Any], index: int) -> list[Fact]:
        """Return the facts of a record; a format whose records hold several facts overrides this.

        Raises:
            UserError: A field is missing or wrong; the message is a predicate.
        """
        return [self.read(record, index)]
