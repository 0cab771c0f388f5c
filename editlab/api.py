"""Editing a loaded model in one call from Python, without files, recipes or a Trainer."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.data import EditDataModule, Fact
from editlab.data.formats import FIELD, Subjects, UnreadFields, read_all
from editlab.editor import SequentialEditor
from editlab.edits import standing
from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.joints import AUTO
from editlab.lm.language_model import MERGE_FIRST, LanguageModel
from editlab.metrics.names import BEFORE, RETAINED, of_group
from editlab.runs.logger import RunLogger
from editlab.runs.progress_bar import with_progress_bar
from editlab.runs.tables import metric_table
from editlab.runs.trainer import TRAINER_DEFAULTS
from editlab.runs.workplace import leave_folder
from editlab.solver.base import EditMethod
from editlab.solver.methods import MEMIT
from editlab.solver.post_steps import PostStep
from editlab.utils.compat import calls_not_compiled
from editlab.utils.progress import bars
from editlab.utils.rng import rng_state, set_rng_state
from editlab.values.settings import ValueSettings

log = logging.getLogger(__name__)

RECOMMENDED: dict[str, Any] = {
    "method": MEMIT(covariance_weight=300),
    "values": ValueSettings(reference="original"),
    "preserve_prompt_tokens": 1.0,
}
"""Default settings of :func:`edit_model`: those of ``configs/emmet.yaml``."""

SETTINGS = {
    "method": EditMethod,
    "values": ValueSettings,
    "moments": MomentSettings,
    "contexts": ContextSettings,
    "evaluation": EvaluationSettings,
}
"""Settings that are objects -> their classes."""


@dataclass
class EditResult:
    """Result of :func:`edit_model`."""

    facts: list[Fact]
    """facts that the weights hold now, in the order of their edits"""
    rolled_back: list[Fact]
    """facts that a callback rolled back or dropped, or that a later edit superseded"""
    summary: dict[str, Any]
    """what a run writes to ``summary.json``; its ``metrics`` are named ``group/metric``, such as ``retained/ES``"""
    editor: SequentialEditor
    """the LightningModule that edited the model, with updates, ledger and evaluation"""

    @property
    def before(self) -> dict[str, float]:
        """ES, PS, NS, accuracies and so on of the facts on the unedited model, and its perplexity."""
        return of_group(self.summary["metrics"], BEFORE)

    @property
    def retained(self) -> dict[str, float]:
        """The same metrics of all edits that are in the weights, after the last of them."""
        return of_group(self.summary["metrics"], RETAINED)

    def revert(self) -> None:
        """Removes the edits of this call from the model; those of later calls stay.

        If nothing else has changed the edited weights since, they are what they were before the call, bit for bit.
        """
        standing.remove(_changed_layers(self.editor))

    def __str__(self) -> str:
        """The metrics before, right after, and at the end, as a table."""
        return metric_table(self.summary["metrics"]).to_text()


def _changed_layers(editor: SequentialEditor) -> list[EditedLayer]:
    layers = [*editor.edited.values(), *editor.adjusted.values()]  # ``auto`` may not have chosen them yet
    return [layer for layer in layers if isinstance(layer, EditedLayer)]


def _revert(editor: SequentialEditor) -> None:
    for layer in _changed_layers(editor):
        layer.adapter = None
        layer.restore(torch.zeros_like(layer.total))


def edit_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    *,
    layers: Sequence[int] | Literal["auto"] = (4, 5, 6),
    batch_size: int = 16,
    joint: str = AUTO,
    subject: str = FIELD,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> tuple[PreTrainedModel, EditResult]:
    """Edits facts in a causal language model, in sequence, and measures the result.

    The weights of ``model`` itself change; :meth:`EditResult.revert` removes the edits again. Random generators and the
    model's train or eval mode do not change.

    Args:
        model: any causal language model of transformers, on one device; of a compiled one the model inside is edited.
        tokenizer: its fast tokenizer.
        facts: the facts in the order of their edits: :class:`~editlab.data.Fact`, or dicts with ``subject``, ``prompt``
            and ``target`` (or in any other schema of a fact file).
        layers: blocks whose MLP output projection is edited. The default suits SmolLM2-135M; ``auto`` chooses
            them by trying (:mod:`editlab.edits.layer_search`), on the first facts.
        batch_size: facts in a step.
        joint: what stands between a prompt and its target: ``auto``, ``space`` or ``none`` (:mod:`editlab.lm.joints`).
        subject: the subject of each fact: the ``field`` of that name; ``infer``, which guesses it where it is absent;
            or ``last_token``: the whole prompt (:class:`editlab.data.formats.Subjects`).
        callbacks: such as ``MemoryReplay()``, ``TrustRollback(heldout="some_text.txt")``, ``LoRAAdjust()``. All facts
            are edited, so trust has no facts to hold out and needs a text. editlab's callbacks forget earlier calls;
            their state after this call can be read from them.
        folder: folder for curves, tables and event logs, as of ``editlab fit``; default: nothing is written.
        seed: seed of all random draws.
        progress: whether to show progress bars.
        settings: further arguments of :class:`~editlab.editor.SequentialEditor`: ``method``, ``values``, ``moments``,
            ``evaluation``, ``keys``, ...; default: :data:`RECOMMENDED`.

    Returns:
        The edited model, and the result.

    Raises:
        UserError: The model, tokenizer, facts, layers, seed, folder or settings are not valid.

    Example::

        model, result = edit_model(model, tokenizer, [
            {"subject": "The Eiffel Tower", "prompt": "{} is located in the city of", "target": "Rome"},
        ])
        print(result)
    """
    given, model = model, _plain(model)
    _check(model, tokenizer, settings)
    _check_run(seed, folder)
    chosen = layers if isinstance(layers, str) else list(layers)
    name = {"language_model": model.config.name_or_path or type(model).__name__}
    editor = SequentialEditor(layers=chosen, **{**name, **_defaults(settings), **settings})
    data = EditDataModule(batch_size=batch_size, keep="all", shuffle=False, joint=joint)
    data.candidates = _facts(facts, subject)
    generators = rng_state()
    try:
        with _as_it_was(model), _environment(), _run_folder(folder) as root, bars(progress):
            seed_everything(seed, verbose=False)
            editor.use(LanguageModel(model, tokenizer, editor.edit_module))
            trainer = Trainer(
                accelerator="cpu" if model.device.type == "cpu" else "auto",
                devices=[model.device.index or 0] if model.device.type == "cuda" else 1,
                callbacks=with_progress_bar(callbacks, progress),
                logger=RunLogger(str(root), "edit_model") if folder is not None else False,
                default_root_dir=root,
                enable_checkpointing=False,
                enable_progress_bar=progress,
                **TRAINER_DEFAULTS,
            )
            try:
                trainer.fit(editor, datamodule=data)
            finally:
                leave_folder(trainer)
            summary = editor.summarize()
    except BaseException:
        _revert(editor)  # without a result the caller cannot remove the edits
        raise
    finally:
        set_rng_state(generators)
    standing.record(_changed_layers(editor))
    kept = editor.edited_facts
    gone = [fact for fact in data.facts if fact not in kept]
    return given, EditResult(kept, gone, summary, editor)


def _plain(model: Any) -> PreTrainedModel:
    """Return the model inside a compiled one, which shares its weights; any other model is returned as it is.

    Raises:
        UserError: It is not a model of transformers.
    """
    model = getattr(model, "_orig_mod", model)
    if type(model).__module__.partition(".")[0] == "peft":
        raise UserError(MERGE_FIRST.format(type(model).__name__))
    if not isinstance(model, PreTrainedModel):
        inside = getattr(model, "module", None)
        fix = "its part .module" if isinstance(inside, PreTrainedModel) else "what AutoModelForCausalLM loads"
        raise UserError(f"The model is a {type(model).__name__}, not a PreTrainedModel of transformers: give {fix}.")
    return model


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets: give the "
            "fast one that AutoTokenizer loads, or convert it to a PreTrainedTokenizerFast."
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(
            "Values are found by gradients, which torch.inference_mode() forbids: load the model and call edit_model "
            "outside of it (torch.no_grad() is fine)."
        )
    for name, kind in SETTINGS.items():
        if name in settings and not isinstance(settings[name], kind):
            example = "EMMET" if kind is EditMethod else kind.__name__
            raise UserError(f"The setting {name} is {settings[name]!r}: give an object, such as {example}().")
    if isinstance(step := settings.get("post_steps"), PostStep):
        raise UserError(f"The setting post_steps is {step!r}: give a list, such as [{step!r}].")


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended settings, as far as the method has a use for them."""
    solves = settings.get("method", RECOMMENDED["method"]).solves
    return RECOMMENDED if solves else {name: RECOMMENDED[name] for name in ("method", "values")}


def _check_run(seed: int, folder: str | Path | None) -> None:
    if not min_seed_value <= seed <= max_seed_value:
        raise UserError(f"seed is {seed}: it must lie between {min_seed_value} and {max_seed_value}.")
    if folder is not None and Path(folder).is_file():
        raise UserError(f"folder is {folder}, a file: give a folder, which need not exist yet.")


def _facts(given: Sequence[Fact | Mapping[str, Any]], subject: str = FIELD) -> list[Fact]:
    if isinstance(given, str | Mapping | Fact) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise UserError(f"facts is of type {kind}: give a list of Facts, or of dicts with subject, prompt and target.")
    facts, unread, subjects = [], UnreadFields(), Subjects(subject)
    for index, one in enumerate(given):
        if not isinstance(one, Fact | Mapping):
            raise UserError(f"Fact {index} is {one!r}: give a Fact, or a dict with subject, prompt and target.")
        try:
            if isinstance(one, Fact):
                facts.append(subjects.settle(one))
                continue
            record = subjects.record(one)
            facts += read_all(record, index, subjects=subjects)
            unread.add(record)
        except UserError as error:
            raise UserError(f"Fact {index} {error}.") from None
    if sentence := unread.sentence("The list of facts"):
        log.warning("%s", sentence)
    if sentence := subjects.sentence("the list of facts"):
        log.info("%s", sentence)
    if not facts:
        raise UserError("No fact is given: give at least one.")
    return facts


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model into eval mode, without gradients and uncompiled, inside the ``with``; afterwards restores it."""
    device = model.device
    training = {module: module.training for module in model.modules()}
    with_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with calls_not_compiled(model):
            yield
    finally:
        model.to(device)  # type: ignore[arg-type]  # the Trainer leaves it on the CPU
        for module, mode in training.items():
            module.training = mode
        for parameter in with_gradient:
            parameter.requires_grad_(True)


@contextmanager
def _environment() -> Iterator[None]:
    """Removes the variables that Lightning's seeding sets, which would seed whatever the process does later."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def _run_folder(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="editlab-") as temporary:
        yield Path(temporary)
