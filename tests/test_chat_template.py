"""Runs with ``model.chat_template`` on a tiny model with a made-up template: where values, keys and scores are read."""

from __future__ import annotations

import pytest
import torch

from editlab.data.chat import as_evaluated
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.subject_keys import locate
from editlab.lm.chat import MODES
from editlab.solver.methods import ROME
from tests.facts import FACTS
from tests.lm.test_chat import TEMPLATE
from tests.test_editor import Spy, editor, fit, site_now
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_one_hard_edit_gives_its_value_at_the_prompt_of_the_mode(chat_folder, tmp_path, mode):
    """With slack 0 and one layer the site's output becomes v* where the edit was made; scores are those of the mode."""
    spy = Spy()
    module = editor(chat_folder, layers=[1], method=ROME(), chat_template=mode)
    trainer = fit(tmp_path, module, callbacks=[spy], limit=1, batch_size=1)
    (fact,) = spy.plans[0].facts
    head = "<s>[user] " if mode in ("edit", "both") else ""
    assert fact.question == head + FACTS[0].question + ("\n[assistant]\n" if head else "")
    assert torch.allclose(site_now(module, fact), spy.plans[0].targets.first[0], atol=1e-4)
    encoding, last = locate(module.lm, fact)
    start, end = encoding.offsets[last]
    assert fact.question[start:end].strip() == fact.subject
    at = "<s>[user] " if mode in ("evaluate", "both") else ""
    (scored,) = as_evaluated([fact], module.lm.chat)
    assert scored.question == at + FACTS[0].question + ("\n[assistant]\n" if at else "")
    with module.unedited():
        expected = score_facts(module.lm, [scored], two_stage=True)
    before = module.evaluation.scores("before")
    torch.testing.assert_close(before.edit.logp_new, expected.edit.logp_new)
    torch.testing.assert_close(before.neighbors.logp_true, expected.neighbors.logp_true)
    assert trainer.datamodule.candidates[1].question.startswith(head)


def test_a_model_without_a_template_is_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        fit(tmp_path, editor(tiny_folder, chat_template="both"), limit=1)
    with pytest.raises(
        UserError, match=r"model\.chat_template is 'chat': it must be one of none, edit, evaluate, both"
    ):
        editor(tiny_folder, chat_template="chat")


def test_a_template_makes_a_text_longer_than_the_model_takes(chat_folder):
    """Scores are after the templated prompt, so that one is checked too."""
    module = editor(chat_folder, chat_template="evaluate")
    module.configure_model()
    module.lm.longest = 12
    assert module.too_long(FACTS[1]) is not None
    module.lm.chat = None
    assert module.too_long(FACTS[1]) is None
