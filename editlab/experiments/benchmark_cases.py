"""Cases of ``scripts/benchmark.py``: the same work done plainly and by editlab, and how much the results differ."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning
import torch
import transformers
from torch import Tensor

from editlab.data import EditDataModule
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.scoring import prefers_truth, score_facts
from editlab.evaluation.settings import TWO_STAGE, EvaluationSettings
from editlab.experiments.reference import (
    plain_keys,
    plain_moments,
    plain_scores,
    plain_solve,
    plain_step,
    plain_value,
)
from editlab.experiments.values_speed import losses_of
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings, accumulate, second_moments
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.lm.loading.load import load
from editlab.lm.text import WINDOW, sample_text
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT
from editlab.solver.preservation import Preservation
from editlab.values.loss import ValueGroup, rows_of
from editlab.values.optimize import optimize_values
from editlab.values.settings import PUBLISHED_SEARCH, ValueSettings

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-xl": ("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-3-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                   "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0}),
}  # fmt: skip
LAMBDA, SLACK = 300.0, 1.0
"""Weight of C0 and slack, as in the recipes."""


class Round(NamedTuple):
    """The same work both ways."""

    units: int
    """facts, tokens or batches in it"""
    plain: Callable[[], Any]
    ours: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    """of the two results; each case says which"""


@dataclass
class Setting:
    """Model, facts, contexts and settings that all cases share."""

    lm: LanguageModel
    facts: list[Fact]
    contexts: list[str]
    site: Site
    values: ValueSettings
    """the search of the published codes, which the plain way does"""
    options: argparse.Namespace

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setting:
        """The model, facts of which it prefers the truth (of random weights: all facts), and contexts."""
        lm = _language_model(options)
        data = EditDataModule(options.path, limit=options.facts)
        data.setup()
        data.select(lambda facts: [True] * len(facts) if options.shape else prefers_truth(lm, facts))
        contexts = sample_contexts(lm, ContextSettings())
        site = Site.of(lm, options.layer)
        return cls(lm, data.facts, contexts, site, ValueSettings(matmul=options.matmul, **PUBLISHED_SEARCH), options)

    @property
    def our_values(self) -> ValueSettings:
        """The default search of this project."""
        return ValueSettings(matmul=self.options.matmul)

    @property
    def groups(self) -> list[list[Fact]]:
        """The facts, by rounds."""
        size = self.options.batch_size
        return [self.facts[i : i + size] for i in range(0, len(self.facts), size)]


def _language_model(options: argparse.Namespace) -> LanguageModel:
    dtype = getattr(torch, options.dtype)
    if not options.shape:
        return LanguageModel.from_name(options.language_model, dtype).to(options.device)
    _, tokenizer = load(options.language_model, dtype)
    name, settings = SHAPES[options.shape]
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **settings)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


def relative(plain: Tensor, ours: Tensor) -> float:
    """Norm of the difference over the plain way's norm."""
    return float((ours.cpu() - plain.cpu()).norm() / plain.norm())


def values(s: Setting, default: bool = False) -> list[Round]:
    """Values v* of a batch, ours by the same or our default search; the difference is the excess of our mean loss."""
    settings = s.our_values if default else s.values

    def plain(facts: list[Fact]) -> Tensor:
        return torch.stack([plain_value(s.lm, fact, s.site, s.contexts, s.values)[0] for fact in facts])

    def ours(facts: list[Fact]) -> Tensor:
        return optimize_values(s.lm, facts, s.site, s.contexts, settings).target

    def excess(facts: list[Fact], plain: Tensor, ours: Tensor) -> float:
        before, after = (
            float(losses_of(s.lm, facts, s.site, s.contexts, s.values, targets)[0].mean()) for targets in (plain, ours)
        )
        return after / before - 1

    return [Round(len(f), partial(plain, f), partial(ours, f), partial(excess, f)) for f in s.groups]


def products(s: Setting) -> list[Round]:
    """Our values with float32 products and with those of ``--matmul``: the effect of that type on time and loss."""
    float32 = replace(s.values, matmul="float32")

    def found(facts: list[Fact], settings: ValueSettings) -> float:
        return float(optimize_values(s.lm, facts, s.site, s.contexts, settings).loss.mean())

    return [
        Round(len(f), partial(found, f, float32), partial(found, f, s.values), lambda a, b: b / a - 1) for f in s.groups
    ]


def early(s: Setting) -> list[Round]:
    """Values of a batch, ours stopped early; the difference is that of the fractions of targets that are the argmax."""
    settings = replace(s.values, early_stop=2)

    def said(facts: list[Fact], targets: Tensor) -> float:
        with torch.no_grad():
            group = ValueGroup(s.lm, s.site, [rows_of(s.lm, i, fact, [""]) for i, fact in enumerate(facts)])
            return float(group.losses(targets.to(group.origin) - group.origin).hit.float().mean())

    def said_more(facts: list[Fact], plain: Tensor, ours: Tensor) -> float:
        return said(facts, ours) - said(facts, plain)

    def plain(facts: list[Fact]) -> Tensor:
        return torch.stack([plain_value(s.lm, fact, s.site, s.contexts, s.values)[0] for fact in facts])

    def ours(facts: list[Fact]) -> Tensor:
        return optimize_values(s.lm, facts, s.site, s.contexts, settings).target

    return [Round(len(f), partial(plain, f), partial(ours, f), partial(said_more, f)) for f in s.groups]


def keys(s: Setting) -> list[Round]:
    """Keys of a batch, the mean over contexts; the difference is relative, in norm."""

    def ours(facts: list[Fact]) -> Tensor:
        return read_keys(s.lm, facts, s.site.layer, s.site, s.contexts, "mean").keys

    def plain(facts: list[Fact]) -> Tensor:
        return plain_keys(s.lm, facts, s.site.layer, s.contexts)

    return [Round(len(f), partial(plain, f), partial(ours, f), relative) for f in s.groups]


def moments(s: Setting) -> list[Round]:
    """Second moments over text; the difference is relative, in norm."""
    windows = sample_text(s.lm, s.options.tokens, 0, "Sampling text")
    before = len(s.lm.beginning)
    windows = [w for w in windows if len(w) == before + WINDOW]
    size = max(1, len(windows) // 4)
    layer = s.site.layer

    def ours(some: list[list[int]]) -> Tensor:
        return accumulate(s.lm, [layer], some)[layer]

    parts = [windows[i : i + size] for i in range(0, size * (len(windows) // size), size)]
    return [Round(len(p) * WINDOW, partial(plain_moments, s.lm, layer, p, before), partial(ours, p), relative)
            for p in parts]  # fmt: skip


def solver(s: Setting) -> list[Round]:
    """Eight batches of 128 at d_k = 6400, d_v = 1600 (GPT-2-XL's); the difference is relative, in norm."""
    d_k, d_v, n, batches = (6400, 1600, 128, 8) if s.lm.anatomy.key_size(s.site.layer) > 100 else (60, 20, 8, 2)
    draw = torch.Generator().manual_seed(0)
    factor = torch.randn(d_k, 2 * d_k, generator=draw, dtype=torch.float64)
    c0 = (factor @ factor.T / (2 * d_k)).to(s.lm.device)
    work = [
        (torch.randn(d_k, n, generator=draw).double().to(c0), torch.randn(d_v, n, generator=draw).double().to(c0))
        for _ in range(batches)
    ]

    def plain() -> Tensor:
        return torch.stack([plain_solve(k, r, c0, LAMBDA, SLACK)[0] for k, r in work])

    def ours() -> Tensor:
        metric = Preservation.from_moments(c0, LAMBDA)
        slack = torch.full((n,), SLACK, dtype=torch.float64, device=c0.device)
        return torch.stack([solve(Constraints(k, r, slack), metric).delta[0] for k, r in work])

    return [Round(batches, plain, ours, relative)] * 2


def evaluation(s: Setting, matmul: str = "float32") -> list[Round]:
    """Scores of all prompts of facts; the difference is the largest one of a log-probability.

    In two stages it is the fraction of prompts of which another target is more likely.
    """
    settings = EvaluationSettings(matmul=matmul)
    two_stage = matmul == TWO_STAGE

    def ours(facts: list[Fact]) -> list[tuple[float, float]]:
        with Evaluation(settings).products(s.lm):
            found = score_facts(s.lm, facts, two_stage=two_stage)
        groups = [g for g in (found.edit, found.paraphrases, found.neighbors) if g is not None]
        return [
            (float(a), float(b))
            for i in range(len(facts))
            for g in groups
            for a, b in zip(g.logp_new[g.record == i], g.logp_true[g.record == i], strict=True)
        ]

    def apart(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
        if two_stage:
            return sum((x > y) != (z > w) for (x, y), (z, w) in zip(a, b, strict=True)) / len(a)
        return float((torch.tensor(a) - torch.tensor(b)).abs().max())

    def plain(facts: list[Fact]) -> list[tuple[float, float]]:
        return [pair for fact in facts for pair in plain_scores(s.lm, fact)]

    return [Round(len(f), partial(plain, f), partial(ours, f), apart) for f in s.groups]


def whole(s: Setting) -> list[Round]:
    """A sequential run with its evaluation, ours by the default search; the difference is retained ES, in points."""
    names: dict[str, Any] = {"language_model": s.options.language_model, "layers": [s.site.layer], "keys": "mean"}
    c0 = second_moments(s.lm, [s.site.layer], MomentSettings(), s.options.language_model)[s.site.layer]

    def plain() -> float:
        lm = _language_model(s.options)
        site = Site.of(lm, s.site.layer)
        method = MEMIT(LAMBDA)
        ridged = c0 + method.ridge * c0.diagonal().mean() * torch.eye(len(c0), dtype=c0.dtype)
        for fact in s.facts:
            plain_scores(lm, fact)
        for batch in s.groups:
            plain_step(lm, batch, site, s.contexts, s.values, ridged, LAMBDA, SLACK)
            for fact in batch:
                plain_scores(lm, fact)
        after = [plain_scores(lm, fact)[0] for fact in s.facts]
        return 100 * sum(new > true for new, true in after) / len(after)

    def ours() -> float:
        evaluation = EvaluationSettings(heldout_tokens=0, generation=0, bystanders=0, immediate="all")
        editor = SequentialEditor(**names, method=MEMIT(LAMBDA), values=s.our_values, evaluation=evaluation)
        data = EditDataModule(s.options.path, limit=s.options.facts, batch_size=s.options.batch_size)
        with TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                default_root_dir=folder,
            )
            editor.configure_model()
            editor.unedited_scores.folder = Path(folder) / "scores"  # computed in each round, as by the plain way
            trainer.fit(editor, datamodule=data)
        return 100 * editor.evaluation.retained["retained/ES"]

    return [Round(len(s.facts), plain, ours, lambda a, b: abs(a - b))]


CASES: dict[str, tuple[str, Callable[[Setting], list[Round]]]] = {
    "values": ("fact", values),
    "products": ("fact", products),
    "early": ("fact", early),
    "values_default": ("fact", partial(values, default=True)),
    "keys": ("fact", keys),
    "moments": ("token", moments),
    "solver": ("batch", solver),
    "evaluation": ("fact", evaluation),
    "evaluation_bfloat16": ("fact", partial(evaluation, matmul="bfloat16")),
    "evaluation_two_stage": ("fact", partial(evaluation, matmul=TWO_STAGE)),
    "whole": ("fact", whole),
}
"""name -> unit of work, and the function that makes its rounds"""
