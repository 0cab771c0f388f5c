"""What every schema of fact files is: a class that recognises a record and reads the fact in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from editlab.data.fact import Fact


class FactFormat(ABC):
    """One schema of fact files.

    The messages of its errors are predicates, such as ``lacks 'subject': add it``: the caller puts the record's name
    before them.
    """

    @abstractmethod
    def matches(self, record: dict[str, Any]) -> bool:
        """Tell whether a record looks like one of this schema."""

    @abstractmethod
    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Return the fact of a record; ``index`` becomes its id unless the record has one of its own.

        Raises:
            UserError: A field is missing or wrong; the message is a predicate.
        """
