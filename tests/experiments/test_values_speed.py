"""The comparison of ways to find values, with the solve left out, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from editlab.experiments import values_speed
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

CONTEXTS = ["", "Oslo lies in Norway, and. "]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


def test_losses_are_those_of_the_optimization_where_all_contexts_run(lm):
    site, settings = Site.of(lm, 1), ValueSettings(steps=4, lr=0.1, clamp=2.0, matmul="float32")
    values = optimize_values(lm, FACTS[:3], site, CONTEXTS, settings)
    losses, hits, distances = values_speed.losses_of(lm, FACTS[:3], site, CONTEXTS, settings, values.target, together=2)
    torch.testing.assert_close(losses, values.loss, rtol=1e-4, atol=1e-5)
    assert (hits.shape, hits.dtype) == ((3,), torch.bool)
    start = optimize_values(lm, FACTS[:3], site, CONTEXTS, replace(settings, steps=1)).target  # no update: v0
    expected = (values.target - start).norm(dim=1) / start.norm(dim=1)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-5)


def test_the_default_search_is_one_of_the_ways():
    way, default = ValueSettings(**values_speed.WAYS["falling steps, two contexts a step"]), ValueSettings()
    assert way == replace(default, lr=default.step_size)


def test_a_row_for_each_way(lm, monkeypatch):
    monkeypatch.setattr(values_speed, "LAYERS", (1,))
    monkeypatch.setattr(values_speed, "sample_contexts", lambda lm, settings: CONTEXTS)
    monkeypatch.setattr(values_speed, "scores_after", lambda *given: {"ES": "1.000"})
    monkeypatch.setitem(values_speed.WAYS, "all contexts", {"steps": 3})
    monkeypatch.setitem(values_speed.WAYS, "one context a step", {"steps": 3, "contexts_a_step": 1})
    rows = values_speed.measure(lm, FACTS[:4], ["all contexts", "one context a step"], rounds=2)
    assert [(row["way"], row["facts"], row["steps"], row["ES"]) for row in rows] == [
        ("all contexts", 4, "3.00", "1.000"), ("one context a step", 4, "3.00", "1.000"),
    ]  # fmt: skip
    assert rows[0]["ratio"] == "1.00"


def test_the_plain_way_is_timed_on_the_first_facts_of_each_part(lm, monkeypatch):
    timed, clock = [], iter(range(100))
    monkeypatch.setattr(values_speed, "LAYERS", (1,))
    monkeypatch.setattr(values_speed, "sample_contexts", lambda lm, settings: CONTEXTS)
    monkeypatch.setattr(values_speed, "scores_after", lambda *given: {})
    monkeypatch.setitem(values_speed.WAYS, "all contexts", {"steps": 2})
    monkeypatch.setattr(values_speed, "plain_value", lambda lm, fact, *rest: timed.append(fact))
    monkeypatch.setattr(values_speed.time, "process_time", lambda: next(clock))
    (row,) = values_speed.measure(lm, FACTS[:4], ["all contexts"], rounds=2, plain=1)
    assert timed == [FACTS[0], FACTS[2]]
    # Each interval is one tick of the clock: one fact in the plain way, and two in the other.
    assert (row["cpu_seconds"], row["times_plain"]) == ("0.500", "2.0")
