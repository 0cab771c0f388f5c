"""Deltas: the sums of updates of a run, read from a checkpoint, saved as a file, or added to a base model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.lm.anatomy import is_transposed
from editlab.lm.experts import JointMap, joint_map
from editlab.lm.fingerprint import fingerprint
from editlab.lm.loading.load import load
from editlab.lm.precision import dtype_name, dtype_named
from editlab.lm.quantized import in_full_precision
from editlab.runs.checkpoint import read_checkpoint
from editlab.runs.history import History
from editlab.runs.measured_model import MeasuredModel
from editlab.runs.resume import KEY, adjusted_path, require_finite, sums
from editlab.utils.disk_cache import digest
from editlab.utils.version import __version__

log = logging.getLogger(__name__)

FILE = "delta.safetensors"
FORMAT = "editlab-delta-2"
WITHOUT_DIGESTS = "editlab-delta-1"
"""Format of earlier versions of editlab, whose files hold no digests and are read without checking them."""
ORIENTATION = "[d_v, d_k]"
"""Layout of a tensor: rows are outputs, as in torch.nn.Linear; GPT-2's Conv1D stores the transpose."""


@dataclass(frozen=True)
class Delta:
    """The sums of all updates of a run, with the identity of their base model."""

    language_model: str
    """the base model's name in the run"""
    fingerprint: str
    """fingerprint of the unedited weights in :attr:`dtype`"""
    dtype: torch.dtype
    """the type in which the run held the model"""
    layers: list[int]
    """numbers of the blocks that were edited"""
    totals: dict[str, Tensor]
    """path of each changed module -> float32 [d_v, d_k]: the edited modules, lowest layer first, then those that a
    callback adjusted"""
    history: History

    @property
    def edit_module(self) -> str:
        """Path of the edited module inside a block, as ``model.edit_module`` takes it."""
        return next(iter(self.totals)).partition(f".{self.layers[0]}.")[2]

    @classmethod
    def from_checkpoint(cls, path: Path, usable: bool = True) -> Delta:
        """Read the delta of a checkpoint file.

        Args:
            path: the file.
            usable: refuse sums that are not finite, and methods that change no weight; False to read only the edits.

        Raises:
            UserError: It cannot be read, is not editlab's, or of a version that did not name the edited modules; or a
                sum holds NaN or infinity.
        """
        checkpoint = read_checkpoint(path)
        saved = checkpoint[KEY]
        if usable and not saved.get("changes_weights", True):
            raise UserError(
                f"The run of the checkpoint {path} had the method {saved.get('method')}, which changes no weight: "
                "measure it by editlab validate, or give a run with another method."
            )
        if "modules" not in saved:
            raise UserError(f"The checkpoint {path} was written by an editlab too old to export from: run it again.")
        totals = {
            module: checkpoint["state_dict"][name].contiguous()
            for name, module in zip(sums(saved["layers"]), saved["modules"], strict=True)
        }
        for name, total in checkpoint["state_dict"].items():
            adjusted = adjusted_path(name)
            if adjusted is not None:
                totals[adjusted] = total.contiguous()
        if usable:
            _require_finite(totals, f"the checkpoint {path}")
        dtype = dtype_named(saved["dtype"])
        history = History.of(checkpoint, path)
        if history.adapted:
            log.warning(
                "The run keeps an adapter next to the weights of %d modules, which a delta does not include: load it "
                "onto the exported model from the adapter folder of the run.", history.adapted,
            )  # fmt: skip
        return cls(saved["language_model"], saved["weights"], dtype, saved["layers"], totals, history)

    @classmethod
    def of_run(cls, model: MeasuredModel, summary: Mapping[str, Any], settings: str = "") -> Delta:
        """Return the delta of a finished run that is still in memory.

        Args:
            model: the edited model, with its ledger.
            summary: the run's summary.
            settings: the run's settings (:attr:`History.settings <editlab.runs.history.History>`).

        Raises:
            UserError: A sum holds NaN or infinity.
        """
        changed = {model.lm.anatomy.edit_name(number): layer for number, layer in model.layers_by_number.items()}
        changed |= {path.replace("/", "."): layer for path, layer in model.adjusted.items()}  # type: ignore[misc]
        totals = {path: layer.total.detach().cpu().clone() for path, layer in changed.items()}
        _require_finite(totals, "this run")
        adapted = sum(layer.adapter is not None for layer in model.changed_layers)
        history = History.of_run(model.ledger, summary, adapted, settings)
        dtype = model.lm.model.dtype
        return cls(model.language_model, model.fingerprint, dtype, model.layer_numbers, totals, history)

    def save(self, path: Path) -> None:
        """Write a safetensors file with one float32 tensor for each module, by its path, and the rest as metadata."""
        metadata = {
            "format": FORMAT,
            "editlab": __version__,
            "base_model": self.language_model,
            "fingerprint": self.fingerprint,
            "dtype": dtype_name(self.dtype),
            "layers": json.dumps(self.layers),
            "modules": json.dumps(list(self.totals)),
            "orientation": ORIENTATION,
            "history": self.history.to_json(),
        }
        metadata["digests"] = json.dumps(_digests(metadata, self.totals))
        save_file(self.totals, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Read what :meth:`save` wrote.

        Args:
            path: the file, or the folder that ``editlab export --delta-only`` wrote it to.

        Raises:
            UserError: There is no such file, or it is damaged or no delta of editlab's, or a sum holds NaN or infinity.
        """
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"The delta {str(path)!r} does not exist: check --delta.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                totals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"The delta {path} is damaged or no safetensors file: export it again.") from error
        if metadata.get("format") not in (FORMAT, WITHOUT_DIGESTS):
            raise UserError(f"{path} is no delta: give a file that `editlab export --delta-only` wrote.")
        if metadata["format"] == FORMAT:
            _require_digests(metadata, totals, path)
        delta = cls._of(metadata, totals, path)
        _require_finite(delta.totals, f"the delta {path}")
        return delta

    @classmethod
    def _of(cls, metadata: dict[str, str], totals: dict[str, Tensor], path: Path) -> Delta:
        try:
            modules, layers = json.loads(metadata["modules"]), json.loads(metadata["layers"])
            named = (metadata["base_model"], metadata["fingerprint"], dtype_named(metadata["dtype"]), layers)
            ordered = {module: totals.pop(module) for module in modules}
            history = metadata["history"]
        except (KeyError, ValueError, TypeError, RecursionError, UserError) as error:
            raise UserError(f"The delta {path} lacks some of its metadata or tensors: export it again.") from error
        if totals:
            raise UserError(f"The delta {path} has tensors that its metadata does not name: export it again.")
        return cls(*named, ordered, History.from_json(history))

    @staticmethod
    def is_file(path: Path) -> bool:
        """Whether a safetensors file says that it is a delta; it may still be damaged."""
        try:
            with safe_open(path, "pt") as file:
                return str((file.metadata() or {}).get("format")).startswith("editlab-delta")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError):
            return False

    def base(self, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the unedited model that the delta belongs to, in the run's dtype, and its tokenizer.

        Args:
            name: name, folder or file of the model; default: the one that the run used.

        Raises:
            UserError: Its weights are not those that were edited; or what :func:`editlab.lm.loading.load.load` raises.
        """
        name = name or self.language_model
        model, tokenizer = load(name, self.dtype)
        if fingerprint(model) != self.fingerprint:
            raise UserError(
                f"The edits belong to {self.language_model}, and the weights of {name} differ from it: name the very "
                "model that was edited with --model."
            )
        return model, tokenizer

    def put_on(self, model: PreTrainedModel) -> None:
        """Add the sums to the weights of ``model`` in place, rounding each result once to the model's dtype.

        Raises:
            UserError: The model lacks one of the modules, or has it in another shape.
        """
        for name, total in self.totals.items():
            EditedLayer(*target_of(model, name, total)).restore(total)

    @contextmanager
    def lent_to(self, model: PreTrainedModel) -> Iterator[None]:
        """Have the sums on the weights of ``model`` inside the ``with``; afterwards the weights have their old bits.

        The old weights of the changed modules are kept for that time.

        Raises:
            UserError: As for :meth:`put_on`.
        """
        layers = {name: EditedLayer(*target_of(model, name, total)) for name, total in self.totals.items()}
        try:
            for name, layer in layers.items():
                layer.restore(self.totals[name])
            yield
        finally:
            for layer in layers.values():
                layer.set_aside = True
                layer.write()


def _digests(metadata: Mapping[str, str], totals: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each entry of a delta's file, by its name: of its metadata and of its tensors."""
    found = {name: digest(text.encode()) for name, text in metadata.items() if name != "digests"}
    for name, total in totals.items():
        content = total.reshape(-1).view(torch.uint8).numpy().tobytes()
        content = f"{total.dtype} {list(total.shape)} ".encode() + content
        found[name] = digest(content)
    return found


def _require_digests(metadata: Mapping[str, str], totals: Mapping[str, Tensor], path: Path) -> None:
    """Check every entry of a delta's file.

    Raises:
        UserError: An entry has changed since the file was written; the message names it.
    """
    try:
        written = json.loads(metadata["digests"])
        assert isinstance(written, dict)
    except (KeyError, ValueError, RecursionError, AssertionError) as error:
        raise UserError(f"The delta {path} is damaged (its digests cannot be read): export it again.") from error
    now = _digests(metadata, totals)
    changed = [name for name in {**written, **now} if written.get(name) != now.get(name)]
    if changed:
        raise UserError(
            f"The delta {path} is damaged (its entry {changed[0]} has changed since it was written): export it again."
        )


def _require_finite(totals: Mapping[str, Tensor], source: str) -> None:
    for name, total in totals.items():
        if total.dtype == torch.float32:  # others are refused when they are put on a model
            require_finite(name, total, source)


def target_of(model: PreTrainedModel, name: str, total: Tensor) -> tuple[Any, bool]:
    """Return the module that a sum belongs to, and whether it stores its weight transposed."""
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Module) and not hasattr(module, "weight"):
        module = joint_map(module, len(total))
    elif module is not None:
        module = in_full_precision(model, name)
    weight = getattr(module, "weight", None)
    if module is None or weight is None:
        raise UserError(
            f"The delta is for the module {name}, which {type(model).__name__} does not have: export it again."
        )
    transposed = is_transposed(module)
    shape = tuple(weight.T.shape if transposed else weight.shape)
    if isinstance(module, JointMap):
        shape = (module.out_features, module.in_features)
    if tuple(total.shape) != shape or total.dtype != torch.float32:
        raise UserError(
            f"The delta for {name} is {dtype_name(total.dtype)} {list(total.shape)} and must be float32 "
            f"{list(shape)}: export it again."
        )
    return module, transposed
