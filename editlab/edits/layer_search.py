"""Choice of the layers to edit: a few facts are edited at candidate layers, one candidate at a time, and compared.

A causal trace (Meng et al. 2022, arXiv:2202.05262) shows where a model recalls a fact, which does not show where an
edit of it works best (Hase et al. 2023, arXiv:2301.04213). So the edits themselves are tried, with the run's own
method, values and keys, on the unedited weights. A candidate's score is the harmonic mean of three fractions between 0
and 1:

- efficacy: the probability of the new target after the edit's own prompt (the geometric mean over its tokens);
- generality: the same after a paraphrase or, if no fact has one, after the prompt behind a prefix that was not used to
  find the values;
- locality: 1 minus the total variation between the next-token distributions before and after the edit, at the facts'
  neighbor prompts or, if no fact has one, at the prompts of other facts.

All are means over the facts. Candidates are evenly spaced over the depth and tried from the lowest up until the score
has fallen twice; then two more are tried, halfway from the best to its neighbors. Layers closer than that differ by
less than ten facts can show. If a target may be spread over several layers (MEMIT), the best layer is finally tried
together with the two below it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.edits.batch import BatchSolver
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.evaluation.scoring import score_pairs
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings, accumulate, text_fingerprint, text_windows
from editlab.keys.subject_keys import Site, check_lengths
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import reading
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.utils.disk_cache import Codec, DiskCache, key_of
from editlab.utils.files import cache_dir
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings
from editlab.values.spread import distinct, find_targets

log = logging.getLogger(__name__)

FACTS = 10
"""Facts that are edited in a trial."""
COARSE = 6
"""Candidates of the first round."""
SPREAD = 3
"""Layers over which the best candidate's target is spread in the last trial."""
STEPS = 8
"""The most optimization steps of a value: short runs are enough to rank layers."""
CONTEXTS = 1
"""Prefixes used to find values; one more is kept for the measurement."""
TOKENS_A_FEATURE = 2
"""Tokens of text for each feature of a key, for second moments that are good enough to compare layers."""
PROMPTS = 20
"""The most prompts at which locality is measured."""


@dataclass(frozen=True)
class SearchSetup:
    """A run's model and settings, as far as the choice of layers depends on them."""

    lm: LanguageModel
    """the unedited model"""
    name: str
    """its name, for messages"""
    model_key: str
    """its key in the cache folder"""
    solve: SolveSettings
    values: ValueSettings
    moments: MomentSettings
    contexts: ContextSettings

    def cache_key(self, facts: Sequence[Fact]) -> str:
        """Hash of everything that a choice of layers on these facts depends on."""
        texts = self.lm.unusual_texts(
            [(fact.question, fact.target_new) for fact in facts]
            + [(paraphrase, fact.target_new) for fact in facts for paraphrase in fact.paraphrases]
            + [(neighbor.prompt, neighbor.truth) for fact in facts for neighbor in fact.neighbors]
        )
        return key_of(
            model=self.model_key, tokenizer=tokenizer_fingerprint(self.lm.tokenizer),
            module=self.lm.anatomy.edit_path, facts=[fact.to_dict() for fact in facts], solve=repr(self.solve),
            values=self.values.cache_key(), moments=_text_settings(self.moments),
            contexts=asdict(self.contexts),
            search=[FACTS, COARSE, SPREAD, STEPS, CONTEXTS, TOKENS_A_FEATURE, PROMPTS],
            **reading(self.lm), **({"texts": texts} if texts else {}), **_beyond_repr(self.solve),
        )  # fmt: skip


def _text_settings(moments: MomentSettings) -> dict[str, object]:
    """The settings of the text, with its identity; a file of published moments takes no part in a search."""
    return {**{k: v for k, v in asdict(moments).items() if k != "file"}, "text": text_fingerprint(moments)}


def _beyond_repr(settings: SolveSettings) -> dict[str, object]:
    """The settings that ``repr`` leaves out and that differ from their defaults.

    Older versions did not have them, so that their caches stay valid where a new setting is not used.
    """
    left_out = [f for f in fields(settings) if not f.repr]
    return {f.name: value for f in left_out if (value := getattr(settings, f.name)) != f.default}


class Fractions(NamedTuple):
    """Efficacy, generality and locality of some edits, each between 0 and 1."""

    efficacy: float
    generality: float
    locality: float | None
    """None if there is no prompt to measure it at"""


@dataclass(frozen=True)
class Trial:
    """Result of editing the facts at some layers; all fractions between 0 and 1."""

    layers: tuple[int, ...]
    efficacy: float
    generality: float
    locality: float | None
    """None if there is no prompt to measure it at"""

    @property
    def score(self) -> float:
        """Harmonic mean of the fractions that were measured; 0 if one of them is 0."""
        fractions = [f for f in (self.efficacy, self.generality, self.locality) if f is not None]
        return len(fractions) / sum(1 / f for f in fractions) if min(fractions) > 0 else 0.0


def choose_layers(setup: SearchSetup, facts: Sequence[Fact]) -> list[int]:
    """The layers at which editing some facts works best; logged as a table and kept in the cache folder.

    The choice depends on the weights, the facts and the settings alone. Several ranks share the work.

    Args:
        setup: the model and the settings; the model's weights do not change.
        facts: up to twice :data:`FACTS`; the first ones are edited.

    Raises:
        UserError: A fact is too long for the model, or the second moments are to come from files.
    """
    if setup.moments.file is not None:
        raise UserError(
            "model.layers is auto, which compares layers by second moments of a text, and model.moments.file names "
            "files: name the layers, such as those of the files, or remove model.moments.file."
        )
    kept, key = DiskCache(cache_dir() / "layers", TRIALS), setup.cache_key(facts)
    trials = ranks.on_first(lambda: kept.read(key))
    if trials:
        log.info("The layer to edit, from an earlier search (%s):\n%s", kept.path(key), table(trials))
        return list(best(trials).layers)
    trials = Search(setup, facts).run()
    ranks.on_first(lambda: kept.write(key, trials))
    log.info("The layer to edit, by edits of %d facts:\n%s", min(FACTS, len(facts)), table(trials))
    return list(best(trials).layers)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score; of equal ones that with fewer layers, then that with lower ones."""
    return min(trials, key=lambda trial: (-trial.score, len(trial.layers), trial.layers))


def table(trials: Sequence[Trial]) -> str:
    """One line for each trial, from the lowest layer up; a star marks the best."""
    chosen = best(trials)
    lines = [f"  {'layers':12}{'efficacy':>10}{'generality':>12}{'locality':>10}{'score':>8}"]
    for trial in sorted(trials, key=lambda t: (t.layers[-1], len(t.layers))):
        locality = f"{'-':>10}" if trial.locality is None else f"{trial.locality:10.3f}"
        name = ", ".join(map(str, trial.layers))
        numbers = f"{trial.efficacy:10.3f}{trial.generality:12.3f}{locality}{trial.score:8.3f}"
        lines.append(f"{'*' if trial is chosen else ' '} {name:12}{numbers}")
    return "\n".join(lines)


def coarse(layers: Sequence[int]) -> list[int]:
    """Up to :data:`COARSE` of some layers, evenly spaced."""
    return sorted({layers[int((i + 0.5) * len(layers) / COARSE)] for i in range(COARSE)})


class Search:
    """The trials that one choice of layers is made from.

    Args:
        setup: as in :func:`choose_layers`.
        facts: as in :func:`choose_layers`.
    """

    def __init__(self, setup: SearchSetup, facts: Sequence[Fact]) -> None:
        self.setup, self.lm = setup, setup.lm
        self.evaluator = TrialEvaluator(self.lm, facts, setup.contexts)
        width = max(self.lm.anatomy.key_size(layer) for layer in self.lm.anatomy.editable)
        tokens = min(setup.moments.tokens, TOKENS_A_FEATURE * width)
        self.windows = text_windows(self.lm, replace(setup.moments, tokens=tokens), setup.name)
        self.values: dict[int, Tensor] = {}
        self.trials: dict[tuple[int, ...], Trial] = {}

    def run(self) -> list[Trial]:
        """Tries layers from the lowest up until the score falls, then around the best, then several layers at once."""
        # No later token reads what is edited in the last block at a subject's last token.
        layers = self.lm.anatomy.editable
        layers = [layer for layer in layers if layer < len(self.lm.anatomy.blocks) - 1] or layers
        for layer in coarse(layers):
            self.try_at((layer,))
            if self._fell_twice():
                break
        index, step = self._best_index(layers), max(1, len(layers) // COARSE // 2)
        for near in (index - step, index + step):
            if 0 <= near < len(layers):
                self.try_at((layers[near],))
        index = self._best_index(layers)
        if Site.of(self.lm, layers[index], self.setup.solve.site).in_stream and index:
            self.try_at(tuple(layers[max(0, index - SPREAD + 1) : index + 1]))
        return list(self.trials.values())

    def _fell_twice(self) -> bool:
        """Whether the last two trials each scored lower than the one before."""
        scores = [trial.score for trial in self.trials.values()][-3:]
        return len(scores) == 3 and scores[0] > scores[1] > scores[2]

    def _best_index(self, layers: Sequence[int]) -> int:
        return layers.index(best(list(self.trials.values())).layers[-1])

    def try_at(self, layers: tuple[int, ...]) -> None:
        """Edits the facts at some layers, measures the edits, and removes them again."""
        if layers in self.trials:
            return
        spread = self.setup.values.spread
        solver = BatchSolver.at(self.lm, layers, self.evaluator.contexts, self.setup.solve, spread)
        solver.set_moments(accumulate(self.lm, layers, self.windows, solver.device))
        facts, in_turn = self.evaluator.facts, self._search if self.setup.values.reference == "current" else None
        targets = find_targets(self.lm, spread, distinct(solver.sites), facts, self._find_values, in_turn)
        size = self.setup.solve.method.largest_batch or len(facts)
        measured = []
        for start in range(0, len(facts), size):
            batch = slice(start, start + size)
            before = Snapshot(list(solver.layers.values()))
            try:
                rows = range(len(facts))[batch]
                solver.solve(EditOutcome(EditPlan(0, facts[batch], targets.of(rows))))
                measured.append(self.evaluator.evaluate(batch))
            finally:
                before.restore_weights()
        locality = [fractions.locality for fractions in measured if fractions.locality is not None]
        self.trials[layers] = Trial(
            layers,
            fmean(fractions.efficacy for fractions in measured),
            fmean(fractions.generality for fractions in measured),
            fmean(locality) if locality else None,
        )

    def _find_values(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Values of the facts at a site on the unedited weights, float32 [n, d_v]; they are the same in each trial."""
        if site.layer not in self.values:
            self.values[site.layer] = self._search(facts, site)
        return self.values[site.layer]

    def _search(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """Values of facts at a site on the weights as they are, float32 [n, d_v]."""
        settings = replace(self.setup.values, steps=min(STEPS, self.setup.values.steps))
        return optimize_values(self.lm, facts, site, self.evaluator.contexts, settings).target


class TrialEvaluator:
    """Measures the edits of a trial at prompts that are chosen once.

    Args:
        lm: the unedited model.
        facts: the first ones are edited; if none of them has neighbors, the prompts of the rest measure locality.
        contexts: settings of the prefixes.
    """

    def __init__(self, lm: LanguageModel, facts: Sequence[Fact], contexts: ContextSettings) -> None:
        self.lm = lm
        neighbors = any(fact.neighbors for fact in facts[:FACTS])  # of those that are edited
        count = min(FACTS, len(facts) if neighbors or len(facts) < 2 else len(facts) // 2)
        self.facts = list(facts[:count])
        self.contexts = sample_contexts(lm, replace(contexts, count=CONTEXTS + 1))
        self.unseen = self.contexts.pop()
        check_lengths(lm, facts, [*self.contexts, self.unseen])
        self.locality_prompts = self._locality_prompts(facts[count:], neighbors)
        self.before = self._distributions()

    def _locality_prompts(self, unedited: Sequence[Fact], neighbors: bool) -> list[str]:
        if not neighbors:
            return [fact.question for fact in unedited][:PROMPTS]
        each = -(-PROMPTS // len(self.facts))
        return [neighbor.prompt for fact in self.facts for neighbor in fact.neighbors[:each]]

    def _distributions(self) -> Tensor | None:
        """Next-token distribution at each locality prompt, float32 [prompts, vocabulary]."""
        if not self.locality_prompts:
            return None
        rows = [self.lm.encode(prompt).ids for prompt in self.locality_prompts]
        return self.lm.next_token_probabilities(rows)

    def evaluate(self, batch: slice) -> Fractions:
        """Efficacy and generality of some of the facts, and locality, with the weights as they are."""
        facts = self.facts[batch]
        paraphrased = [(prompt, fact.target_new) for fact in facts for prompt in fact.paraphrases[:1]]
        prefixed = [(self.lm.in_context(self.unseen, fact.question), fact.target_new) for fact in facts]
        efficacy = self._probability([(fact.question, fact.target_new) for fact in facts])
        generality = self._probability(paraphrased or prefixed)
        now = self._distributions()
        if now is None or self.before is None:
            return Fractions(efficacy, generality, None)
        return Fractions(efficacy, generality, 1 - float((now - self.before).abs().sum(1).mean()) / 2)

    def _probability(self, pairs: Sequence[tuple[str, str]]) -> float:
        return float(score_pairs(self.lm, pairs)[0].exp().mean())


def _dump(trials: Sequence[Trial]) -> bytes:
    return json.dumps([asdict(trial) for trial in trials], indent=1).encode()


def _load(content: bytes) -> list[Trial]:
    return [Trial(**{**one, "layers": tuple(one["layers"])}) for one in json.loads(content)]


TRIALS: Codec[list[Trial]] = Codec(_dump, _load)
"""Trials as a cache file holds them."""
