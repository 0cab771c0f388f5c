"""The help of ``fit``, ``validate`` and ``test``: short by default, and in editlab's words where Lightning's are wrong.

The Trainer's own texts describe training by gradients with Lightning's defaults. Those that are wrong for a run of
edits are replaced here, and most of the Trainer's settings are shown by ``--help=all`` only.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterable, Sequence

from editlab.cli.commands import TRAINER_VERBS
from editlab.utils import compat
from editlab.utils.shipped import first_sentence

ALL = "all"
"""The value of ``--help`` that shows every setting."""

TEXTS = {
    "config": "YAML file of settings, a recipe, or the name of one that ships (editlab ls). Of several files, and of "
    "the options after them, the last one counts.",
    "seed_everything": "Seed of all random draws of a run; true draws a seed, false sets none.",
    "trainer.accelerator": "Device of the model: cpu, gpu, cuda, mps, or auto, which takes a GPU if there is one.",
    "trainer.strategy": "Sharing of a run: auto for one process; editlab_ddp shares each edit among several processes.",
    "trainer.devices": "Number of devices, a list of their numbers, or auto.",
    "trainer.precision": "Type of the weights and of the model's computations: 32-true, or bf16-true for half the "
    "memory. Values, scores and solves keep their full width.",
    "trainer.logger": "Where numbers are logged. RunLogger writes TensorBoard files and metrics.csv into the run's "
    "folder, lightning_logs/RECIPE/version_N; CSVRunLogger writes metrics.csv alone, and is added to others, such as "
    "WandbLogger and MLFlowLogger; false logs nothing, and the run's folder has its other files.",
    "trainer.callbacks": "Callbacks, such as MemoryReplay, TrustRollback, LoRAAdjust and ForgettingCurve.",
    "trainer.max_epochs": "Number of passes over the facts. A run edits each of its facts once, so it is 1.",
    "trainer.max_steps": "Number of batches after which the run ends; -1 edits all facts.",
    "trainer.log_every_n_steps": "Has no effect on a run's own numbers, which are logged after each batch.",
    "trainer.num_sanity_val_steps": "Number of batches that are evaluated before the first edit. There is nothing to "
    "evaluate then, so it is 0.",
    "trainer.check_val_every_n_epoch": "Has no effect: a fit evaluates edits by ForgettingCurve and at its end.",
    "trainer.enable_checkpointing": "Whether checkpoints are written, from which a run can be resumed or exported. "
    "null and true write one after each batch, unless the recipe has a checkpoint callback of its own.",
    "trainer.enable_progress_bar": "Whether progress bars are shown; null shows them.",
    "trainer.enable_model_summary": "Whether the modules of the model are listed before the run.",
    "trainer.use_distributed_sampler": "Must be false: with several processes, each of them gets every fact.",
    "trainer.default_root_dir": "Folder under which runs are kept: X/lightning_logs/RECIPE/version_N, or X/version_N "
    "without a logger. null is the working directory; a save_dir of the logger's own takes precedence.",
    "trainer.deterministic": "Whether only deterministic algorithms of torch are used. The solve is deterministic on "
    "a CPU anyway.",
    "weights_only": "Leave it out: checkpoints of editlab hold tensors, numbers and texts, and no code. false is "
    "refused.",
}  # fmt: skip
"""Name of a setting -> its help, in place of Lightning's."""

VERB_TEXTS = {
    "fit": {
        "ckpt_path": "Checkpoint that the run resumes from: a file, a run's folder, or last for the newest run of this "
        "recipe."
    },
    "validate": {
        "ckpt_path": "Checkpoint whose edits are evaluated: a file, a run's folder, or last.",
        "verbose": "Whether the results are shown.",
    },
    "test": {
        "ckpt_path": "Checkpoint on whose model facts that were not edited are evaluated: a file, a run's folder, or "
        "last.",
        "verbose": "Whether the results are shown.",
    },
}
"""Verb -> name of a setting -> its help."""

SHOWN = (
    "trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.precision", "trainer.logger",
    "trainer.callbacks", "trainer.max_steps", "trainer.enable_checkpointing", "trainer.enable_progress_bar",
)  # fmt: skip
"""The Trainer's settings that the short help has."""

_HIDDEN = ("weights_only", "print_shtab")

_OF_A_WHOLE_SECTION = "Path to a configuration file."
"""The parser's help of an option that reads a whole section, such as ``--model.values FILE``."""

USAGE = "editlab {verb} [-c RECIPE.yaml] [--SECTION.NAME VALUE ...] [--ckpt_path PATH]"


def help_wanted(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments with a plain ``--help`` in place of ``--help=all``, and which help is wanted.

    The second value is :data:`ALL`, "short", or None if no help is asked for.

    >>> help_wanted(["fit", "--help=all"]), help_wanted(["fit", "-h"]), help_wanted(["fit"])
    ((['fit', '--help'], 'all'), (['fit', '-h'], 'short'), (['fit'], None))
    """
    kept, wanted = [], None
    words = iter(arguments)
    for word in words:
        option, _, value = word.partition("=")
        if option in ("-h", "--help"):
            following = value or next(words, "")
            wanted = ALL if following == ALL else wanted or "short"
            kept += [option] if following in ("", ALL) else [option, following]
        else:
            kept.append(word)
            if option.endswith(".help"):
                wanted = wanted or "short"
    return kept, wanted


def arrange(verb: str, parser: ArgumentParser, actions: Iterable[Action], everything: bool) -> None:
    """Put editlab's texts into the parser of a verb; the short help has fewer settings, in a sentence each.

    Args:
        verb: ``fit``, ``validate`` or ``test``.
        parser: its parser.
        actions: the parser's arguments.
        everything: whether all settings are shown, with their whole text.
    """
    rest = "" if everything else (
        " Shown are editlab's own settings and the most used ones of the Trainer, in a sentence each; --help=all shows "
        "everything, and --model.method.help CLASS or --trainer.callbacks.help CLASS the settings of a class."
    )  # fmt: skip
    parser.description = TRAINER_VERBS[verb] + rest
    parser.usage = USAGE.format(verb=verb)
    texts = TEXTS | VERB_TEXTS[verb]
    for action in actions:
        action.help = texts.get(action.dest, action.help)
        if not everything:
            action.help = SUPPRESS if _is_hidden(action) else action.help and first_sentence(action.help)
            # For the Trainer's settings Lightning has dozens of classes, and none is listed.
            compat.change_class_list(action, _no_classes if action.dest.startswith("trainer.") else own_classes)


def _is_hidden(action: Action) -> bool:
    name = action.dest
    of_trainer = name.startswith("trainer.") and name not in SHOWN
    return of_trainer or name in _HIDDEN or name.endswith(".help") or action.help == _OF_A_WHOLE_SECTION


def _no_classes(text: str) -> str:
    return ""


def own_classes(text: str) -> str:
    """Return editlab's classes in the parser's list of classes by the names that YAML takes, as the end of a help text.

    >>> own_classes(", known subclasses: editlab.solver.methods.EMMET, lightning.Callback")
    ', classes: EMMET'
    """
    names = re.findall(r"\b(?:editlab|callbacks)\.(?:\w+\.)*(\w+)", text)
    return f", classes: {', '.join(names)}" if names else ""
