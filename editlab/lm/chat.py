"""A tokenizer's chat template, as the text that it puts before and after the user's turn."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from editlab.errors import UserError

NONE = "none"
MODES = (NONE, "edit", "evaluate", "both")
"""Where prompts go through the chat template (``model.chat_template``)."""

_PLACEHOLDER = "editlab0prompt"
"""Stands for the prompt while the template is rendered: no template trims, escapes or contains it."""


@dataclass(frozen=True)
class Chat:
    """A chat template around one user turn, and where it is used."""

    head: str
    """text before the user's words, with the system prompt if the template has one"""
    tail: str
    """text after the user's words, up to the beginning of the assistant's answer"""
    mode: str
    """one of :data:`MODES`"""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, mode: str) -> Chat | None:
        """Return a tokenizer's chat template with its generation prompt; None if the mode is ``none``.

        Raises:
            UserError: The tokenizer has no chat template, or it does not hold the user's words as they are.
        """
        if mode == NONE:
            return None
        if not tokenizer.chat_template:
            raise UserError(
                f"model.chat_template is {mode}, and the model's tokenizer has no chat template: set it to none, or "
                "name a model that was trained for chats."
            )
        try:
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": _PLACEHOLDER}], tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template may raise whatever it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"model.chat_template is {mode}, and the tokenizer's chat template takes no single user turn "
                f"({reason}): set it to none."
            ) from error
        head, found, tail = text.partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in tail or "{}" in head + tail:
            raise UserError(
                f"model.chat_template is {mode}, and the tokenizer's chat template does not hold the user's text once "
                "and literally: set it to none."
            )
        return cls(head, tail, mode)

    @property
    def edits(self) -> bool:
        """Whether keys and values are computed at templated prompts."""
        return self.mode in ("edit", "both")

    @property
    def evaluates(self) -> bool:
        """Whether scores and generated answers are those after templated prompts."""
        return self.mode in ("evaluate", "both")

    def wrap(self, prompt: str) -> str:
        """Return a prompt as the user's turn of a chat, up to the beginning of the answer."""
        return self.head + prompt + self.tail

    def unwrap(self, prompt: str) -> str:
        """Return the prompt that :meth:`wrap` was called with."""
        return prompt.removeprefix(self.head).removesuffix(self.tail)
