"""``editlab facts check``: lists the wrong records of a file of facts, and counts those that a model holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_device_argument
from editlab.data.fact import Fact
from editlab.data.files import find_facts
from editlab.data.formats import UnreadFields
from editlab.errors import UserError

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="A JSON, JSONL, CSV or TSV file, or worldfacts for the built-in facts.")
    parser.add_argument(
        "--model", help="A model: count the facts whose truth it prefers, P(true) > P(new), and those that it knows."
    )
    add_device_argument(parser)


def _check(given: Namespace) -> None:
    facts: list[Fact] = []
    wrong = 0
    slots: dict[tuple[str, str], tuple[str, Fact]] = {}
    unread = UnreadFields()
    for where, fact, fault, record in find_facts(given.file):
        if record is not None:
            unread.add(record)
        if fact is None:
            wrong += 1
            log.info("%s %s.", where, fault)
            continue
        facts.append(fact)
        if fact.keeps_the_truth:
            log.info("%s has the target %r, which is its truth, so that an edit cannot change it: give it another "
                     "target, or remove it.", where, fact.target_new)  # fmt: skip
        first, earlier = slots.setdefault(fact.slot, (where, fact))
        if earlier is not fact:
            log.info("%s repeats subject and prompt of %s%s: one of them is edited, or all with data.keep_repeats.",
                     where, first[0].lower() + first[1:], _difference(fact, earlier))  # fmt: skip
    if sentence := unread.sentence(given.file):
        log.info("%s", sentence)
    if wrong:
        count = f"{wrong} of {wrong + len(facts)} records of {given.file} {'is' if wrong == 1 else 'are'} wrong"
        raise UserError(f"{count}: correct or remove those named above.")
    log.info("%s", measured(facts, given.file))
    if given.model is not None:
        log.info("%s", held(facts, given.model, given.device))


def held(facts: Sequence[Fact], model: str, device: str) -> str:
    """Count the facts whose truth a model prefers, and those that it knows, as a sentence.

    Args:
        facts: the facts.
        model: name or path of the model.
        device: device on which it runs.

    Raises:
        UserError: No fact has a truth, a fact does not fit the model, or the model cannot be loaded.
    """
    # Imported here, as checking a file needs no model.
    import torch

    from editlab.evaluation.known import count_held
    from editlab.keys.subject_keys import check_lengths
    from editlab.lm.language_model import LanguageModel
    from editlab.lm.placement import device_named

    if all(fact.target_true is None for fact in facts):
        raise UserError("No fact has a truth, so none can be preferred or known: leave --model out, or add truths.")
    place = device_named(device)
    lm = LanguageModel.from_name(model, torch.float32)
    lm.model.to(place)  # type: ignore[arg-type]
    check_lengths(lm, facts, [])
    return f"The model {model} {count_held(lm, facts)}."


def _difference(one: Fact, other: Fact) -> str:
    """Return how two texts that look alike differ; "" if they are equal."""
    if (one.subject, one.prompt) == (other.subject, other.prompt):
        return ""
    return ", in another Unicode form (accented letters as one character or as two)"


def measured(facts: Sequence[Fact], name: str) -> str:
    """The number of facts, and of those with a truth, with paraphrases and with neighbors, as text."""
    total = len(facts)
    truths = sum(fact.target_true is not None for fact in facts)
    paraphrases = sum(bool(fact.paraphrases) for fact in facts)
    neighbors = sum(bool(fact.neighbors) for fact in facts)
    lines = [
        f"{total} fact{'' if total == 1 else 's'} in {name}, none of them wrong; {truths} with a truth, {paraphrases} "
        f"with paraphrases, {neighbors} with neighbors."
    ]
    if truths < total:
        lines.append("Set data.keep to all: without a truth it is unknown whether the model prefers or knows it.")
    return "\n".join(lines)


_CHECK = Command("check", "List the wrong records of a file of facts.", _add_arguments, _check)
COMMAND = Command("facts", "Check files of facts.", commands=(_CHECK,))
