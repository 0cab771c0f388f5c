"""Value sources: where the targets v* of a batch come from, behind one interface.

The editor asks its source for targets at a site (:class:`~editlab.keys.subject_keys.Site`) and keeps the source's state
in the checkpoint; it does not know how targets are found. ``values.source`` and ``values.anchor_facts`` choose the
source: :class:`OptimizedValues`, the same under a norm anchor (:class:`AnchoredValues`), or :class:`GradientValues`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.solver.base import EditMethod
from editlab.utils.progress import progress
from editlab.values.anchor import anchor_of, anchored, parts_of
from editlab.values.cache import ValueCache
from editlab.values.gradient import RunningMoments, read_gradients, steps_of
from editlab.values.optimize import optimize_values
from editlab.values.settings import GRADIENT, ValueSettings


class ValueSource(ABC):
    """Finds the targets of facts; several sites may be asked for in turn."""

    repeatable = True
    """Whether a fact may be asked for again, without an effect on the targets of other facts."""

    @abstractmethod
    def find(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Targets of facts at a site, float32 [n, d_v], on the weights that the settings name."""

    @abstractmethod
    def find_now(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Targets of facts at a site, float32 [n, d_v], on the weights as they are."""

    def state_dict(self) -> dict[str, Any]:
        """What later targets depend on in addition to the weights, for the checkpoint; empty if there is nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state; the default accepts only the empty one.

        Raises:
            UserError: The state is of a source that has one.
        """
        _require(state)


class OptimizedValues(ValueSource):
    """Values v* by a search for each fact (:mod:`editlab.values.optimize`).

    Values on the original weights do not depend on the run, so they are kept in the cache folder.

    Args:
        lm: the model.
        model_key: key of the unedited model in the cache folder.
        contexts: prefixes, the empty one first.
        settings: settings of the search.
        unedited: puts the original weights in place inside its ``with``.
        reserved: bytes that other tensors will use on the model's devices, such as the metrics' factors.
    """

    def __init__(
        self,
        lm: LanguageModel,
        model_key: str,
        contexts: Sequence[str],
        settings: ValueSettings,
        unedited: Callable[[], AbstractContextManager[None]],
        reserved: Callable[[], int] = lambda: 0,
    ) -> None:
        self.lm, self.model_key, self.contexts, self.settings = lm, model_key, contexts, settings
        self.unedited, self.reserved = unedited, reserved
        self._caches: dict[int, ValueCache] = {}

    def find(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Values of facts at a site, float32 [n, d_v], on the weights that ``values.reference`` names."""
        if self.settings.reference == "current":
            return self.find_now(facts, site)
        return self.find_original(facts, site)

    def find_original(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Values of facts at a site, float32 [n, d_v], on the original weights."""
        with self.unedited():
            if site.layer not in self._caches:
                self._caches[site.layer] = ValueCache.of(self.lm, self.model_key, site, self.contexts, self.settings)
            return self._caches[site.layer].fetch(facts, lambda missing: self.find_now(missing, site))

    def find_now(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Values of facts at a site, float32 [n, d_v], on the weights as they are."""
        with progress(total=len(facts), desc="Values", unit="fact") as bar:
            return optimize_values(
                self.lm, facts, site, self.contexts, self.settings, progress=bar.update, reserved=self.reserved()
            ).target


class AnchoredValues(ValueSource):
    """Values v* of a search, rescaled to a norm of the original model (NAS, :mod:`editlab.values.anchor`).

    Args:
        search: finds the values.
        first: the run's first facts, up to a number; their values on the original weights give the norm.
    """

    def __init__(self, search: OptimizedValues, first: Callable[[int], Sequence[Fact]]) -> None:
        self.search, self.first = search, first
        self._anchors: dict[int, float] = {}

    def find(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Rescaled values of facts at a site, float32 [n, d_v], on the weights that ``values.reference`` names."""
        if self.search.settings.reference == "current":
            return self.find_now(facts, site)
        with self.search.unedited():
            return self._rescaled(facts, site, self.search.find(facts, site))

    def find_now(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Rescaled values of facts at a site, float32 [n, d_v], on the weights as they are."""
        return self._rescaled(facts, site, self.search.find_now(facts, site))

    def _rescaled(self, facts: Sequence[Fact], site: Site, values: Tensor) -> Tensor:
        return anchored(values, parts_of(self.search.lm, facts, site, values), self.anchor(site))

    def anchor(self, site: Site) -> float:
        """The norm that the layer's parts of values at a site are rescaled to; computed at the first call."""
        if site.layer not in self._anchors:
            facts = self.first(self.search.settings.anchor_facts)
            with self.search.unedited():
                values = self.search.find_original(facts, site)
                self._anchors[site.layer] = anchor_of(parts_of(self.search.lm, facts, site, values))
        return self._anchors[site.layer]

    def state_dict(self) -> dict[str, Any]:
        """The anchor of each site's layer."""
        return {"anchors": dict(self._anchors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the anchors.

        Raises:
            UserError: The state is of another source.
        """
        _require(state, "anchors")
        self._anchors = dict(state.get("anchors", {}))


class GradientValues(ValueSource):
    """Targets from one gradient (UltraEdit, :mod:`editlab.values.gradient`): present output plus a step.

    The state is, for each site's layer, the mean and the deviation of keys and gradients of all facts so far.

    Args:
        lm: the model.
        settings: ``lr``, ``batch_tokens`` and ``matmul`` are used.
        reserved: as for :class:`OptimizedValues`.
    """

    repeatable = False

    def __init__(self, lm: LanguageModel, settings: ValueSettings, reserved: Callable[[], int] = lambda: 0) -> None:
        self.lm, self.settings, self.reserved = lm, settings, reserved
        self._moments: dict[int, RunningMoments] = {}

    def find(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Targets of facts at a site, float32 [n, d_v], on the weights as they are; the facts enter the statistics."""
        with progress(total=len(facts), desc="Gradients", unit="fact") as bar:
            keys, gradients, origins = read_gradients(
                self.lm, facts, site, self.settings, progress=bar.update, reserved=self.reserved()
            )
        features = torch.cat([keys, gradients], 1)
        moments = self._moments.get(site.layer, RunningMoments.empty(features.shape[1])).plus(features)
        steps = steps_of(keys, gradients, moments, self.settings.step_size)
        self._moments[site.layer] = moments
        return (origins.double() + steps).float()

    def find_now(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Refused: a second step for a fact would change the statistics.

        Raises:
            UserError: Always.
        """
        raise UserError(NOT_AGAIN)

    def state_dict(self) -> dict[str, Any]:
        """Count, mean and sum of squared differences of the features at each site's layer."""
        return {"moments": {layer: vars(moments).copy() for layer, moments in self._moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the statistics.

        Raises:
            UserError: The state is of another source.
        """
        _require(state, "moments")
        self._moments = {layer: RunningMoments(**saved) for layer, saved in state.get("moments", {}).items()}


def make_source(
    lm: LanguageModel,
    model_key: str,
    contexts: Sequence[str],
    settings: ValueSettings,
    unedited: Callable[[], AbstractContextManager[None]],
    reserved: Callable[[], int],
    first: Callable[[int], Sequence[Fact]],
) -> ValueSource:
    """The source that the settings choose; the arguments are those of the sources."""
    if settings.source == GRADIENT:
        return GradientValues(lm, settings, reserved)
    search = OptimizedValues(lm, model_key, contexts, settings, unedited, reserved)
    return AnchoredValues(search, first) if settings.anchor_facts else search


NOT_AGAIN = (
    "model.values.source gradient takes one step for a fact when it is edited and has no value to find again: set "
    "MemoryReplay.refresh to none."
)


def require_combination(settings: ValueSettings, method: EditMethod, search_layers: bool, independent: bool) -> None:
    """Refuses the gradient source where it has no meaning.

    Args:
        settings: settings of the values.
        method: the editing method.
        search_layers: whether the layers are to be chosen by trying.
        independent: whether each batch is edited on the original weights.

    Raises:
        UserError: The source is ``gradient`` and the method edits one fact a step, or the layers are to be chosen by
            trying, or batches are independent.
    """
    if settings.source != GRADIENT:
        return
    if method.largest_batch == 1:
        raise UserError(
            "model.values.source gradient needs the standard deviation over a batch, and "
            f"{type(method).__name__} edits one fact a step: use UltraEdit, MEMIT or EMMET."
        )
    if search_layers:
        raise UserError(
            "model.layers auto compares layers by optimized values, which model.values.source gradient does not use: "
            "name the layers."
        )
    if independent:
        raise UserError(
            "model.values.source gradient keeps statistics over a sequence of batches, and restore_between_batches "
            "edits without a sequence: turn one of them off."
        )


def _require(state: dict[str, Any], *own: str) -> None:
    """Refuses the state of a source that has other entries than ``own``; an empty state is accepted."""
    if set(state) - set(own):
        raise UserError(
            f"The checkpoint has the state of another value source ({', '.join(sorted(state))}): give model.values "
            "the settings of the run that wrote it."
        )
