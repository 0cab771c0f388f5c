"""The summary at the end of a run: its edits, its metrics, and the paths of its files."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import WeakKeyDictionary, finalize

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from editlab.distributed import ranks
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.ledger import Ledger
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.scoring import FactScores
from editlab.metrics.names import RETAINED, TABLE_GROUPS
from editlab.runs.folders import SUMMARY
from editlab.runs.logger import RunLogger
from editlab.runs.outcomes import FILE as OUTCOMES
from editlab.runs.outcomes import answers_of, outcome_rows, write_outcomes
from editlab.runs.run_table import RunTable
from editlab.runs.tables import metric_table
from editlab.utils.files import atomic_file, shown_path
from editlab.utils.version import __version__

log = logging.getLogger(__name__)

_VERSION = re.compile(r"version_\d+")
"""Pattern of the name of a run's folder."""

_own_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()
"""Trainer -> the folder of its run, for runs whose folder is not their logger's."""


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's files; every rank has to call this.

    It is the logger's. A run without a logger that has a folder gets a folder of its own, ``version_N`` with the next
    free number in the Trainer's ``default_root_dir``, unless :func:`resume_in_own_folder` has set it. With
    ``fast_dev_run`` it is a temporary folder, which is removed with the Trainer: a trial run keeps nothing.
    """
    if not is_trial(trainer) and has_folder(trainer.loggers):
        return Path(str(trainer.log_dir))
    if trainer not in _own_folders:
        _own_folders[trainer] = (
            _temporary(trainer) if is_trial(trainer) else Path(ranks.on_first(lambda: str(_reserved(trainer))))
        )
    return _own_folders[trainer]


def is_trial(trainer: Trainer) -> bool:
    """Tell whether this is a trial run of one or a few batches (``fast_dev_run``), which keeps nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def own_folder(trainer: Trainer) -> Path | None:
    """Return the folder that :func:`run_folder` has created for a run whose logger has none; None otherwise."""
    return _own_folders.get(trainer)


def resume_in_own_folder(trainer: Trainer, checkpoint: Path) -> None:
    """Let a run without a logger that has a folder write into that of the run that it resumes, if it is one of its own.

    Args:
        trainer: of the run.
        checkpoint: the checkpoint that it resumes from.
    """
    root, run = Path(trainer.default_root_dir), checkpoint.resolve().parent.parent
    own = run.parent == root.resolve() and _VERSION.fullmatch(run.name)
    if own and not is_trial(trainer) and not has_folder(trainer.loggers):
        _own_folders[trainer] = root / run.name


def has_folder(loggers: Iterable[Logger]) -> bool:
    """Tell whether the first logger has a folder for each run; loggers that send numbers to a server have none."""
    return isinstance(next(iter(loggers), None), TensorBoardLogger | CSVLogger)


def _temporary(trainer: Trainer) -> Path:
    """Create a folder that is removed with the Trainer, or at the end of the process."""
    folder = mkdtemp(prefix="editlab-")
    finalize(trainer, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _reserved(trainer: Trainer) -> Path:
    """Create the next free folder."""
    root = Path(trainer.default_root_dir)
    numbers = [int(path.name.partition("_")[2]) for path in root.glob("version_*") if _VERSION.fullmatch(path.name)]
    number = max(numbers, default=-1) + 1
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run was faster
            number += 1


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


def finish_run(
    trainer: Trainer,
    summary: dict[str, Any],
    title: str,
    ledger: Ledger,
    evaluation: Evaluation,
) -> None:
    """Writes ``outcomes.csv`` and ``summary.json`` into the run's folder, and logs the summary.

    The summary has null for numbers that are not finite. It is written last: a run that has one is finished.

    Args:
        trainer: of the run.
        summary: the dict of :func:`summarize`.
        title: model, layers and method, in a few words.
        ledger: the run's edits.
        evaluation: the run's measurements.
    """
    folder = run_folder(trainer)
    save_outcomes(trainer, ledger, evaluation)
    if trainer.is_global_zero:
        with atomic_file(folder / SUMMARY) as temporary:
            content = json.dumps(_finite(summary), indent=2, allow_nan=False)
            Path(temporary).write_text(content + "\n", encoding="utf-8")
    changed = evaluation.memory is None
    log.info("%s", render(summary, title, trainer, folder, _checkpoint(trainer), exports=changed))


def save_outcomes(trainer: Trainer, ledger: Ledger, evaluation: Evaluation) -> None:
    """Writes ``outcomes.csv`` into the folder of a run or of a validation that has measured all standing edits.

    A validation of an earlier checkpoint does not replace the outcomes of the finished run.

    Args:
        trainer: of the run.
        ledger: its edits.
        evaluation: its measurements.
    """
    if trainer.state.fn == "validate" and not has_folder(trainer.loggers):
        return
    folder = run_folder(trainer)  # collective: every rank has to call it
    scores = {group: evaluation.scores(group) for group in TABLE_GROUPS}
    if not trainer.is_global_zero or (trainer.state.fn == "validate" and not _is_end(folder, trainer, ledger, scores)):
        return
    write_outcomes(outcome_rows(ledger, scores, answers_of(evaluation.generated)), folder / OUTCOMES)


def _is_end(folder: Path, trainer: Trainer, ledger: Ledger, scores: Mapping[str, FactScores | None]) -> bool:
    """Whether a validation has measured all standing edits, at the end of the run in this folder if it has finished."""
    measured = scores[RETAINED]
    if measured is None or len(measured.edit) != len(ledger.standing_numbers):
        return False
    return edits_at_end(folder) in (None, len(ledger))


def edits_at_end(folder: Path) -> int | None:
    """Number of edits, rolled back or not, after which the run in a folder was finished; None if it was not."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return int(summary["edits"] + summary["rolled_back"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checkpoint(trainer: Trainer) -> str | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (path := callback.best_model_path or callback.last_model_path):
            return shown_path(path)
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
            if facts[name] < facts["checked"] == facts.get("facts"):
                lines.append("the others are not edited: --data.keep all edits every fact")
    if facts.get("neighbors_left_out"):
        lines.append(
            f"NS leaves out {facts['neighbors_left_out']} of {facts['neighbors']} neighbors, whose subjects are edited"
        )
    return lines


def render(
    summary: dict[str, Any], title: str, trainer: Trainer, folder: Path, checkpoint: str | None, exports: bool = True
) -> str:
    """The summary as text of at most one screen; ``exports``: whether weights have changed that can be exported."""
    undone = "".join(f", {summary[k]} {k.replace('_', ' ')}" for k in ("rolled_back", "superseded") if summary[k])
    lines = [
        "",
        f"{summary['edits']} facts edited{undone} in {counted(summary['batches'], 'batch', 'batches')}: {title}",
        metric_table(summary["metrics"]).to_text(),
    ]
    norms = ", ".join(f"{value:.3f} (layer {layer})" for layer, value in summary["delta_norm"].items())
    where = shown_path(folder)
    drawn, listed = (any(isinstance(one, kind) for one in trainer.loggers) for kind in (RunLogger, RunTable))
    tables = [*(["metrics.csv"] if listed else []), OUTCOMES, SUMMARY]
    lines += [
        "",
        f"||delta|| / ||W||: {norms}",
        f"{summary['seconds']:.0f} s{_asking(summary)}, peak memory {summary['peak_memory_mb']:.0f} MiB",
        *selected(summary.get("facts", {})),
        "",
    ]
    if is_trial(trainer):
        return "\n".join([*lines, "nothing was kept, because trainer.fast_dev_run is set", ""])
    lines += [
        *([f"curves       tensorboard --logdir {shown_path(folder.parent)}"] if drawn else []),
        f"tables       {', '.join(tables)} in {where}",
        f"edited model {checkpoint or 'none was written (see trainer.enable_checkpointing)'}",
        *([f"to use it    editlab export --ckpt_path {where} --out edited"] if checkpoint and exports else []),
        "",
    ]
    return "\n".join(lines)
