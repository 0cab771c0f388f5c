"""The data module of a run: the facts to edit, their order, and the facts that serve as bystanders."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from lightning import LightningDataModule

from editlab.data.fact import Fact, composed
from editlab.data.files import read_facts
from editlab.data.formats import FactFormat
from editlab.data.stream import EditStream
from editlab.errors import UserError
from editlab.lm.joints import AUTO, JOINTS
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, one_of

log = logging.getLogger(__name__)

CHUNK = 64
"""Number of facts that are scored at once."""


class EditDataModule(LightningDataModule):
    """The facts of one file: ordered, filtered, and split into batches.

    Args:
        path: a JSON, JSONL, CSV or TSV file of facts, or ``worldfacts`` (built in).
        limit: number of facts to edit; default: all.
        batch_size: number of facts edited in one step.
        only_known: edit only facts for which the unedited model prefers the truth, P(true) > P(new); editing a fact
            that the model did not prefer shows little.
        shuffle: order the facts at random by ``seed``; otherwise as in the file.
        seed: seed of the order.
        bystanders: number of facts for ``editlab test``, which are never edited and are about other subjects.
        format: class name of the file's schema; default: the schema that the first record matches.
        keep_repeats: edit all facts with the same subject and prompt, each superseding the one before; otherwise only
            the first is edited.
        joint: what stands between a prompt and its target: a ``space``, ``none``, or ``auto``: a space, but none if the
            language writes none there, as Chinese, Japanese and Thai do. Nothing is put after a prompt that ends in
            white space, such as a rendered chat prompt.
        skip_bad: skip and log records that do not fit their schema or the model; otherwise they raise an error.

    Raises:
        UserError: A size is below 1, or the joint is unknown.
    """

    def __init__(
        self,
        path: str = "worldfacts",
        limit: int | None = None,
        batch_size: int = 16,
        only_known: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        bystanders: int = 100,
        format: FactFormat | None = None,
        skip_bad: bool = False,
        keep_repeats: bool = False,
        joint: str = AUTO,
    ) -> None:
        super().__init__()
        at_least_one("data", limit=limit, batch_size=batch_size, bystanders=bystanders)
        one_of("data", JOINTS, joint=joint)
        self.path = path
        self.limit = limit
        self.batch_size = batch_size
        self.only_known = only_known
        self.shuffle = shuffle
        self.seed = seed
        self.bystanders = bystanders
        self.format = format
        self.skip_bad = skip_bad
        self.keep_repeats = keep_repeats
        self.joint = joint
        self.candidates: list[Fact] = []
        self.facts: list[Fact] = []
        self.fault: Callable[[Fact], str | None] = lambda fact: None
        """Returns why a fact does not fit the model, as a predicate such as ``has no token ...``, or None if it fits.
        The owner of the model sets this function."""
        self._skipped: set[Fact] = set()

    def setup(self, stage: str | None = None) -> None:
        """Read and order the facts; unless ``keep_repeats`` is set, keep only the first of each subject and prompt."""
        if self.candidates:
            return
        facts = read_facts(self.path, self.format, self.skip_bad)
        if self.shuffle:
            random.Random(self.seed).shuffle(facts)
        first: dict[tuple[str, str], Fact] = {}
        for fact in facts:
            first.setdefault(fact.slot, fact)
        self.candidates = facts if self.keep_repeats else list(first.values())
        if len(first) < len(facts):
            what = "supersede earlier ones" if self.keep_repeats else "are skipped (data.keep_repeats keeps them)"
            log.info("%d records of %s repeat a subject and prompt and %s", len(facts) - len(first), self.path, what)

    def select(self, is_known: Callable[[Sequence[Fact]], Sequence[bool]]) -> None:
        """Fix the facts to edit.

        Args:
            is_known: returns for each of the given facts whether the unedited model prefers the truth; it is called
                with the facts in order, and only until the limit is reached.

        Raises:
            UserError: A fact has no true target or does not fit the model, or the model prefers the truth of none.
        """
        self._name_unchanged_truths()
        wanted = self.limit or len(self.candidates)
        fitting = self.fitting(self.candidates)
        if not self.only_known:
            self.facts = list(islice(fitting, wanted))
            if not self.facts:
                raise UserError(f"None of the facts in {self.path} fits the model: shorten them.")
            return
        if any(fact.target_true is None for fact in self.candidates):
            raise UserError(
                f"{self.path} has facts without a true target, so it is unknown whether the model prefers the truth: "
                "set data.only_known to false."
            )
        kept: list[Fact] = []
        checked = 0
        with progress(total=min(wanted, len(self.candidates)), desc="Known facts", unit="fact") as bar:
            while len(kept) < wanted and (chunk := list(islice(fitting, CHUNK))):
                for fact, known in zip(chunk, is_known(chunk), strict=True):
                    if len(kept) < wanted:
                        checked += 1
                        kept += [fact] if known else []
                bar.update(len(kept) - bar.n)
        log.info("The model prefers the truth of %d of the first %d facts of %s", len(kept), checked, self.path)
        if not kept:
            raise UserError(
                f"The model prefers the truth of none of the facts in {self.path}: set data.only_known to false."
            )
        self.facts = kept

    def _name_unchanged_truths(self) -> None:
        """Log the facts whose new target is their truth."""
        kept = [fact for fact in self.candidates if fact.keeps_the_truth]
        if kept:
            some = ", ".join(f"{fact.question[:40]!r} with {fact.target_new!r}" for fact in kept[:3])
            log.warning(
                "%d of the facts have a target that is their truth, so that an edit cannot change them (%s%s): give "
                "them another target, or remove them.", len(kept), some, ", ..." if len(kept) > 3 else "",
            )  # fmt: skip

    def fitting(self, facts: Iterable[Fact]) -> Iterator[Fact]:
        """Yield the facts that fit the model, checking each when it is needed; ``skip_bad`` skips the other facts.

        Raises:
            UserError: A fact does not fit, and ``skip_bad`` is off.
        """
        for fact in facts:
            fault = self.fault(fact)
            if fault is None:
                yield fact
                continue
            named = f"fact {fact.question[:40]!r}... {fault}"
            if not self.skip_bad:
                raise UserError(f"The {named}, or skip the fact (data.skip_bad).")
            if fact not in self._skipped:
                log.warning("Skipped: the %s.", named)
            self._skipped.add(fact)

    def train_dataloader(self) -> EditStream:
        """Return the batches to edit."""
        return EditStream(self.facts, self.batch_size)

    def val_dataloader(self) -> Any:
        """Return the edited facts of the checkpoint for ``editlab validate``; during ``fit``, return no facts."""
        if self.trainer is None or self.trainer.state.fn != "validate":
            return []
        edited = getattr(self.trainer.lightning_module, "edited_facts", [])
        if not edited:
            raise UserError("No fact has been edited yet: give a checkpoint with --ckpt_path.")
        return EditStream(list(self.fitting(edited)), CHUNK)

    def test_dataloader(self) -> EditStream:
        """Return the bystanders for ``editlab test``: facts about subjects that are not edited."""
        bystanders = list(islice(self.fitting(self._unedited()), self.bystanders))
        if not bystanders:
            raise UserError(f"Every subject of {self.path} is edited, so no bystander is left: lower data.limit.")
        return EditStream(bystanders, CHUNK)

    def spare_facts(self, count: int) -> list[Fact]:
        """Return up to ``count`` facts about subjects that are not edited, none of them a bystander of ``test``.

        Facts that are measured during a run must not be those that ``test`` measures, so bystanders are excluded.
        """
        return list(islice(self.fitting(self._unedited()), self.bystanders, self.bystanders + count))

    def other_facts(self, count: int) -> list[Fact]:
        """Return up to ``count`` bystanders of a run: facts with a truth, about subjects that are not edited.

        Where the built-in facts are edited, these are the first of the bystanders of ``test``; otherwise they are
        built-in facts in a fixed random order. Facts that do not fit the model are left out.
        """
        others = self._unedited()[: self.bystanders] if self.path == "worldfacts" else []
        if not others and count:  # facts of another file, or facts given from Python
            builtin = read_facts("worldfacts")
            random.Random(0).shuffle(builtin)
            subjects = self._edited_subjects()
            others = [fact for fact in builtin if composed(fact.subject) not in subjects]
        fitting = (fact for fact in others if fact.target_true is not None and self.fault(fact) is None)
        return list(islice(fitting, count))

    def facts_to_try(self, count: int) -> list[Fact]:
        """Return up to ``count`` facts for trials before the facts to edit are fixed.

        They are taken from the facts after the limit and before the bystanders of ``test``. If those are too few, the
        first facts are added, although they are edited too.
        """
        candidates = list(self.fitting(self.candidates)) if self.skip_bad else self.candidates
        beyond = candidates[self.limit :] if self.limit else []
        spare = beyond[: max(0, len(beyond) - self.bystanders)][-count:]
        remaining = (fact for fact in candidates if fact not in spare)
        return list(self.fitting(islice(chain(spare, remaining), count)))

    def _unedited(self) -> list[Fact]:
        subjects = self._edited_subjects()
        return [fact for fact in reversed(self.candidates) if composed(fact.subject) not in subjects]

    def _edited_subjects(self) -> set[str]:
        edited = self.facts or list(getattr(self.trainer and self.trainer.lightning_module, "edited_facts", []))
        return {composed(fact.subject) for fact in edited}

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Return the batch unchanged, because facts hold no tensors."""
        return batch
