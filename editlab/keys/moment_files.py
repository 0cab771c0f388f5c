"""Second moments C0 of keys from files that others have published.

Two formats are read:

- ``.npz`` as the code of ROME and MEMIT writes it, one file for each layer, named
  ``{model}/{text}_stats/{module}_{precision}_mom2_{documents}.npz``. Its array ``mom2.mom2`` [d_k, d_k] is the *sum* of
  ``k k^T`` over ``mom2.count`` tokens, and ``sample_size`` is the number of documents that were read.
- ``.pt`` (of ``torch.save``) and ``.safetensors`` with the tensors ``mom2``, the same sum, and ``count``; ``layer`` and
  ``text`` may say which layer and text they are of.

No file is read as a pickle, which could run code.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from editlab.errors import UserError
from editlab.lm.anatomy import Anatomy
from editlab.utils.files import require_end
from editlab.utils.torch_files import DamagedFileError, load_verified

LAYER = "{layer}"
"""What stands for the layer's number in the setting ``model.moments.file``."""

_MODULE = re.compile(r"(?:^|\.)(\d+)\.([A-Za-z][\w.]*?)(?:_b?float\d+.*)?$")
"""A module's path in the name of a file without its suffix: the number of the block, and the path inside it."""


@dataclass(frozen=True)
class MomentFile:
    """The content of one file of second moments."""

    moments: Tensor
    """C0 = E[k k^T], float64 [d_k, d_k], symmetric"""
    tokens: int
    """number of tokens that it is the mean over"""
    text: str | None
    """name of the text, if the file or its folder says it"""
    documents: int | None
    """number of the text's documents that were read, if the file says it"""

    def __str__(self) -> str:
        """What the moments were computed from, in words."""
        documents = f" ({self.documents} documents)" if self.documents else ""
        return f"{self.tokens} tokens of {self.text or 'a text that the file does not name'}{documents}"


def find_file(setting: str, layer: int, layers: int, anatomy: Anatomy) -> Path:
    """The file of one layer.

    Args:
        setting: a file, if one layer is edited; a path with ``{layer}`` in it; or a folder with one file a layer, whose
            names begin with the path of the edited module, such as ``model.layers.4.mlp.down_proj``.
        layer: number of the layer.
        layers: how many layers are edited.
        anatomy: of the model.

    Raises:
        UserError: There is no such file, or several fit.
    """
    if LAYER in setting:
        path = Path(setting.replace(LAYER, str(layer))).expanduser()
    else:
        path = Path(setting).expanduser()
        if path.is_dir():
            return _in_folder(path, layer, anatomy)
        if layers > 1:
            raise UserError(
                f"model.moments.file is {setting}, one file, and {layers} layers are edited: write {LAYER} in place of "
                "the layer's number, or give the folder with one file for each layer."
            )
    if not path.is_file() and not path.is_fifo():
        raise UserError(f"The file of second moments {path} does not exist: check model.moments.file.")
    require_end(path, f"The file of second moments {path}")
    return path


def _in_folder(folder: Path, layer: int, anatomy: Anatomy) -> Path:
    found = [path for path in sorted(folder.iterdir()) if path.suffix in READERS and _named(path, anatomy) == layer]
    if len(found) == 1:
        return found[0]
    name = f"{anatomy.edit_name(layer)}*"
    if found:
        raise UserError(
            f"{folder} has several files of layer {layer}, such as {found[0].name} and {found[1].name}: name one in "
            f"model.moments.file, with {LAYER} in place of the number."
        )
    raise UserError(
        f"{folder} has no second moments of layer {layer}, a file {name} ending in {', '.join(READERS)}: add it, or "
        f"give model.moments.file as a path with {LAYER} in place of the layer's number."
    )


def _named(path: Path, anatomy: Anatomy) -> int | None:
    """The layer whose edited module a file's name has the path of; None if it names another module or none."""
    found = _MODULE.search(path.stem)
    return int(found[1]) if found and found[2] == anatomy.edit_path else None


def read_moments(path: Path, layer: int, anatomy: Anatomy) -> MomentFile:
    """Read the second moments of one layer from a file, and check that they can be this layer's.

    Args:
        path: the file.
        layer: number of the layer.
        anatomy: of the model.

    Raises:
        UserError: The file is damaged, of another format, or would have to be read as a pickle; an entry is missing;
            or it is of another layer, module or width, not finite, not symmetric or not positive.
    """
    named = _MODULE.search(path.stem)
    if named and named[2] != anatomy.edit_path:
        raise UserError(
            f"{path} is named after the module {named[2]}, and {anatomy.edit_path} is edited: give the file of "
            f"{anatomy.edit_name(layer)}."
        )
    if path.suffix not in READERS:
        raise UserError(f"{path} is no file of second moments: give one that ends in {', '.join(READERS)}.")
    entries = READERS[path.suffix](path)
    of_layer = entries.get("layer", named[1] if named else layer)
    if _whole(of_layer, path, "layer") != layer:
        raise UserError(f"{path} is of layer {_whole(of_layer, path, 'layer')}, not of layer {layer}: give that one's.")
    count = _whole(_entry(entries, "count", path), path, "count")
    if count < 1:
        raise UserError(f"{path} counts {count} tokens: compute the second moments again.")
    moments = _checked(_entry(entries, "mom2", path), count, anatomy.key_size(layer), layer, path)
    text, documents = entries.get("text"), entries.get("sample_size")
    if text is None and path.parent.name.endswith("_stats"):
        text = path.parent.name.removesuffix("_stats")
    known = documents is not None and not np.isnan(float(documents))  # the code writes None as a NaN
    return MomentFile(moments, count, text, int(documents) if known and documents is not None else None)


def _entry(entries: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in entries:
        shown = f"mom2.{name}" if path.suffix == ".npz" else name
        raise UserError(f"{path} has no entry {shown}: give a file of second moments, with mom2 and count.")
    return entries[name]


def _whole(value: Any, path: Path, name: str) -> int:
    try:
        number = float(value)
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"The entry {name} of {path} is not a whole number: compute the moments again.") from error
    return int(number)


def _checked(total: Any, count: int, size: int, layer: int, path: Path) -> Tensor:
    """C0 of a sum over ``count`` tokens; its own rounding to a lower precision is the only asymmetry allowed."""
    if not isinstance(total, Tensor) or not total.is_floating_point():
        raise UserError(f"The entry mom2 of {path} is no matrix of floating-point numbers: compute the moments again.")
    if tuple(total.shape) != (size, size):
        raise UserError(
            f"The second moments in {path} are {list(total.shape)}, and the keys of layer {layer} have {size} "
            "features: give those of the model that is edited."
        )
    rounding = torch.finfo(total.dtype).eps
    moments = total.to(torch.float64).div_(count)
    if not bool(moments.isfinite().all()):
        raise UserError(f"The second moments in {path} hold NaN or infinity: compute them again.")
    largest = float(moments.diagonal().abs().max())
    if float((moments - moments.T).abs().max()) > 100 * rounding * size**0.5 * largest:
        raise UserError(f"The second moments in {path} are not symmetric, as a mean of k k^T is: compute them again.")
    moments = (moments + moments.T).div_(2)
    # Each element of a sum in float32 is rounded, so a matrix that is positive counts as such up to that.
    shifted = moments.clone()
    shifted.diagonal().add_(rounding * float(moments.diagonal().sum().abs()) + torch.finfo(torch.float64).tiny)
    if float(moments.diagonal().min()) < 0 or largest == 0 or torch.linalg.cholesky_ex(shifted).info.item() != 0:
        raise UserError(f"The second moments in {path} are not positive, as a mean of k k^T is: compute them again.")
    return moments


# ---- formats ------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is no archive of arrays, as np.savez writes it: download it again.")
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                short = name.removeprefix("mom2.")
                if short in ("mom2", "count", "sample_size"):
                    found[short] = archive[name] if short == "mom2" else archive[name].item()
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds Python objects, and reading them could run code: save it with plain arrays."
            ) from error
        raise UserError(f"{path} is damaged ({error}): download it again.") from error
    if isinstance(matrix := found.get("mom2"), np.ndarray) and matrix.dtype.kind == "f":
        found["mom2"] = torch.from_numpy(matrix.astype(matrix.dtype.newbyteorder("="), copy=False))
    return found


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        found = load_verified(path)
    except DamagedFileError as error:
        raise UserError(
            f"{path} is damaged, or holds Python objects, and reading them could run code: save a dict with the "
            "tensors mom2 and count by torch.save."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no dict: save one with the tensors mom2 and count by torch.save.")
    return {name.removeprefix("mom2."): value for name, value in found.items() if isinstance(name, str)}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name.removeprefix("mom2."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {**(file.metadata() or {}), **tensors}
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: download it again.") from error


READERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".safetensors": _read_safetensors,
}
"""Suffix of a file -> function that returns its entries, by their names without the prefix ``mom2.``"""
