"""The summary at the end of a run: what was edited, with what effect, and where its files are."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import editlab
from editlab.runs.logger import RunLogger
from editlab.runs.tables import metric_table
from editlab.utils.files import atomic_file

if TYPE_CHECKING:
    from editlab.editor import SequentialEditor

log = logging.getLogger(__name__)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run's files: its logger's, or the Trainer's root if it has no logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB; on a GPU, the peak of what torch had allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":  # no resource module there
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions of editlab, Python and the libraries on which the numbers depend."""
    found = {"editlab": editlab.__version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "peft", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summarize(trainer: Trainer, editor: SequentialEditor) -> dict[str, Any]:
    """The content of ``summary.json``; numbers that were not measured are absent."""
    return {
        "edits": editor.ledger.kept,
        "rolled_back": editor.edits - editor.ledger.kept,
        "superseded": editor.ledger.superseded,
        "batches": editor.global_step,
        "metrics": editor.evaluation.results(),
        "delta_norm": {
            str(number): layer.relative_norm()
            for number, layer in zip(editor.layer_numbers, editor.layers, strict=True)
        },
        "seconds": editor.evaluation.stop_clock(),
        "peak_memory_mb": peak_memory_mb(),
        "ranks": trainer.world_size,
        "recipe": trainer.logger.name if trainer.logger else None,
        "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        "versions": versions(),
    }


def finish_run(trainer: Trainer, editor: SequentialEditor) -> None:
    """Writes ``summary.json`` into the run's folder and logs the summary; numbers that are not finite become null."""
    summary = summarize(trainer, editor)
    folder = run_folder(trainer)
    if trainer.is_global_zero:
        with atomic_file(folder / "summary.json") as temporary:
            content = json.dumps(_finite(summary), indent=2, allow_nan=False)
            Path(temporary).write_text(content + "\n", encoding="utf-8")
    log.info("%s", render(summary, editor, folder, _checkpoint(trainer)))


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


def render(summary: dict[str, Any], editor: SequentialEditor, folder: Path, checkpoint: str | None) -> str:
    """The summary as text of at most one screen."""
    undone = "".join(f", {summary[k]} {k.replace('_', ' ')}" for k in ("rolled_back", "superseded") if summary[k])
    lines = [
        "",
        f"{summary['edits']} facts edited{undone} in {counted(summary['batches'], 'batch', 'batches')}: "
        f"{editor.language_model}, layers {', '.join(map(str, editor.layer_numbers))}, {type(editor.method).__name__}",
        "",
        metric_table(summary["metrics"]).to_text(),
    ]
    norms = ", ".join(f"{value:.3f} (layer {layer})" for layer, value in summary["delta_norm"].items())
    where = os.path.relpath(folder)
    logged = any(isinstance(logger, RunLogger) for logger in editor.trainer.loggers)
    tables = ["metrics.csv", "summary.json"] if logged else ["summary.json"]
    lines += [
        "",
        f"||delta|| / ||W||: {norms}",
        f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mb']:.0f} MiB",
        "",
        f"curves       tensorboard --logdir {os.path.relpath(folder.parent)}",
        f"tables       {', '.join(f'{where}/{name}' for name in tables)}",
        f"edited model {checkpoint or 'none was written (see trainer.enable_checkpointing)'}",
        *([f"to use it    editlab export --ckpt_path {where} --out edited"] if checkpoint else []),
        "",
    ]
    return "\n".join(lines)
