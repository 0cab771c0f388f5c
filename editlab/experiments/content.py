"""What an experiment's YAML file holds, together with what it takes from another experiment (``like``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from editlab.errors import UserError
from editlab.utils.shipped import EXPERIMENTS, resolve, unknown

LIKE = "like"
"""Key that names another experiment: its keys count where they are not given, and flags are added to its flags."""


def experiment_file(path: str | Path) -> Path:
    """The file that the user means: a path, or the name of an experiment that ships with editlab.

    Raises:
        UserError: If there is none.
    """
    file = Path(resolve(str(path), (EXPERIMENTS,), "Experiment")).expanduser()
    if not file.is_file():
        raise UserError(f"There is no experiment file {str(path)!r}: {unknown(str(path), (EXPERIMENTS,))}")
    return file


def read_content(file: Path, where: str, readers: tuple[Path, ...] = ()) -> Any:
    """The file's content, completed by the experiment that it is like.

    Args:
        file: the YAML file.
        where: its name in messages.
        readers: files whose ``like`` led to this one.

    Raises:
        UserError: If a file is not there or no YAML, or if an experiment is like itself.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = "" if line is None else f" (see line {line + 1})"
        raise UserError(f"{where} is not valid YAML{place}: correct it.") from error
    if not isinstance(content, Mapping) or content.get(LIKE) is None:
        return content
    name = content[LIKE]
    if not isinstance(name, str):
        raise UserError(f"{where}: {LIKE} must be the name of an experiment or the path of its file, and is {name!r}.")
    readers = (*readers, file.resolve())
    beside = [file.parent / name, file.parent / f"{name}.yaml"]
    other = next((path for path in beside if path.is_file()), None) or experiment_file(name)
    if other.resolve() in readers:
        raise UserError(
            f"{where}: {LIKE} leads from {other.name} back to itself: name an experiment that stands alone."
        )
    base = read_content(other, str(other), readers)
    if not isinstance(base, Mapping):
        raise UserError(f"{where} is like {other}, which is no experiment: name another one.")
    flags = [one.get("flags") or {} for one in (base, content)]
    if all(isinstance(one, Mapping) for one in flags):  # whatever else it is, the schema reports it
        content = {**content, "flags": {**flags[0], **flags[1]}}
    return {**base, **content}
