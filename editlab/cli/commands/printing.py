"""Results of a verb for a person, or as JSON for another program."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

log = logging.getLogger(__name__)

T = TypeVar("T")


def add_json_argument(parser: ArgumentParser) -> None:
    """Adds the argument that asks for JSON."""
    parser.add_argument(
        "--json", action="store_true", help="Write a JSON object to standard output, and messages elsewhere."
    )


def show(
    given: Namespace, measure: Callable[[Namespace], T], plain: Callable[[T], Any], text: Callable[[T], str]
) -> None:
    """Measures, and shows what was found.

    Args:
        given: the verb's arguments, with those of :func:`add_json_argument`.
        measure: finds the result.
        plain: the result as JSON takes it.
        text: the result for a person.
    """
    if given.json:
        with redirect_stdout(sys.stderr):  # a program reads standard output, so messages must not be in it
            found = measure(given)
        sys.stdout.write(json.dumps(plain(found), indent=2) + "\n")
    else:
        log.info("\n%s\n", text(measure(given)))
