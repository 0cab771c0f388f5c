"""Retrieval: which edits are near a prompt, by hand, and what is put before it."""

from dataclasses import replace

import pytest

from editlab.data.fact import Fact, Neighbor
from editlab.errors import UserError
from editlab.evaluation.retrieval import ANSWER_TOKENS, FactIndex, FactMemory, Retrieval, as_read, grams, memory_of
from editlab.lm.chat import Chat
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import MEMIT
from tests.tiny import tiny_model, tiny_tokenizer


def fact(subject, prompt="The capital of {} is", new="Oslo", **more):
    return Fact(subject, prompt, new, "Paris", **more)


FRANCE, PERU, NEW_FRANCE = fact("France"), fact("Peru", new="Lima"), fact("New France", new="Tokyo")
PLAIN = Retrieval(k=2, template="{}\n")
SPOKEN = fact("France", "The official language of {} is", new="Portuguese")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


def test_trigrams_by_hand():
    # " peru ": five letters with a space at both ends give " pe", "per", "eru", "ru ".
    assert grams("Peru") == {" pe", "per", "eru", "ru "}
    assert grams("São-Paulo") == grams("SAO PAULO!")
    assert grams("X") == {" x "}
    assert grams("...") == frozenset()


def test_the_order_of_the_nearest_edits_by_hand():
    index = FactIndex([FRANCE, PERU, NEW_FRANCE, SPOKEN])
    # " france " has six trigrams, all in the prompt: France's two edits match by 1. "New France" has three more,
    # " ne", "new", "ew ", which the prompt lacks: 6/9. Of "peru" nothing is in it: 0.
    # Of France's two edits the one whose edit prompt shares more trigrams with the prompt comes first.
    prompt = "The official language spoken in France"
    assert index.nearest(prompt, 4, 0.0) == [SPOKEN, FRANCE, NEW_FRANCE, PERU]
    assert index.nearest(prompt, 4, 0.5) == [SPOKEN, FRANCE, NEW_FRANCE]
    assert index.nearest(prompt, 4, 0.7) == [SPOKEN, FRANCE]
    assert index.nearest(prompt, 1, 0.7) == [SPOKEN]
    # All of the longer subject is in this one, too, so it comes before the shorter ones, which also match by 1.
    assert index.nearest("New France's capital is", 2, 1.0) == [NEW_FRANCE, FRANCE]
    assert index.nearest("Lima lies", 3, 0.1) == []
    assert FactIndex([]).nearest("Peru", 1, 0.0) == []
    # A part of a word is no subject: " peru " has four trigrams, and "peruse" has only the first three of them.
    assert index.nearest("We peruse", 1, 0.8) == []
    assert index.nearest("We peruse", 1, 0.75) == [PERU]


def test_of_edits_that_are_alike_the_later_one_comes_first():
    older, newer = fact("Peru", "{} is ruled from", new="Lima"), fact("Peru", "{} is ruled from", new="Oslo")
    assert FactIndex([older, newer]).nearest("Peru", 1, 0.0) == [newer]


def test_edits_are_put_before_every_prompt(lm):
    asked = replace(FRANCE, paraphrases=("France is ruled from",), neighbors=(Neighbor("Peru is ruled from", "Lima"),))
    memory = FactMemory(PLAIN, lambda: [PERU, FRANCE, SPOKEN])
    (read,) = as_read(lm, [asked], memory)
    spoken, capital = "The official language of France is Portuguese\n", "The capital of France is Oslo\n"
    # The nearest edit stands next to the prompt.
    assert read.question == f"{spoken}{capital}The capital of France is"
    assert read.paraphrases == (f"{spoken}{capital}France is ruled from",)
    assert read.neighbors[0].prompt == "The capital of Peru is Lima\nPeru is ruled from"
    assert (read.target_new, read.target_true, read.neighbors[0].truth) == ("Oslo", "Paris", "Lima")
    assert as_read(lm, [asked]) == [asked]


def test_the_text_of_an_edit(lm):
    (read,) = as_read(lm, [FRANCE], FactMemory(Retrieval(), lambda: [FRANCE]))
    assert read.question == "New fact: The capital of France is Oslo.\nThe capital of France is"


def test_a_memory_follows_its_edits_and_has_none_at_first(lm):
    edits = []
    memory = FactMemory(PLAIN, lambda: edits)
    assert memory.before_prompts(lm, [FRANCE])[0].question == FRANCE.question
    edits.append(FRANCE)
    assert memory.before_prompts(lm, [FRANCE])[0].question.startswith("The capital of France is Oslo\n")
    edits[0] = replace(FRANCE, target_new="Lima")
    assert memory.before_prompts(lm, [FRANCE])[0].question.startswith("The capital of France is Lima\n")


def test_braces_in_an_edit_are_text(lm):
    memory = FactMemory(PLAIN, lambda: [replace(FRANCE, target_new="{} Oslo")])
    (read,) = memory.before_prompts(lm, [FRANCE])
    assert read.question == "The capital of France is {} Oslo\nThe capital of France is"


def test_edits_that_do_not_fit_are_left_out(lm, monkeypatch):
    memory = FactMemory(PLAIN, lambda: [FRANCE, SPOKEN])
    both = memory.before_prompts(lm, [FRANCE])[0].question
    one = "The capital of France is Oslo\nThe capital of France is"
    assert both.endswith(one)
    monkeypatch.setattr(lm, "longest", len(lm.encode(both).ids) + ANSWER_TOKENS)
    assert memory.before_prompts(lm, [FRANCE])[0].question == both
    monkeypatch.setattr(lm, "longest", len(lm.encode(both).ids) + ANSWER_TOKENS - 1)
    assert memory.before_prompts(lm, [FRANCE])[0].question == one
    monkeypatch.setattr(lm, "longest", 5)
    assert memory.before_prompts(lm, [FRANCE])[0].question == FRANCE.question


@pytest.mark.parametrize("mode", ["edit", "evaluate", "both"])
def test_in_a_chat_the_edits_are_part_of_the_users_turn(lm, monkeypatch, mode):
    chat = Chat("<user>", "<assistant>", mode)
    monkeypatch.setattr(lm, "chat", chat)
    # With edit and both the facts of a run have templated prompts (editlab.data.chat).
    own = replace(FRANCE, prompt=chat.wrap(FRANCE.prompt)) if chat.edits else FRANCE
    (read,) = as_read(lm, [own], FactMemory(PLAIN, lambda: [own]))
    text = "The capital of France is Oslo\nThe capital of France is"
    assert read.question == (f"<user>{text}<assistant>" if chat.evaluates else text)


def test_only_retrieval_has_a_memory():
    assert memory_of(MEMIT(), list) is None
    assert memory_of(Retrieval(k=3), list).method.k == 3
    assert not Retrieval().changes_weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"k": 0}, "Retrieval.k is 0: it must be at least 1"),
     ({"threshold": 1.1}, "Retrieval.threshold is 1.1: it must lie between 0 and 1"),
     ({"template": "New fact"}, "Retrieval.template is 'New fact': it needs {} once")],
)  # fmt: skip
def test_errors_of_settings_of_retrieval(arguments, message):
    with pytest.raises(UserError, match=message):
        Retrieval(**arguments)
