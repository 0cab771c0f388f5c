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
from pathlib import Path
from textwrap import wrap

import torch
from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_device_argument
from editlab.errors import UserError
from editlab.lm.generate import Answer, answer, require_words
from editlab.lm.loading.load import load
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
    """the answer of the model itself, if there are no edits"""
    after: Answer | None


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", type=str, default=[], help="Default: read from standard input, one on each line."
    )
    parser.add_argument("--ckpt_path", type=str, help="A checkpoint, or a run's folder: its edits are asked.")
    parser.add_argument("--delta", type=str, help="A patch of editlab set or export --delta-only, in their place.")
    parser.add_argument(
        "--model",
        type=str,
        help="Name or path of the base model, if it has moved since the run; alone, a model that answers by itself.",
    )
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
    if given.ckpt_path is not None and given.delta is not None:
        raise UserError("--ckpt_path and --delta are both given: choose one, as each holds edits of its own.")
    delta = None
    if given.ckpt_path is not None:
        delta = Delta.from_checkpoint(find_checkpoint(given.ckpt_path))
    elif given.delta is not None:
        delta = Delta.load(Path(given.delta).expanduser())
    elif given.model is None:
        raise UserError(
            "Nothing says which model is asked: give --ckpt_path for a run, --delta for a patch, or --model for a "
            "model by itself."
        )
    device = device_named(given.device)
    prompts = given.prompts or _prompts_from_input()
    return ask(delta, prompts, given.new_tokens, given.top, given.model, device)


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
    delta: Delta | None,
    prompts: list[str],
    new_tokens: int,
    top: int,
    base: str | None = None,
    device: torch.device | None = None,
) -> list[Pair]:
    """Answers of the unedited model and of the edited one to each prompt.

    Args:
        delta: the edits; None to ask the model ``base`` by itself.
        prompts: what is asked.
        new_tokens: number of tokens of the continuation.
        top: number of most likely next tokens.
        base: name or path of the base model; default: the delta's.
        device: device of the model; default: the CPU.

    Raises:
        UserError: A prompt is empty or too long, or the base model is not the one that was edited.
    """
    for prompt in prompts:  # all are checked before the first is answered
        require_words(prompt)
    model, tokenizer = load(str(base), torch.float32) if delta is None else delta.base(base)
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    before = [answer(model, tokenizer, prompt, new_tokens, top) for prompt in prompts]
    if delta is None:
        return [Pair(prompt, found, None) for prompt, found in zip(prompts, before, strict=True)]
    delta.put_on(model)
    after = [answer(model, tokenizer, prompt, new_tokens, top) for prompt in prompts]
    return [Pair(*three) for three in zip(prompts, before, after, strict=True)]


def _plain(pair: Pair) -> dict[str, object]:
    def side(one: Answer) -> dict[str, object]:
        tokens = [{"token": token, "probability": probability} for token, probability in one.next]
        return {"continuation": one.continuation, "next": tokens}

    if pair.after is None:
        return {"prompt": pair.prompt, "answer": side(pair.before)}
    return {"prompt": pair.prompt, "before": side(pair.before), "after": side(pair.after)}


def render(pair: Pair, with_text: bool = True) -> str:
    """The answers as columns that fill the terminal, up to a largest and from a least width."""
    sides = [pair.before] if pair.after is None else [pair.before, pair.after]
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size().columns))
    column = (width - _LABEL - 2) // len(sides)
    rows: list[tuple[str, ...]] = [] if pair.after is None else [("", "before", "after")]
    if with_text:
        texts = (wrap(_visible(one.continuation), column) or ["(the text ends)"] for one in sides)
        labels = ("continuation",)
        rows += list(zip_longest(labels, *texts, fillvalue=""))
    nexts = zip_longest(*(one.next for one in sides))
    for rank, tokens in enumerate(nexts, start=1):
        rows.append((f"{rank}. next token", *(_token(token, column) for token in tokens)))
    lines = [
        " ".join([f"{label:{_LABEL}}", *(f"{cell:{column}}" for cell in cells)]).rstrip() for label, *cells in rows
    ]
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
