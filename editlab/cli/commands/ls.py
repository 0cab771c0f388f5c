"""``editlab ls``: lists the recipes, presets and experiments that ship with editlab."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.utils.shipped import EXPERIMENTS, KINDS, MODELS, RECIPES, Shipped, shipped

log = logging.getLogger(__name__)

TITLES = {
    RECIPES: "Recipes: editlab fit --config NAME",
    MODELS: "Presets of models, over a recipe: editlab fit --config RECIPE --config NAME",
    EXPERIMENTS: "Experiments: editlab sweep NAME",
}


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, help="What is listed. Default: all.")


def _list(given: Namespace) -> None:
    # Whole lines for a file or another program; a terminal would wrap them.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    kinds = [given.kind] if given.kind else KINDS
    log.info("%s", "\n\n".join("\n".join(lines(kind, shipped(kind), width)) for kind in kinds))


def lines(kind: str, files: Iterable[Shipped], width: int | None = None) -> Iterator[str]:
    """Yield a title, and a line for each file with its name and what it is.

    Args:
        kind: the kind of the files.
        files: the files.
        width: number of characters to which a line is cut; None leaves it whole.
    """
    rows: Sequence[Shipped] = list(files)
    column = max((len(one.name) for one in rows), default=0)
    yield TITLES[kind]
    for one in rows:
        line = f"  {one.name:{column}}  {one.about}"
        yield line if width is None or len(line) <= width else f"{line[: width - 1]}…"


COMMAND = Command("ls", "List the recipes, presets and experiments that ship with editlab.", _add_arguments, _list)
