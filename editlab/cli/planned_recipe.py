"""The recipe that ``editlab plan --out`` writes: the user's own, with the chosen settings in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from editlab.edits.forecast import Candidate
from editlab.errors import UserError
from editlab.utils.files import atomic_file

REPLAY = "MemoryReplay"


def planned(recipe: Mapping[str, Any], settings: Sequence[tuple[str, Any]], candidate: Candidate, edits: int) -> Any:
    """The recipe with settings of the command line and the chosen ones over its own.

    Args:
        recipe: what the user's file holds; empty without one.
        settings: names and values, such as ``("data.path", "facts.json")``.
        candidate: the chosen settings.
        edits: number of facts to edit.
    """
    chosen: list[tuple[str, Any]] = [
        ("model.layers", list(candidate.layers)),
        ("model.method", {"class_path": "MEMIT", "init_args": {"covariance_weight": candidate.weight}}),
        ("model.preserve_prompt_tokens", candidate.context_weight),
        ("model.values.reference", "original"),
        ("data.limit", edits),
    ]
    result: dict[str, Any] = dict(recipe)
    for name, value in (*settings, *chosen):
        *above, last = name.split(".")
        inner = result
        for part in above:
            below = inner.get(part)
            inner[part] = {"class_path": below} if isinstance(below, str) else dict(below or {})
            inner = inner[part]
        inner[last] = value
    trainer = dict(result.get("trainer") or {})
    given = trainer.get("callbacks") or []
    others = [one for one in (given if isinstance(given, list) else [given]) if class_name(one) != REPLAY]
    memory = [{"class_path": REPLAY, "init_args": {"memory": "consolidated"}}] if candidate.memory else []
    result["trainer"] = {**trainer, "callbacks": [*memory, *others]}
    return result


def class_name(callback: Any) -> str:
    """The bare class name of a callback in a recipe."""
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]


def read_recipe(path: str | None) -> dict[str, Any]:
    """What the user's recipe holds; empty without one.

    Raises:
        UserError: It cannot be read, or is no mapping.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"The recipe {path} cannot be read ({error}): correct its path or its text.") from error
    if not isinstance(content, dict):
        raise UserError(f"The recipe {path} holds no settings: give a file as editlab fit --config takes it.")
    return content


def require_new_file(out: str | None) -> None:
    """Refuses a file that exists, before any work is done.

    Raises:
        UserError: It exists, or its folder does not.
    """
    if out is None:
        return
    if Path(out).exists():
        raise UserError(f"--out {out} exists, and nothing is overwritten: give a new file.")
    if not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out} is in a folder that does not exist: create it, or give another file.")


def write_recipe(path: Path, recipe: Any, comments: Sequence[str]) -> None:
    """Writes a recipe under a comment whose first line is the command that runs it."""
    lines = [f"editlab fit --config {path}", "", *comments]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as temporary:
        temporary.write_text(head + text, encoding="utf-8")
