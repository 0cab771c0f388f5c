"""Writing a GGUF file: as a copy of the file that the model came from with the edited tensors replaced, or anew."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.gguf.layout import STORED, TensorNames, add_settings, architecture_of, stored
from editlab.lm.gguf.vocabulary import add_tokenizer
from editlab.lm.precision import dtype_name
from editlab.utils.progress import progress

KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
}
"""Types in which a tensor is written -> their types in the file."""

_FILES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
}


def require_kind(dtype: torch.dtype) -> None:
    """Make sure that a type of weights can be written.

    Raises:
        UserError: It cannot.
    """
    if dtype not in KINDS:
        named = ", ".join(map(dtype_name, KINDS))
        raise UserError(f"--dtype is {dtype_name(dtype)}, and tensors of a GGUF file are written as {named}: give one.")


def write_copy(
    source: Path, path: Path, model: PreTrainedModel, changed: Collection[str], dtype: torch.dtype, about: str
) -> None:
    """Write a copy of a GGUF file in which the tensors of some weights are replaced by the model's.

    All other tensors keep their quantized blocks, and all other entries (settings, tokenizer, chat template) are those
    of the source.

    Args:
        source: the file from which the model was loaded.
        path: the file to write.
        model: the model.
        changed: names of the changed parameters.
        dtype: type of the replaced tensors.
        about: the description that the file gets.

    Raises:
        UserError: A changed weight has no tensor in the source.
    """
    reader = gguf.GGUFReader(source)
    name = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(path, name, endianess=reader.endianess)
    if reader.alignment != writer.data_alignment:
        writer.add_custom_alignment(reader.alignment)
    own = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.ALIGNMENT, gguf.Keys.General.DESCRIPTION)
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):  # written by the writer itself
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_description(about)
    names, weights = TensorNames(name, model.config.num_hidden_layers), dict(model.named_parameters())
    replaced = {names(parameter): weights[parameter] for parameter in changed}
    lacking = replaced.keys() - {tensor.name for tensor in reader.tensors}
    if lacking:
        raise UserError(f"{source} has no tensor {min(lacking)}, whose weight was edited: give the file of the run.")
    for tensor in reader.tensors:
        if tensor.name in replaced:
            weight = stored(replaced[tensor.name], tensor.name, STORED.get(name), model.config)
            _add(writer, tensor.name, weight, KINDS[dtype])
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type, tensor_endianess=reader.endianess)
    _finish(writer)


def write_new(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, about: str
) -> None:
    """Write a model that did not come from a GGUF file; vectors, such as norms and biases, are always in float32.

    Args:
        path: the file to write.
        model: the model.
        tokenizer: its tokenizer.
        dtype: type of the matrices.
        about: the description that the file gets.

    Raises:
        UserError: The model or its tokenizer cannot be written as GGUF.
    """
    config = model.config
    architecture = architecture_of(config)
    names = TensorNames(architecture.name, config.num_hidden_layers)
    tensors = {names(name): weight for name, weight in model.named_parameters()}
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("model")
    writer.add_name(Path(str(config.name_or_path)).name or type(model).__name__)
    writer.add_description(about)
    writer.add_file_type(_FILES[dtype])
    add_settings(writer, architecture, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, weight in tensors.items():
        kind = KINDS[dtype] if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
        _add(writer, name, stored(weight, name, architecture, config), kind)
    _finish(writer)


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """Add a float32 tensor in one of :data:`KINDS`, each number rounded to nearest, ties to even."""
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    with progress(total=1, desc="writing GGUF") as bar:
        writer.write_tensors_to_file()
        bar.update()
    writer.close()
