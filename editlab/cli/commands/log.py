"""``editlab log``: lists what was edited, when, and what was kept, rolled back and removed."""

from __future__ import annotations

import json
import logging
import sys

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.runs.edit_log import read_log

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=str, help="A run's folder, a delta, an exported model, or a folder with some of these in it."
    )
    parser.add_argument("--json", action="store_true", help="Write a JSON list to standard output.")


def _log(given: Namespace) -> None:
    logs = read_log(given.folder)
    if given.json:
        sys.stdout.write(json.dumps([one.to_dict() for one in logs], indent=2, ensure_ascii=False) + "\n")
        return
    for one in logs:
        log.info("%s\n", one.to_text())


COMMAND = Command("log", "List what was edited, when, and what was kept, rolled back or removed.", _add_arguments, _log)
