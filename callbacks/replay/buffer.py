"""The replay buffer: earlier edits, with policies for sampling them and for evicting one when the buffer is full.

Data and arithmetic only, no model. A policy is one function in :data:`SAMPLING` or :data:`EVICTION`; a function added
there can be named in YAML.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.utils.validation import at_least_one, one_of


@dataclass
class Memory:
    """One remembered edit; tensors are float32 on the CPU."""

    fact: Fact
    value: Tensor
    """values v* of the fact at the sites of the edited layers, from the lowest up, [sites, d_v]"""
    key: Tensor
    """k at the highest edited layer when the edit was made, [d_k]"""
    origin: Tensor
    """output of that layer's site at the subject's last token without the layer's updates, [d_v]"""
    step: int
    """number of the batch that made the edit"""
    replayed: int = -1
    """number of the batch in which it was last replayed; that of the edit if it never was"""
    importance: float = 0.0
    """its drift or its loss, depending on the sampling policy"""
    weighed: bool = False
    """whether its importance has been measured"""
    context_keys: Tensor | None = None
    """keys of its prompt's context tokens, [m, d_k]; only if keys are cached and context keys are preserved"""

    def __post_init__(self) -> None:
        if self.value.dim() == 1:  # checkpoints of older versions hold [d_v]
            self.value = self.value[None]
        if self.replayed < 0:
            self.replayed = self.step

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        tensors = (self.value, self.key, self.origin, self.context_keys)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


Sampling = Callable[[Sequence[Memory], int, torch.Generator], Sequence[int]]
"""Memories (oldest first), number to choose (at most all), generator -> indices of the chosen ones."""

Eviction = Callable[[Sequence[Memory], int, torch.Generator], int]
"""Memories (oldest first, the new one last), number of edits ever added, generator -> index of the one to drop."""


def _random(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return torch.randperm(len(memories), generator=generator)[:count].tolist()


def _recent(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return range(len(memories) - count, len(memories))


def _oldest(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return range(count)


def _priority(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    """Without replacement, with probability proportional to importance (Schaul et al. 2016, arXiv:1511.05952)."""
    weights = torch.tensor([m.importance for m in memories], dtype=torch.float64).clamp_min(0)
    weights += 1e-9 * max(1.0, float(weights.max()))  # a memory without drift can still be drawn
    return torch.multinomial(weights, count, replacement=False, generator=generator).tolist()


def _most_important(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return sorted(range(len(memories)), key=lambda i: -memories[i].importance)[:count]


SAMPLING: dict[str, Sampling] = {
    "random": _random,
    "recent": _recent,
    "oldest": _oldest,
    "priority": _priority,
    "loss": _most_important,
}
"""Name -> policy. For ``loss``, importance is minus the target's log-probability; the highest come first."""


def _least_important(memories: Sequence[Memory], seen: int, generator: torch.Generator) -> int:
    """The least important of those whose importance was measured; the oldest if none was."""
    measured = [i for i, memory in enumerate(memories) if memory.weighed]
    return min(measured, key=lambda i: memories[i].importance, default=0)


def _reservoir(memories: Sequence[Memory], seen: int, generator: torch.Generator) -> int:
    """Reservoir sampling: every edit ever made is equally likely to be in the buffer (Vitter 1985, algorithm R)."""
    draw = int(torch.randint(seen, (1,), generator=generator))
    return draw if draw < len(memories) - 1 else len(memories) - 1


EVICTION: dict[str, Eviction] = {
    "fifo": lambda memories, seen, generator: 0,
    "lru": lambda memories, seen, generator: min(range(len(memories)), key=lambda i: memories[i].replayed),
    "reservoir": _reservoir,
    "least_important": _least_important,
}


class ReplayBuffer:
    """At most ``capacity`` edits with their values and keys.

    A new edit replaces an earlier one of the same subject and prompt.

    Args:
        capacity: the largest number of memories.
        sampling: a name in :data:`SAMPLING`.
        eviction: a name in :data:`EVICTION`.
        seed: of the buffer's own generator.

    Raises:
        UserError: The capacity is under 1, or a policy is unknown.
    """

    def __init__(self, capacity: int, sampling: str = "random", eviction: str = "fifo", seed: int = 0) -> None:
        at_least_one("MemoryReplay", capacity=capacity)
        one_of("MemoryReplay", SAMPLING, sampling=sampling)
        one_of("MemoryReplay", EVICTION, eviction=eviction)
        self.capacity = capacity
        self.sampling = sampling
        self.eviction = eviction
        self.seen = 0
        self.replaced = 0
        self._memories: OrderedDict[tuple[str, str], Memory] = OrderedDict()
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._memories)

    @property
    def memories(self) -> list[Memory]:
        """All memories, oldest first."""
        return list(self._memories.values())

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(memory.size for memory in self._memories.values())

    def add(self, memory: Memory) -> None:
        """Adds an edit as the newest one; it replaces an older one of the same subject and prompt."""
        if self._memories.pop(memory.fact.slot, None) is not None:
            self.replaced += 1
        else:
            self.seen += 1
        self._memories[memory.fact.slot] = memory
        if len(self._memories) > self.capacity:
            slots = list(self._memories)
            drop = EVICTION[self.eviction](list(self._memories.values()), self.seen, self._generator)
            del self._memories[slots[drop]]

    def sample(self, count: int, exclude: Collection[Fact] = (), step: int | None = None) -> list[Memory]:
        """Samples up to ``count`` different memories, none of a subject and prompt that is edited now.

        They are returned oldest first, so the order of the draw does not affect the solve.

        Args:
            count: number of memories.
            exclude: facts of the batch being edited.
            step: number of the batch in which they are replayed, which is noted in them; None notes nothing.
        """
        taken = {fact.slot for fact in exclude}
        free = [memory for slot, memory in self._memories.items() if slot not in taken]
        chosen = SAMPLING[self.sampling](free, min(count, len(free)), self._generator) if free and count > 0 else []
        memories = [free[i] for i in sorted(chosen)]
        for memory in memories:
            memory.replayed = memory.replayed if step is None else step
        return memories

    def state_dict(self) -> dict[str, Any]:
        """The whole buffer as tensors, numbers and strings."""
        plain = [f.name for f in fields(Memory) if f.name != "fact"]
        return {
            "memories": [{"fact": m.fact.to_dict(), **{n: getattr(m, n) for n in plain}} for m in self.memories],
            "seen": self.seen,
            "replaced": self.replaced,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        memories = [Memory(**{**saved, "fact": Fact.from_dict(saved["fact"])}) for saved in state["memories"]]
        self._memories = OrderedDict((m.fact.slot, m) for m in memories)
        self.seen, self.replaced = state["seen"], state["replaced"]
        self._generator.set_state(state["generator"])
