"""One edited tiny model that the tests of this folder read; none of them changes it."""

import copy
from types import SimpleNamespace

import pytest
import torch

from editlab import edit_model
from editlab.data import Fact, Neighbor
from editlab.evaluation.settings import EvaluationSettings
from editlab.values.optimize import ValueSettings
from tests.test_api import SMALL
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ("Oslo lies in Norway", "The Oslo lies in Norway")
PROMPTS = [text[:end] for text in TEXTS for end in range(4, len(text)) if text[end - 1] != " "]


def likeliest(model, tokenizer, prompt):
    """The likeliest token after a prompt as text; None if it shows nothing, or is read otherwise after the prompt."""
    ids = tokenizer(prompt).input_ids
    with torch.no_grad():
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    text = tokenizer.decode(token)
    return text if text.isalpha() and tokenizer(prompt + text).input_ids == [*ids, token] else None


@pytest.fixture(scope="package")
def edited():
    """Two facts in a tiny model: one with a truth, and neighbors whose truth is what the unedited model says."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    original = copy.deepcopy(model)
    said = {prompt: likeliest(original, tokenizer, prompt) for prompt in PROMPTS}
    known = tuple(Neighbor(prompt, word) for prompt, word in said.items() if word is not None)
    facts = [
        Fact("France", "The capital of {} is", "Tokyo", "Paris", neighbors=(*known, Neighbor("Lima speaks", "Norway"))),
        Fact("Brazil", "The official language of {} is", "French and Swedish", id="b"),
    ]
    settings = {
        **SMALL, "joint": "none", "values": ValueSettings(steps=40, lr=0.5, clamp=30.0, reference="original"),
        "evaluation": EvaluationSettings(heldout_tokens=64, generation=0, bystanders=8, generated_texts=0),
    }  # fmt: skip
    _, result = edit_model(model, tokenizer, facts, **settings)
    return SimpleNamespace(
        model=model, original=original, tokenizer=tokenizer, facts=facts, known=known, settings=settings, result=result
    )
