"""The guard's measurements against the scoring of facts and plain forwards, and its reasons for dropping."""

import math

import pytest
import torch

from callbacks.lora.guard import Adjustment, Health, examine
from callbacks.lora.objective import text_rows
from editlab.evaluation.scoring import score_facts
from editlab.lm.language_model import LanguageModel
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama").requires_grad_(False), tiny_tokenizer())


def test_examine_agrees_with_the_scoring(lm):
    texts = text_rows(lm, [list(range(3, 12)), list(range(20, 30))])
    health = examine(lm, FACTS[:4], texts)
    scores = score_facts(lm, FACTS[:4]).edit
    assert health.edits == pytest.approx(float(scores.logp_new.mean()))
    success = float((scores.logp_new > scores.logp_true).float().mean())
    assert health.ES == pytest.approx(success)  # noqa: SIM300 - ES is a number and no constant
    logps = [lm.run(torch.tensor([row.ids])).logits[0].float().log_softmax(1) for row in texts]
    nll = [-logp[range(len(row.ids)), row.following] for logp, row in zip(logps, texts, strict=True)]
    assert health.text == pytest.approx(float(torch.cat(nll).mean()), rel=1e-4)
    assert examine(lm, FACTS[:1], []).text is None
    assert examine(lm, [], texts) == Health(None, None, health.text)


def test_the_reason_names_what_got_worse():
    before = Health(edits=-1.0, accuracy=0.5, text=3.0, ES=None)
    assert Health(-1.0, 0.5, 3.0).worse_than(before, 0.0) == ""
    assert Health(-1.2, 0.5, 2.0).worse_than(before, 0.1) == "held-out edits went from -1.000 to -1.200 nats per token"
    assert Health(-1.2, 0.5, 2.0).worse_than(before, 0.3) == ""
    assert "held-out text went from 3.000 to 3.200" in Health(0.0, 1.0, 3.2).worse_than(before, 0.1)
    assert Health(math.nan, 0.0, 3.0).worse_than(before, 9.0)
    assert Health(-1.0, 0.0, math.nan).worse_than(before, 9.0)
    # If no edits are held out, only the text is compared.
    assert Health(None, None, 3.0).worse_than(Health(None, None, 3.0), 0.0) == ""
    assert "the held-out text" in Health(None, None, 3.2).worse_than(Health(None, None, 3.0), 0.1)
    assert before.numbers() == {"edits": -1.0, "accuracy": 0.5, "text": 3.0}
    assert Health(math.nan, 0.0, math.inf).numbers() == {"accuracy": 0.0}


def test_a_failed_adjustment_logs_no_numbers_after_it():
    failed = Adjustment(Health(-1.0, 0.5, 3.0), reason="the loss is nan", seconds=1.23456)
    assert failed.measured() == {
        "lora/fraction": 0.0, "lora/edits_before": -1.0, "lora/accuracy_before": 0.5, "lora/text_before": 3.0,
        "lora/kept": 0.0,
    }  # fmt: skip
    event = failed.event()
    assert (event["decision"], event["after"], event["seconds"]) == ("drop", {}, 1.235)
