"""Targets for several edited layers: the site that each layer works towards, and how the values there are found.

- ``residual``: one value at the highest layer. Each layer removes its fraction of the residual there: 1 / (number of
  layers from it upwards), with the residual as the lower updates have left it (MEMIT, Meng et al. 2023,
  arXiv:2210.07229, eq. 20).
- ``each``: every layer has a value of its own, found by a search at that layer, and removes its whole residual (BLUE,
  Li et al. 2025, arXiv:2502.03748, which edits two layers: the first and the last of MEMIT's). As in the authors' code,
  keys, residuals and, on the current weights, also the search of a higher layer come after the updates of the lower
  ones. On the original weights all searches see the unedited model.
- ``forward``: one search at the lowest layer; the values of the others are what the model itself outputs there, at the
  subject's last token of the bare prompt, if that value is put in the place of the lowest layer's output (FE, Liu et
  al. 2026, arXiv:2605.00358). Every layer removes its whole residual, which would be 0 if the lower layers reached
  their values exactly and changed nothing at other tokens.

One layer is its own highest and lowest layer, so the three are the same for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.keys.subject_keys import Site, locate
from editlab.lm.forward import by_row, reading, replacing
from editlab.lm.language_model import TOKENS_A_PASS, LanguageModel
from editlab.lm.memory import by_halves
from editlab.lm.packing import lay_out
from editlab.lm.prefix_cache import read_prefixes
from editlab.lm.tokens import by_length

RESIDUAL, EACH, FORWARD = "residual", "each", "forward"
SPREADS = (RESIDUAL, EACH, FORWARD)
"""Ways to find targets for several layers."""

Find = Callable[[Sequence[Fact], Site], Tensor]
"""Finds the values of facts at a site, float32 [n, d_v]."""


def sites_of(lm: LanguageModel, layers: Sequence[int], spread: str, output: str | None = None) -> dict[int, Site]:
    """Edited layer -> the site that it works towards, from the lowest layer up.

    Args:
        lm: the model.
        layers: numbers of the edited layers.
        spread: one of :data:`SPREADS`.
        output: ``model.site``, the output that a target replaces (:meth:`Site.of
            <editlab.keys.subject_keys.Site.of>`).
    """
    if spread == RESIDUAL:
        return dict.fromkeys(sorted(layers), Site.of(lm, max(layers), output))
    return {layer: Site.of(lm, layer, output) for layer in sorted(layers)}


def distinct(sites: Mapping[int, Site]) -> list[Site]:
    """The different sites in what :func:`sites_of` gave, from the lowest up."""
    return list({site.layer: site for site in sites.values()}.values())


class Targets:
    """The values of some facts at the sites of the edited layers.

    Those of higher layers may have to be found while the batch is solved, after the updates of the lower layers.

    Args:
        facts: the facts.
        given: layer of a site -> values of the facts there, float32 [n, d_v], from the lowest up.
        sites: sites whose values are not found yet, from the lowest up; each lies above those of ``given``.
        find: finds the values at one of these sites when they are first asked for.
    """

    def __init__(
        self, facts: Sequence[Fact], given: Mapping[int, Tensor], sites: Sequence[Site] = (), find: Find | None = None
    ) -> None:
        self.facts, self.given, self.sites, self.find = facts, given, sites, find
        self._found: dict[int, Tensor] = {}

    @classmethod
    def none(cls, facts: Sequence[Fact]) -> Targets:
        """Targets of facts whose method solves no closed form: [n, 0] at one site."""
        return cls(facts, {0: torch.zeros(len(facts), 0)})

    @property
    def layers(self) -> list[int]:
        """Layers of the sites, from the lowest up."""
        return [*self.given, *(site.layer for site in self.sites)]

    @property
    def first(self) -> Tensor:
        """Values at the lowest site, float32 [n, d_v]."""
        return next(iter(self.given.values()))

    def at(self, layer: int) -> Tensor:
        """Values at the site of a layer, float32 [n, d_v].

        Values that are not found yet are found on the weights as they are now, and kept for the next call.
        """
        if layer in self.given:
            return self.given[layer]
        if layer not in self._found:
            (site,) = (site for site in self.sites if site.layer == layer)
            assert self.find is not None  # given with the sites
            with torch.enable_grad():  # a solve runs without gradients
                self._found[layer] = self.find(self.facts, site)
        return self._found[layer]

    def stacked(self) -> Tensor:
        """Values at all sites, float32 [n, sites, d_v]."""
        return torch.stack([self.at(layer) for layer in self.layers], 1)

    def of(self, rows: Sequence[int]) -> Targets:
        """Targets of some of the facts, by index; values that were found during a solve are to be found again."""
        given = {layer: values[list(rows)] for layer, values in self.given.items()}
        return Targets([self.facts[row] for row in rows], given, self.sites, self.find)

    def unsolved(self) -> Targets:
        """The same targets before any solve, for another solve of the same facts."""
        return Targets(self.facts, self.given, self.sites, self.find)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """Targets whose values [n, d_v] at each site are changed by a function, also those that are found later."""
        find = self.find
        given = {layer: change(values) for layer, values in self.given.items()}
        return Targets(self.facts, given, self.sites, find and (lambda facts, site: change(find(facts, site))))


def find_targets(
    lm: LanguageModel,
    spread: str,
    sites: Sequence[Site],
    facts: Sequence[Fact],
    find: Find,
    in_turn: Find | None = None,
) -> Targets:
    """Finds the targets of facts at some sites; several ranks share the work.

    Args:
        lm: the model, with the weights that values are found on.
        spread: how the values are found, in :data:`SPREADS`.
        sites: the sites, from the lowest up.
        facts: the facts.
        find: searches values at a site.
        in_turn: searches values at a higher site of ``each`` when its layer's turn comes; default: ``find``, at once.
    """
    first, *higher = sites
    given = {first.layer: find(facts, first)}
    if spread == FORWARD:
        given |= carry_forward(lm, facts, first, given[first.layer], higher)
    elif in_turn is not None:
        return Targets(facts, given, higher, in_turn)
    else:
        given |= {site.layer: find(facts, site) for site in higher}
    return Targets(facts, given)


def carry_forward(
    lm: LanguageModel, facts: Sequence[Fact], first: Site, values: Tensor, higher: Sequence[Site]
) -> dict[int, Tensor]:
    """What higher sites output if the values are put in the place of the first site's output (FE, arXiv:2605.00358).

    Both at the subject's last token of the bare prompt, with the weights as they are. Several ranks share the passes.

    Args:
        lm: the model.
        facts: the facts.
        first: the site whose output is replaced.
        values: float32 [n, d_v].
        higher: the sites above it, from the lowest up.

    Returns:
        Layer of a site -> float32 [n, d_v].
    """
    if not higher:
        return {}
    rows = [encoding.ids[: last + 1] for encoding, last in (locate(lm, fact) for fact in facts)]
    read = partial(_carried, lm, rows, first, values, higher)
    found = ranks.each(by_length([len(row) for row in rows], TOKENS_A_PASS), partial(by_halves, read))
    return {site.layer: torch.stack([outputs[index] for outputs in found]) for index, site in enumerate(higher)}


@torch.no_grad()
def _carried(
    lm: LanguageModel,
    rows: Sequence[tuple[int, ...]],
    first: Site,
    values: Tensor,
    higher: Sequence[Site],
    group: Sequence[int],
) -> list[Tensor]:
    """For each row of a group, the outputs of the higher sites at its last token, float32 [sites, d_v], on the CPU."""
    # Only the last token runs after the KV cache of the others, so two rows never share the token that is replaced.
    prefix = read_prefixes(lm, [[rows[i][:-1]] for i in group])
    layout = lay_out(lm, [rows[i][-1:] for i in group], prefix)
    index = torch.arange(len(group), device=lm.device)
    tokens = layout.locate(index, torch.zeros_like(index))
    modules = {site.layer: (site.module, "output") for site in higher}
    with (
        replacing(first.module, tokens, values[list(group)], layout.rows),
        reading(modules, stop=higher[-1].layer) as seen,
    ):
        layout.run()
    outputs = []
    for site in higher:
        output = by_row(seen[site.layer], layout.rows)
        outputs.append(output[tuple(at.to(output.device) for at in tokens)].float().cpu())
    return list(torch.stack(outputs, 1))
