r"""A dry solve: what a sequence of edits will do to a model, from the keys alone.

Every update is linear in the residuals, with factors that depend on keys and metrics only. So the solver runs here on
the unit vectors ``e_1 ... e_N`` in the place of the N residuals, and gives at each layer a matrix ``A`` [N, d_k] such
that the sum of all updates is ``R A`` for *any* residuals ``R`` [d_v, N]. No value v* is needed for it.

**What an edit keeps.** The outputs at the keys move by ``R H`` with ``H = A K`` [N, N]; column j belongs to edit j. Its
diagonal element is the fraction of its own residual that edit j keeps at the end, after all others (*held*); the other
elements are what other edits add to it. For one layer with slack S and a consolidated memory the sequence is one joint
ridge regression (recursive least squares), so::

    H = G (G + S)^-1     with the Gram matrix     G = K^T C^-1 K

The more keys there are for each dimension, the more they lean on each other, and the less of each edit is held,
although each was enforced in its own batch. Without a memory H has no such form, and the recursion over the batches
gives it. Context keys are held where they are at the time of their batch; with memory the recursion then differs a
little from one joint solve, which holds all of them where they were at the beginning.

**What others add to it.** If residuals have the mean square norm ``r^2`` and the mean cosine ``c`` between two of them,
so that ``E[R^T R] = r^2 ((1 - c) I + c 1 1^T)``, the output at key j is ``H_jj r_j`` and noise whose mean square is
``r^2 ((1 - c) sum_i H_ij^2 + c (sum_i H_ij)^2)`` over the other edits i (*crosstalk*, its root over ``r``). Values of a
few facts give r and c. An edit is lost if too little of it is held, or if too much of others is added.

**What the prompts pay.** At a context key q of an edited prompt, which should stay where it is, the output moves by
``R A q``, in the mean square as crosstalk does, with all edits in the sum (*drift*, its root over ``r``).

**What ordinary text pays.** The layer's output at an ordinary token with key k moves by ``R A k``. Its mean square over
text is ``tr(R A C0 A^T R^T)``, in expectation ``r^2 ((1 - c) tr(A C0 A^T) + c 1^T A C0 A^T 1)`` (*spent*, in units of
``r^2``). Over the layer's own mean square output ``tr(W C0 W^T)`` it is the relative error of the output.

**Several layers** share a residual as MEMIT does (Meng et al. 2023, arXiv:2210.07229, eq. 20): each takes 1 / (number
of layers from it upwards) of what remains at the highest. A dry solve assumes that the blocks in between pass a change
on as it is, and that lower updates leave the keys of higher layers alone. Both hold exactly for one layer, and values
must be those of the original weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.preservation import Preservation

SOLVES = 6
"""Largest number of batches that a dry solve with memory makes of the edits: without context keys their number has no
effect, and with them a small one."""
CONTEXT_KEYS = 512
"""Largest number of context keys at which drift is computed, evenly spaced over the prompts."""


@dataclass(frozen=True)
class DryLayer:
    """Keys of the facts and of ordinary text at one layer, with the original weights."""

    keys: Tensor
    """key of each fact in the order of the edits, float64 [d_k, n]"""
    context_keys: Tensor
    """keys of the context tokens of their prompts, float64 [d_k, m]"""
    context_fact: Tensor
    """long [m], ascending: the fact whose prompt each context key is in"""
    moments: Tensor
    """second moments C0 of ordinary keys, float64 [d_k, d_k]"""

    def first(self, count: int) -> DryLayer:
        """The layer with the first facts only."""
        inside = int((self.context_fact < count).sum())
        return DryLayer(
            self.keys[:, :count], self.context_keys[:, :inside], self.context_fact[:inside], self.moments
        )  # fmt: skip


@dataclass(frozen=True)
class DrySettings:
    """The settings that a dry solve depends on; the metric is ``weight * C0 + mu I`` plus the ridge."""

    weight: float
    """lambda, the weight of C0"""
    context_weight: float = 0.0
    """weight of the context keys of each batch in its metric"""
    memory: bool = False
    """whether the keys of all past edits, and their context keys, are in the metric (consolidated memory)"""
    slack: float = 1.0
    """slack of each edit; past keys weigh 1 / slack, or 1 if it is 0"""
    ridge: float = 1e-6
    """fraction of C0's mean eigenvalue, times the weight, that is added to the diagonal"""
    mu: float = 0.0
    """weight of the identity in the metric"""


@dataclass(frozen=True)
class DryOutcome:
    """What a sequence of edits has done after some of them."""

    edits: int
    held: Tensor
    """fraction of its own residual that each edit keeps, float64 [edits]"""
    crosstalk: Tensor
    """root mean square of what others add at each edit's key, as a fraction of a residual's norm, float64 [edits]"""
    drift: float
    """root mean square, over context keys of all prompts, of what the edits add there, as a fraction of that norm"""
    spent: tuple[float, ...]
    """for each layer the mean square change of its output on ordinary text, in units of the residuals' mean square"""


def dry_solve(
    layers: Sequence[DryLayer],
    settings: DrySettings,
    batch_size: int,
    alike: float = 0.0,
    at: Sequence[int] = (),
    tick: Callable[[int], object] = lambda edits: None,
) -> list[DryOutcome]:
    """Edits all facts without a model, and returns what has become of the edits.

    Args:
        layers: the edited layers, from the lowest up, with the same facts.
        settings: the settings of the solve.
        batch_size: number of facts in a batch. With memory, batches are joined to :data:`SOLVES` at most.
        alike: mean cosine c between the residuals of two facts, at least 0.
        at: numbers of edits after which an outcome is wanted, too.
        tick: called with the number of edits of each batch.

    Returns:
        The outcomes at ``at`` and after the last edit, by the number of edits.
    """
    count = layers[0].keys.shape[1]
    if settings.memory:
        batch_size = max(batch_size, -(-count // SOLVES))
    marks = sorted({edits for edits in at if 0 < edits < count} | {count})
    states = [_State(layer, settings) for layer in layers]
    outcomes = []
    for batch in _batches(marks, batch_size):
        stop = batch.stop
        left = torch.zeros(stop, len(batch), dtype=torch.float64)
        left[batch.start :] = torch.eye(len(batch), dtype=torch.float64)
        for state in states:
            left = left - state.moved(batch, batch.start)
        for number, state in enumerate(states):
            left = left - state.solve(left / (len(states) - number), batch)
        tick(len(batch))
        if stop in marks:
            outcomes.append(_outcome(states, stop, alike))
    return outcomes


def _batches(marks: Sequence[int], batch_size: int) -> Iterator[range]:
    """The batches up to each mark; none reaches over a mark."""
    start = 0
    for mark in marks:
        while start < mark:
            stop = min(start + batch_size, mark)
            yield range(start, stop)
            start = stop


class _State:
    """One layer during a dry solve: the coefficients of its sum of updates, and the past keys of its metric."""

    def __init__(self, layer: DryLayer, settings: DrySettings) -> None:
        self.layer, self.settings = layer, settings
        size, count = layer.keys.shape
        self.sums = torch.zeros(count, size, dtype=torch.float64)
        self.past_weight = 1 / settings.slack if settings.slack else 1.0
        # All of the metric scales with the weight, so the ridge is that of the bare C0 times the weight.
        self.identity = settings.ridge * settings.weight * float(layer.moments.diagonal().mean()) + settings.mu
        self.preserved = settings.weight * layer.moments  # and, with memory, all keys up to now
        self.metric = None if settings.memory else self._metric(self.preserved)

    def _metric(self, preserved: Tensor) -> Preservation:
        return Preservation.from_moments(preserved, 1.0, 0.0, identity=self.identity)

    def _context_keys(self, batch: range) -> Tensor:
        fact = self.layer.context_fact
        return self.layer.context_keys[:, (fact >= batch.start) & (fact < batch.stop)]

    def moved(self, batch: range, edits: int) -> Tensor:
        """What the first ``edits`` updates have done at the keys of a batch, in coefficients, [batch.stop, batch]."""
        moved = torch.zeros(batch.stop, len(batch), dtype=torch.float64)
        moved[:edits] = self.sums[:edits] @ self.layer.keys[:, batch.start : batch.stop]
        return moved

    def solve(self, wanted: Tensor, batch: range) -> Tensor:
        """Adds the update that moves a batch by ``wanted`` [batch.stop, batch]; returns how far it moves, alike."""
        keys, context = self.layer.keys[:, batch.start : batch.stop], self._context_keys(batch)
        weight = self.settings.context_weight
        if self.metric is None:
            if weight:
                self.preserved = torch.addmm(self.preserved, context, context.T, alpha=weight)
            metric = self._metric(self.preserved)
        else:
            metric = self.metric.plus(context, weight) if weight else self.metric
        slack = torch.full((len(batch),), self.settings.slack, dtype=torch.float64)
        delta = solve(Constraints(keys, wanted, slack), metric).delta
        self.sums[: batch.stop] += delta
        if self.metric is None:
            self.preserved = torch.addmm(self.preserved, keys, keys.T, alpha=self.past_weight)
        return delta @ keys


def _outcome(states: Sequence[_State], edits: int, alike: float) -> DryOutcome:
    moved = torch.zeros(edits, edits, dtype=torch.float64)
    spent = []
    for state in states:
        sums = state.sums[:edits]
        moved += sums @ state.layer.keys[:, :edits]
        on_text = sums @ state.layer.moments
        each, together = float((on_text * sums).sum()), float(on_text.sum(0) @ sums.sum(0))
        spent.append((1 - alike) * each + alike * together)
    held = moved.diagonal().clone()
    others = moved.fill_diagonal_(0)
    square = (1 - alike) * others.square().sum(0) + alike * others.sum(0).square()
    return DryOutcome(edits, held, square.sqrt(), _drift(states, edits, alike), tuple(spent))


def _drift(states: Sequence[_State], edits: int, alike: float) -> float:
    count = int((states[0].layer.context_fact < edits).sum())
    if not count:
        return 0.0
    some = torch.linspace(0, count - 1, min(count, CONTEXT_KEYS)).long()
    moved = torch.zeros(edits, len(some), dtype=torch.float64)
    for state in states:
        moved += state.sums[:edits] @ state.layer.context_keys[:, some]
    square = (1 - alike) * moved.square().sum(0) + alike * moved.sum(0).square()
    return float(square.mean().sqrt())


def residual_statistics(residuals: Tensor) -> tuple[float, float]:
    """Mean square norm ``r^2`` of some residuals [d_v, n], and the mean cosine c of two of them, at least 0.

    c is the mean of ``r_i^T r_j`` over pairs, over ``r^2``; of a single residual it is 0.
    """
    gram = residuals.double().T @ residuals.double()
    count = len(gram)
    square = float(gram.diagonal().mean())
    if count < 2 or square == 0:
        return square, 0.0
    pairs = float(gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
    return square, min(1.0, max(0.0, pairs / square))
