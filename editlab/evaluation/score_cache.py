"""Scores of the unedited model, kept across runs: a sweep of configurations measures "before" once.

They depend on the model and the tokens alone, as do the log-probabilities of held-out texts and the free answers.
Scores that are measured together are kept as one file, whole or not at all, so a run that is killed and resumed finds
the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from editlab.distributed import ranks
from editlab.lm.precision import cast_to
from editlab.utils.disk_cache import TENSORS, Codec, DiskCache, RowCache, key_of
from editlab.utils.files import cache_dir

Request = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its continuation, and the index of the continuation's first token."""

Score = tuple[float, bool]
"""Mean log-probability of the continuation's tokens, in nats, and whether each of them is the argmax."""


class RoughScore(NamedTuple):
    """Score of the first of two stages (:mod:`editlab.evaluation.two_stage`)."""

    logp: float
    """mean log-probability of the continuation's tokens, in nats"""
    hit: bool
    """whether each token is the argmax"""
    gap: float
    """distance of ``hit`` from a change, in nats: if it is true, the smallest lead of a token over the best other one;
    otherwise the largest deficit of a token to the argmax"""


CPU = torch.device("cpu")

ANSWERS: Codec[list[str]] = Codec(lambda texts: json.dumps(texts).encode(), json.loads)
"""Codec of the answers to several prompts."""


class ScoreCache:
    """Scores by token ids, in the cache folder.

    Args:
        key: of the model that scores (:func:`editlab.lm.fingerprint.model_key`).
        products: type of the matrix products that the scores are computed with.
        device: where the scores are computed. Each :meth:`fetch` looks up the autocast type of this device, because a
            Trainer turns autocast on for its steps alone.
    """

    def __init__(self, key: str, products: str = "float32", device: torch.device = CPU) -> None:
        name = key[:32] + ("" if products == "float32" else f"-{products}")
        self.folder = cache_dir() / "scores" / name
        self.device = device
        self._rows: dict[str, RowCache] = {}

    def fetch(
        self, requests: Sequence[Request], find: Callable[[Sequence[Request]], Sequence[Score]]
    ) -> dict[Request, Score]:
        """Return the scores of all requests: read where they were kept, else computed and kept.

        Args:
            requests: what is scored; repeats are scored once.
            find: computes the scores of the requests that are missing. A score that is not finite is not kept.
        """
        found = self._fetch(requests, find, self._folder())
        return {request: (logp, bool(hit)) for request, (logp, hit) in found.items()}

    def fetch_rough(
        self, requests: Sequence[Request], find: Callable[[Sequence[Request]], Sequence[RoughScore]]
    ) -> dict[Request, RoughScore]:
        """Return the first stage's scores of all requests, which are kept apart from those of :meth:`fetch`.

        Args:
            requests: as for :meth:`fetch`.
            find: computes the scores of the requests that are missing.
        """
        folder = self._folder()
        found = self._fetch(requests, find, folder.with_name(f"{folder.name}-first-stage"))
        return {request: RoughScore(logp, bool(hit), gap) for request, (logp, hit, gap) in found.items()}

    def _fetch(
        self,
        requests: Sequence[Request],
        find: Callable[[Sequence[Request]], Sequence[tuple[float, ...]]],
        folder: Path,
    ) -> dict[Request, list[float]]:
        unique = list(dict.fromkeys(requests))
        if not unique:
            return {}
        rows = self._rows.setdefault(str(folder), RowCache(folder))

        def compute(missing: list[int]) -> torch.Tensor:
            return torch.tensor(find([unique[index] for index in missing]), dtype=torch.float64)

        found = rows.fetch([key_of(ids=ids, start=start) for ids, start in unique], compute, ranks.on_first).tolist()
        return dict(zip(unique, found, strict=True))

    def token_scores(
        self, ids: Sequence[int], find: Callable[[], torch.Tensor], beginning: Sequence[int], window: int
    ) -> torch.Tensor:
        """Return the log-probabilities of a text's tokens, float32 [scored tokens]: read, or else computed and kept.

        Args:
            ids: token ids of the text.
            find: computes them on all ranks.
            beginning: special tokens that each window begins with.
            window: tokens of text in a window.
        """
        key = key_of(ids=list(ids), beginning=list(beginning), window=window)
        cache = DiskCache(self._folder() / "texts", TENSORS)
        return cache.fetch(key, lambda: {"logps": find()}, ranks.on_first)["logps"]

    def answers(
        self,
        prompts: Sequence[tuple[str, Sequence[int]]],
        tokens: int,
        ends: Collection[int],
        find: Callable[[], list[str]],
    ) -> list[str]:
        """Return the model's free answers to prompts that are asked together: read, or else computed and kept.

        Args:
            prompts: each prompt and its token ids.
            tokens: the largest number of new tokens.
            ends: ids of the tokens that end a text, which the model's weights do not determine.
            find: computes them on all ranks.
        """
        key = key_of(prompts=[[prompt, list(ids)] for prompt, ids in prompts], tokens=tokens, ends=sorted(ends))
        return DiskCache(self._folder() / "answers", ANSWERS).fetch(key, find, ranks.on_first)

    def _folder(self) -> Path:
        cast = cast_to(self.device)
        return self.folder.with_name(f"{self.folder.name}-autocast-{cast}") if cast else self.folder
