"""What is refused around the edit of a fact that a user sets."""

import pytest
import torch

from editlab.api.setting import require_changes, set_facts
from editlab.callback import EditCallback
from editlab.data import Fact
from editlab.errors import UserError
from editlab.evaluation.retrieval import Retrieval
from editlab.lm.joints import AUTO
from editlab.solver.methods import MEMIT
from tests.test_api import SMALL
from tests.tiny import tiny_model, tiny_tokenizer

FACT = Fact("France", "The capital of {} is", "Tokyo", "Paris")
ARGUMENTS = {**{name: value for name, value in SMALL.items() if name != "layers"}, "method": MEMIT(300), "joint": AUTO,
             "edit_module": None, "chat_template": "none"}  # fmt: skip


class RollBack(EditCallback):
    """Rolls every batch back."""

    def on_edit_applied(self, trainer, editor, outcome):
        outcome.roll_back("a test")


class Beside(EditCallback):
    """Leaves an adapter next to the weights, as LoRAAdjust does in its mode ``adapter``."""

    def on_edit_adjust(self, trainer, editor, outcome):
        editor.layers[0].set_adapter(torch.ones_like(editor.layers[0].total))


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ([Fact("France", "The capital of {} is", "Paris", "Paris")], "which is also its truth, so there is nothing"),
        ([FACT, Fact("France", "The capital of {} is", "Lima")], "Two facts have the subject and prompt of 'The cap"),
    ],
)
def test_facts_that_change_nothing_or_contradict(facts, sentence):
    with pytest.raises(UserError, match=sentence):
        require_changes(facts)
    require_changes([FACT, Fact("Peru", "The capital of {} is", "Lima")])


@pytest.mark.parametrize(
    ("layers", "changes", "sentence"),
    [
        (None, {}, r"The layers to edit are not known for tiny: name them \(--model\.layers"),
        ([1], {"method": Retrieval()}, "The method Retrieval changes no weight"),
        ([1], {"callbacks": [RollBack()]}, "rolled back all edits, so nothing is changed"),
        ([1], {"callbacks": [Beside()]}, "LoRAAdjust keeps its adapter next to the weights"),
    ],
)
def test_what_is_refused(layers, changes, sentence):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=sentence):
        set_facts("tiny", model, tokenizer, [FACT], layers, {**ARGUMENTS, **changes})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_the_model_says_already_is_refused(edited):
    said = edited.known[0]  # the likeliest token after the prompt, by a plain forward pass
    fact = Fact("Oslo", said.prompt.replace("Oslo", "{}"), said.truth)
    with pytest.raises(UserError, match=f"tiny already says {said.truth!r} after {said.prompt!r}, so there is nothing"):
        set_facts("tiny", tiny_model("llama"), edited.tokenizer, [fact], [1], {**ARGUMENTS, "joint": "none"})
