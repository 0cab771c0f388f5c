"""The recipe of a call of ``edit_model``, as its patch keeps it: such a call has no ``config.yaml`` to copy from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import yaml
from lightning.pytorch import Callback

from editlab.editor import SequentialEditor

_PLAIN = (str, int, float, bool, type(None))


def recorded_settings(editor: SequentialEditor, joint: str, callbacks: Iterable[Callback]) -> str:
    """The sections ``model``, ``data`` and ``trainer`` of a recipe in YAML, with what a patch's later uses read.

    Args:
        editor: the editor after its run.
        joint: what stands between a prompt and its target.
        callbacks: the callbacks of the run; of their settings those count that are plain values.
    """
    solve = editor.solve_settings
    model = {
        "language_model": editor.language_model,
        "layers": list(editor.layer_numbers),
        "method": _component(editor.method),
        "values": _plain(asdict(editor.values)),
        "moments": _plain(asdict(editor.moments)),
        "contexts": _plain(asdict(editor.context_settings)),
        "keys": solve.key_mode,
        "site": solve.site,
        "preserve_prompt_tokens": solve.context_key_weight,
        "passes": solve.passes,
        "condition_limit": solve.condition_limit,
        "chat_template": editor.chat_template,
        "solver_device": solve.device,
        "post_steps": [_component(step) for step in solve.post_steps],
        "compensate": solve.compensate,
    }
    sections: dict[str, Any] = {"model": model, "data": {"joint": joint}}
    if components := [_component(callback) for callback in callbacks]:
        sections["trainer"] = {"callbacks": components}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _component(made: Any) -> dict[str, Any]:
    """Class path and settings of an object, from its fields or from attributes named like its parameters."""
    kind = type(made)
    if is_dataclass(made):
        settings = asdict(made)  # type: ignore[arg-type]
    else:
        settings = {name: getattr(made, name, ...) for name in inspect.signature(kind).parameters}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": _plain(settings)}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that YAML has a form for: numbers, words, and lists of them."""
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {name: value for name, value in found.items() if isinstance(value, _PLAIN) or _is_plain_list(value)}


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, _PLAIN) for one in value)
