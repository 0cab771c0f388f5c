"""The recipes, presets and experiments that ship with editlab: which there are, and finding one by its name.

They lie in ``configs/`` at the top of the repository, and in a wheel in ``editlab/configs/``. A name is that of the
file without its folders and ending (``emmet_replay``, ``gpt2-xl``); ``models/gpt2-xl`` and
``configs/models/gpt2-xl.yaml`` name the same file.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from editlab.errors import EditLabError, UserError
from editlab.utils.files import atomic_file

log = logging.getLogger(__name__)

RECIPES, MODELS, EXPERIMENTS = KINDS = ("recipes", "models", "experiments")
"""What ships: recipes, presets of models, experiments; the last two in a folder of that name."""

SINGULAR = {RECIPES: "recipe", MODELS: "preset", EXPERIMENTS: "experiment"}
"""What one file of a kind is called."""

SETTINGS = (RECIPES, MODELS)
"""What ``--config`` takes."""

_ENDING = ".yaml"
_FOLDER = "configs"


@dataclass(frozen=True)
class Shipped:
    """A file that ships with editlab."""

    kind: str
    """one of :data:`KINDS`"""
    path: Path

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def about(self) -> str:
        """What the file is, in one sentence (:func:`about`)."""
        return about(self.path.read_text(encoding="utf-8"))


def shipped_folder() -> Path:
    """Return the folder with the recipes: that of the installed package, or that of the checkout.

    Raises:
        EditLabError: There is neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / _FOLDER, package.parent / _FOLDER):
        if (folder / MODELS).is_dir() and (folder / EXPERIMENTS).is_dir():
            return folder
    raise EditLabError(f"The recipes of editlab are missing from {package / _FOLDER}: install editlab again.")


def in_checkout() -> bool:
    """Tell whether editlab runs from a checkout, where experiments belong to a project, and not from a wheel."""
    return shipped_folder().parent != Path(__file__).resolve().parents[1]


def shipped(kind: str) -> list[Shipped]:
    """Return all files of a kind (one of :data:`KINDS`), sorted by name."""
    folder = shipped_folder() / ("" if kind == RECIPES else kind)
    return [Shipped(kind, path) for path in sorted(folder.glob(f"*{_ENDING}"))]


def find(name: str, kinds: Sequence[str] = KINDS) -> Shipped | None:
    """Return the shipped file of that name; None if there is none.

    Args:
        name: such as ``emmet_replay``, ``models/gpt2-xl`` or ``configs/emmet.yaml``.
        kinds: the kinds that are searched, in this order.
    """
    *folders, last = Path(name).parts or ("",)
    if folders[:1] == [_FOLDER]:
        del folders[0]
    elif not folders and last.endswith(_ENDING):
        return None  # a file of the working folder is meant
    elsewhere = folders not in ([], [MODELS], [EXPERIMENTS]) or (folders and folders[0] not in kinds)
    if elsewhere:
        return None
    stem = last.removesuffix(_ENDING)
    return next((one for kind in folders or kinds for one in shipped(kind) if one.name == stem), None)


def resolve(name: str, kinds: Sequence[str] = SETTINGS, option: str = "--config") -> str:
    """Return the path of the file that the user means by a name, and log which one if it was not a path.

    A file of that name, or of that name with ``.yaml``, takes precedence over one that ships with editlab.

    Args:
        name: a path, or a name for :func:`find`.
        kinds: the kinds that are meant.
        option: what the user gave the name to, for the log.

    Returns:
        The path; ``name`` itself where nothing was found.
    """
    found, one = chosen(name, kinds), find(name, kinds)
    ships = one is not None and Path(found).exists() and one.path.samefile(found)
    if one is not None and ships and found != name:
        log.info("%s %s: the %s that ships with editlab, %s", option, name, SINGULAR[one.kind], found)
    elif not ships and (one is not None or found != name):
        besides = f", and not the {SINGULAR[one.kind]} that ships with editlab" if one is not None else ""
        log.info("%s %s: the file %s of this folder%s", option, name, found, besides)
    return found


def chosen(name: str, kinds: Sequence[str] = SETTINGS) -> str:
    """Return the path that :func:`resolve` returns, without a message."""
    with suppress(OSError, ValueError, RuntimeError):  # what no path can be, such as settings, or ~nobody
        path = Path(name).expanduser()
        if path.exists() and not path.is_dir():
            return name
        if Path(f"{name}{_ENDING}").is_file():
            return f"{name}{_ENDING}"
        one = find(name, kinds)
        if one is not None:
            return str(one.path)
    return name


def unknown(name: str, kinds: Sequence[str] = KINDS) -> str:
    """Return advice for a name that no file has, worded as the end of a sentence.

    It names the verb for a file of another kind, or the closest names.
    """
    stem = Path(name).name.removesuffix(_ENDING)
    other = find(stem, [kind for kind in KINDS if kind not in kinds])
    if other is not None:
        verb = "editlab sweep" if other.kind == EXPERIMENTS else "editlab fit --config"
        return f"{stem} is the name of {_a(SINGULAR[other.kind])}, for {verb} {stem}."
    names = [one.name for kind in kinds for one in shipped(kind)]
    close = difflib.get_close_matches(stem, names)
    return f"did you mean {' or '.join(close)}?" if close else "editlab ls lists those that ship with editlab."


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def copy(name: str, target: str | Path = ".", force: bool = False) -> Path:
    """Copy a shipped file into a folder, under its own name or another one.

    Args:
        name: as for :func:`find`; the first of the kinds that has the name counts.
        target: a folder, which is created if it is missing, or a file's path that ends in ``.yaml``.
        force: replace a file that is there.

    Returns:
        The path of the copy.

    Raises:
        UserError: No file has that name, or a file is there already.
    """
    one = find(name) or find(name.removesuffix(_ENDING))
    if one is None:
        raise UserError(f"No recipe, preset or experiment is called {name!r}: {unknown(name)}")
    target = Path(target).expanduser()
    path = target if target.suffix == _ENDING and not target.is_dir() else target / one.path.name
    if path.is_dir():
        raise UserError(f"{path} is a folder: name another one to copy to.")
    if path.exists() and not force:
        raise UserError(f"{path} exists, and is not overwritten: name another folder, or use --force.")
    with atomic_file(path) as temporary:
        temporary.write_bytes(one.path.read_bytes())
    return path


def about(text: str) -> str:
    r"""Return what a recipe is: the first sentence of its opening comment that is not a command.

    >>> about("# editlab fit --config configs/rome.yaml\n#\n# ROME: one fact a step. It is\n# slow.\nmodel: {}")
    'ROME: one fact a step.'
    """
    comment = re.match(r"(?:#.*\n?)*", text)
    lines = (comment.group() if comment else "").splitlines()
    paragraphs = "\n".join(line[1:].strip() for line in lines).split("\n\n")
    prose = next((" ".join(part.split()) for part in paragraphs if part and not part.startswith("editlab ")), "")
    return first_sentence(prose)


def first_sentence(text: str) -> str:
    """Return a text up to the first full stop that ends a sentence.

    >>> first_sentence("Seeds, e.g. 3. They are drawn.")
    'Seeds, e.g. 3.'
    """
    found = re.match(r".*?[^.]\.(?=\s+[A-Z`])", text, re.DOTALL)
    return found.group() if found else text
