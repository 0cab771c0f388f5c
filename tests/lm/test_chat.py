"""Tests of the chat template around a prompt, on made-up templates, against the tokenizer's own rendering."""

from __future__ import annotations

import pytest

from editlab.errors import UserError
from editlab.lm.chat import MODES, Chat
from tests.lm.conftest import lm_of
from tests.tiny import tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def with_template(template, **settings):
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_wrapped_prompt_is_the_tokenizers_own_rendering(mode):
    tokenizer = with_template(TEMPLATE)
    chat = Chat.of(tokenizer, mode)
    prompt = "The capital of France is"
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.wrap(prompt) == text == "<s>[user] The capital of France is\n[assistant]\n"
    assert chat.unwrap(text) == prompt
    assert (chat.edits, chat.evaluates) == (mode != "evaluate", mode != "edit")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template: set it to none, or name a model"),
        ("You are a poet.", "does not hold the user's text once and literally: set it to none"),
        ("{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}", "literally"),
        ("{{ messages[0]['content'] | upper }}", "does not hold the user's text once and literally"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "once and literally"),
        ("{{ '{}' }}{{ messages[0]['content'] }}", "literally"),
        ("{{ raise_exception('a system turn must come first') }}", r"takes no single user turn \(a system turn must"),
    ],
)
def test_templates_that_cannot_be_used_raise_an_error(template, message):
    with pytest.raises(UserError, match=message):
        Chat.of(with_template(template), "edit")
    assert Chat.of(with_template(template), "none") is None


def test_a_context_stands_inside_the_users_turn():
    """The index of a character of the prompt is that in context + prompt, with and without a chat."""
    lm = lm_of("llama")
    lm.chat = Chat.of(with_template(TEMPLATE), "both")
    try:
        prompt = lm.chat.wrap("Oslo lies in")
        text = lm.in_context("It is said. ", prompt)
        assert text == "<s>[user] It is said. Oslo lies in\n[assistant]\n"
        end = prompt.index("Oslo") + len("Oslo")
        assert text[: len("It is said. ") + end].endswith("Oslo")
        assert lm.in_context("It is said. ", "Oslo lies in") == "It is said. Oslo lies in"
    finally:
        lm.chat = None
