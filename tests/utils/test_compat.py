"""Tests that each private name of a dependency does what editlab expects, and is used in compat only."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import threading
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from packaging.requirements import Requirement
from packaging.version import Version
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.summary.writer import event_file_writer
from torch import nn

from editlab.utils import compat
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


# ---- versions


@pytest.mark.parametrize("package", sorted(compat.SUPPORTED))
def test_the_bounds_are_those_of_setup_cfg_and_hold_what_is_installed(package):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {r.name: r for r in map(Requirement, config["options"]["install_requires"].split())}
    low, high = compat.SUPPORTED[package]
    assert {str(s) for s in required[package].specifier} == {f">={low}", f"<{high}"}
    assert Version(low) <= Version(version(package)) < Version(high)


# ---- no private name elsewhere


def names_of(tree: ast.AST) -> tuple[set[str], dict[str, int]]:
    """Return the private names that a module defines, and those that it looks up with their line numbers."""
    defined, used = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if isinstance(node.ctx, ast.Store) and own:
                defined.add(node.attr)
            elif re.match(r"_[a-z]", node.attr):
                used[node.attr] = node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used |= {a.name: node.lineno for a in node.names if re.match(r"_[a-z]", a.name)}
    return defined, used


def test_private_names_of_dependencies_are_used_in_compat_only():
    files = [*(ROOT / "editlab").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    found = {path: names_of(ast.parse(path.read_text(encoding="utf-8"))) for path in files if path.name != "compat.py"}
    ours = set().union(*(defined for defined, _ in found.values()))
    # torchmetrics documents _plot for subclasses.
    foreign = [
        f"{p}:{line} {n}" for p, (_, used) in found.items() for n, line in used.items() if n not in {*ours, "_plot"}
    ]
    assert foreign == []


def test_the_search_finds_private_names():
    tree = ast.parse("class A:\n def _b(self): self._c = config._d; self._e()\nfrom x import _f")
    assert names_of(tree) == ({"A", "_b", "_c"}, {"_d": 2, "_e": 2, "_f": 3})


# ---- what each of them does


def test_command_hooks():
    class Plain(LightningCLI):
        def __init__(self):
            self.config = {"subcommand": "fit", "fit": {"ckpt_path": "nowhere.ckpt"}}
            self.trainer = self
            self.ran = []

        def fit(self, **kwargs):
            self.ran.append("fit")

        def _prepare_subcommand_kwargs(self, subcommand):
            return {}

    class Hooked(compat.CommandHooks, Plain):
        def run_verb(self, verb, run):
            self.ran.append(f"before {verb}")
            run()
            self.ran.append(f"after {verb}")

    cli = Hooked()
    cli._parse_ckpt_path()  # does not look for the file
    cli._run_subcommand("fit")
    assert cli.ran == ["before fit", "fit", "after fit"]
    for name in ("_run_subcommand", "_parse_ckpt_path"):  # Lightning calls them by these names
        assert callable(getattr(LightningCLI, name))
        assert name in LightningCLI.__init__.__code__.co_names


class OneStep(LightningModule):
    """A module that is trained by three steps of gradient descent."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        return (self.weight - batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(3, 1))


class Noted(compat.CheckpointHooks, ModelCheckpoint):
    """Records the calls of its hooks."""

    def __init__(self, folder):
        super().__init__(folder, every_n_train_steps=2)
        self.notes = []

    def before_save(self, trainer):
        self.notes.append(("before", trainer.global_step, len(list(Path(self.dirpath).glob("*.ckpt")))))

    def after_save(self, trainer, path):
        self.notes.append(("after", trainer.global_step, Path(path).is_file()))

    def on_train_end(self, trainer, pl_module):
        for _ in range(2):  # the second call finds everything saved
            compat.save_unless_saved(self, trainer)


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_hooks_and_the_last_save(tmp_path):
    callback, module = Noted(tmp_path / "kept"), OneStep()
    assert compat.trainer_of(module) is None
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    assert compat.trainer_of(module) is trainer
    assert callback.notes == [("before", 2, 0), ("after", 2, True), ("before", 3, 1), ("after", 3, True)]


def test_a_loggers_version_and_event_file(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="runs")
    assert compat.next_version(logger) == 0
    (tmp_path / "runs" / "version_4").mkdir(parents=True)
    assert compat.next_version(logger) == 5
    compat.close_event_file(logger)  # none is open
    first = logger.experiment
    compat.close_event_file(logger)
    compat.purge_events_from(logger, 7)
    assert logger.experiment is not first
    logger.finalize("success")
    files = sorted((tmp_path / "runs" / "version_5").glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    starts = [e.step for f in files for e in EventFileLoader(str(f)).Load() if e.session_log.status == SessionLog.START]
    assert starts == [7]
    again = TensorBoardLogger(tmp_path, name="runs", version=5)
    assert again.experiment
    compat.close_event_file(again, remove=True)  # the one that is open, no other
    assert sorted((tmp_path / "runs" / "version_5").glob("events*")) == sorted(files)


def test_early_stopping_is_evaluated_at_once():
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    trainer.callback_metrics["x"] = torch.tensor(3.0)
    callback = EarlyStopping("x", mode="max", stopping_threshold=2.0)
    compat.check_early_stopping(callback, trainer)
    assert trainer.should_stop


def test_errors_of_tensorboards_threads_are_not_printed(monkeypatch):
    assert event_file_writer._AsyncWriterThread.run
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.thread))
    compat.hide_writer_threads()
    compat.hide_writer_threads()
    for kind in (type("_AsyncWriterThread", (threading.Thread,), {}), threading.Thread):
        thread = kind(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert [type(thread) for thread in seen] == [threading.Thread]


def test_a_strategys_timeout():
    assert compat.timeout_of(DDPStrategy(timeout=timedelta(seconds=5))) == timedelta(seconds=5)


def test_replaced_parameters_are_exactly_the_given_objects():
    module, weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
    compat.replace_parameters(module, {"weight": weight})
    assert module.weight is weight
    assert dict(module.named_parameters())["weight"] is weight


def test_attention_is_set_inside_the_with_only():
    config = tiny_model("llama").config
    before = compat.attention_of(config)

    def fail():
        with compat.attention_set([config], "eager"):
            assert compat.attention_of(config) == "eager"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert compat.attention_of(config) == before == "sdpa"


def test_the_hook_of_an_offloaded_module():
    hooks = pytest.importorskip("accelerate.hooks")
    module = nn.Linear(2, 2)
    assert compat.offload_hook(module) is None
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    assert compat.offload_hook(module).execution_device == "cpu"


def test_a_dequantized_model_can_be_saved(tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = transformers.GgufConfig() if hasattr(transformers, "GgufConfig") else {}
    model.hf_quantizer, model.is_quantized = object(), True
    compat.forget_quantization(model)
    model.save_pretrained(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


def test_the_reader_of_gguf_files_shows_no_bar(capsys):
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    before = reader.tqdm
    with compat.gguf_without_bars():
        assert list(reader.tqdm([1, 2])) == [1, 2]
    assert reader.tqdm is before
    assert capsys.readouterr().err == ""


def test_calls_are_not_compiled_inside_the_block_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].compile(backend="eager")
    call = model[0]._compiled_call_impl
    assert call is not None
    with compat.calls_not_compiled(model):
        assert model[0]._compiled_call_impl is None
    assert model[0]._compiled_call_impl is call


def test_the_list_of_classes_in_a_help_can_be_changed(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=torch.optim.Optimizer, help="One of them.")
    parser.add_argument("--count", type=int)
    for argument in compat.arguments_of(parser):
        compat.change_class_list(argument, lambda text: ", SGD and others" if "torch.optim.SGD" in text else text)
    parser.print_help()
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: null, SGD and others)" in shown
    assert "Adagrad" not in shown
    assert [argument.dest for argument in compat.arguments_of(parser)][-2:] == ["optimizer", "count"]
