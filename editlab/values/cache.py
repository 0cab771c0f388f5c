"""A cache of values on the unedited model that lasts across runs, so that a sweep computes them once.

Values on the original weights depend only on the parts of the cache key: the model and the tokenizer, the site, the
contexts, the hyper-parameters of the optimization, and autocast. The rounding of a value depends on which facts are
optimized together, so their values are one file, and a run that is killed and resumed finds all of them or none. In a
run with another batch size a value differs by rounding (about 1e-7), and the value that was cached first is used: a run
is reproduced bit for bit only with the cache that it started with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import type_of_products
from editlab.lm.precision import cast_to
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.utils.disk_cache import RowCache, key_of
from editlab.utils.files import cache_dir
from editlab.values.settings import ValueSettings

UNRELATED = ("reference", "batch_tokens", "spread", "anchor_facts")
"""Settings on which a cached value at a given site does not depend beyond rounding; the norm anchor comes after it."""


class ValueCache:
    """A cache of targets v* by fact, in the cache folder.

    Args:
        model: identity of the model: its key, the tokenizer's digest, the path of the edited map, the autocast type.
        site: site of the values.
        contexts: the prefixes.
        settings: the hyper-parameters, with ``matmul`` as it is resolved on the device.
        unusual_texts: see :meth:`LanguageModel.unusual_texts <editlab.lm.language_model.LanguageModel.unusual_texts>`.
    """

    def __init__(
        self,
        model: Sequence[str],
        site: Site,
        contexts: Sequence[str],
        settings: ValueSettings,
        unusual_texts: Callable[[Sequence[tuple[str, str]]], list[str]] = lambda pairs: [],
    ) -> None:
        relevant = {k: v for k, v in settings.cache_key().items() if k not in UNRELATED}
        relevant["lr"] = settings.step_size
        key = key_of(
            model=list(model), layer=site.layer, in_stream=site.in_stream, contexts=list(contexts), settings=relevant
        )
        self.folder = cache_dir() / "values" / key
        self._rows = RowCache(self.folder)
        self._unusual_texts = unusual_texts

    @classmethod
    def of(
        cls, lm: LanguageModel, key: str, site: Site, contexts: Sequence[str], settings: ValueSettings
    ) -> ValueCache:
        """Return the cache of a model with its :func:`~editlab.lm.fingerprint.model_key`, for autocast as it is now."""
        edited = "" if site.in_stream else lm.anatomy.edit_path  # a value in the stream belongs to no linear map
        resolved = replace(settings, matmul=type_of_products(settings.matmul, lm.device))
        model = [key, tokenizer_fingerprint(lm.tokenizer), edited]
        # Contexts stand inside the user's turn of a chat.
        chat = f"chat: {lm.chat.head}" if lm.chat is not None and lm.chat.edits else ""
        return cls([*model, *filter(None, [cast_to(lm.device), chat])], site, contexts, resolved, lm.unusual_texts)

    def fetch(self, facts: Sequence[Fact], find: Callable[[Sequence[Fact]], Tensor]) -> Tensor:
        """Return the targets of facts, float32 [n, d_v]; those that the cache lacks are computed and added to it.

        Args:
            facts: the facts.
            find: computes the targets [m, d_v] of the facts that are missing.
        """
        return self._rows.fetch(
            [name_of(fact, self._unusual_texts([(fact.question, fact.target_new)])) for fact in facts],
            lambda missing: find([facts[index] for index in missing]),
            ranks.on_first,
        )


def name_of(fact: Fact, unusual_texts: Sequence[str] = ()) -> str:
    """Return the name of a fact's value, which depends on the prompt, the subject, the new target and their joint.

    Args:
        fact: the fact.
        unusual_texts: the prompt with its target if it is not read as two words with a space between, so that the names
            of all other facts are independent of how joints are chosen.
    """
    joined = {"texts": list(unusual_texts)} if unusual_texts else {}
    return key_of(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new, **joined)
