"""Value sources: where the targets v* of a batch come from, behind one interface.

The editor asks its source for targets at a site (:class:`~editlab.keys.subject_keys.Site`) and keeps the source's state
in the checkpoint; it does not know how targets are found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.utils.progress import progress
from editlab.values.cache import ValueCache
from editlab.values.optimize import ValueSettings, optimize_values


class ValueSource(ABC):
    """Finds the targets of facts; several sites may be asked for in turn."""

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
        if state:
            raise UserError(
                f"The checkpoint has the state of another value source ({', '.join(sorted(state))}): give model.values "
                "the settings of the run that wrote it."
            )


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
