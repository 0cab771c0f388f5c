"""An optional judge of generated answers: any server with OpenAI's interface for chat completions.

A judge is asked about one answer at a time whether it states the target, and must say yes or no. It only ever adds a
column: if it cannot be reached, or answers something else, a run goes on without its verdicts.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from editlab.errors import UserError
from editlab.utils.validation import above_zero, at_least_one, not_negative

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
"""Environment variable with the key that is sent to the judge; a local server needs none."""

QUESTION = """A language model continued a text.

Text: {prompt}
Continuation: {answer}

Does the continuation state that the answer is "{target}"{aliases}? Answer with one word, yes or no."""
"""What a judge is asked about each answer."""

RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""Status codes of a busy or failing server, after which a request is repeated; others mean a wrong request."""

_VERDICT = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)
"""The whole of an answer that is a verdict."""


@dataclass
class JudgeSettings:
    """Settings of the judge of generated answers."""

    url: str | None = None
    """Address of a server with OpenAI's interface, up to its version, such as ``http://localhost:8000/v1``; default: no
    judge. The environment variable ``OPENAI_API_KEY`` holds the key."""
    model: str | None = None
    """Name of the judge's model, as the server knows it."""
    timeout: float = 30.0
    """Seconds that one request may take."""
    tries: int = 3
    """Number of times that a request is tried before the judge is given up for the run."""
    backoff: float = 1.0
    """Seconds before the second try; they double before each further one."""

    def __post_init__(self) -> None:
        where = "model.evaluation.judge"
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise UserError(f"{where}.url is {self.url!r}: give an address such as http://localhost:8000/v1.")
        if self.url is not None and not self.model:
            raise UserError(f"{where}.url is set and {where}.model is not: name the judge's model.")
        above_zero(where, timeout=self.timeout)
        at_least_one(where, tries=self.tries)
        not_negative(where, backoff=self.backoff)


class Item(NamedTuple):
    """One generated answer to judge."""

    prompt: str
    """the prompt that was continued"""
    answer: str
    """the continuation"""
    target: str
    """what it should state"""
    aliases: tuple[str, ...] = ()
    """other names of the target"""

    @property
    def question(self) -> str:
        """What the judge is asked."""
        others = f" (or {', '.join(self.aliases)})" if self.aliases else ""
        return QUESTION.format(prompt=self.prompt, answer=self.answer, target=self.target, aliases=others)


class _Down(Exception):  # noqa: N818 - not an error of a run
    """The judge cannot be reached or refuses; says why."""


def judged(settings: JudgeSettings, items: Sequence[Item]) -> list[bool | None] | None:
    """The judge's verdict on each answer.

    Args:
        settings: of the judge.
        items: answers, in any number.

    Returns:
        For each answer whether it states its target; None for one on which the judge said neither yes nor no. None as a
        whole if there is no judge, or if it failed on an answer after all tries (with one warning), as verdicts on a
        part of the answers could not be compared with other runs'.
    """
    if settings.url is None:
        return None
    verdicts: list[bool | None] = []
    for item in items:
        try:
            verdicts.append(verdict(_asked(settings, item.question)))
        except _Down as error:
            log.warning("The judge at %s is left out, because %s; the run goes on without it.", settings.url, error)
            return None
    unclear = sum(one is None for one in verdicts)
    if unclear:
        log.warning(
            "The judge said neither yes nor no to %d of %d answers, which have no verdict.", unclear, len(items)
        )
    return verdicts


def verdict(text: str | None) -> bool | None:
    """True for yes, False for no, None for anything else; only case and punctuation around the word are ignored.

    >>> verdict("Yes."), verdict("**no**"), verdict("Yes and no"), verdict(None)
    (True, False, None, None)
    """
    found = _VERDICT.fullmatch(text or "")
    return found[1].lower() == "yes" if found else None


def _asked(settings: JudgeSettings, question: str) -> str | None:
    """The judge's answer; None if the server's reply has none.

    Raises:
        _Down: if the server could not be reached, failed, or refused, at all tries.
    """
    body = {"model": settings.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY, "").strip():
        headers["Authorization"] = f"Bearer {key}"
    address = f"{str(settings.url).rstrip('/')}/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    why = ""
    for number in range(settings.tries):
        if number:
            time.sleep(settings.backoff * 2 ** (number - 1))
        try:
            with urllib.request.urlopen(request, timeout=settings.timeout) as reply:
                return _text(reply.read())
        except urllib.error.HTTPError as error:
            why = f"it answers with status {error.code}"
            error.close()
            if error.code not in RETRIED:
                hint = f" (is the key in {KEY} right?)" if error.code in (401, 403) else ""
                raise _Down(why + hint) from error
        except TimeoutError:
            why = f"it did not answer within {settings.timeout:g} s"
        except (OSError, http.client.HTTPException) as error:  # not reachable, or the connection broke
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            why = f"it did not answer within {settings.timeout:g} s" if late else f"it cannot be reached ({reason})"
        except ValueError as error:  # its message may hold the key
            raise _Down(f"the request cannot be sent: check the address and {KEY}") from error
    raise _Down(f"{why}, {settings.tries} times" if settings.tries > 1 else why)


def _text(reply: bytes) -> str | None:
    """The text of a chat completion; None if the reply is none."""
    try:
        content: Any = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
