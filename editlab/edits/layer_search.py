"""Which layer to edit, measured: a few facts are edited at candidate layers, one candidate at a time, and compared.

A causal trace (Meng et al. 2022, arXiv:2202.05262) tells where a model recalls a fact, which does not tell where an
edit of it works best (Hase et al. 2023, arXiv:2301.04213). So the edits themselves are tried, with the run's own
method, values and keys, on the unedited weights. A candidate's score is the harmonic mean of three fractions between 0
and 1:

- efficacy: the probability of the new target after the edit's own prompt (the geometric mean over its tokens);
- generality: the same after a paraphrase or, where no fact has any, after the prompt behind a prefix that the values
  were not found in;
- locality: the share of the next token's probabilities that stays where it was (1 - total variation), after the facts'
  neighbors or, where no fact has any, after the prompts of other facts.

They are means over the facts. Candidates lie evenly over the depth and are tried from below until the score has fallen
twice; then one to either side of the best, half-way to the next. Closer neighbors differ by less than ten facts can
tell. Where a target may be spread over several layers (MEMIT), the best one's is at last spread over it and the two
below.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final, NamedTuple

from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.edits.batch import StepState, solve_batch
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.evaluation.scoring import score_pairs
from editlab.keys.contexts import sample_contexts
from editlab.keys.moments import accumulate, text_fingerprint, text_windows
from editlab.keys.subject_keys import check_lengths
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import encode, tokenizer_fingerprint
from editlab.utils.files import atomic_file, cache_dir
from editlab.values.optimize import optimize_values

if TYPE_CHECKING:
    from editlab.editor import SequentialEditor

log = logging.getLogger(__name__)

AUTO: Final = "auto"
"""In the place of layers: those that :func:`find_layers` finds."""
FACTS = 10
"""Facts that are edited in a trial."""
COARSE = 6
"""Candidates of the first round."""
SPREAD = 3
"""Layers over which the best candidate's target is spread at last."""
STEPS = 8
"""The most evaluations of a value's loss; where it goes shows before it is there."""
CONTEXTS = 1
"""Prefixes in which values are found; another is kept for the measurement."""
TOKENS_A_FEATURE = 2
"""Tokens of text for each feature of a key, for second moments that are good enough to compare layers."""
PROMPTS = 20
"""The most prompts after which locality is measured."""


class Shares(NamedTuple):
    """What is measured of some facts."""

    efficacy: float
    generality: float
    locality: float | None
    """None where there is nothing that should stay as it is"""


@dataclass(frozen=True)
class Trial:
    """What came of editing the facts at some layers; all shares between 0 and 1."""

    layers: tuple[int, ...]
    efficacy: float
    generality: float
    locality: float | None
    """None where there is nothing that should stay as it is"""

    @property
    def score(self) -> float:
        """Harmonic mean of the shares that were measured; 0 where one of them is."""
        shares = [share for share in (self.efficacy, self.generality, self.locality) if share is not None]
        return len(shares) / sum(1 / share for share in shares) if min(shares) > 0 else 0.0


def find_layers(editor: SequentialEditor) -> list[int]:
    """The layers that suit a run's model best, tried on facts of its data module; see :func:`choose_layers`."""
    return choose_layers(editor, editor.trainer.datamodule.facts_to_try(2 * FACTS))  # type: ignore[attr-defined]


def choose_layers(editor: SequentialEditor, facts: Sequence[Fact]) -> list[int]:
    """The layers at which editing some facts works best; shown as a table, and kept in the cache folder.

    The choice depends on the weights, the facts and the settings alone. Several ranks share the work.

    Args:
        editor: whose model, method, values and keys are used; the model's weights are left as they were.
        facts: up to twice :data:`FACTS`; the first are edited.

    Raises:
        UserError: where a fact does not fit into the model.
    """
    path = cache_dir() / "layers" / f"{_key(editor, facts)}.json"
    trials = ranks.on_first(lambda: _read(path))
    if trials:
        log.info("The layer to edit, as measured before (%s):\n%s", path, table(trials))
        return list(best(trials).layers)
    trials = Search(editor, facts).run()
    ranks.on_first(lambda: _keep(path, trials))
    log.info("The layer to edit, by edits of %d facts:\n%s", min(FACTS, len(facts)), table(trials))
    return list(best(trials).layers)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score; of equal ones that of fewer layers, then of lower ones."""
    return min(trials, key=lambda trial: (-trial.score, len(trial.layers), trial.layers))


def table(trials: Sequence[Trial]) -> str:
    """One line a trial, from the lowest layer up; the best has a star."""
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
    """The trials of one choice.

    Args:
        editor: as in :func:`choose_layers`.
        facts: as in :func:`choose_layers`.
    """

    def __init__(self, editor: SequentialEditor, facts: Sequence[Fact]) -> None:
        self.editor, self.lm = editor, editor.lm
        self.exam = Exam(self.lm, facts, editor)
        settings = editor.moments
        width = max(self.lm.anatomy.key_size(layer) for layer in self.lm.anatomy.editable)
        tokens = min(settings.tokens, TOKENS_A_FEATURE * width)
        self.windows = text_windows(self.lm, replace(settings, tokens=tokens), editor.language_model)
        self.values: dict[int, Tensor] = {}
        self.trials: dict[tuple[int, ...], Trial] = {}

    def run(self) -> list[Trial]:
        """Tries layer after layer, until it goes downhill; then beside the best, and spread over those below it."""
        # What is edited in the last block at a subject's last token is read by no later token.
        layers = self.lm.anatomy.editable
        layers = [layer for layer in layers if layer < len(self.lm.anatomy.blocks) - 1] or layers
        for layer in coarse(layers):
            self.try_at((layer,))
            if self._goes_downhill():
                break
        place, step = self._best_place(layers), max(1, len(layers) // COARSE // 2)
        for near in (place - step, place + step):
            if 0 <= near < len(layers):
                self.try_at((layers[near],))
        place = self._best_place(layers)
        if self.lm.anatomy.additive and place:
            self.try_at(tuple(layers[max(0, place - SPREAD + 1) : place + 1]))
        return list(self.trials.values())

    def _goes_downhill(self) -> bool:
        """Whether the last two trials were each worse than the one before."""
        scores = [trial.score for trial in self.trials.values()][-3:]
        return len(scores) == 3 and scores[0] > scores[1] > scores[2]

    def _best_place(self, layers: Sequence[int]) -> int:
        return layers.index(best(list(self.trials.values())).layers[-1])

    def try_at(self, layers: tuple[int, ...]) -> None:
        """Edits the facts at some layers, measures what came of it, and takes the edits out again."""
        if layers in self.trials:
            return
        trial = self._editor_at(layers)
        device = trial.solver_device
        for layer, c0 in accumulate(self.lm, layers, self.windows, device).items():
            trial.preservation[layer] = trial.method.preservation(c0, device)
        facts, top = self.exam.facts, layers[-1]
        if top not in self.values:
            settings = replace(trial.values, steps=min(STEPS, trial.values.steps))
            self.values[top] = optimize_values(self.lm, facts, trial.site, trial.contexts, settings).target
        size = trial.method.largest_batch or len(facts)
        measured = []
        for start in range(0, len(facts), size):
            some = slice(start, start + size)
            outcome = EditOutcome(EditPlan(0, facts[some], self.values[top][some]), {}, {})
            before = StepState(trial.layers)
            try:
                for edited, update in solve_batch(trial, outcome):
                    edited.add(update)
                measured.append(self.exam.take(some))
            finally:
                before.restore_weights()
        kept = [shares.locality for shares in measured if shares.locality is not None]
        self.trials[layers] = Trial(
            layers,
            fmean(shares.efficacy for shares in measured),
            fmean(shares.generality for shares in measured),
            fmean(kept) if kept else None,
        )

    def _editor_at(self, layers: Sequence[int]) -> SequentialEditor:
        """An editor of some layers of the same model, with the settings that make an edit what it is."""
        like = self.editor
        trial = type(like)(
            like.language_model, list(layers), like.method, like.values, keys=like.key_mode,
            preserve_prompt_tokens=like.preserve_prompt_tokens, passes=like.passes,
            condition_limit=like.condition_limit, solver_device=like.solver_setting,
        )  # fmt: skip
        trial.use(self.lm)
        trial.contexts = self.exam.contexts
        return trial


class Exam:
    """What edits of some facts are measured on: prompts, and what the unedited model says to those of locality.

    Args:
        lm: the unedited model.
        facts: the first are edited; without neighbors, the prompts of the others should stay as they are.
        editor: whose contexts are used.
    """

    def __init__(self, lm: LanguageModel, facts: Sequence[Fact], editor: SequentialEditor) -> None:
        self.lm = lm
        neighbors = any(fact.neighbors for fact in facts)
        count = min(FACTS, len(facts) if neighbors or len(facts) < 2 else len(facts) // 2)
        self.facts = list(facts[:count])
        settings = editor.context_settings
        self.contexts = sample_contexts(lm, replace(settings, count=CONTEXTS + 1))
        self.unseen = self.contexts.pop()
        check_lengths(lm, facts, [*self.contexts, self.unseen])
        self.watched = self._watched(facts[count:], neighbors)
        self.before = self._said()

    def _watched(self, others: Sequence[Fact], neighbors: bool) -> list[str]:
        if not neighbors:
            return [fact.question for fact in others][:PROMPTS]
        each = -(-PROMPTS // len(self.facts))
        return [neighbor.prompt for fact in self.facts for neighbor in fact.neighbors[:each]]

    def _said(self) -> Tensor | None:
        """Probabilities of the next token after each watched prompt, float32 [prompts, vocabulary]."""
        if not self.watched:
            return None
        return self.lm.next_token_probabilities([encode(self.lm.tokenizer, prompt).ids for prompt in self.watched])

    def take(self, some: slice) -> Shares:
        """Efficacy and generality of some of the facts, and locality, on the weights as they are."""
        facts = self.facts[some]
        paraphrased = [(prompt, fact.target_new) for fact in facts for prompt in fact.paraphrases[:1]]
        prefixed = [(self.unseen + fact.question, fact.target_new) for fact in facts]
        efficacy = self._probability([(fact.question, fact.target_new) for fact in facts])
        generality = self._probability(paraphrased or prefixed)
        said = self._said()
        if said is None or self.before is None:
            return Shares(efficacy, generality, None)
        return Shares(efficacy, generality, 1 - float((said - self.before).abs().sum(1).mean()) / 2)

    def _probability(self, pairs: Sequence[tuple[str, str]]) -> float:
        return float(score_pairs(self.lm, pairs)[0].exp().mean())


def _key(editor: SequentialEditor, facts: Sequence[Fact]) -> str:
    """What a choice depends on."""
    moments = {**asdict(editor.moments), "text": text_fingerprint(editor.moments)}
    what = [
        editor.model_key, tokenizer_fingerprint(editor.lm.tokenizer), editor.lm.anatomy.edit_path,
        [f.to_dict() for f in facts], repr(editor.method), asdict(editor.values), moments,
        asdict(editor.context_settings), editor.key_mode, editor.preserve_prompt_tokens, editor.passes,
        editor.condition_limit,
        [FACTS, COARSE, SPREAD, STEPS, CONTEXTS, TOKENS_A_FEATURE, PROMPTS],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> list[Trial]:
    """Trials that were kept; none where there are none, or the file is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return [Trial(**{**one, "layers": tuple(one["layers"])}) for one in known]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        log.warning("%s can not be read: layers are tried again", path)
        return []


def _keep(path: Path, trials: Sequence[Trial]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n", encoding="utf-8")
