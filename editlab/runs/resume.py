"""A run's state in a checkpoint, and the settings that must agree for a run to resume from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from editlab.data.fact import Fact
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.edited_model import EditedModel
from editlab.edits.ledger import LedgerEntry
from editlab.errors import UserError
from editlab.lm.fingerprint import architecture
from editlab.lm.joints import AUTO
from editlab.lm.precision import dtype_name
from editlab.runs.folders import SUMMARY
from editlab.runs.outcomes import FILE as OUTCOMES
from editlab.runs.run_table import RunTable
from editlab.runs.summary import edits_at_end, run_folder
from editlab.utils.files import sweep
from editlab.utils.rng import rng_state

KEY = "editor"
"""The editor's entry in a checkpoint."""


ENTRIES = (
    "language_model", "weights", "dtype", "layers", "batch_size", "ledger", "contexts", "evaluation", "table", "rng",
)  # fmt: skip
"""Fields that the editor's entry must have; later versions of editlab added further ones."""


CONVENTIONS = {
    "kl_at": "model.values.kl_at",
    "keys": "model.keys",
    "site": "model.site",
    "bare_denominator": "bare_denominator (which model.conventions published sets for ROME)",
}
"""Conventions in an identity -> their settings, for messages."""


@dataclass(frozen=True)
class RunIdentity:
    """The properties, apart from the facts, in which a checkpoint and the run that resumes from it must agree."""

    language_model: str
    """name of the model, for messages; models are compared by their weights"""
    weights: str
    """fingerprint of the unedited weights"""
    dtype: str
    """dtype of the model"""
    layers: list[int]
    """edited layers"""
    batch_size: int
    """facts in a batch"""
    architecture: dict[str, Any] = field(default_factory=dict)
    """settings of the model that its weights do not show; empty in checkpoints of older versions"""
    precision: str | None = None
    """``trainer.precision``; None in checkpoints of older versions"""
    joint: str = AUTO
    """``data.joint``"""
    split: str = "all"
    """``data.split``"""
    conventions: dict[str, Any] = field(default_factory=dict)
    """the run's :class:`~editlab.edits.conventions.Conventions`; empty in checkpoints of older versions"""
    spread: str = "residual"
    """``model.values.spread``, as replayed edits have a value for each site"""

    @classmethod
    def of_run(cls, model: EditedModel, trainer: Trainer) -> RunIdentity:
        """The identity of the run in which a Trainer fits, validates or tests a model."""
        return cls(
            language_model=model.language_model,
            weights=model.fingerprint,
            dtype=dtype_name(model.lm.model.dtype),
            layers=model.layer_numbers,
            batch_size=getattr(trainer.datamodule, "batch_size", 0),  # type: ignore[attr-defined]
            architecture=architecture(model.lm.model),
            precision=trainer.precision,
            joint=model.lm.joint,
            split=getattr(trainer.datamodule, "split", "all"),  # type: ignore[attr-defined]
            spread=getattr(getattr(model, "values", None), "spread", "residual"),
        )

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> RunIdentity:
        """The identity in an editor's entry of a checkpoint."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def require_model(self, run: RunIdentity) -> None:
        """Makes sure that ``run`` edits the same layers of the same model as the checkpoint with this identity.

        Raises:
            UserError: The layers or the models differ.
        """
        if self.layers != run.layers:
            raise UserError(
                f"The checkpoint edits layers {self.layers} and this run layers {run.layers}: set model.layers to the "
                "checkpoint's, or start a new run without --ckpt_path."
            )
        if self.dtype != run.dtype:
            raise UserError(
                f"The checkpoint's model is in {self.dtype} and this run's in {run.dtype}: set trainer.precision to "
                "the checkpoint's."
            )
        if self.weights != run.weights:
            raise UserError(
                f"The checkpoint is of {self.language_model}, whose weights differ from those of "
                f"{run.language_model}: set model.language_model to the checkpoint's model."
            )
        # Two versions of transformers may report different settings: those are compared that both report.
        shared = [name for name in self.architecture if name in run.architecture]
        other = next((name for name in shared if self.architecture[name] != run.architecture[name]), None)
        if other is not None:
            raise UserError(
                f"The checkpoint's model has {self.architecture[other]} as {other} in its config.json and this run's "
                f"{run.architecture[other]}, so equal weights give different results: set model.language_model to the "
                "checkpoint's model."
            )

    def require_settings(self, run: RunIdentity) -> None:
        """Makes sure that ``run`` has this identity's precision, batch size, split, joint, conventions and spread.

        Raises:
            UserError: One of them differs.
        """
        if self.batch_size != run.batch_size:
            raise UserError(
                f"The checkpoint's batches are of {self.batch_size} facts and this run's of {run.batch_size}: set "
                "data.batch_size to the checkpoint's."
            )
        pairs = {
            "trainer.precision": (self.precision, run.precision),
            "data.split": (self.split, run.split),
            "data.joint": (self.joint, run.joint),
            "model.values.spread": (self.spread, run.spread),
        } | {CONVENTIONS[name]: (own, run.conventions.get(name, own)) for name, own in self.conventions.items()}
        for setting, (own, other) in pairs.items():
            if own is not None and own != other:
                raise UserError(
                    f"The checkpoint's run had {setting} {own} and this one has {other}: set it to the checkpoint's, "
                    "or start a new run without --ckpt_path."
                )


def _as_edited(fact: Fact) -> Fact:
    """Return a fact without what an edit does not depend on.

    With a higher limit more subjects are edited, and fewer neighbors are measured; a later version may read more
    aliases and questions from the same file.
    """
    return replace(fact, neighbors=(), aliases=(), truth_aliases=(), portability=())


def require_facts(ledger: Iterable[LedgerEntry], facts: Sequence[Fact], source: str | None) -> None:
    """Makes sure that the facts to edit begin with those that the checkpoint has edited.

    Args:
        ledger: the checkpoint's edits.
        facts: this run's facts, in the order of their edits.
        source: where they come from, for messages.

    Raises:
        UserError: A fact differs, or there are fewer than the checkpoint has edited.
    """
    edited = [entry.fact for entry in ledger]
    for number, (before, now) in enumerate(zip(edited, facts, strict=False)):
        if _as_edited(before) != _as_edited(now):
            raise UserError(
                f"Fact {number} of the checkpoint is {before.question!r} -> {before.target_new!r}, and in {source} it "
                f"is {now.question!r} -> {now.target_new!r}: give the same file, limit and seed, or start a new run "
                "without --ckpt_path."
            )
    if len(facts) < len(edited):
        raise UserError(
            f"The checkpoint has edited {len(edited)} facts and {source} gives {len(facts)}: give the same file and "
            "limit."
        )


def require_unfinished(trainer: Trainer, saved: Mapping[str, Any], edits: int) -> None:
    """Makes sure that a resumed run had not been finished with fewer facts: the Trainer would skip the further ones.

    Args:
        trainer: of the resumed run.
        saved: the editor's entry of the checkpoint.
        edits: facts that are edited now.

    Raises:
        UserError: Further facts were given to a finished run.
    """
    if len(saved["ledger"]) < edits:
        return
    given = len(trainer.datamodule.facts)  # type: ignore[attr-defined]
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and edits < given:
        raise UserError(
            f"The checkpoint is of a run that was finished with its {edits} facts, and {given} are given: start a new "
            "run with all of them, without --ckpt_path."
        )


def save(checkpoint: dict[str, Any], trainer: Trainer, identity: RunIdentity, state: Mapping[str, Any]) -> None:
    """Puts a run's identity and state into ``checkpoint``, and takes the language model's weights out of it.

    Args:
        checkpoint: Lightning's.
        trainer: of the run; its table of metrics is saved too.
        identity: the properties that must agree to resume.
        state: the editor's own fields.
    """
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("lm.")}
    loggers = [logger for logger in trainer.loggers if isinstance(logger, RunTable)]
    table = loggers[0].rows if loggers else {}
    checkpoint[KEY] = {
        **asdict(identity),
        **state,
        "table": table,
        "rng": rng_state(),
        "threads": torch.get_num_threads(),
    }


def sums(layers: Sequence[int]) -> list[str]:
    """Names under which a checkpoint holds the edited layers' sums of updates."""
    return [f"edited.{layer}.total" for layer in layers]


def require_sums(saved: Mapping[str, Tensor], layers: Mapping[int, EditedLayer]) -> None:
    """Make sure that the sums of updates in a checkpoint fit the weights that they belong to.

    They need not be finite: a run that has broken its model comes to its end, whether or not it was resumed.

    Args:
        saved: the checkpoint's tensors by name.
        layers: layer number -> the edited layer.

    Raises:
        UserError: A sum has another shape or is missing.
    """
    for name, layer in zip(sums(list(layers)), layers.values(), strict=True):
        own, total = layer.total, saved.get(name)
        if not isinstance(total, Tensor) or total.shape != own.shape:
            shape = list(total.shape) if isinstance(total, Tensor) else "no shape"
            raise UserError(
                f"The checkpoint's {name} has the shape {shape} and the weight {list(own.shape)}: set "
                "model.edit_module and model.language_model as in the checkpoint's run, or start a new run without "
                "--ckpt_path."
            )


def require_finite(name: str, total: Tensor, source: str) -> None:
    """Make sure that a sum of updates is finite.

    Raises:
        UserError: It holds NaN or infinity.
    """
    if not bool(total.isfinite().all()):
        raise UserError(
            f"The sum of updates {name} in {source} holds NaN or infinity, so the edited model cannot answer: use an "
            "earlier checkpoint, or run the edits again with other settings."
        )


def adjusted_path(name: str) -> str | None:
    """Path in the language model of a sum of updates by its name in a checkpoint.

    Returns:
        The path for a map that a callback adjusted, None for any other name.
    """
    return name.split(".")[1].replace("/", ".") if name.startswith("adjusted.") else None


def prepare_folder(trainer: Trainer, table: Mapping[int, Any], edits: int) -> None:
    """Removes what is not of this run's state, and sets the loggers to the checkpoint's state or to an empty one.

    These are files that a kill left half-written, results of a run that was further, and, since a new run may have been
    given an old one's folder, that run's results and checkpoints.

    To be called after all checks, since it changes the run's folder.

    Args:
        trainer: of the run.
        table: the metrics logged up to the checkpoint; {} for a new run.
        edits: number of edits in the checkpoint; 0 for a new run.
    """
    folder = run_folder(trainer)  # collective: every rank has to call it
    if trainer.is_global_zero:  # a kill leaves a partly written checkpoint
        for path in (folder, folder / "checkpoints"):
            sweep(path)
        stale = [] if edits else [*(folder / "checkpoints").glob("*.ckpt")]
        if edits_at_end(folder) != edits:
            stale += [folder / SUMMARY, folder / OUTCOMES]
        for path in stale:
            path.unlink(missing_ok=True)
    for logger in trainer.loggers:
        if isinstance(logger, RunTable):
            logger.share()
            logger.resume(dict(table), edits)
