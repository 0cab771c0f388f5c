"""The call :func:`editlab.edit_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.api.inputs import check, check_run, check_types, facts_of, plain_model
from editlab.api.recorded import recorded_settings
from editlab.api.result import EditResult, changed_layers, take_out
from editlab.api.surroundings import as_it_was, environment, root_folder
from editlab.data import EditDataModule, Fact
from editlab.data.formats import FIELD
from editlab.editor import SequentialEditor
from editlab.edits import standing
from editlab.edits.conventions import OWN
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.chat import NONE
from editlab.lm.joints import AUTO
from editlab.lm.language_model import LanguageModel
from editlab.runs.folders import RunFolder
from editlab.runs.frames import event_rows
from editlab.runs.logger import RowLogger, RunLogger
from editlab.runs.progress_bar import with_progress_bar
from editlab.runs.summary import run_folder
from editlab.runs.trainer import TRAINER_DEFAULTS
from editlab.runs.workplace import leave_folder
from editlab.solver.base import EditMethod
from editlab.solver.methods import MEMIT
from editlab.solver.post_steps import PostStep
from editlab.utils.progress import bars
from editlab.utils.rng import rng_state, set_rng_state
from editlab.values.settings import ValueSettings

RECOMMENDED: dict[str, Any] = {
    "method": MEMIT(covariance_weight=300),
    "values": ValueSettings(reference="original"),
    "preserve_prompt_tokens": 1.0,
}
"""Default settings of :func:`edit_model`: those of ``configs/memit.yaml``."""


def edit_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    *,
    layers: Sequence[int] | Literal["auto"] = (4, 5, 6),
    method: EditMethod | None = None,
    values: ValueSettings | None = None,
    moments: MomentSettings | None = None,
    contexts: ContextSettings | None = None,
    evaluation: EvaluationSettings | None = None,
    batch_size: int = 16,
    joint: str = AUTO,
    subject: str = FIELD,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    language_model: str | None = None,
    keys: str | None = None,
    preserve_prompt_tokens: float | None = None,
    passes: int = 1,
    edit_module: str | None = None,
    restore_between_batches: bool = False,
    condition_limit: float = 1e10,
    chat_template: str = NONE,
    solver_device: str = "auto",
    conventions: str = OWN,
    site: str | None = None,
    post_steps: Sequence[PostStep] = (),
    compensate: bool = True,
    made_for: dict[str, int | str] | None = None,
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
        method: metric and slack of the closed form, such as ``EMMET()`` or ``ROME()``, or a control without one;
            default: MEMIT at effective weight 300.
        values: how the values v* are found; default: on the original weights.
        moments: the text that the second moments C0 are computed from; default: text that the model samples.
        contexts: prefixes in which values (and, depending on ``keys``, keys) are averaged.
        evaluation: what is measured in addition to the edits.
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
        language_model: the model's name, in messages and in :meth:`EditResult.delta`; default: where it was loaded
            from.
        keys: ``bare``, ``mean`` or ``templates``; default: as ``conventions`` says.
        preserve_prompt_tokens: weight of the keys of the edited prompts' context tokens in the batch's metric, 0 for
            none; default: 1 for methods with a closed form.
        passes: number of times that a batch goes through the layers, each time for the remaining residual.
        edit_module: path of the edited module inside a block; default: found by structure.
        restore_between_batches: edit each batch on the original weights: independent batches, no sequence.
        condition_limit: condition number of the Gram matrix above which the slack is raised.
        chat_template: what reads prompts as a user's turn: ``none``, ``edit``, ``evaluate`` or ``both``.
        solver_device: device on which the closed form is solved; ``auto`` chooses it.
        conventions: ``own`` or ``published``: whose choices hold for ``keys``, ``site`` and ``values.kl_at``.
        site: whether a target is a state of the residual ``stream`` or the output of the ``mlp``; default: as
            ``conventions`` says.
        post_steps: what is done with each layer's update before it is added, in order.
        compensate: carry what post-steps cut off from an update into the next solve.
        made_for: entries of the model's configuration that the settings were chosen for; other models are refused.

    All settings from ``keys`` on are those of :class:`~editlab.editor.SequentialEditor`, which says more of each.

    Returns:
        The edited model, and the result.

    Raises:
        UserError: The model, tokenizer, facts, layers, seed, folder or settings are not valid.

    ``model`` and ``tokenizer`` are those that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load. For a few facts a
    short text is enough, for the moments and for the perplexity:

    >>> from editlab import edit_model
    >>> from editlab.evaluation.settings import EvaluationSettings
    >>> from editlab.keys.moments import MomentSettings
    >>> fact = {"subject": "The Eiffel Tower", "prompt": "{} is located in the city of", "target": "Rome"}
    >>> model, result = edit_model(
    ...     model,
    ...     tokenizer,
    ...     [fact],
    ...     moments=MomentSettings(tokens=256),
    ...     evaluation=EvaluationSettings(heldout_tokens=512, generation=0, bystanders=8),
    ...     progress=False,
    ... )
    >>> sorted(result.retained)[:3]  # what was measured with the edit in the weights
    ['accuracy', 'accuracy_age_1', 'bystander_accuracy']
    >>> list(result.outcomes["status"])  # a row for each edit, as of editlab.Run
    ['kept']
    >>> len(result.changes().facts)  # the target's probability before and after, neighbors, perplexity, norms
    1
    >>> result.revert()  # the weights of before, bit for bit
    """
    given, model = model, plain_model(model)
    settings = {
        "method": method, "values": values, "moments": moments, "contexts": contexts, "evaluation": evaluation,
        "keys": keys, "preserve_prompt_tokens": preserve_prompt_tokens, "passes": passes, "edit_module": edit_module,
        "restore_between_batches": restore_between_batches, "condition_limit": condition_limit,
        "chat_template": chat_template, "solver_device": solver_device, "conventions": conventions, "site": site,
        "post_steps": post_steps, "compensate": compensate, "made_for": made_for,
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    check(model, tokenizer, settings)
    check_types(layers, callbacks, batch_size=batch_size, seed=seed, passes=passes, condition_limit=condition_limit)
    check_run(seed, folder)
    editor = SequentialEditor(
        language_model or model.config.name_or_path or type(model).__name__,
        layers if isinstance(layers, str) else list(layers),
        **{**_defaults(settings), **settings, "post_steps": list(post_steps)},
    )
    data = EditDataModule(path="facts given from Python", batch_size=batch_size, keep="all", shuffle=False, joint=joint)
    data.candidates = facts_of(facts, subject)
    return given, _edited(editor, data, model, tokenizer, callbacks, folder, seed, progress)


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended settings, as far as the method has a use for them."""
    solves = settings.get("method", RECOMMENDED["method"]).solves
    return RECOMMENDED if solves else {name: RECOMMENDED[name] for name in ("method", "values")}


def _edited(
    editor: SequentialEditor,
    data: EditDataModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[Callback],
    folder: str | Path | None,
    seed: int,
    progress: bool,
) -> EditResult:
    """Runs an editor over facts; the arguments are those of :func:`edit_model`."""
    generators = rng_state()
    try:
        with as_it_was(model), environment(), root_folder(folder) as root, bars(progress):
            seed_everything(seed, verbose=False)
            editor.use(LanguageModel(model, tokenizer, editor.edit_module))
            logger: RowLogger | RunLogger = RowLogger() if folder is None else RunLogger(str(root), "edit_model")
            trainer = Trainer(
                accelerator="cpu" if model.device.type == "cpu" else "auto",
                devices=[model.device.index or 0] if model.device.type == "cuda" else 1,
                callbacks=with_progress_bar(callbacks, progress),
                logger=logger,
                default_root_dir=root,
                enable_checkpointing=False,
                enable_progress_bar=progress,
                **TRAINER_DEFAULTS,
            )
            try:
                trainer.fit(editor, datamodule=data)
            finally:
                leave_folder(trainer)
            summary, run = editor.summarize(), RunFolder(run_folder(trainer))
            outcomes, events = run.outcomes, event_rows(run.path)
    except BaseException:
        take_out(editor)  # without a result the caller cannot remove the edits
        raise
    finally:
        set_rng_state(generators)
    standing.record(changed_layers(editor))
    kept = editor.edited_facts
    gone = [fact for fact in data.facts if fact not in kept]
    place = None if folder is None else run.path
    settings = recorded_settings(editor, data.joint, callbacks)
    return EditResult(kept, gone, summary, editor, place, logger.rows, outcomes, events, settings)
