"""Methods that edit by training: :class:`FineTune` of the edited weights, and :class:`LoRAOnly`, a low-rank adapter.

Both minimize, by Adam, the cross-entropy of the new targets after the edit prompts, and both follow LocFT-BF (Yang et
al. 2025, arXiv:2509.22072): an epoch goes once over all mini-batches of the facts of a step, in a new random order, so
that no fact is trained to convergence before the next one (*breadth-first*), and each target ends with the tokenizer's
end token. For a fact with m target tokens x (the end token included) after the prompt p::

    loss = mean over the mini-batch's facts of  -1/m sum_j log P(x_j | p, x_1 ... x_j-1)

The facts of a step are those of one batch (``data.batch_size``): with all facts in one batch the training is the
paper's; with smaller batches it is sequential, and each batch starts from the weights of the last.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import MATMULS
from editlab.solver.base import EditMethod
from editlab.training.adapter import Adapter, parameters
from editlab.utils.validation import above_zero, at_least_one, fractions, not_negative, one_of


@dataclass(frozen=True)
class Trainee:
    """Parameters in a model that are trained, and the updates of the edited weights that they stand for."""

    parameters: Sequence[nn.Parameter]
    updates: Callable[[], dict[int, Tensor]]
    """layer -> the update of its weight at present, float32 [d_v, d_k]"""
    constrain: Callable[[], None] = lambda: None
    """called after each step: moves the parameters back to where they may be"""


@dataclass(frozen=True)
class TrainedMethod(EditMethod):
    """A method that edits by training; :mod:`editlab.training.breadth_first` is its training.

    Raises:
        UserError: A setting is out of range.
    """

    solves: ClassVar[bool] = False

    lr: float = 1e-3
    """Learning rate of Adam."""
    epochs: int = 25
    """Largest number of times that the training goes over the facts of a batch."""
    mini_batch: int = 8
    """Largest number of facts in a training step."""
    stop_loss: float = 0.01
    """Mean loss of an epoch, in nats per token, under which the training of a batch ends. A mini-batch whose loss is
    under it takes no step."""
    end_token: bool = True
    """Whether the tokenizer's end token is trained as the last token of each target."""
    matmul: str = "auto"
    """Type of the matrix products above the edited layers and of the head, for float32 weights: ``float32``,
    ``bfloat16``, or ``auto``: bfloat16 on CPUs with instructions for it."""
    seed: int = 0
    """Seed of the order of the facts and, for :class:`LoRAOnly`, of the adapter's first factors."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        above_zero(where, lr=self.lr)
        at_least_one(where, epochs=self.epochs, mini_batch=self.mini_batch)
        not_negative(where, stop_loss=self.stop_loss)
        one_of(where, MATMULS, matmul=self.matmul)

    @abstractmethod
    def trainee(self, lm: LanguageModel, layers: Sequence[int], step: int) -> AbstractContextManager[Trainee]:
        """Put the parameters to train into a model inside the ``with``; afterwards it has its own modules again.

        Args:
            lm: the model.
            layers: numbers of the layers whose edited modules are trained.
            step: number of batches before this one, for seeds.
        """


@dataclass(frozen=True)
class FineTune(TrainedMethod):
    """Constrained fine-tuning: all entries of the edited weights are trained, and no other weight.

    At one layer with ``end_token`` it is LocFT-BF (Yang et al. 2025, arXiv:2509.22072); with ``norm_constraint`` it is
    FT+L, the baseline of ROME (Meng et al. 2022, arXiv:2202.05262; also called FT-L), whose constraint is that of Zhu
    et al. 2020, arXiv:2012.00363: ``|delta_ij| <= norm_constraint`` for each entry of a batch's update.

    Raises:
        UserError: A setting is out of range.
    """

    norm_constraint: float | None = None
    """Largest absolute value of an entry of a batch's update (the L-infinity norm); default: no constraint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(type(self).__name__, norm_constraint=self.norm_constraint)

    @contextmanager
    def trainee(self, lm: LanguageModel, layers: Sequence[int], step: int) -> Iterator[Trainee]:
        """Add a shift, zero at first, to the weight of each edited module; see :meth:`TrainedMethod.trainee`."""
        shifts: dict[int, nn.Parameter] = {}

        @torch.no_grad()
        def constrain() -> None:
            for shift in shifts.values():
                shift.clamp_(-self.limit, self.limit)

        with ExitStack() as stack:
            for layer in layers:
                module = lm.anatomy.edit_module(layer)
                weight: Any = module.weight
                shape = weight.T.shape if lm.anatomy.transposed(layer) else weight.shape
                wide = torch.promote_types(weight.dtype, torch.float32)
                shifts[layer] = nn.Parameter(torch.zeros(shape, dtype=wide, device=weight.device))
                stack.callback(module.register_forward_hook(_adding_product(shifts[layer])).remove)
            yield Trainee(
                list(shifts.values()), lambda: {layer: s.detach().float() for layer, s in shifts.items()}, constrain
            )

    @property
    def limit(self) -> float:
        """The norm constraint; infinity if there is none."""
        return math.inf if self.norm_constraint is None else self.norm_constraint


def _adding_product(shift: nn.Parameter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds ``shift x`` to a linear map's output for its input ``x``."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(args[0].to(shift.dtype), shift).to(output.dtype)

    return hook


@dataclass(frozen=True)
class LoRAOnly(TrainedMethod):
    """Training of a low-rank adapter on the edited modules (Hu et al. 2022, arXiv:2106.09685), by PEFT.

    Each batch trains an adapter of its own, whose update ``alpha / rank * B A`` is then added to the weight, so a
    batch's update has at most this rank, and the sum over n batches at most n times this rank.

    Raises:
        UserError: A setting is out of range.
    """

    lr: float = 5e-3
    """Learning rate of Adam."""
    rank: int = 8
    """Rank of a batch's update of each weight."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's inputs in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        at_least_one(where, rank=self.rank)
        above_zero(where, alpha=self.alpha)
        fractions(where, dropout=self.dropout)

    @contextmanager
    def trainee(self, lm: LanguageModel, layers: Sequence[int], step: int) -> Iterator[Trainee]:
        """Put a new adapter on the edited modules; see :meth:`TrainedMethod.trainee`."""
        paths = {lm.anatomy.edit_name(layer): layer for layer in layers}
        adapter = Adapter(lm, list(paths), self.rank, self.alpha, self.dropout, 1000 * self.seed + step)
        with adapter.in_place() as model:
            yield Trainee(parameters(model), lambda: {paths[path]: u for path, u in adapter.updates(model).items()})
