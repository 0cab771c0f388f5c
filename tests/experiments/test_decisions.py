"""The check of scores in two stages, against counts made from score_facts directly."""

import pytest
import torch

from editlab.errors import EditLabError
from editlab.evaluation.scoring import score_facts
from editlab.evaluation.two_stage import first_stage
from editlab.experiments.decisions import Agreement, agreement
from editlab.lm.language_model import LanguageModel
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


def test_agreement_counts_prompts_and_decisions(monkeypatch):
    monkeypatch.setattr("editlab.evaluation.two_stage.multiplies_bfloat16", lambda device: True)
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    found = agreement(lm, FACTS[:4])
    exact = score_facts(lm, FACTS[:4])
    with first_stage(lm):
        rough = score_facts(lm, FACTS[:4])
    prompts = 4 * (1 + 2 + 2)  # a fact has an edit prompt, two paraphrases and two neighbors
    assert (found.facts, found.prompts, found.decisions) == (4, prompts, 3 * prompts)
    assert found.changed_by_two_stages == 0
    assert 0 < found.scored_again <= prompts
    errors = [
        (getattr(getattr(rough, g), n) - getattr(getattr(exact, g), n)).abs().max()
        for g in ("edit", "paraphrases", "neighbors") for n in ("logp_new", "logp_true")
    ]  # fmt: skip
    assert found.largest_error == pytest.approx(float(torch.stack(errors).max()), abs=1e-4)


def test_agreement_adds_up_over_chunks():
    one, other = Agreement(1, 5, 15, 2, 0, 3, 0.1, 0.01), Agreement(2, 9, 27, 1, 0, 4, 0.05, 0.02)
    assert one + other == Agreement(3, 14, 42, 3, 0, 7, 0.1, 0.02)


def test_errors_where_there_is_only_one_stage(monkeypatch):
    monkeypatch.setattr("editlab.evaluation.two_stage.multiplies_bfloat16", lambda device: False)
    with pytest.raises(EditLabError, match="targets have no score of the first stage"):
        agreement(LanguageModel(tiny_model("llama"), tiny_tokenizer()), FACTS[:1])
