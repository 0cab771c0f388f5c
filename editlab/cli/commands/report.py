"""``editlab report``: writes one run as one HTML page, with the model's answers where it does not hold an edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import add_device_argument
from editlab.data.chat import as_evaluated
from editlab.edits.ledger import Ledger, LedgerEntry
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.lm.joints import AUTO
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import device_named
from editlab.metrics.names import IMMEDIATE
from editlab.runs.checkpoint import find_checkpoint, read_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.event_log import EventLog
from editlab.runs.folders import RunFolder
from editlab.runs.patched_model import chat_of
from editlab.runs.report import Example, Missed, Page
from editlab.runs.resume import KEY
from editlab.utils.files import atomic_file
from editlab.utils.progress import progress

log = logging.getLogger(__name__)

ANSWER_TOKENS = 10
"""Number of tokens of each answer."""
EXAMPLES = 10
"""Number of edits that are shown with the answers before and after."""
ROWS = 64
"""Number of prompts that are answered at a time."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="A run's folder.")
    parser.add_argument("--out", help="File to write; default: report.html in the run's folder.")
    parser.add_argument("--no_answers", action="store_true", help="Do not load the model, and show no answers.")
    add_device_argument(parser)
    parser.add_argument("--model", help="Name or path of the base model, if it has moved since the run.")


def _report(given: Namespace) -> None:
    folder = Path(given.run).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {given.run!r}: name a run's folder, such as lightning_logs/emmet/version_0."
        )
    out = Path(given.out) if given.out is not None else folder / "report.html"
    device = device_named(given.device)
    path = find_checkpoint(given.run)
    delta = Delta.from_checkpoint(path, usable=not given.no_answers)
    saved = read_checkpoint(path, verify=False)[KEY]  # verified with the delta
    ledger = Ledger.of(saved)
    run = RunFolder(folder)
    found = (
        None
        if given.no_answers
        else inspect_edits(delta, ledger, _learnt(saved), given.model, device, saved.get("joint", AUTO))
    )
    page = Page(
        title=f"{folder.resolve().parent.name}, {folder.resolve().name}: {delta.language_model}, layers "
        f"{', '.join(map(str, delta.layers))}",
        settings=delta.history.settings,
        summary=run.summary,
        curve=run.curve,
        fates=ledger.fates,
        examples=found[0] if found else (),
        missed=found[1] if found else None,
        adapted=delta.history.adapted,
        outcomes=run.outcomes if run.has_outcomes else (),
        events={file.stem: EventLog(file).read() for file in sorted(folder.glob("*_events.jsonl"))},
    )
    with atomic_file(out) as temporary:
        Path(temporary).write_text(page.to_html(), encoding="utf-8")
    log.info("%s is written: open it in a browser.", out)


def _learnt(saved: dict[str, Any]) -> list[bool]:
    """Whether each edit was right just after its batch, in the ledger's order."""
    scores = saved["evaluation"]["scores"].get(IMMEDIATE)
    # Checkpoints of older versions have a list here, and are reported without this.
    return scores["edit"]["hit_new"].tolist() if isinstance(scores, dict) and scores else []


def inspect_edits(
    delta: Delta,
    ledger: Ledger,
    learnt: Sequence[bool],
    base: str | None,
    device: torch.device | None = None,
    joint: str = AUTO,
) -> tuple[list[Example], list[Missed]]:
    """The edits with the least likely targets, and all that the edited model should hold and does not.

    Args:
        delta: the sums of all updates, with the identity of their base model.
        ledger: all edits.
        learnt: whether each edit was right just after its batch.
        base: name or path of the base model; default: the run's.
        device: device of the model; default: the CPU.
        joint: the run's ``data.joint``.

    Returns:
        At most :data:`EXAMPLES` edits with the answers before and after, the least likely target first; and the edits
        that were missed, with the answers now.
    """
    standing = {id(fact) for fact in ledger.standing}
    numbered: list[tuple[int, LedgerEntry]] = [(i, e) for i, e in enumerate(ledger) if id(e.fact) in standing]
    if not numbered:
        return [], []
    model, tokenizer = delta.base(base)
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    delta.put_on(model)
    lm = LanguageModel(model, tokenizer, delta.edit_module)
    lm.joint, lm.chat = joint, chat_of(tokenizer, delta.history)
    facts = as_evaluated([entry.fact for _, entry in numbered], lm.chat)
    questions = [fact.question for fact in facts]
    scores = score_facts(lm, facts, paraphrases=False, neighbors=0).edit
    hits, likely = scores.hit_new.tolist(), scores.logp_new.exp().tolist()
    order = sorted(range(len(numbered)), key=lambda k: (hits[k], likely[k]))
    worst, missed = order[:EXAMPLES], [k for k, hit in enumerate(hits) if not hit]
    asked = sorted({*worst, *missed})
    after = dict(zip(asked, _answers(lm, [questions[k] for k in asked]), strict=True))
    del lm, model  # one model at a time; taking the delta off again would not give the unedited model's very bits
    model, tokenizer = delta.base(base)
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    before = _answers(LanguageModel(model, tokenizer, delta.edit_module), [questions[k] for k in worst])
    examples = [
        Example(numbered[k][0] + 1, questions[k], numbered[k][1].fact.target_new, old, after[k], likely[k], hits[k])
        for k, old in zip(worst, before, strict=True)
    ]
    lost = []
    for k in missed:
        i, entry = numbered[k]
        known = i < len(learnt) and learnt[i]
        lost.append(Missed(i + 1, entry.batch + 1, questions[k], entry.fact.target_new, after[k], known))
    return examples, lost


def _answers(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """The greedy continuation of each prompt; prompts of one length are run together."""
    ids = [lm.encode(prompt).ids for prompt in prompts]
    answers = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    with progress(total=len(prompts), desc="Answers", unit="fact") as bar:
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), ROWS):
                some = members[start : start + ROWS]
                texts = lm.sample([ids[i] for i in some], ANSWER_TOKENS, 0, greedy=True)
                for i, new in zip(some, texts, strict=True):
                    answers[i] = str(lm.tokenizer.decode(new[length:], skip_special_tokens=True)).strip()
                bar.update(len(some))
    return answers


COMMAND = Command(
    "report", "Write one run as one HTML page, with the edits that the model does not hold.", _add_arguments, _report
)
