"""``editlab report``: one run as one HTML page, with what the model says to the edits that it does not hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_device_argument
from editlab.edits.ledger import Ledger, LedgerEntry
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import device_named
from editlab.lm.tokens import encode
from editlab.runs.checkpoint import find_checkpoint, read_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.event_log import EventLog
from editlab.runs.folders import RunFolder
from editlab.runs.report import Missed, Page
from editlab.runs.resume import KEY
from editlab.utils.files import atomic_file

log = logging.getLogger(__name__)

SAID = 10
"""Tokens that the model says to a prompt."""
ROWS = 64
"""Prompts that it answers at a time."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="A run's folder.")
    parser.add_argument("--out", help="The file to write; report.html in the run's folder where not given.")
    parser.add_argument("--no_answers", action="store_true", help="Do not load the model, and leave its answers out.")
    add_device_argument(parser)
    parser.add_argument("--model", help="Where the base model is, if no longer where the run found it: a name or path.")


def _report(given: Namespace) -> None:
    folder = Path(given.run).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {given.run!r}: name a run's, such as lightning_logs/emmet/version_0.")
    out = Path(given.out) if given.out is not None else folder / "report.html"
    device = device_named(given.device)
    path = find_checkpoint(given.run)
    saved = read_checkpoint(path)[KEY]
    delta = Delta.from_checkpoint(path)
    ledger = Ledger.of(saved)
    run = RunFolder(folder)
    page = Page(
        title=f"{folder.resolve().parent.name}, {folder.resolve().name}: {delta.language_model}, layers "
        f"{', '.join(map(str, delta.layers))}",
        settings=delta.history.settings,
        summary=run.summary,
        curve=run.curve,
        fates=ledger.fates,
        missed=None if given.no_answers else find_missed(delta, ledger, _learnt(saved), given.model, device),
        adapted=delta.history.adapted,
        events={file.stem: EventLog(file).read() for file in sorted(folder.glob("*_events.jsonl"))},
    )
    with atomic_file(out) as temporary:
        Path(temporary).write_text(page.to_html(), encoding="utf-8")
    log.info("%s is written: open it in a browser.", out)


def _learnt(saved: dict[str, Any]) -> list[bool]:
    """Whether each edit was right just after its batch, in the ledger's order."""
    return [
        bool(hit)
        for scores in saved["evaluation"]["scores"].get("immediate", [])
        for hit in scores["edit"]["hit_new"]
    ]  # fmt: skip


def find_missed(
    delta: Delta, ledger: Ledger, learnt: Sequence[bool], base: str | None, device: torch.device | None = None
) -> list[Missed]:
    """The edits that the edited model should hold and does not, with what it says instead.

    Args:
        delta: what was edited.
        ledger: all edits.
        learnt: whether each was right just after its batch.
        base: where the base model is; default: what the run called it.
        device: where the model runs; default: the CPU.
    """
    standing = {id(fact) for fact in ledger.standing}
    numbered: list[tuple[int, LedgerEntry]] = [(i, e) for i, e in enumerate(ledger) if id(e.fact) in standing]
    if not numbered:
        return []
    model, tokenizer = delta.base(base)
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    delta.put_on(model)
    lm = LanguageModel(model, tokenizer, delta.edit_module)
    facts = [entry.fact for _, entry in numbered]
    hits = score_facts(lm, facts, paraphrases=False, neighbors=0).edit.hit_new.tolist()
    gone = [pair for pair, hit in zip(numbered, hits, strict=True) if not hit]
    said = _said(lm, [entry.fact.question for _, entry in gone])
    return [
        Missed(i + 1, e.batch + 1, e.fact.question, e.fact.target_new, words, i < len(learnt) and learnt[i])
        for (i, e), words in zip(gone, said, strict=True)
    ]


def _said(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """The likeliest continuation of each prompt, in groups of one length."""
    ids = [encode(lm.tokenizer, prompt).ids for prompt in prompts]
    said = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    with tqdm(total=len(prompts), desc="Answers", unit="fact", leave=False) as bar:
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), ROWS):
                some = members[start : start + ROWS]
                for i, new in zip(some, lm.sample([ids[i] for i in some], SAID, 0, greedy=True), strict=True):
                    said[i] = str(lm.tokenizer.decode(new[length:], skip_special_tokens=True)).strip()
                bar.update(len(some))
    return said


COMMAND = Command("report", "Write one run as one HTML page, with the edits that it lost.", _add_arguments, _report)
