"""The benchmark of value sources: cases are timed in turn, and the weights are the unedited ones after each round."""

import dataclasses

import torch

import scripts.benchmark_sources as benchmark
from editlab.lm.language_model import LanguageModel
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


def test_a_round_leaves_the_unedited_weights():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    case = dataclasses.replace(benchmark.CASES["gradient_same_layers"], layers=[1, 2])
    timed = benchmark.Timed(lm, case, [""], "tiny")
    assert min(timed.seconds(FACTS[:3])) > 0
    assert timed.source.state_dict()["moments"][2]["count"] == 3
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())


def test_cases_are_facts_of_the_dev_split_with_their_subjects():
    last = benchmark.facts_of(benchmark.CASES["gradient"], 3)
    named = benchmark.facts_of(benchmark.CASES["optimize"], 3)
    assert [fact.side for fact in [*last, *named]] == ["dev"] * 6
    assert [fact.question for fact in last] == [fact.subject for fact in last] != [fact.subject for fact in named]
    assert benchmark.CASES["optimize"].values == ValueSettings(reference="original")
