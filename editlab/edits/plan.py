"""The moments of an edit at which callbacks may take part, and what they are given.

    on_edit_planned   before the solve: constraints may be added (replay)
    on_edit_applied   the weights have changed: the edit may be scaled, cut or rolled back (trust)
    on_edit_settled   the verdict is in: kept edits may be remembered (replay)
    on_edit_adjust    the weights may be adjusted by other means (LoRA)
    on_edit_done      the weights are as the next batch finds them: measure

Every callback hears each event before any hears the next, in an order that does not depend on the YAML, so the
order in which callbacks are listed never changes a result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from editlab.data.fact import Fact
from editlab.keys.subject_keys import CachedKey, Keys

if TYPE_CHECKING:
    from editlab.editor import SequentialEditor
    from editlab.edits.batch import StepState


@dataclass
class Addition:
    """A constraint that a callback adds: an earlier fact that shall (still) have its value."""

    fact: Fact
    target: Tensor
    """[d_v]: what the site should give at the subject's last token"""
    weight: float = 1.0
    """its slack is 1 / weight; ``inf`` makes it as hard as an equality"""
    repair: float = 1.0
    """share of the way back to its value that is asked for; 0 only asks that it stay where it is"""
    known: CachedKey | None = None
    """its key, where it is known and need not be read; only for a single edited layer"""


@dataclass
class EditPlan:
    """One batch of edits before its solve."""

    step: int
    """batches before this one"""
    facts: Sequence[Fact]
    """those of the batch, of one subject and prompt the last alone; "places in the batch" count these"""
    targets: Tensor
    """float32 [n, d_v]: values of the facts"""
    additions: list[Addition] = field(default_factory=list)

    def add(self, additions: Sequence[Addition]) -> None:
        """Adds constraints to the batch's own; they are the first to go where the system is ill-conditioned."""
        self.additions.extend(additions)


@dataclass
class EditOutcome:
    """One batch of edits after its solve."""

    plan: EditPlan
    updates: dict[int, Tensor]
    """layer -> what was added to its weight, float32 [d_v, d_k]"""
    diagnostics: dict[str, float]
    """what the step logs: ``layer_6/gram_condition`` and the like"""
    keys: dict[int, Keys] = field(default_factory=dict)
    """layer -> keys of the plan's facts and then its additions (set by the solve), as its last pass found them"""
    last_updates: dict[int, Tensor] = field(default_factory=dict)
    """layer -> the part of its update that the last pass added, after those keys were read"""
    missing: Tensor | None = None
    """[n]: length of what each of the plan's facts had to go to its value when its solve began (set by the solve)"""
    measured: dict[str, float] = field(default_factory=dict)
    """what callbacks have to log of this step, by full name: ``replay/buffer`` and the like"""
    factor: float = 1.0
    """share of the update that stays: 1 kept, 0 rolled back"""
    reasons: list[str] = field(default_factory=list)
    """why it was scaled, solved without some facts, or rolled back"""
    left_out: set[int] = field(default_factory=set)
    """places in the batch of facts without which it is solved again"""
    before_adjustment: StepState | None = None
    """the weights before they were adjusted; None where they were not"""

    def __post_init__(self) -> None:
        self._batch = len(self.plan.facts)
        self._planned = list(range(self._batch))

    @property
    def kept(self) -> bool:
        """Whether any of the update stays."""
        return self.factor > 0

    @property
    def stays(self) -> list[int]:
        """Places in the batch of the facts that are not left out."""
        return [place for place in range(self._batch) if place not in self.left_out]

    @property
    def factors(self) -> list[float]:
        """The share that stays of each fact of the batch, those left out included."""
        return [0.0 if place in self.left_out else self.factor for place in range(self._batch)]

    def scale(self, factor: float, reason: str) -> None:
        """Asks that only ``factor`` (0 to 1) of the update stay; the lowest that any callback asks for counts."""
        if not 0 <= factor <= 1:
            raise ValueError(f"factor is {factor}: it must lie between 0 and 1")
        self.factor = min(self.factor, factor)
        self.reasons.append(reason)

    def leave_out(self, places: Collection[int], reason: str) -> None:
        """Asks that the batch be solved again without the facts at ``places`` of it; without all it is undone.

        Solved again, it is told to ``on_edit_applied`` once more.
        """
        if not set(places) <= set(range(self._batch)):
            raise ValueError(f"places are {sorted(places)}: the batch has {self._batch} facts")
        self.left_out |= set(places)
        self.reasons.append(reason)
        if len(self.left_out) == self._batch:
            self.factor = 0.0

    @property
    def needs_solving(self) -> bool:
        """Whether facts were left out since it was solved, and some stay."""
        return self.kept and len(self.plan.facts) > len(self.stays)

    def drop_left_out(self) -> None:
        """The plan becomes that of the facts that stay, and nothing is solved yet; for the editor."""
        stay = [i for i, place in enumerate(self._planned) if place not in self.left_out]
        self._planned = [self._planned[i] for i in stay]
        self.plan = replace(self.plan, facts=[self.plan.facts[i] for i in stay], targets=self.plan.targets[stay])
        self.updates, self.last_updates, self.keys, self.diagnostics, self.missing = {}, {}, {}, {}, None

    def roll_back(self, reason: str) -> None:
        """Asks that the edit be undone, bit for bit."""
        self.scale(0.0, reason)


class EditCallback(Callback):
    """A Lightning callback that also hears the events of an edit; each does nothing by default."""

    charts: Mapping[str, Sequence[str]] = {}
    """Charts of what the callback logs, for TensorBoard's custom scalars: title -> patterns of the names in a chart."""

    def begin_anew(self, editor: SequentialEditor, unused: Mapping[str, Any]) -> None:
        """Forgets another run that the object was used in; for ``on_fit_start``.

        Args:
            editor: what it knows is kept where this one has edits: those of the run that is gone on with.
            unused: its ``state_dict`` as it was made.
        """
        if not editor.edits:
            self.load_state_dict(dict(unused))

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Values are found, nothing is solved yet: add constraints by :meth:`EditPlan.add`."""

    def on_edit_applied(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """The weights have changed: the outcome may be asked to ``scale``, ``leave_out`` facts, or ``roll_back``."""

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Every callback has had its say and the weights are as they stay."""

    def on_edit_adjust(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """All have remembered what they need: the weights may be changed, by ``outcome.before_adjustment`` at first."""

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """The weights stay as they are until the next batch: measure, or follow what an adjustment changed."""
