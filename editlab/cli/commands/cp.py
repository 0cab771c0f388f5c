"""``editlab cp``: copies a recipe, a preset or an experiment that ships with editlab."""

from __future__ import annotations

import logging

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.utils.shipped import copy

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", type=str, help="Name of a recipe, preset or experiment, as editlab ls lists it.")
    parser.add_argument(
        "folder", type=str, nargs="?", default=".", help="Folder of the copy, or its path if it ends in .yaml."
    )
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")


def _copy(given: Namespace) -> None:
    log.info("%s", copy(given.name, given.folder, given.force))


COMMAND = Command("cp", "Copy a recipe, preset or experiment that ships with editlab.", _add_arguments, _copy)
