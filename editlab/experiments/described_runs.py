"""The settings of a measured run, as far as a dry solve (:mod:`editlab.solver.dry_solve`) describes the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editlab.edits.forecast import Candidate
from editlab.experiments.plan import Case

HARMLESS = ("ForgettingCurve", "DownstreamEval")
"""Callbacks that change no weight."""


@dataclass(frozen=True)
class Described:
    """A measured run's settings, as far as a forecast depends on them."""

    candidate: Candidate
    batch_size: int
    data: tuple[tuple[str, Any], ...]
    """settings of the data module, without the limit and the batch size"""
    moments: tuple[tuple[str, Any], ...]
    """settings of the second moments"""
    language_model: str


class NotDescribed(Exception):  # noqa: N818 - a reason, not an error
    """Says why a dry solve does not describe a run."""


def described(recipe: Mapping[str, Any], case: Case) -> Described:
    """The settings of a case over its recipe.

    Raises:
        NotDescribed: A dry solve does not describe its runs.
    """
    config: dict[str, Any] = {name: dict(recipe.get(name) or {}) for name in ("model", "data")}
    for name, value in case.flags.items():
        _set(config, name.split("."), value)
    model, data = config["model"], dict(config["data"])
    method = model.get("method", {})
    method = {"class_path": method} if isinstance(method, str) else method
    arguments = dict(method.get("init_args") or {})
    require(str(method.get("class_path")).rpartition(".")[2] == "MEMIT", "the method is not MEMIT")
    require(set(arguments) <= {"covariance_weight", "mu"}, "the method has other settings")
    values = dict(model.get("values") or {})
    require(values == {"reference": "original"}, "values are found in another way")
    for name, usual in (("keys", "bare"), ("conventions", "own"), ("passes", 1), ("post_steps", []), ("site", None),
                        ("restore_between_batches", False), ("chat_template", "none"), ("contexts", {})):  # fmt: skip
        require(model.get(name, usual) in (usual, None), f"model.{name} is {model.get(name)}")
    require(isinstance(model.get("layers"), list), "the layers are not named")
    candidate = Candidate(
        tuple(sorted(model["layers"])), float(arguments.get("covariance_weight", 15000)),
        float(model.get("preserve_prompt_tokens", 0)), _memory(case.callbacks), mu=float(arguments.get("mu", 0)),
    )  # fmt: skip
    data.pop("limit", None)
    batch_size = int(data.pop("batch_size", 16))
    moments = {"text": "self", "tokens": 24576, **(model.get("moments") or {})}
    return Described(
        candidate, batch_size, tuple(sorted(data.items())), tuple(sorted(moments.items())),
        str(model.get("language_model", "smollm2-135m")),
    )  # fmt: skip


def _memory(callbacks: Iterable[Mapping[str, Any]]) -> bool:
    memory = False
    for callback in callbacks:
        name, arguments = str(callback["class_path"]).rpartition(".")[2], callback.get("init_args") or {}
        if name == "MemoryReplay" and arguments == {"memory": "consolidated"}:
            memory = True
        else:
            require(name in HARMLESS, f"it has the callback {name}")
    return memory


def require(holds: bool, why: str) -> None:
    """Raises :class:`NotDescribed` unless something holds; ``why`` says what does not."""
    if not holds:
        raise NotDescribed(why)


def _set(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets a nested value as a flag does; a class that is named replaces the one before."""
    *above, last = path
    for name in above:
        inner = config.get(name)
        config[name] = {"class_path": inner} if isinstance(inner, str) else dict(inner or {})
        config = config[name]
    config[last] = value
