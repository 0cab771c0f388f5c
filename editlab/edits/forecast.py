"""The forecast of a run of N edits: what a dry solve (:mod:`editlab.solver.dry_solve`) says about a model's own keys.

A :class:`FactSample` holds what is measured once on the unedited model: keys of up to N facts, second moments of
ordinary keys, and the residuals of a few values. Every candidate setting is then forecast without the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.drawn_keys import with_drawn
from editlab.keys.key_sample import read_key_sample
from editlab.keys.moments import MomentSettings, second_moments
from editlab.keys.subject_keys import Site, check_lengths, read_outputs
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.solver.dry_solve import DryLayer, DrySettings, dry_solve, residual_statistics
from editlab.values.settings import ValueSettings
from editlab.values.sources import OptimizedValues

VALUES = 32
"""Number of facts whose values are found, for the size of residuals and how alike they are."""


@dataclass(frozen=True)
class Candidate:
    """Settings of a run that a forecast depends on; the method is MEMIT, or EMMET if the slack is below 1."""

    layers: tuple[int, ...]
    weight: float
    """``covariance_weight``, lambda"""
    context_weight: float
    """``preserve_prompt_tokens``"""
    memory: bool
    """whether ``MemoryReplay`` consolidates"""
    slack: float = 1.0
    mu: float = 0.0

    def __str__(self) -> str:
        first, *others = self.layers
        contiguous = len(others) > 1 and list(self.layers) == list(range(first, others[-1] + 1))
        named = f"{first} to {others[-1]}" if contiguous else ", ".join(map(str, self.layers))
        memory = "consolidated memory" if self.memory else "no memory"
        slack = "" if self.slack == 1 else f", slack {self.slack:g}"
        mu = f", mu {self.mu:g}" if self.mu else ""
        return f"layers {named}, lambda {self.weight:g}{slack}{mu}, context keys {self.context_weight:g}, {memory}"


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a run."""

    candidate: Candidate
    edits: int
    batch_size: int
    held: Tensor
    """fraction of its own residual that each edit keeps at the end, float64 [edits]"""
    crosstalk: Tensor
    """what other edits add at each edit's key, as a fraction of a residual's norm, float64 [edits]"""
    drift: float
    """what the edits add at the context keys of their prompts, as a fraction of a residual's norm"""
    harm: float
    """mean square change of the outputs on ordinary text, summed over the layers, as a fraction of the mean square of
    the site's output at the edited subjects"""
    output_errors: tuple[float, ...]
    """for each layer, the relative error of its own output on ordinary text: the root of the mean square change over
    the root of the mean square output"""


@dataclass(frozen=True)
class FactSample:
    """What is measured on the unedited model for all forecasts."""

    layers: Mapping[int, DryLayer]
    """layer -> keys of N facts, the first of which were read, and of ordinary text"""
    energy: Mapping[int, float]
    """layer -> its mean square output on ordinary text, ``tr(W C0 W^T)``"""
    square: float
    """mean square norm of the residuals"""
    alike: float
    """mean cosine between two residuals"""
    scale: float
    """mean square norm of the site's output at the edited subjects"""
    read: int
    """number of facts whose keys were read; those of others are drawn"""

    @classmethod
    def measure(
        cls,
        lm: LanguageModel,
        name: str,
        facts: Sequence[Fact],
        edits: int,
        layers: Sequence[int],
        site: str | None,
        values: ValueSettings,
        contexts: ContextSettings,
        moments: MomentSettings,
    ) -> FactSample:
        """Finds the values of the first facts, computes C0, and reads keys; values and C0 are kept in the cache folder.

        Args:
            lm: the unedited model.
            name: its name, for messages.
            facts: the facts in the order of their edits.
            edits: number N of edits.
            layers: all layers that a candidate may have; the highest is that of the site.
            site: ``model.site`` of the recipe.
            values: how values are found; on the original weights, whatever the settings say.
            contexts: prefixes of the values.
            moments: text of C0.
        """
        place, some = Site.of(lm, max(layers), site), list(facts[: min(VALUES, edits)])
        prefixes = sample_contexts(lm, contexts)
        check_lengths(lm, facts[:edits], prefixes)
        key = model_key(fingerprint(lm.model), lm.model)
        source = OptimizedValues(lm, key, prefixes, replace(values, reference="original"), nullcontext)
        found = source.find(some, place)
        outputs = read_outputs(lm, some, [place])[:, 0]
        return cls.of(lm, facts, edits, second_moments(lm, sorted(layers), moments, name), found, outputs)

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        facts: Sequence[Fact],
        edits: int,
        moments: Mapping[int, Tensor],
        values: Tensor,
        outputs: Tensor,
        seed: int = 0,
    ) -> FactSample:
        """Reads keys at the layers of ``moments``, which no edit has changed.

        Args:
            lm: the unedited model.
            facts: facts whose keys are read, at least one; at most the first ``edits`` are.
            edits: number N of edits; if there are fewer facts, the keys of the remaining ones are drawn
                (:mod:`editlab.keys.drawn_keys`).
            moments: layer -> C0 of that layer, float64 [d_k, d_k].
            values: values v* of some facts at the site, [n, d_v].
            outputs: what the site outputs for these facts now, [n, d_v].
            seed: seed of the draws.
        """
        facts = facts[:edits]
        layers, energy = {}, {}
        for layer, sample in read_key_sample(lm, facts, sorted(moments)).items():
            whole = with_drawn(sample, moments[layer], edits, seed)
            layers[layer] = DryLayer(whole.keys, whole.context_keys, whole.context_fact, moments[layer])
            weight = lm.anatomy.edit_module(layer).weight.detach().double().cpu()
            weight = weight.T if lm.anatomy.transposed(layer) else weight
            energy[layer] = float(((weight @ moments[layer]) * weight).sum())
        square, alike = residual_statistics((values.double() - outputs.double()).T)
        scale = float(outputs.double().square().sum(1).mean())
        return cls(layers, energy, square, alike, scale, len(facts))

    @property
    def edits(self) -> int:
        """The number N of edits."""
        return next(iter(self.layers.values())).keys.shape[1]

    def first(self, edits: int) -> FactSample:
        """The sample with the first facts only."""
        layers = {number: layer.first(edits) for number, layer in self.layers.items()}
        return replace(self, layers=layers, read=min(edits, self.read))

    def forecast(
        self,
        candidate: Candidate,
        batch_size: int,
        at: Sequence[int] = (),
        tick: Callable[[int], object] = lambda edits: None,
    ) -> list[Forecast]:
        """Forecasts after some of the edits and after the last.

        Args:
            candidate: the settings; its layers are among those of the sample.
            batch_size: number of facts in a batch.
            at: further numbers of edits to forecast.
            tick: called with the number of edits of each solved batch.
        """
        settings = DrySettings(candidate.weight, candidate.context_weight, candidate.memory, candidate.slack,
                               mu=candidate.mu)  # fmt: skip
        layers = [self.layers[number] for number in candidate.layers]
        found = []
        for outcome in dry_solve(layers, settings, batch_size, self.alike, at, tick):
            spent = torch.tensor(outcome.spent, dtype=torch.float64) * self.square
            energy = torch.tensor([self.energy[number] for number in candidate.layers], dtype=torch.float64)
            errors = tuple((spent / energy.clamp_min(1e-300)).sqrt().tolist())
            harm = float(spent.sum()) / self.scale if self.scale else 0.0
            edits, held, crosstalk = outcome.edits, outcome.held, outcome.crosstalk
            found.append(Forecast(candidate, edits, batch_size, held, crosstalk, outcome.drift, harm, errors))
        return found
