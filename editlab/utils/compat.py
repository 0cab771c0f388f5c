"""Everything that editlab takes from its dependencies' private interfaces, each with the reason why.

A name that begins with an underscore may change in any release, so the versions between which editlab is known to work
are bounded (:data:`SUPPORTED`, the same bounds as in setup.cfg), and a test checks each name in the installed versions.
Other modules use no private name of a dependency; a test checks that too. Nothing heavy is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

SUPPORTED: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "3"),
    "lightning": ("2.5", "2.7"),
    "transformers": ("4.56", "6"),
    "peft": ("0.17", "1"),
    "torchmetrics": ("1.6", "2"),
    "jsonargparse": ("4.40", "5"),
}
"""Packages whose private names are used: the first supported version, and the first version that is not supported."""


# ---- LightningCLI and jsonargparse: the command line --------------------------------------------------------------


class CommandHooks:
    """Base class to list before ``LightningCLI``, which has no public way to change these steps."""

    def run_verb(self, verb: str, run: Callable[[], None]) -> None:
        """Run a verb of the Trainer by calling ``run``; override this to act before or after it."""
        run()

    def arrange_help(self, verb: str, parser: Any, arguments: list[Any]) -> None:
        """Override this to change the help of a verb's parser, which has these arguments."""

    def setup_parser(self, *arguments: Any, **named: Any) -> None:
        """Create the parsers; ``add_arguments_to_parser`` is too early, as the verb's own arguments are added later."""
        super().setup_parser(*arguments, **named)  # type: ignore[misc]
        for verb, parser in self._subcommand_parsers.items():  # type: ignore[attr-defined]
            self.arrange_help(verb, parser, list(parser._actions))

    def _run_subcommand(self, subcommand: str) -> None:
        # before_fit and after_fit do not see an error, and there is one pair of them for each verb.
        self.run_verb(subcommand, partial(super()._run_subcommand, subcommand))  # type: ignore[misc]

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would look for hyper-parameters in the checkpoint, and editlab's checkpoints hold none.

        A file that is not a checkpoint is reported by the code that reads it.
        """


def read_attribute_docstrings(wanted: bool = True) -> None:
    """Make jsonargparse take help texts from the docstrings below a dataclass's fields, too, or no longer.

    Versions of jsonargparse differ in the name of the function, and the old name warns in new ones.
    """
    import jsonargparse

    try:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=wanted)
    except (AttributeError, TypeError):
        jsonargparse.set_docstring_parse_options(attribute_docstrings=wanted)


def change_class_list(argument: Any, change: Callable[[str], str]) -> None:
    """Replace the list of classes at the end of a parser argument's help by ``change`` of it; "" hides it.

    jsonargparse puts it together while it formats the help, and documents no way to leave it out.
    """
    if hasattr(argument, "extra_help"):  # only an argument with a type hint has a list
        text = change(argument.extra_help())
        argument.extra_help = lambda: text


def arguments_of(parser: Any) -> list[Any]:
    """Return the arguments of a parser, which argparse has no public way to list."""
    return list(parser._actions)


@contextmanager
def arguments_of_one_class(*kinds: type) -> Iterator[None]:
    """Let a setting of one of ``kinds`` that gets another class start with that class's defaults, inside the ``with``.

    jsonargparse takes over the arguments of the class before, defaults included, if both classes have them. MEMIT would
    get lambda 1 from EMMET, which is the default method, in place of its own 15,000, and MLFlowLogger the folder of
    RunLogger.
    """
    from jsonargparse import _typehints

    plain = _typehints.discard_init_args_on_class_path_change

    def discard(action: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            known = _typehints.import_object(now["class_path"])
            if isinstance(known, type) and issubclass(known, kinds):
                arguments = before["init_args"]
                for name in list(arguments.keys()):
                    del arguments[name]
        plain(action, before, now)

    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = plain


# ---- Lightning: checkpoints, loggers, strategies, modules ---------------------------------------------------------


class CheckpointHooks:
    """Base class to list before ``ModelCheckpoint``, which has no hooks around the writing of a file."""

    def before_save(self, trainer: Any) -> None:
        """Override this to act before a checkpoint is written; all ranks call it."""

    def after_save(self, trainer: Any, path: str) -> None:
        """Override this to act after a checkpoint was written to ``path``; all ranks call it."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self.before_save(trainer)
        super()._save_checkpoint(trainer, filepath)  # type: ignore[misc]
        self.after_save(trainer, filepath)


def save_unless_saved(checkpoint: Any, trainer: Any) -> None:
    """Make a ModelCheckpoint save now, unless it has already saved at this step.

    ModelCheckpoint saves every N steps, and after the last one only if N divides their number.
    """
    if checkpoint._last_global_step_saved != trainer.global_step:
        checkpoint._save_topk_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


def log_measurements_at(trainer: Any, step: int) -> None:
    """Have ``validate`` or ``test`` give its numbers to the loggers at a step of our choice.

    It would be the number of batches that this process has trained on, which is 0 if it only measures a checkpoint.

    Args:
        trainer: the Trainer.
        step: the step.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def check_early_stopping(callback: Any, trainer: Any) -> None:
    """Make an EarlyStopping callback evaluate the number that it watches now; by itself it does so once an epoch."""
    callback._run_early_stopping_check(trainer)


def next_version(logger: Any) -> int:
    """Return the next free number of a TensorBoardLogger's runs, without claiming it as ``logger.version`` does."""
    return int(logger._get_next_version())


def close_event_file(logger: Any, remove: bool = False) -> None:
    """Close a TensorBoardLogger's event file if one is open; the next access to ``experiment`` opens a new one.

    ``logger.experiment.close()`` would keep the closed writer, and would open a file only to close it.

    Args:
        logger: the logger.
        remove: remove the file, too.
    """
    if logger._experiment is not None:
        path = Path(logger._experiment._get_file_writer().event_writer._file_name)
        logger._experiment.close()
        logger._experiment = None
        if remove:
            path.unlink(missing_ok=True)


def purge_events_from(logger: Any, step: int) -> None:
    """Make TensorBoard ignore a run's earlier events from ``step`` on; call it while no event file is open.

    The arguments of the writer can otherwise be set only when the logger is created.
    """
    logger._kwargs["purge_step"] = step


def hide_writer_threads() -> None:
    """Do not print the traceback of a failed write by TensorBoard's thread: the main thread raises the error too."""
    before = threading.excepthook
    if before.__module__ == __name__:
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            before(arguments)

    threading.excepthook = hook


def event_file(logger: Any, folder: Path) -> Any:
    """Open a further event file in another folder, with the arguments of a TensorBoardLogger's own."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder), **logger._kwargs)


def add_hyperparameters(logger: Any, settings: dict[str, bool | int | float | str], name: str) -> None:
    """Write the settings of a run for TensorBoard's HParams page.

    ``logger.log_hyperparams`` would also write a list of metrics that hides those of all other runs, and a scalar for
    each of them at step 0.
    """
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    logger.experiment._get_file_writer().add_summary(hparams_pb(settings, trial_id=name))


def timeout_of(strategy: Any) -> timedelta | None:
    """Return a DDPStrategy's timeout for collectives, which it accepts as an argument but does not expose."""
    found: timedelta | None = strategy._timeout
    return found


def trainer_of(module: Any) -> Any:
    """Return a LightningModule's Trainer, or None; the public ``trainer`` raises an error if there is none."""
    return module._trainer


# ---- torch: modules -----------------------------------------------------------------------------------------------


def replace_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Make exactly these objects a module's parameters; plain assignment may wrap them if they are parametrized."""
    module._parameters.update(parameters)


# ---- transformers and accelerate: models --------------------------------------------------------------------------


@contextmanager
def calls_not_compiled(model: nn.Module) -> Iterator[None]:
    """Undo ``module.compile()`` for all modules of a model in a ``with`` block.

    A compiled call does not run hooks that are added after its compilation. torch has no public way to undo it.
    """
    compiled = {module: call for module in model.modules() if (call := vars(module).get("_compiled_call_impl"))}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def attention_of(config: Any) -> str:
    """Return the name of the attention function that a model with this configuration uses; it is set at loading."""
    found: str = config._attn_implementation
    return found


@contextmanager
def attention_set(configs: list[Any], name: str) -> Iterator[None]:
    """Inside the ``with``, models with these configurations use the attention function ``name``.

    The public ``set_attn_implementation`` acts on the whole model and checks its class and kernels at each call, which
    is too slow for a setting that changes at every forward pass.
    """
    before = [(config, attention_of(config)) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


def offload_hook(module: nn.Module) -> Any:
    """Return the hook by which accelerate moves a module's weights and inputs; None if the module has none."""
    return getattr(module, "_hf_hook", None)


def forget_quantization(model: Any) -> None:
    """Allow saving a model that was dequantized from GGUF; transformers still treats it as quantized."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


@contextmanager
def gguf_without_bars() -> Iterator[None]:
    """Hide the bars of transformers' GGUF reader inside the ``with``; it ignores transformers' own switch for them."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    before = reader.tqdm
    reader.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        reader.tqdm = before


# ---- streamlit: the page of editlab view, an extra whose versions setup.cfg bounds ---------------------------------


def set_own_addresses(address: str) -> None:
    """Tell streamlit this machine's addresses; it would ask a server for them before it refuses another site's page."""
    from streamlit import net_util

    util: Any = net_util
    util._external_ip = util._internal_ip = address
