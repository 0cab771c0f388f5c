"""GGUF files: the model in such a file is dequantized once, and stored in the cache as a plain folder.

Reading a GGUF file takes half a minute, and a folder of safetensors takes a second. The folder is keyed by the file's
content: a changed file is another model, and a file that was only moved or renamed is the same model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.loading.causal import require_causal
from editlab.lm.memory import require_memory
from editlab.lm.save import save
from editlab.utils.compat import forget_quantization, gguf_without_bars
from editlab.utils.disk_cache import cached_folder
from editlab.utils.files import cache_dir, sha256

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
"""First bytes of every GGUF file."""

_PARTS = (("config.json",), ("model.safetensors", "model.safetensors.index.json"), ("tokenizer.json",))
"""Files that the folder of a model must have: at least one of each group."""
SAMPLE = "The 2 rivers, Ob'  and Łódź:\n\tl'été — 東京 isn't 1,234 km."
"""A text that different tokenizers tokenize differently: digits, apostrophes, spaces, line ends, scripts."""


def is_gguf(file: Path) -> bool:
    """Return whether a file begins with the GGUF magic bytes."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def gguf_folder(file: Path) -> Path:
    """Return the folder in the cache that holds the model of a GGUF file; if there is none, make it first.

    The weights are dequantized to float32, which takes 4 bytes per weight in memory and on disk.

    Raises:
        UserError: The file is damaged, one of several parts, or of a kind that transformers cannot read; or the cache
            cannot be written to.
        EditLabError: The disk is full, or memory is insufficient.
    """
    return converted_folder(cache_dir() / "models" / f"gguf-{sha256(file)[:16]}", partial(_convert_checked, file))


def converted_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder of a model in the cache; if it is missing or damaged, ``make`` fills it first.

    Every file is compared with its digest at each call, which takes a tenth of a second for 500 MB.

    Raises:
        EditLabError: The disk is full; or what ``make`` raises.
        UserError: The cache cannot be written to.
    """
    return cached_folder(folder, make, _PARTS)


def convert(file: Path, folder: Path) -> None:
    """Write the model of ``file`` to ``folder``: float32 safetensors, configuration and tokenizer.

    Raises:
        UserError: What :func:`read_gguf` raises, or loading the folder gives another tokenizer than the file's.
    """
    model, tokenizer = read_gguf(file)
    with _quiet():
        save(model, tokenizer, folder)
        _check_saved(tokenizer, folder, file)


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of ``file``, dequantized to float32, and its tokenizer.

    Raises:
        UserError: Transformers cannot read this kind of model or its tokenizer, the model is not a causal language
            model, or tensors are missing.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with _quiet():
        with _explained(f"transformers {transformers.__version__} cannot read the model in {file}"):
            config = transformers.AutoConfig.from_pretrained(**source)
        require_causal(str(file), config)
        with _explained(f"transformers {transformers.__version__} cannot make the tokenizer of {file}"):
            tokenizer = _unconverted(transformers.AutoTokenizer.from_pretrained(**source))
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
        if report["missing_keys"]:
            raise UserError(f"{file} is incomplete ({min(report['missing_keys'])} is missing): get the file again")
        forget_quantization(model)
    return model, tokenizer


def _convert_checked(file: Path, folder: Path) -> None:
    parts, weights = _inspect(file)
    if parts > 1:
        raise UserError(f"{file} is one of {parts} parts of a model: join them by llama.cpp's gguf-split --merge")
    require_memory(str(file), 4 * weights, torch.float32, torch.device("cpu"))
    log.info("%s: converting (once, to %s)", file.name, folder.parent)
    convert(file, folder)


def _inspect(file: Path) -> tuple[int, int]:
    """Return the number of files that the model is split into, and of weights in this one.

    Raises:
        UserError: The file's tables or tensors extend beyond its end, or are invalid.
    """
    try:
        reader = GGUFReader(file)
        split = reader.get_field("split.count")
        parts = int(split.parts[split.data[0]][0]) if split is not None else 1
        return parts, sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, LookupError, OverflowError, TypeError) as error:  # the reader does not check numbers
        raise UserError(f"{file} is damaged, cut short, or of another version of GGUF: get the file again") from error


def _unconverted(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer as a PreTrainedTokenizerFast, as a family's class would rebuild it from its vocabulary."""
    if type(tokenizer) is transformers.PreTrainedTokenizerFast:
        return tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _check_saved(tokenizer: PreTrainedTokenizerBase, folder: Path, file: Path) -> None:
    """Check that loading the folder gives the file's tokenizer, which transformers replaces for some families.

    Raises:
        UserError: Loading gives another tokenizer.
    """
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    if saved(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise UserError(
            f"transformers {transformers.__version__} uses another tokenizer for this model than {file} has: name a "
            "folder or a hub id of this model instead"
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{what} ({first}): name a folder or a hub id of this model instead") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings, messages and progress bars of transformers."""
    messages = transformers.utils.logging
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        with gguf_without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()
