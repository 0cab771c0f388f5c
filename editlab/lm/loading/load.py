"""Loading a causal language model and its tokenizer by name, with clear error messages."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError, causes
from editlab.lm.loading.builtin import smollm2_folder, smollm2_gguf
from editlab.lm.loading.causal import require_causal
from editlab.lm.loading.gguf import gguf_folder, is_gguf
from editlab.lm.memory import require_memory, weight_bytes
from editlab.lm.placement import DeviceMap
from editlab.lm.quantized import keep_layout

_LEAST_VOCABULARY = 16
BITSANDBYTES = "bitsandbytes"
"""Package and name of the quantization whose models can be edited."""

BUILTIN: dict[str, Callable[[], Path]] = {"smollm2-135m": smollm2_folder}
"""Models that need no hub: name -> function that downloads the model and returns its folder."""

_GGUF_OF: dict[str, Callable[[], Path]] = {"smollm2-135m": smollm2_gguf}


def load(
    name: str, dtype: torch.dtype, device_map: DeviceMap | None = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode and without gradients, and its fast tokenizer.

    ``name`` is the name of a built-in model (:data:`BUILTIN`), the path of a folder that ``save_pretrained``
    wrote or of a GGUF file, or an id on the Hugging Face hub. Code that comes with a model is never run.
    ``device_map`` is passed to transformers, for a model that does not fit on one device. Otherwise the model is loaded
    into the CPU's memory and later moved to ``device``, so it must fit into both. Of a model with 4- or 8-bit weights
    of bitsandbytes, ``dtype`` is the type of the others.

    Raises:
        UserError: There is no such model; its folder or file is incomplete; it is gated, or not a causal
            language model; or it has no fast tokenizer (edits need the offsets of tokens in the text).
        EditLabError: The hub cannot be reached, a built-in model cannot be downloaded, or memory is insufficient.
    """
    source = _source(name)
    with _explained(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    require_causal(name, config)
    narrow = _has_narrow_weights(name, config)
    if device_map is None:
        with _explained(name):
            needed = weight_bytes(config, torch.int8 if narrow else dtype)
        for target in dict.fromkeys([torch.device("cpu"), device or torch.device("cpu")]):
            require_memory(repr(name), needed, dtype, target)
    with _explained(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, device_map=device_map, trust_remote_code=False, output_loading_info=True
        )
    model, report = loaded
    if report["missing_keys"]:
        one = sorted(report["missing_keys"])[0]
        raise UserError(f"the weights of {name!r} are incomplete ({one} is missing): get the whole model again")
    keep_layout(model)
    return model.eval().requires_grad_(False), _load_tokenizer(name, source)


def gguf_source(name: str) -> Path | None:
    """Return the GGUF file that a model comes from; None for a model that comes from a folder or from the hub.

    Raises:
        EditLabError: As for :func:`load`.
    """
    if name in _GGUF_OF:
        return _GGUF_OF[name]()
    file = Path(name).expanduser()
    return file if file.is_file() and is_gguf(file) else None


def _source(name: str) -> str:
    """Return the folder or hub id of ``name``; raise an error that explains why it is neither."""
    if name in BUILTIN:
        return str(ranks.first_ahead(BUILTIN[name]))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"the folder {name} has no config.json: name one that save_pretrained has written")
        return str(folder)
    built_in = ", ".join(BUILTIN)
    known = f"name a built-in model ({built_in}), a folder, a GGUF file, or a hub id such as openai-community/gpt2"
    if name and folder.is_file():
        if not is_gguf(folder):
            raise UserError(f"{name} is a file, but not a GGUF file: {known}")
        return str(ranks.first_ahead(lambda: gguf_folder(folder)))
    try:
        validate_repo_id(name)
    except hub.HFValidationError as error:
        raise UserError(f"there is no folder {name!r}, and it is not a hub id: {known}") from error
    return name


def _has_narrow_weights(name: str, config: PretrainedConfig) -> bool:
    """Return whether a model has 4- or 8-bit weights that bitsandbytes can read; reject other quantizations."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return False
    how = how if isinstance(how, dict) else how.to_dict()
    method = how.get("quant_method", "by an unnamed method")
    if method != BITSANDBYTES:
        raise UserError(
            f"the weights of {name!r} are quantized ({method}), and an update is smaller than their steps: name the "
            f"model in full precision, in 4 or 8 bits of {BITSANDBYTES}, or a GGUF file of it, which is dequantized"
        )
    if any(find_spec(package) is None for package in (BITSANDBYTES, "accelerate")):
        raise UserError(
            f"{name!r} has 4- or 8-bit weights, which need the packages {BITSANDBYTES} and accelerate: pip install "
            "'editlab[quantized]'"
        )
    return True


def _load_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    get_another = "choose a model that comes with a fast tokenizer (tokenizer.json)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        known = _hub_trouble(name, error)
        raise known or UserError(f"{name!r} has no readable tokenizer: {get_another}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name!r} has only a slow tokenizer, which gives no offsets: {get_another}")
    # Without tokenizer files, transformers makes an empty tokenizer of the right class and raises no error.
    if len(tokenizer) < _LEAST_VOCABULARY:
        raise UserError(f"{name!r} has a tokenizer without a vocabulary: {get_another}")
    return tokenizer


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Replace errors of transformers and the hub by clear messages."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        otherwise = UserError(f"{name!r} cannot be loaded: {first_line}")
        raise _hub_trouble(name, error) or otherwise from error


def _hub_trouble(name: str, error: BaseException) -> EditLabError | None:
    """Return an explained error if a cause of ``error`` is a known hub error; None otherwise."""
    for link in causes(error):
        # The order matters: GatedRepoError is a subclass of RepositoryNotFoundError.
        if isinstance(link, hub.GatedRepoError):
            return UserError(f"{name!r} is gated: accept its terms on the hub, then log in with `hf auth login`")
        if isinstance(link, hub.RepositoryNotFoundError):
            return UserError(
                f"there is neither a folder nor a hub model {name!r}: check the spelling, or log in with "
                f"`hf auth login` if it is private (built in: {', '.join(BUILTIN)})"
            )
        if isinstance(link, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)):
            return EditLabError(
                f"there is no folder {name!r}, and the hub cannot be reached to look for it: connect, "
                f"download it beforehand, or use a built-in model ({', '.join(BUILTIN)})"
            )
        if isinstance(link, hub.EntryNotFoundError):
            return UserError(f"the hub's {name!r} holds no model that transformers can read: choose another")
        if isinstance(link, hub.HfHubHTTPError):
            return EditLabError(f"the hub refused {name!r} ({str(link).splitlines()[0]}): try again later")
        if isinstance(link, OSError) and link.errno == errno.ENOSPC:
            return EditLabError(f"the disk is full while fetching {name!r}: free some space, or move HF_HOME")
        if "trust_remote_code" in str(link):
            return UserError(f"{name!r} needs custom code, which editlab never runs: choose another model")
    return None
