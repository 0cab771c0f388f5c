"""The targets of a run's batches: its value source asked at the sites of its edited layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from editlab.data.fact import Fact
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values.settings import ValueSettings
from editlab.values.sources import ValueSource
from editlab.values.spread import EACH, Targets, find_targets


@dataclass(frozen=True)
class TargetFinder:
    """Finds targets at all sites, on the weights that ``values.reference`` names."""

    lm: LanguageModel
    settings: ValueSettings
    source: ValueSource
    """finds the values at one site"""
    sites: Sequence[Site]
    """the different sites that the edited layers work towards, from the lowest up"""
    unedited: Callable[[], AbstractContextManager[None]]
    """puts the original weights in place inside its ``with``"""

    def find(self, facts: Sequence[Fact]) -> Targets:
        """Targets of the facts of a batch; those of higher layers may be found later, when their layer is solved."""
        current = self.settings.reference == "current"
        with nullcontext() if current else self.unedited():
            in_turn = self.source.find if current and self.settings.spread == EACH else None
            return find_targets(self.lm, self.settings.spread, self.sites, facts, self.source.find, in_turn)

    def find_now(self, facts: Sequence[Fact]) -> Tensor:
        """Values of facts at all sites, float32 [n, sites, d_v], on the weights as they are."""
        return find_targets(self.lm, self.settings.spread, self.sites, facts, self.source.find_now).stacked()
