"""Running only what is needed of a transformers model: some blocks, some tokens, some logits.

The model's own ``forward`` is always what runs, so masks, positions and caches are its own; blocks that are not
wanted are stepped over for the time of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values of the tokens before, one pair of [rows, heads, tokens, size] a block."""


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward pass once all that was wanted has been seen."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or (GPT-J) a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def replace_hidden(output: Any, hidden: Tensor) -> Any:
    """``output`` with its hidden states exchanged."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def by_row(tensor: Tensor, rows: int) -> Tensor:
    """[rows, tokens, features], also of what a module saw as [rows * tokens, features] (OPT's MLP)."""
    return tensor.view(rows, -1, tensor.shape[-1])


def past_of(cache: DynamicCache) -> KeyValues:
    """What a forward pass has put into a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]


def cache_of(past: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Keys and values as a model takes them; made anew for each pass, which adds to it."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(past):
        cache.update(keys, values, number)
    return cache


@contextmanager
def reading(modules: dict[Any, tuple[nn.Module, str]], stop: Any = None) -> Iterator[dict[Any, Tensor]]:
    """Collects inputs or outputs of modules during forward passes inside the ``with``.

    Args:
        modules: name -> (module, "input" | "output").
        stop: the name whose reading ends the pass; everything above it is not run.

    Yields:
        A dict that each pass fills: name -> tensor as the module saw or gave it, [rows, tokens, features] (or, in
        some models, [rows * tokens, features]: see :func:`by_row`).
    """
    seen: dict[Any, Tensor] = {}

    def reader(name: Any, kind: str) -> Any:
        def note_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(args[0] if args else kwargs["hidden_states"])

        def note_output(module: nn.Module, args: Any, output: Any) -> None:
            note(hidden_of(output))

        def note(tensor: Tensor) -> None:
            seen[name] = tensor
            if name == stop:
                raise _Reached

        return note_input if kind == "input" else note_output

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
    """Blocks before ``first`` are stepped over; block ``first`` receives ``hidden`` [rows, tokens, d].

    Args:
        blocks: the model's blocks.
        first: index of the first block that runs; ``len(blocks)`` runs only the final norm and the head.
        hidden: what the blocks before it would have given.
        as_tuple: whether this architecture's blocks return tuples.
    """
    if first == 0:
        # No block to step over: the first one's input is exchanged instead.
        def exchange(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handle = blocks[0].register_forward_pre_hook(exchange, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    skipped = list(blocks)[:first]
    given: Any = (hidden,) if as_tuple else hidden
    # Other tools put a forward of their own on a module (accelerate does); theirs has to come back.
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
def adding(module: nn.Module, places: tuple[Tensor, Tensor], shift: Tensor, rows: int) -> Iterator[None]:
    """Adds ``shift`` [n, d] to the module's output at n places.

    Args:
        module: whose output is changed.
        places: row and column of each, [n].
        shift: what is added.
        rows: that run at a time.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        before = hidden_of(output)
        there = before.device
        hidden = by_row(before, rows)
        hidden = hidden.index_put(tuple(p.to(there) for p in places), shift.to(there), accumulate=True)
        return replace_hidden(output, hidden.view(before.shape))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def logits_only_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """The head sees only the hidden states at (row, column), so the model's logits are [1, n, vocabulary].

    It is done before the head and not after, so whatever the model does to its logits (soft caps, scales, biases)
    still happens, and the full [rows, tokens, vocabulary] tensor never exists.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
