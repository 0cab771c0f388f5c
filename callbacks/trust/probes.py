"""Probes: measurements before and after each batch of edits, and the signals computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor, nn

from callbacks.trust.score import TrustMetrics
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome
from editlab.evaluation.scoring import score_pairs
from editlab.keys.subject_keys import locate
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import products_above
from editlab.lm.text import cut, first_ids, scored

LARGEST = 1e300
"""Replaces an infinite condition number, which JSON cannot represent."""
LARGEST_RISE = 700.0
"""Largest rise in nats whose exponential fits into a float."""
TEXT_WINDOW = 32
"""Tokens of a held-out sentence that is cut from a text file."""


class Sentence(NamedTuple):
    """A held-out sentence, and the token at whose prediction the model's confidence is measured."""

    ids: tuple[int, ...]
    """token ids of the sentence"""
    confidence_index: int
    """index of that token"""
    beginning: int = 0
    """number of special tokens that the tokenizer put before it, which are not scored"""

    @property
    def scored(self) -> range:
        """Indices of the tokens that are scored."""
        return range(max(1, self.beginning), len(self.ids))


@dataclass(frozen=True)
class HeldOut:
    """Measurements on the held-out sentences."""

    nll: float
    """mean negative log-probability per token, in nats"""
    confidence: float
    """mean over sentences of the largest next-token probability before the sentence's chosen token"""


@dataclass(frozen=True)
class BatchAnswers:
    """Measurements on a batch's own prompts."""

    target: Tensor
    """[facts]: mean log-probability per token of each new target"""
    neighbor_right: Tensor
    """bool [neighbors]: the truth is likelier than the new target"""
    neighbor_of: Tensor
    """long [neighbors]: index in the batch of the fact that each neighbor belongs to"""


def sentences_of_facts(lm: LanguageModel, facts: Sequence[Fact], count: int) -> list[Sentence]:
    """Return true statements of up to ``count`` facts; confidence is measured at the first token of the answer."""
    stated = [(fact.question, fact.target_true) for fact in facts if fact.target_true is not None][:count]
    encoded = [lm.encode_pair(question, truth) for question, truth in stated]
    return [Sentence(tuple(encoding.ids), start, encoding.beginning) for encoding, start in encoded]


def sentences_of_text(lm: LanguageModel, text: str, count: int, last: bool = False) -> list[Sentence]:
    """Up to ``count`` windows of a text; confidence is measured at the last token of each.

    Args:
        lm: the model.
        text: the text.
        count: largest number of windows.
        last: take the text's last windows, as a run's perplexity is measured from the text's beginning on.
    """
    tokens = count * TEXT_WINDOW
    ids = first_ids(lm, text, len(text))[-tokens:] if last else first_ids(lm, text, tokens)
    windows = cut(lm, ids, TEXT_WINDOW)
    return [Sentence(tuple(w), len(w) - 1, len(lm.beginning)) for w in windows if scored(lm, w)]


def measure_heldout(lm: LanguageModel, sentences: Sequence[Sentence]) -> HeldOut:
    """Measure the held-out sentences with the current weights."""
    wanted = [[(p - 1, s.ids[p]) for p in s.scored] for s in sentences]
    logps, _, tops, _ = lm.next_token_scores([s.ids for s in sentences], wanted)
    confidence = [float(top[s.scored.index(s.confidence_index)].exp()) for s, top in zip(sentences, tops, strict=True)]
    return HeldOut(float(-torch.cat(logps).mean()), sum(confidence) / len(confidence))


def measure_batch(lm: LanguageModel, facts: Sequence[Fact], neighbors: int) -> BatchAnswers:
    """Measure the facts' edit prompts, and the last neighbor of up to ``neighbors`` facts that have one."""
    indices = [i for i, fact in enumerate(facts) if fact.neighbors][:neighbors]
    last = [facts[i].neighbors[-1] for i in indices]
    pairs = [(fact.question, fact.target_new) for fact in facts]
    pairs += [(neighbor.prompt, neighbor.truth) for neighbor in last]
    pairs += [(neighbor.prompt, facts[i].target_new) for i, neighbor in zip(indices, last, strict=True)]
    logps, _ = score_pairs(lm, pairs)
    target, truth, new = logps.split([len(facts), len(last), len(last)])
    return BatchAnswers(target, truth > new, torch.tensor(indices, dtype=torch.long))


def flip_rate(before: BatchAnswers, after: BatchAnswers) -> float:
    """Return the fraction of neighbors that were right before the batch and are wrong after it; 0 if none was right."""
    right = int(before.neighbor_right.sum())
    return float((before.neighbor_right & ~after.neighbor_right).sum()) / right if right else 0.0


def attribution_focus(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """Return the fraction of the attribution at the edited layer that falls on the subject's last token, [facts].

    Attribution of a token is ``|g . x|``, gradient times input (Shrikumar et al. 2017, arXiv:1704.02685), of the log-
    probability of the target's first token, with ``x`` the input of the edited projection at that token.
    """
    fractions = []
    module = lm.anatomy.edit_module(layer)
    for fact in facts:
        encoding, start = lm.encode_pair(fact.question, fact.target_new)
        _, last = locate(lm, fact)
        with torch.enable_grad(), _read_as_leaf(module) as seen:
            logits = lm.run(torch.tensor([encoding.ids[:start]])).logits[0, -1].float()
            (gradient,) = torch.autograd.grad(logits.log_softmax(0)[encoding.ids[start]], seen[0])
        x = seen[0].detach()
        by_token = (gradient * x).reshape(-1, x.shape[-1]).sum(1).abs()
        fractions.append(by_token[last] / by_token.sum().clamp_min(1e-30))
    return torch.stack(fractions).detach().cpu()


@contextmanager
def _read_as_leaf(module: nn.Module) -> Iterator[list[Tensor]]:
    """Make the module's input a leaf tensor, so that it has a gradient, and append it to the yielded list."""
    seen: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].detach().requires_grad_())
        return (seen[-1], *args[1:])

    handle = module.register_forward_pre_hook(replace)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def largest_singular_value(layer: EditedLayer, start: Tensor, iterations: int) -> tuple[float, Tensor]:
    """Return the largest singular value of the edited weight by power iteration, and its right singular vector.

    Args:
        layer: the edited layer.
        start: start vector [d_k]; from the vector of the last batch, a few iterations give three digits.
        iterations: number of iterations.
    """
    # For a 576 x 1536 weight on one core, torch.linalg.svdvals takes 630 ms, the eigenvalues of the Gram matrix 137 ms,
    # and 20 warm-started power iterations 3 ms.
    weight = layer.original_matrix.float() + layer.total
    vector = start / start.norm()
    value = torch.zeros(())
    for _ in range(iterations):
        left = weight @ vector
        value = left.norm()
        vector = weight.T @ left
        vector = vector / vector.norm().clamp_min(1e-30)
    return float(value), vector


@dataclass(frozen=True)
class Measured:
    """What the probes found after an update; it is put back if that update stays after others were tried."""

    answers: BatchAnswers
    """of the batch"""
    heldout: HeldOut
    """of the held-out sentences"""
    weights: Sequence[Tensor]
    """the weights that it was measured on"""


class Probes:
    """Measures the model before and after each batch, and computes the trust signals.

    Args:
        sentences: held-out sentences, the same for the whole run.
        neighbors: number of neighbors that are measured in each batch.
        attribution: also measure :func:`attribution_focus`.
        matmul: precision of the matrix products above the edited layers (:func:`~editlab.lm.matmul.products_above`).
    """

    def __init__(
        self, sentences: Sequence[Sentence], neighbors: int, attribution: bool, matmul: str = "float32"
    ) -> None:
        self.matmul = matmul
        self.sentences = sentences
        self.neighbors = neighbors
        self.attribution = attribution
        self.singular_vectors: dict[int, Tensor] = {}
        self._heldout: HeldOut | None = None
        self.latest: Measured | None = None
        """what :meth:`measure_after` found last; the one of the update that stays, once a search has ended"""
        self._weights: Sequence[Tensor] = []

    @property
    def nll(self) -> float:
        """Mean negative log-probability per token of the held-out sentences before the batch."""
        assert self._heldout is not None
        return self._heldout.nll

    def measure_before(self, editor: SequentialEditor, facts: Sequence[Fact]) -> None:
        """Measure the model before the batch; held-out sentences are measured only if the weights have changed."""
        weights = [layer.weight for layer in editor.changed_layers]
        unchanged = len(self._weights) == len(weights) and all(map(torch.equal, self._weights, weights))
        self._facts = list(facts)
        with products_above(editor.lm, editor.layer_numbers[-1], self.matmul):
            if self._heldout is None or not unchanged:
                self._heldout = measure_heldout(editor.lm, self.sentences)
            self._before = measure_batch(editor.lm, self._facts, self.neighbors)
        if not unchanged:
            self._weights = [weight.clone() for weight in weights]
        self._focus = self._attribution(editor)
        self._singular = self._singular_values(editor)

    def measure_after(self, editor: SequentialEditor, outcome: EditOutcome) -> TrustMetrics | None:
        """Return the signals of the batch, after its update was added to the weights.

        Returns:
            The signals; None if the model's log-probabilities were finite before the batch and are not after it.

        Raises:
            ValueError: A signal is not finite for any other reason.
        """
        assert self._heldout is not None
        with products_above(editor.lm, editor.layer_numbers[-1], self.matmul):
            after = measure_batch(editor.lm, self._facts, self.neighbors)
            heldout = measure_heldout(editor.lm, self.sentences)
        self.latest = Measured(after, heldout, [layer.weight.clone() for layer in editor.changed_layers])
        was_finite = math.isfinite(self._heldout.nll) and bool(self._before.target.isfinite().all())
        if was_finite and not (math.isfinite(heldout.nll) and bool(after.target.isfinite().all())):
            return None
        remaining = outcome.remaining
        singular = zip(self._singular, self._singular_values(editor), strict=True)
        metrics = TrustMetrics(
            edit_success_gain=float((after.target - self._before.target)[remaining].mean()),
            certainty=float(after.target[remaining].exp().mean()),
            heldout_ppl_delta=math.expm1(min(LARGEST_RISE, heldout.nll - self._heldout.nll)),
            neighbor_flip_rate=flip_rate(self._before, after),
            confidence_shift=heldout.confidence - self._heldout.confidence,
            update_norm=_largest(outcome, "update_norm"),
            singular_growth=max(after / before - 1 for before, after in singular),
            # A method that trains has neither Gram matrix nor constraints: condition 1, weight 0.
            gram_condition=math.log10(min(LARGEST, _largest(outcome, "gram_condition", 1.0))),
            effective_weight=_largest(outcome, "effective_weight", 0.0),
            attribution_focus_delta=self._focus - self._attribution(editor),
        )
        for name, value in asdict(metrics).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        return metrics

    def measure_facts(self, outcome: EditOutcome) -> list[TrustMetrics]:
        """Return the signals of each fact: gain, flip of its neighbor, and residual norm over the batch's median.

        Facts of a method that trains have no residual; each counts as the median.
        """
        assert self.latest is not None
        after = self.latest.answers
        norms = [1.0] * len(outcome.plan.facts) if outcome.residual_norm is None else outcome.residual_norm.tolist()
        median = max(median_low(norms), 1e-12)
        flipped = self._before.neighbor_right & ~after.neighbor_right
        with_flip = set(self._before.neighbor_of[flipped].tolist())
        gains = (after.target - self._before.target).tolist()
        certainty = after.target.exp().tolist()
        return [
            TrustMetrics(gain, sure, neighbor_flip_rate=float(index in with_flip), update_norm=norm / median)
            for index, (gain, sure, norm) in enumerate(zip(gains, certainty, norms, strict=True))
        ]

    def reuse_heldout(self) -> None:
        """Reuse the last measurement of the held-out sentences in the next batch, if the weights are still the same."""
        if self.latest is not None:
            self._heldout, self._weights = self.latest.heldout, self.latest.weights

    def clear(self) -> None:
        """Discard all measurements: if one rank failed, the other ranks may have measured more."""
        self._heldout, self._weights = None, []
        self.singular_vectors = {}

    def _attribution(self, editor: SequentialEditor) -> float:
        if not self.attribution:
            return 0.0
        return float(attribution_focus(editor.lm, self._facts, editor.layer_numbers[-1]).mean())

    def _singular_values(self, editor: SequentialEditor) -> list[float]:
        values = []
        for number, layer in zip(editor.layer_numbers, editor.layers, strict=True):
            start = self.singular_vectors.get(number)
            iterations = 50 if start is None else 20
            start = torch.ones(layer.total.shape[1]) if start is None else start
            value, end = largest_singular_value(layer, start.to(layer.total), iterations)
            self.singular_vectors[number] = end.cpu()
            values.append(value)
        return values


def _largest(outcome: EditOutcome, name: str, default: float | None = None) -> float:
    """The largest of the layers' numbers of this name; the default if the batch was trained, and has none."""
    found = [value for key, value in outcome.diagnostics.items() if key.endswith(f"/{name}")]
    return max(found) if found or default is None else default
