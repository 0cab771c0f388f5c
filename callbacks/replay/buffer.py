"""The replay buffer: edits that were made, which of them leave when it is full, and which come back.

Pure data and arithmetic, no model. A policy is one function in :data:`SAMPLING` or :data:`EVICTION`; adding one there
makes it known to YAML by its name.
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
    """v*, [d_v]"""
    key: Tensor
    """k at the topmost edited layer when the edit was made, [d_k]"""
    origin: Tensor
    """what the site gave at the subject's last token but for the topmost layer's updates, [d_v]"""
    step: int
    """batch that made the edit"""
    replayed: int = -1
    """batch in which it was last replayed; that of the edit where it never was"""
    importance: float = 0.0
    """how much it needs replaying: its drift or its loss, as the sampling policy has it"""
    weighed: bool = False
    """whether its importance has been measured"""
    others: Tensor | None = None
    """keys of its prompt's other tokens, [m, d_k]; only where keys are cached and such tokens are preserved"""

    def __post_init__(self) -> None:
        if self.replayed < 0:
            self.replayed = self.step

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        tensors = (self.value, self.key, self.origin, self.others)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


Sampling = Callable[[Sequence[Memory], int, torch.Generator], Sequence[int]]
"""Memories (oldest first), how many to choose of them (no more than there are), the generator -> indices chosen."""

Eviction = Callable[[Sequence[Memory], int, torch.Generator], int]
"""Memories (oldest first, the newcomer last), how many edits have ever come, the generator -> index to drop."""


def _random(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return torch.randperm(len(memories), generator=generator)[:count].tolist()


def _recent(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return range(len(memories) - count, len(memories))


def _oldest(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    return range(count)


def _priority(memories: Sequence[Memory], count: int, generator: torch.Generator) -> Sequence[int]:
    """Without replacement, with probability proportional to importance (Schaul et al. 2016, arXiv:1511.05952)."""
    weights = torch.tensor([m.importance for m in memories], dtype=torch.float64).clamp_min(0)
    weights += 1e-9 * max(1.0, float(weights.max()))  # one that has not drifted at all can still be drawn
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
"""``loss`` is what importance stands for there: minus the target's log-probability, the worst first."""


def _least_important(memories: Sequence[Memory], seen: int, generator: torch.Generator) -> int:
    """Of those whose importance is known; the oldest where it is of none."""
    known = [i for i, memory in enumerate(memories) if memory.weighed]
    return min(known, key=lambda i: memories[i].importance, default=0)


def _reservoir(memories: Sequence[Memory], seen: int, generator: torch.Generator) -> int:
    """Every edit ever made is equally likely to be in the buffer (Vitter 1985, algorithm R)."""
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

    A fact with the same subject and prompt as one that is there takes its place: the user changed their mind.

    Args:
        capacity: the most memories kept.
        sampling: a name in :data:`SAMPLING`.
        eviction: a name in :data:`EVICTION`.
        seed: of the buffer's own generator.

    Raises:
        UserError: for a capacity under 1, or an unknown policy.
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
        """What is remembered, oldest first."""
        return list(self._memories.values())

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(memory.size for memory in self._memories.values())

    def add(self, memory: Memory) -> None:
        """Remembers an edit as the newest, in the place of an older one of the same subject and prompt."""
        if self._memories.pop(memory.fact.slot, None) is not None:
            self.replaced += 1
        else:
            self.seen += 1
        self._memories[memory.fact.slot] = memory
        if len(self._memories) > self.capacity:
            slots = list(self._memories)
            drop = EVICTION[self.eviction](list(self._memories.values()), self.seen, self._generator)
            del self._memories[slots[drop]]

    def sample(self, count: int, but: Collection[Fact] = (), step: int | None = None) -> list[Memory]:
        """Up to ``count`` different memories by the sampling policy, none that ``but`` is about to replace.

        They come oldest first, so the order of the draw leaves no trace in the solve.

        Args:
            count: how many.
            but: facts of the batch being edited.
            step: the batch they are replayed in, which is noted; None notes nothing.
        """
        taken = {fact.slot for fact in but}
        free = [memory for slot, memory in self._memories.items() if slot not in taken]
        chosen = SAMPLING[self.sampling](free, min(count, len(free)), self._generator) if free and count > 0 else []
        memories = [free[i] for i in sorted(chosen)]
        for memory in memories:
            memory.replayed = memory.replayed if step is None else step
        return memories

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers and strings."""
        plain = [f.name for f in fields(Memory) if f.name != "fact"]
        return {
            "memories": [{"fact": m.fact.to_dict(), **{n: getattr(m, n) for n in plain}} for m in self.memories],
            "seen": self.seen,
            "replaced": self.replaced,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        memories = [Memory(**{**saved, "fact": Fact.from_dict(saved["fact"])}) for saved in state["memories"]]
        self._memories = OrderedDict((m.fact.slot, m) for m in memories)
        self.seen, self.replaced = state["seen"], state["replaced"]
        self._generator.set_state(state["generator"])
