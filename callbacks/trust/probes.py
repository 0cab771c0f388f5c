"""Probes: what is asked of the model around each batch of edits, and the signals that the answers make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from editlab.lm.matmul import products
from editlab.lm.tokens import encode, encode_pair

LARGEST = 1e300
"""Stands for an infinite condition number, which JSON has no word for."""
LARGEST_RISE = 700.0
"""Nats of a rise whose exponential a float still holds."""
TEXT_WINDOW = 32
"""Tokens of a held-out sentence that is cut from a text file."""


class Sentence(NamedTuple):
    """A held-out sentence, and the token before which the model is asked how sure it is."""

    ids: tuple[int, ...]
    asked: int


@dataclass(frozen=True)
class HeldOut:
    """The model on the held-out sentences."""

    nll: float
    """mean negative log-probability per token, in nats"""
    confidence: float
    """mean over sentences of the largest next-token probability at the asked place"""


@dataclass(frozen=True)
class BatchAnswers:
    """The model on a batch's own prompts."""

    target: Tensor
    """[facts]: mean log-probability per token of each new target"""
    neighbor_right: Tensor
    """bool [neighbors]: the truth is likelier than the new target"""
    neighbor_of: Tensor
    """long [neighbors]: place in the batch of the fact that each neighbor belongs to"""


def sentences_of_facts(lm: LanguageModel, facts: Sequence[Fact], count: int) -> list[Sentence]:
    """True statements of up to ``count`` facts; the model is asked before their answers."""
    stated = [(fact.question, fact.target_true) for fact in facts if fact.target_true is not None][:count]
    encoded = [encode_pair(lm.tokenizer, question, truth) for question, truth in stated]
    return [Sentence(tuple(encoding.ids), start) for encoding, start in encoded]


def sentences_of_text(lm: LanguageModel, text: str, count: int) -> list[Sentence]:
    """Up to ``count`` windows of a text; the model is asked before the last token of each."""
    ids = tuple(encode(lm.tokenizer, text).ids[: count * TEXT_WINDOW])
    windows = [ids[i : i + TEXT_WINDOW] for i in range(0, len(ids), TEXT_WINDOW)]
    return [Sentence(window, len(window) - 1) for window in windows if len(window) > 1]


def ask_heldout(lm: LanguageModel, sentences: Sequence[Sentence]) -> HeldOut:
    """One pass over the held-out sentences."""
    wanted = [[(p - 1, s.ids[p]) for p in range(1, len(s.ids))] for s in sentences]
    logps, _, tops = lm.next_token_scores([s.ids for s in sentences], wanted)
    confidence = [float(top[s.asked - 1].exp()) for s, top in zip(sentences, tops, strict=True)]
    return HeldOut(float(-torch.cat(logps).mean()), sum(confidence) / len(confidence))


def ask_batch(lm: LanguageModel, facts: Sequence[Fact], neighbors: int) -> BatchAnswers:
    """One pass over the facts' edit prompts and the last neighbor of each of up to ``neighbors`` of them."""
    places = [i for i, fact in enumerate(facts) if fact.neighbors][:neighbors]
    last = [facts[i].neighbors[-1] for i in places]
    pairs = [(fact.question, fact.target_new) for fact in facts]
    pairs += [(neighbor.prompt, neighbor.truth) for neighbor in last]
    pairs += [(neighbor.prompt, facts[i].target_new) for i, neighbor in zip(places, last, strict=True)]
    logps, _ = score_pairs(lm, pairs)
    target, truth, new = logps.split([len(facts), len(last), len(last)])
    return BatchAnswers(target, truth > new, torch.tensor(places, dtype=torch.long))


def flip_rate(before: BatchAnswers, after: BatchAnswers) -> float:
    """Share of the neighbors that were right before which are wrong after; 0 where none was right."""
    right = int(before.neighbor_right.sum())
    return float((before.neighbor_right & ~after.neighbor_right).sum()) / right if right else 0.0


def attribution_focus(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """Share of the attribution at the edited layer that lies on the subject's last token, [facts].

    Attribution of a token is ``|g . x|``, gradient times input (Shrikumar et al. 2017, arXiv:1704.02685), of the log-
    probability of the target's first token, with ``x`` what the edited projection reads there.
    """
    shares = []
    module = lm.anatomy.edit_module(layer)
    for fact in facts:
        encoding, start = encode_pair(lm.tokenizer, fact.question, fact.target_new)
        _, last = locate(lm, fact)
        with torch.enable_grad(), _read_as_leaf(module) as seen:
            logits = lm.run(torch.tensor([encoding.ids[:start]])).logits[0, -1].float()
            (gradient,) = torch.autograd.grad(logits.log_softmax(0)[encoding.ids[start]], seen[0])
        x = seen[0].detach()
        by_token = (gradient * x).reshape(-1, x.shape[-1]).sum(1).abs()
        shares.append(by_token[last] / by_token.sum().clamp_min(1e-30))
    return torch.stack(shares).detach().cpu()


@contextmanager
def _read_as_leaf(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module reads becomes a leaf that gradients reach; it is put into the list."""
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
    """Of the edited weight, by power iteration from ``start`` [d_k]; and the vector where it ended.

    From a good start, such as the last batch's end, a few iterations settle it to three digits.
    """
    original = layer.original.float()
    weight = (original.T if layer.transposed else original) + layer.total
    vector = start / start.norm()
    value = torch.zeros(())
    for _ in range(iterations):
        left = weight @ vector
        value = left.norm()
        vector = weight.T @ left
        vector = vector / vector.norm().clamp_min(1e-30)
    return float(value), vector


def quick(
    editor: SequentialEditor, matmul: str, also: Sequence[int] = (), head: bool = False
) -> AbstractContextManager[None]:
    """Within it blocks above the edited layers and those ``also`` named multiply as ``matmul`` says; edits do not.

    With ``head`` the logits' product does too: twice as fast in training, and too coarse to compare answers by.
    """
    anatomy = editor.lm.anatomy
    above = list(anatomy.blocks)[max([*editor.layer_numbers, *also]) + 1 :]
    return products(matmul, above, anatomy.edit_path, editor.lm.device, anatomy.head if head else None)


class NotFiniteError(ArithmeticError):
    """The model answered before a batch, and does not after it: that is harm, and no probe that failed."""


class Probes:
    """Asks the model before and after each batch, and makes the signals of what it answers.

    Args:
        sentences: held-out sentences, the same for the whole run.
        neighbors: neighbor statements asked for in each batch.
        attribution: also measure :func:`attribution_focus`.
        matmul: how the blocks above the edited layers multiply (:func:`~editlab.lm.matmul.products`).
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
        self._weights: list[Tensor] = []

    def ask_before(self, editor: SequentialEditor, facts: Sequence[Fact]) -> None:
        """The model as it is before the batch; held-out answers are asked for only where these weights are new."""
        weights = [layer.weight for layer in editor.changed_layers]
        known = len(self._weights) == len(weights) and all(map(torch.equal, self._weights, weights))
        self._facts = list(facts)
        with quick(editor, self.matmul):
            if self._heldout is None or not known:
                self._heldout = ask_heldout(editor.lm, self.sentences)
            self._before = ask_batch(editor.lm, self._facts, self.neighbors)
        if not known:
            self._weights = [weight.clone() for weight in weights]
        self._focus = self._attribution(editor)
        self._singular = self._singular_values(editor)

    def ask_after(self, editor: SequentialEditor, outcome: EditOutcome) -> TrustMetrics:
        """The signals of the batch, with the weights as it left them.

        Raises:
            NotFiniteError: where the model's answers are not finite any more.
            ValueError: where a signal is not.
        """
        assert self._heldout is not None
        with quick(editor, self.matmul):
            self._after = ask_batch(editor.lm, self._facts, self.neighbors)
            self._heldout_after = ask_heldout(editor.lm, self.sentences)
        self._weights_after = [layer.weight.clone() for layer in editor.changed_layers]
        there = math.isfinite(self._heldout.nll) and bool(self._before.target.isfinite().all())
        if there and not (math.isfinite(self._heldout_after.nll) and bool(self._after.target.isfinite().all())):
            raise NotFiniteError("what the model says is not finite after it")
        stay = outcome.stays
        singular = zip(self._singular, self._singular_values(editor), strict=True)
        metrics = TrustMetrics(
            edit_success_gain=float((self._after.target - self._before.target)[stay].mean()),
            certainty=float(self._after.target[stay].exp().mean()),
            heldout_ppl_delta=math.expm1(min(LARGEST_RISE, self._heldout_after.nll - self._heldout.nll)),
            neighbor_flip_rate=flip_rate(self._before, self._after),
            confidence_shift=self._heldout_after.confidence - self._heldout.confidence,
            update_norm=_largest(outcome, "update_norm"),
            singular_growth=max(after / before - 1 for before, after in singular),
            gram_condition=math.log10(min(LARGEST, _largest(outcome, "gram_condition"))),
            effective_weight=_largest(outcome, "effective_weight"),
            attribution_focus_delta=self._focus - self._attribution(editor),
        )
        for name, value in asdict(metrics).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        return metrics

    def of_facts(self, outcome: EditOutcome) -> list[TrustMetrics]:
        """Of each fact of the batch: its gain, its own neighbor, and its residual over the (lower) median one."""
        assert outcome.missing is not None  # it was solved
        residuals = outcome.missing.tolist()
        usual = max(median_low(residuals), 1e-12)
        flipped = self._before.neighbor_right & ~self._after.neighbor_right
        places = set(self._before.neighbor_of[flipped].tolist())
        gains = (self._after.target - self._before.target).tolist()
        certainty = self._after.target.exp().tolist()
        return [
            TrustMetrics(gain, sure, neighbor_flip_rate=float(place in places), update_norm=residual / usual)
            for place, (gain, sure, residual) in enumerate(zip(gains, certainty, residuals, strict=True))
        ]

    def weights_stay(self) -> None:
        """The last answers on held-out sentences serve the next batch, if its weights are still those."""
        self._heldout, self._weights = self._heldout_after, self._weights_after

    def forget(self) -> None:
        """Everything is asked anew: after a failure on one rank the others may have got further than it did."""
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


def _largest(outcome: EditOutcome, name: str) -> float:
    return max(value for key, value in outcome.diagnostics.items() if key.endswith(f"/{name}"))
