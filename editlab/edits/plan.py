"""One batch of edits before its solve (:class:`EditPlan`) and after it (:class:`EditOutcome`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from editlab.data.fact import Fact
from editlab.edits.snapshot import Snapshot
from editlab.keys.subject_keys import CachedKey, Keys
from editlab.values.spread import Targets


@dataclass
class Addition:
    """A constraint that a callback adds to a batch: an earlier fact that should have its value after the solve."""

    fact: Fact
    target: Tensor
    """[sites, d_v]: what each site (:class:`~editlab.values.spread.Targets`), from the lowest up, should output at the
    subject's last token; [d_v] if there is one"""
    weight: float = 1.0
    """the slack of the constraint is 1 / weight; ``inf`` makes it an equality"""
    repair: float = 1.0
    """fraction of the residual to remove: 1 asks for the target, 0 asks that the output stay as it is now"""
    cached_key: CachedKey | None = None
    """its key, if known, so that no forward pass is needed; only for a single edited layer"""


@dataclass
class EditPlan:
    """One batch of edits before its solve."""

    step: int
    """number of batches before this one"""
    facts: Sequence[Fact]
    """facts of the batch; of several with the same subject and prompt only the last. Batch indices refer to these"""
    targets: Targets
    """values v* of the facts at the site that each layer works towards"""
    additions: list[Addition] = field(default_factory=list)
    """constraints that callbacks added"""
    firmness: float = 0.0
    """how much the solve holds the update back (:func:`editlab.solver.closed_form.solve`); 0: not at all"""

    def add(self, additions: Sequence[Addition]) -> None:
        """Adds constraints to the batch; if the system is ill-conditioned, they are dropped before the batch's own."""
        self.additions.extend(additions)


@dataclass
class EditOutcome:
    """One batch of edits after its solve, with the decisions of the callbacks about it."""

    plan: EditPlan
    updates: dict[int, Tensor] = field(default_factory=dict)
    """layer -> the update that was added to its weight, float32 [d_v, d_k]"""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """numbers of the solve to log, such as ``layer_6/gram_condition``"""
    keys: dict[int, Keys] = field(default_factory=dict)
    """layer -> keys of the plan's facts followed by its additions, as the last pass read them"""
    last_updates: dict[int, Tensor] = field(default_factory=dict)
    """layer -> the part of its update that the last pass added, after those keys were read"""
    firm_slack: dict[int, float] = field(default_factory=dict)
    """layer -> number that the plan's firmness added to each slack in the last pass; only if it is firm"""
    lowest_keys: Keys | None = None
    """keys of the plan's facts at the lowest layer before the batch, which no update of the batch changes"""
    cut: dict[int, Tensor] = field(default_factory=dict)
    """layer -> the part of the solved update that post-steps cut off, float32 [d_v, d_k]; empty without post-steps"""
    residual_norm: Tensor | None = None
    """norm of each fact's residual at the lowest site before the solve, [n]; set by the solve"""
    measured: dict[str, float] = field(default_factory=dict)
    """numbers that callbacks log for this step, by full name, such as ``replay/buffer``"""
    factor: float = 1.0
    """fraction of the update that stays in the weights: 1 keeps it, 0 rolls it back"""
    reasons: list[str] = field(default_factory=list)
    """why the update was scaled, solved again without some facts, or rolled back"""
    dropped: set[int] = field(default_factory=set)
    """indices in the batch of the facts without which it is solved again"""
    before_adjustment: Snapshot | None = None
    """the weights before a callback adjusted them; None if none did"""

    def __post_init__(self) -> None:
        self._batch = len(self.plan.facts)
        self._planned = list(range(self._batch))

    @property
    def kept(self) -> bool:
        """Whether any fraction of the update stays in the weights."""
        return self.factor > 0

    @property
    def remaining(self) -> list[int]:
        """Indices in the batch of the facts that are not dropped."""
        return [index for index in range(self._batch) if index not in self.dropped]

    @property
    def factors(self) -> list[float]:
        """For each fact of the batch, the fraction of its edit that stays: 0 for dropped facts."""
        return [0.0 if index in self.dropped else self.factor for index in range(self._batch)]

    def scale(self, factor: float, reason: str) -> None:
        """Requests that only ``factor`` (0 to 1) of the update stay; of several requests the lowest holds.

        Raises:
            ValueError: The factor is not between 0 and 1.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor is {factor}: it must lie between 0 and 1")
        self.factor = min(self.factor, factor)
        self.reasons.append(reason)

    def drop(self, indices: Collection[int], reason: str) -> None:
        """Requests that the batch be solved again without some facts; if none remains, it is rolled back.

        After the second solve the callbacks get ``on_edit_applied`` again.

        Args:
            indices: indices in the batch.
            reason: why, for the log.

        Raises:
            ValueError: The batch has no such index.
        """
        if not set(indices) <= set(range(self._batch)):
            raise ValueError(f"indices are {sorted(indices)}: the batch has {self._batch} facts")
        self.dropped |= set(indices)
        self.reasons.append(reason)
        if len(self.dropped) == self._batch:
            self.factor = 0.0

    def roll_back(self, reason: str) -> None:
        """Requests that the update be undone, bit for bit."""
        self.scale(0.0, reason)

    @property
    def needs_solving(self) -> bool:
        """Whether facts were dropped since the last solve, and some remain."""
        return self.kept and len(self.plan.facts) > len(self.remaining)

    def remove_dropped(self) -> None:
        """Reduces the plan to the remaining facts and clears the results of the last solve."""
        rows = [row for row, index in enumerate(self._planned) if index not in self.dropped]
        self._planned = [self._planned[row] for row in rows]
        self.plan = replace(self.plan, facts=[self.plan.facts[row] for row in rows], targets=self.plan.targets.of(rows))
        self.lowest_keys = None
        self.clear()

    def clear(self) -> None:
        """Clears the results of the last solve, apart from the keys of the lowest layer, which no solve changes."""
        self.updates, self.last_updates, self.keys, self.diagnostics, self.residual_norm = {}, {}, {}, {}, None
        self.firm_slack, self.cut = {}, {}
