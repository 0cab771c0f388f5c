"""The summary at the end of a run: its edits, its metrics, and the paths of its files."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from editlab.edits.edited_layer import EditedLayer
from editlab.edits.ledger import Ledger
from editlab.evaluation.evaluator import Evaluation
from editlab.runs.logger import RunLogger
from editlab.runs.tables import metric_table
from editlab.utils.files import atomic_file
from editlab.utils.version import __version__

log = logging.getLogger(__name__)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run's files: its logger's, or the Trainer's root if it has no logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB; on a GPU, the peak of what torch had allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":  # which has no resource module; elsewhere psutil does not know the peak
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions of editlab, Python and the libraries on which the numbers depend."""
    found = {"editlab": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "peft", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Memory, ranks, recipe, seed and versions of a run, for its summary."""
    return {
        "peak_memory_mb": peak_memory_mb(),
        "ranks": trainer.world_size,
        "recipe": trainer.logger.name if trainer.logger else None,
        "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        "versions": versions(),
    }


def summarize(
    trainer: Trainer,
    ledger: Ledger,
    layers: Mapping[int, EditedLayer],
    evaluation: Evaluation,
) -> dict[str, Any]:
    """A run as a dict, for ``summary.json``.

    Args:
        trainer: of the run.
        ledger: its edits.
        layers: layer number -> the edited layer.
        evaluation: what was measured, and how long the run and the parts of the measuring took.
    """
    return {
        "edits": ledger.kept,
        "rolled_back": len(ledger) - ledger.kept,
        "superseded": ledger.superseded,
        "batches": trainer.global_step,
        "metrics": evaluation.results(),
        "delta_norm": {str(number): layer.relative_norm() for number, layer in layers.items()},
        "seconds": evaluation.stop_clock(),
        "evaluation_seconds": dict(evaluation.costs),
        "facts": dict(getattr(trainer.datamodule, "selection", {})),  # type: ignore[attr-defined]
        **provenance(trainer),
    }


def finish_run(trainer: Trainer, summary: dict[str, Any], title: str) -> None:
    """Writes ``summary.json`` into the run's folder, with null for numbers that are not finite, and logs the summary.

    Args:
        trainer: of the run.
        summary: the dict of :func:`summarize`.
        title: model, layers and method, in a few words.
    """
    folder = run_folder(trainer)
    if trainer.is_global_zero:
        with atomic_file(folder / "summary.json") as temporary:
            content = json.dumps(_finite(summary), indent=2, allow_nan=False)
            Path(temporary).write_text(content + "\n", encoding="utf-8")
    log.info("%s", render(summary, title, trainer, folder, _checkpoint(trainer)))


def _finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checkpoint(trainer: Trainer) -> str | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (path := callback.best_model_path or callback.last_model_path):
            return os.path.relpath(path)
    return None


def counted(number: int, one: str, several: str) -> str:
    """A count with its noun, such as ``1 batch`` or ``2 batches``."""
    return f"{number} {one if number == 1 else several}"


def _asking(summary: Mapping[str, Any]) -> str:
    """The seconds of free generation, in words; empty if nothing was generated."""
    seconds = summary.get("evaluation_seconds", {}).get("generation", 0.0)
    asked = any(name.endswith("generation") for name in summary["metrics"])
    return f" ({seconds:.0f} s of them free generation)" if asked else ""


def selected(facts: Mapping[str, Any]) -> list[str]:
    """What was measured of a file of facts to select those to edit, as sentences.

    Args:
        facts: :attr:`editlab.data.EditDataModule.selection`.
    """
    lines = []
    half = "" if facts.get("split", "all") == "all" else f" ({facts['split']} half)"
    for name, verb in (("preferred", "prefers the truth of"), ("known", "knows")):
        if name in facts:
            of = f"{facts[name]} of the {facts['checked']} facts of {facts['path']}{half} that were checked"
            lines.append(f"the unedited model {verb} {of} ({facts[name] / facts['checked']:.1%})")
    if facts.get("neighbors_left_out"):
        lines.append(
            f"NS leaves out {facts['neighbors_left_out']} of {facts['neighbors']} neighbors, whose subjects are edited"
        )
    return lines


def render(summary: dict[str, Any], title: str, trainer: Trainer, folder: Path, checkpoint: str | None) -> str:
    """The summary as text of at most one screen."""
    undone = "".join(f", {summary[k]} {k.replace('_', ' ')}" for k in ("rolled_back", "superseded") if summary[k])
    lines = [
        "",
        f"{summary['edits']} facts edited{undone} in {counted(summary['batches'], 'batch', 'batches')}: {title}",
        metric_table(summary["metrics"]).to_text(),
    ]
    norms = ", ".join(f"{value:.3f} (layer {layer})" for layer, value in summary["delta_norm"].items())
    where = os.path.relpath(folder)
    logged = any(isinstance(logger, RunLogger) for logger in trainer.loggers)
    tables = ["metrics.csv", "summary.json"] if logged else ["summary.json"]
    lines += [
        "",
        f"||delta|| / ||W||: {norms}",
        f"{summary['seconds']:.0f} s{_asking(summary)}, peak memory {summary['peak_memory_mb']:.0f} MiB",
        *selected(summary.get("facts", {})),
        f"curves       tensorboard --logdir {os.path.relpath(folder.parent)}",
        f"tables       {', '.join(f'{where}/{name}' for name in tables)}",
        f"edited model {checkpoint or 'none was written (see trainer.enable_checkpointing)'}",
        *([f"to use it    editlab export --ckpt_path {where} --out edited"] if checkpoint else []),
        "",
    ]
    return "\n".join(lines)
