"""``editlab view``: serves a page to look at runs while they go."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_device_argument
from editlab.lm.placement import device_named
from editlab.runs.run_table import DEFAULT_FOLDER
from editlab.view.listing import require_runs
from editlab.view.serving import PORT, require_streamlit, serve


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=str, default=DEFAULT_FOLDER, help="Folder of all runs, or of one.")
    parser.add_argument("--port", type=int, default=PORT, help="Port on 127.0.0.1; 0 takes any that is free.")
    add_device_argument(parser)
    parser.add_argument("--model", help="Name or path of the base model, if it has moved since the runs.")


def _view(given: Namespace) -> None:
    require_streamlit()
    device_named(given.device)
    serve(require_runs(given.folder), given.port, given.device, given.model)


COMMAND = Command("view", "Serve a page to look at runs while they go.", _add_arguments, _view)
