"""``editlab push``: uploads an exported model or delta to a repository on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.runs.hub import Export, push, size_of

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, help="Folder that export, apply or revert has written.")
    parser.add_argument("repo", type=str, help="Repository on the hub, such as me/my-model; created if there is none.")
    parser.add_argument("--private", action="store_true", help="Create a repository that only its owner sees.")
    parser.add_argument("--message", default="Edited by editlab", help="Message of the commit.")


def _push(given: Namespace) -> None:
    export = Export.of(Path(given.folder).expanduser())
    address = push(export, given.repo, given.private, given.message)
    log.info("%s: %d files, %s, pushed to %s", given.folder, len(export.names), size_of(export), address)


COMMAND = Command("push", "Upload an exported model or delta to a repository on the hub.", _add_arguments, _push)
