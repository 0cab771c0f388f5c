"""Probes of a model on a short dummy text: effects of the linear maps of a block, and the state kept between passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editlab.errors import UserError
from editlab.lm.forward import cache_of, key_values_of, with_cache
from editlab.lm.placement import runs_on

LinearMap = nn.Linear | Conv1D
Alter = Callable[[str, Tensor, float], Tensor]

TOKENS = 3
"""Length of the dummy text: one token to disturb, and later tokens to observe."""
_SAME_LOGITS = 0.2
"""Relative error up to which logits count as equal; bfloat16 rounding causes less, and a lost state more."""


@dataclass
class Trace:
    """Recorded tensors of one block, each ``[rows, TOKENS, width]``."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """The input of each linear map that ran exactly once, on every token."""
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    """The block's output."""


class _BlockDoneError(Exception):
    """Raised to end the forward pass, because the blocks above need not run."""


def linear_maps(block: nn.Module) -> dict[str, LinearMap]:
    """Return the linear maps inside ``block`` by their paths, in the order of their definition."""
    return {path: part for path, part in block.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


def random_signs(like: Tensor) -> Tensor:
    """Draw random numbers -1 and 1, one for each feature of ``like``, in its type; no global generator is used."""
    # Lightning loads the model with its device as the default device, on which a CPU generator cannot draw.
    drawn = torch.randint(0, 2, like.shape[-1:], generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * drawn - 1).to(like)


def run_block(
    model: PreTrainedModel,
    block: nn.Module,
    rows: int,
    alter: Alter,
    others: Mapping[str, nn.Module] | None = None,
) -> Trace:
    """Run ``model`` on ``rows`` copies of a dummy text up to the end of ``block``, altering its linear maps.

    ``alter(path, output, scale)`` receives the output ``[rows, TOKENS, width]`` of each linear map and returns its
    replacement; ``scale`` is the size of a detectable shift (the RMS of this output or of the block's input, whichever
    is larger). ``others`` are modules by path whose outputs are altered, too. Weights, modes, hooks, gradients and
    random states of the model are not changed.

    Raises:
        UserError: The model does not run through ``block``.
    """
    trace = Trace()
    stream = [0.0]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        stream[0] = _rms(hidden)

    def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        trace.output = output if isinstance(output, Tensor) else output[0]
        raise _BlockDoneError

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    for path, part in {**linear_maps(block), **(others or {})}.items():
        handles.append(part.register_forward_hook(_altering(path, rows, alter, trace, stream)))
    ids = _dummy_text(model).expand(rows, -1).contiguous()
    try:
        with torch.no_grad(), _evaluating(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _BlockDoneError:
        return trace
    finally:
        for handle in handles:
            handle.remove()
    raise UserError(f"{type(model).__name__} does not run its blocks on a plain text: this model cannot be edited")


def keeps_only_kv_cache(model: PreTrainedModel) -> bool:
    """Return whether the KV cache is all that a token needs of earlier tokens.

    In that case a text can be run in two parts, the second with the KV cache of the first, and the logits of the last
    token are those of the whole text. A recurrent state would be lost between the parts.
    """
    ids = _dummy_text(model)[None]
    cache = DynamicCache()
    with torch.no_grad(), _evaluating(model):
        whole = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        try:
            model(input_ids=ids[:, :-1], **with_cache(model, cache))
            first_part = cache_of(key_values_of(cache))
            parts = model(input_ids=ids[:, -1:], **with_cache(model, first_part)).logits[0, -1].float()
        except (TypeError, ValueError, LookupError, AttributeError):  # the model does not support such a cache
            return False
    return bool((parts - whole).norm() < _SAME_LOGITS * (whole - whole.mean()).norm())


def _altering(path: str, rows: int, alter: Alter, trace: Trace, stream: list[float]) -> Callable[..., Tensor | None]:
    """Return the forward hook of one linear map."""
    calls = 0

    def hook(part: nn.Module, args: tuple[Tensor, ...], output: Any) -> Tensor | None:
        # Some models flatten rows and tokens; an expert receives only the tokens that are routed to it; and some
        # routers of experts are linear maps by their class, but return several tensors.
        nonlocal calls
        calls += 1
        on_every_token = isinstance(output, Tensor) and output.shape[:-1].numel() == rows * TOKENS
        if calls > 1 or not on_every_token:
            trace.inputs.pop(path, None)
            return None
        trace.inputs[path] = args[0].reshape(rows, TOKENS, -1)
        shaped = output.reshape(rows, TOKENS, -1)
        return alter(path, shaped, max(_rms(shaped), stream[0])).reshape(output.shape)

    return hook


def _dummy_text(model: PreTrainedModel) -> Tensor:
    """Return ids ``[TOKENS]`` of ordinary tokens; special tokens are at the ends of the vocabulary."""
    embeddings = model.get_input_embeddings()
    size = len(embeddings.weight)  # type: ignore[arg-type]
    return torch.arange(TOKENS, device=runs_on(embeddings)).add(size // 2).remainder(size)


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set all modules of ``model`` to eval mode inside the ``with``, and restore their modes afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
