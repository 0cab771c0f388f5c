"""``editlab ask``: shows the model's answers before and after its edits, side by side."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap

import torch
from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_checkpoint_arguments, add_device_argument
from editlab.errors import UserError
from editlab.lm.generate import Answer, answer, require_words
from editlab.lm.placement import device_named
from editlab.runs.checkpoint import find_checkpoint
from editlab.runs.delta import Delta

log = logging.getLogger(__name__)

_NARROWEST, _WIDEST = 60, 120
_LABEL = 14


@dataclass(frozen=True)
class Pair:
    """The answers to one prompt before and after the edits."""

    prompt: str
    before: Answer
    after: Answer


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", type=str, help="Default: read from standard input, one on each line.")
    add_checkpoint_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--new_tokens", type=int, default=20, help="Number of tokens of the continuation.")
    parser.add_argument("--top", type=int, default=5, help="Number of likeliest next tokens to show.")
    parser.add_argument(
        "--json", action="store_true", help="Write a JSON array to standard output, and messages elsewhere."
    )


def _ask(given: Namespace) -> None:
    for name, least in (("new_tokens", 0), ("top", 0)):
        if given[name] < least:
            raise UserError(f"--{name} is {given[name]}: it must be at least {least}.")
    if given.json:
        with redirect_stdout(sys.stderr):  # a program reads standard output, so messages must not be in it
            pairs = _answers(given)
        sys.stdout.write(json.dumps([_plain(pair) for pair in pairs], ensure_ascii=False, indent=2) + "\n")
    else:
        for pair in _answers(given):
            log.info("%s\n", render(pair, given.new_tokens > 0))


def _answers(given: Namespace) -> list[Pair]:
    delta = Delta.from_checkpoint(find_checkpoint(given.ckpt_path))
    device = device_named(given.device)
    return ask(delta, given.prompts or _prompts_from_input(), given.new_tokens, given.top, given.model, device)


def _prompts_from_input() -> list[str]:
    if sys.stdin.isatty():
        sys.stderr.write("Type one prompt on each line; end with an empty line or Ctrl-D.\n")
    prompts = []
    try:
        for line in sys.stdin:
            if line.strip():
                prompts.append(line.rstrip("\r\n"))
            elif sys.stdin.isatty():
                break
    except UnicodeDecodeError as error:
        raise UserError(
            f"Standard input is not in {error.encoding.upper()} ({error.reason}): convert the prompts, or give them as "
            "arguments."
        ) from error
    if not prompts:
        raise UserError("There is no prompt: give some as arguments, or one on each line of standard input.")
    return prompts


def ask(
    delta: Delta,
    prompts: list[str],
    new_tokens: int,
    top: int,
    base: str | None = None,
    device: torch.device | None = None,
) -> list[Pair]:
    """Answers of the unedited model and of the edited one to each prompt.

    Raises:
        UserError: A prompt is empty or too long, or the base model is not the one that was edited.
    """
    for prompt in prompts:  # all are checked before the first is answered
        require_words(prompt)
    model, tokenizer = delta.base(base)
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    before = [answer(model, tokenizer, prompt, new_tokens, top) for prompt in prompts]
    delta.put_on(model)
    after = [answer(model, tokenizer, prompt, new_tokens, top) for prompt in prompts]
    return [Pair(*three) for three in zip(prompts, before, after, strict=True)]


def _plain(pair: Pair) -> dict[str, object]:
    def side(one: Answer) -> dict[str, object]:
        tokens = [{"token": token, "probability": probability} for token, probability in one.next]
        return {"continuation": one.continuation, "next": tokens}

    return {"prompt": pair.prompt, "before": side(pair.before), "after": side(pair.after)}


def render(pair: Pair, with_text: bool = True) -> str:
    """The two answers as columns that fill the terminal, up to a largest and from a least width."""
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size().columns))
    column = (width - _LABEL - 2) // 2
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    if with_text:
        texts = (wrap(_visible(one.continuation), column) or ["(the text ends)"] for one in (pair.before, pair.after))
        labels = ("continuation",)
        rows += list(zip_longest(labels, *texts, fillvalue=""))
    nexts = zip_longest(pair.before.next, pair.after.next)
    for rank, (before, after) in enumerate(nexts, start=1):
        rows.append((f"{rank}. next token", _token(before, column), _token(after, column)))
    lines = [f"{label:{_LABEL}} {left:{column}} {right}".rstrip() for label, left, right in rows]
    return "\n".join([pair.prompt, *lines])


def _visible(text: str) -> str:
    return re.sub(r"\s*\n\s*", " / ", text.strip())


def _token(one: tuple[str, float] | None, width: int) -> str:
    if one is None:
        return ""
    token, probability = one
    shown = json.dumps(token, ensure_ascii=False)  # quotes show the space that begins a word
    return f"{probability:5.3f} {shown}"[:width]


COMMAND = Command("ask", "Show the model's answers to prompts before and after its edits.", _add_arguments, _ask)
