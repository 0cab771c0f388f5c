"""Partial forward passes of a transformers model: only some blocks, some tokens, some logits.

Every pass calls the model's own ``forward``, which makes its masks, positions and caches; blocks that are not needed
are skipped for the duration of the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

KeyValues = list[tuple[Tensor, Tensor]]
"""KV cache of earlier tokens: for each block its keys and values, each [rows, heads, tokens, size]."""


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward pass to end it, after the last required tensor was recorded."""


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a block's output, which is a tensor or (GPT-J) a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def replace_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a block's ``output`` with its hidden states replaced by ``hidden``."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def by_row(tensor: Tensor, rows: int) -> Tensor:
    """Reshape [rows * tokens, features], which OPT's MLP receives, to [rows, tokens, features]."""
    return tensor.view(rows, -1, tensor.shape[-1])


def key_values_of(cache: DynamicCache) -> KeyValues:
    """Return the keys and values that a forward pass has stored in a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]


def cache_of(key_values: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a transformers cache with these keys and values; a pass appends to it, so each pass needs a new one."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(key_values):
        cache.update(keys, values, number)
    return cache


def with_cache(model: nn.Module, cache: DynamicCache | None) -> dict[str, Any]:
    """Return the arguments with which a call of ``model`` reads and extends a KV cache; None lets it begin one.

    The argument is called ``cache`` from transformers 5.24 on, and ``past_key_values`` in earlier versions.
    """
    new_name = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if new_name else "past_key_values": cache, "use_cache": True}


def cache_in(output: Any) -> Any:
    """Return the KV cache in a model's output, by either of its names (:func:`with_cache`)."""
    return output.cache if "cache" in output else output.past_key_values


@contextmanager
def reading(modules: dict[Any, tuple[nn.Module, str]], stop: Any = None) -> Iterator[dict[Any, Tensor]]:
    """Record the inputs or outputs of modules during forward passes inside the ``with``.

    Args:
        modules: maps a name to a module and ``input`` or ``output``.
        stop: name of the module at which the pass ends; the model above it is not run.

    Yields:
        A dict that each pass fills: it maps each name to the module's input or output, [rows, tokens, features] (in
        some models [rows * tokens, features]: see :func:`by_row`).
    """
    seen: dict[Any, Tensor] = {}

    def reader(name: Any, kind: str) -> Any:
        def record_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(args[0] if args else kwargs["hidden_states"])

        def record_output(module: nn.Module, args: Any, output: Any) -> None:
            record(hidden_of(output))

        def record(tensor: Tensor) -> None:
            seen[name] = tensor
            if name == stop:
                raise _Reached

        return record_input if kind == "input" else record_output

    with ExitStack() as stack:
        for name, (module, kind) in modules.items():
            hook = reader(name, kind)
            handle = (
                module.register_forward_pre_hook(hook, with_kwargs=True)
                if kind == "input"
                else module.register_forward_hook(hook)
            )
            stack.callback(handle.remove)
        with suppress(_Reached):
            yield seen


@contextmanager
def starting_at(blocks: nn.ModuleList, first: int, hidden: Tensor, as_tuple: bool) -> Iterator[None]:
    """Skip the blocks before ``first`` inside the ``with``, and feed ``hidden`` [rows, tokens, d] to block ``first``.

    Args:
        blocks: the model's blocks.
        first: index of the first block that runs; with ``len(blocks)`` only the final norm and the head run.
        hidden: hidden states in place of the output of the skipped blocks.
        as_tuple: whether the blocks of this architecture return tuples.
    """
    if first == 0:
        # There is no block to skip, so the input of the first one is replaced.
        def replace_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handle = blocks[0].register_forward_pre_hook(replace_input, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    skipped = list(blocks)[:first]
    given: Any = (hidden,) if as_tuple else hidden
    # Other tools (such as accelerate) replace a module's forward; their replacement must be restored.
    before = [vars(block).get("forward") for block in skipped]
    for block in skipped:
        block.forward = lambda *args, **kwargs: given
    try:
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def adding(module: nn.Module, indices: tuple[Tensor, Tensor], shift: Tensor, rows: int) -> Iterator[None]:
    """Add ``shift`` to a module's output at n tokens inside the ``with``.

    Args:
        module: the module.
        indices: row and column of each token, [n] each.
        shift: the vectors to add, [n, d].
        rows: number of rows in each pass.
    """
    with _putting(module, indices, shift, rows, accumulate=True):
        yield


@contextmanager
def replacing(module: nn.Module, indices: tuple[Tensor, Tensor], vectors: Tensor, rows: int) -> Iterator[None]:
    """Replace a module's output at n tokens by ``vectors`` [n, d] inside the ``with``; see :func:`adding`."""
    with _putting(module, indices, vectors, rows, accumulate=False):
        yield


@contextmanager
def _putting(
    module: nn.Module, indices: tuple[Tensor, Tensor], vectors: Tensor, rows: int, accumulate: bool
) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        before = hidden_of(output)
        hidden = by_row(before, rows)
        there = tuple(index.to(before.device) for index in indices)
        hidden = hidden.index_put(there, vectors.to(device=before.device, dtype=before.dtype), accumulate=accumulate)
        return replace_hidden(output, hidden.view(before.shape))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def logits_only_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Compute logits only at the tokens (row, column) inside the ``with``; the model's logits are [1, n, vocabulary].

    The tokens are selected before the head, so the model's own processing of logits (soft caps, scales, biases) still
    applies, and the full [rows, tokens, vocabulary] tensor is never allocated.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
