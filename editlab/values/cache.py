"""Values of the unedited model, kept across runs: a sweep of configurations pays for them once.

Values on the original weights do not depend on the run, only on what is in the key: the model and the tokenizer, the
site, the contexts, the hyper-parameters of the optimization, and autocast. What is found together is written as one
file: values found together round together, so a run that is killed and resumed finds the same ones again, or none of
them. Found in other company, by a run with another batch size, a value differs by rounding (about 1e-7), and of two the
one that is known stays: to the bit, a run is repeated with the cache that it had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import type_of_products
from editlab.lm.precision import cast_to
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.utils.files import atomic_file, cache_dir, read_tensors
from editlab.values.optimize import ValueSettings


class ValueCache:
    """Targets v* by fact, in the cache folder.

    Args:
        model: what tells it from others: its key, the tokenizer's, the path of the edited map, the type of autocast.
        site: where they live.
        contexts: the prefixes.
        settings: the hyper-parameters; ``matmul`` as it comes to on the device.
    """

    def __init__(self, model: Sequence[str], site: Site, contexts: Sequence[str], settings: ValueSettings) -> None:
        relevant = {k: v for k, v in asdict(settings).items() if k not in ("reference", "batch_tokens")}
        if not settings.early_stop:
            del relevant["early_stop"]  # as before there was such a setting: values found then are still right
        relevant["lr"] = settings.step_size
        what = [*model, site.layer, site.in_stream, list(contexts), relevant]
        self.folder = cache_dir() / "values" / _digest(json.dumps(what, sort_keys=True))
        self._known: dict[str, Tensor] = {}
        self._read: set[Path] = set()

    @classmethod
    def of(
        cls, lm: LanguageModel, key: str, site: Site, contexts: Sequence[str], settings: ValueSettings
    ) -> ValueCache:
        """That of a model, with its key (:func:`editlab.lm.fingerprint.model_key`), as autocast is in force now."""
        edited = "" if site.in_stream else lm.anatomy.edit_path  # a value in the stream is of no map
        found_by = replace(settings, matmul=type_of_products(settings.matmul, lm.device))
        model = [key, tokenizer_fingerprint(lm.tokenizer), edited]
        return cls([*model, *filter(None, [cast_to(lm.device)])], site, contexts, found_by)

    def fetch(self, facts: Sequence[Fact], find: Callable[[Sequence[Fact]], Tensor]) -> Tensor:
        """Targets of facts, float32 [n, d_v]: read where they are known, found and kept where they are not.

        Of several ranks the first one alone touches the folder.

        Args:
            facts: the facts.
            find: gives the targets [m, d_v] of those that are missing.
        """
        names = [name_of(fact) for fact in facts]
        known = ranks.on_first(lambda: self._look(names))
        missing = [fact for fact, name in zip(facts, names, strict=True) if name not in known]
        if missing:
            found = {name_of(fact): target.contiguous() for fact, target in zip(missing, find(missing), strict=True)}
            ranks.on_first(lambda: self._keep(found))
            known |= found
        return torch.stack([known[name] for name in names])

    def _look(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Reads files that have come since the last look; of two values of one fact the one known first stays."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._read):
            self._known = read_tensors(path) | self._known
            self._read.add(path)
        return {name: self._known[name] for name in names if name in self._known}

    def _keep(self, found: dict[str, Tensor]) -> None:
        path = self.folder / f"{_digest(json.dumps(sorted(found)))}.safetensors"
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(found, temporary)
        self._known |= found
        self._read.add(path)


def name_of(fact: Fact) -> str:
    """What a fact's value is kept under: it depends on the prompt, the subject and the new target alone."""
    return _digest(json.dumps([fact.prompt, fact.subject, fact.target_new]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
