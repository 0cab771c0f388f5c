"""Cached values: computed once, and never used for another model, site, context or hyper-parameter."""

import pytest
import torch

from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values.cache import ValueCache, name_of
from editlab.values.settings import ValueSettings
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

SITE = Site(3, True, torch.nn.Identity())


def cache(fingerprint="f", site=SITE, contexts=("", "a. "), tokenizer="t", edited="", **settings):
    return ValueCache([fingerprint, tokenizer, edited], site, contexts, ValueSettings(**settings))


def test_only_what_is_missing_is_found():
    asked = []

    def find(facts):
        asked.append([f.id for f in facts])
        return torch.stack([torch.full((2,), float(f.id)) for f in facts])

    first = cache("once").fetch(FACTS[:2], find)
    again = cache("once").fetch([FACTS[2], FACTS[1], FACTS[0]], find)
    assert asked == [[0, 1], [2]]
    assert first.tolist() == [[0, 0], [1, 1]]
    assert again.tolist() == [[2, 2], [1, 1], [0, 0]]
    assert cache("once").fetch(FACTS[:2], lambda facts: 1 / 0).tolist() == first.tolist()


def test_the_key_holds_all_that_a_value_depends_on():
    others = [
        cache("g"),
        cache(tokenizer="u"),
        cache(edited="mlp.down_proj"),
        cache(matmul="bfloat16"),
        cache(lr=0.1),
        cache(site=Site(4, True, SITE.module)),
        cache(site=Site(3, False, SITE.module)),
        cache(contexts=("",)),
        cache(steps=3),
        cache(clamp=2.0),
        cache(kl_factor=0.5),
        cache(early_stop=2),
    ]
    assert len({c.folder for c in [cache(), *others]}) == 13
    assert len({cache(kl_at=kl_at).folder for kl_at in (None, "prompt", "subject")}) == 2
    assert "kl_at" not in ValueSettings(kl_at="prompt").cache_key()  # older versions' caches stay valid
    assert cache(batch_tokens=7).folder == cache(reference="original").folder == cache(anchor_facts=2).folder
    assert cache(anchor_facts=2).folder == cache().folder
    assert len({name_of(fact) for fact in FACTS}) == len(FACTS)


def test_values_optimized_together_are_cached_together_or_not_at_all(monkeypatch):
    # A kill between two files would leave a part, and the rest, found in another group, would round otherwise.
    def fail(*arguments):
        raise OSError("killed")

    monkeypatch.setattr("safetensors.torch.save", fail)
    with pytest.raises(OSError, match="killed"):
        cache("part").fetch(FACTS[:3], lambda facts: torch.ones(len(facts), 2))
    assert list(cache("part").folder.glob("*")) == []
    monkeypatch.undo()
    cache("part").fetch(FACTS[:3], lambda facts: torch.ones(len(facts), 2))
    assert len(list(cache("part").folder.iterdir())) == 1


def test_values_under_autocast_have_a_cache_of_their_own():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    plain = ValueCache.of(lm, "key", SITE, ("",), ValueSettings())
    with torch.autocast("cpu", torch.bfloat16):
        cast = ValueCache.of(lm, "key", SITE, ("",), ValueSettings())
    assert cast.folder != plain.folder
    assert ValueCache.of(lm, "key", SITE, ("",), ValueSettings()).folder == plain.folder


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_flipped_byte_never_yields_a_wrong_value(where, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))
    cache().fetch(FACTS[:2], lambda facts: torch.ones(2, 4))
    (path,) = cache().folder.iterdir()
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    assert cache().fetch(FACTS[:2], lambda facts: torch.ones(2, 4)).tolist() == [[1.0] * 4] * 2
    assert f"{path} is damaged" in caplog.text


def test_of_two_values_of_one_fact_the_first_known_stays():
    mine, other = cache("two"), cache("two")
    mine.fetch(FACTS[:1], lambda facts: torch.zeros(1, 2))
    other.fetch(FACTS[:2], lambda facts: torch.ones(len(facts), 2))
    assert mine.fetch(FACTS[:2], lambda facts: 1 / 0).tolist() == [[0, 0], [1, 1]]
