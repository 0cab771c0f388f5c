"""The data module of a run: the facts to edit, their order, and the facts that serve as bystanders."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from lightning import LightningDataModule

from editlab.data.fact import SIDES, Fact, composed
from editlab.data.files import read_facts
from editlab.data.formats import FIELD, SUBJECTS, FactFormat, check_columns
from editlab.data.neighbors import without_edited_neighbors
from editlab.data.portability import with_questions_of
from editlab.data.stream import EditStream
from editlab.errors import UserError
from editlab.lm.joints import AUTO, JOINTS
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, one_of

log = logging.getLogger(__name__)

WORLDFACTS = "worldfacts"
"""Path of the built-in facts."""

CHUNK = 64
"""Number of facts that are scored at once."""


ALL, PREFERRED, KNOWN = KEEP = ("all", "preferred", "known")
"""Settings of ``data.keep``."""
SPLITS = (ALL, *SIDES)
"""Settings of ``data.split``."""
PREDICATES = {PREFERRED: "prefers the truth of", KNOWN: "knows"}
"""What the model does with the facts that a setting of ``data.keep`` keeps."""


class EditDataModule(LightningDataModule):
    """The facts of one file: ordered, filtered, and split into batches.

    Args:
        path: a JSON, JSONL, CSV or TSV file of facts, or ``worldfacts`` (built in).
        limit: number of facts to edit; default: all.
        batch_size: number of facts edited in one step.
        keep: which facts are edited: ``preferred`` ones, for which the unedited model finds the truth likelier than
            the new target, P(true) > P(new); ``known`` ones, for which the model's own greedy answer after the edit
            prompt begins with the truth or one of its aliases; or ``all``. Editing a fact that the model did not
            prefer shows little.
        split: half of the facts on which settings are chosen (``dev``) or reported (``test``), or ``all``. A fact's
            half depends on its subject and prompt alone (:attr:`~editlab.data.fact.Fact.side`).
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
        columns: names of a fact's fields -> their names in the file, such as ``{prompt: question, target: ans}``, for a
            file of no known schema.
        subject: the subject of each fact: the ``field`` of its record; ``infer``, which guesses it where the record has
            none; or ``last_token``: the whole prompt, so that the edit acts at the prompt's last token.

    Raises:
        UserError: A size is below 1, or a word is none of those of its setting.
    """

    def __init__(
        self,
        path: str = "worldfacts",
        limit: int | None = None,
        batch_size: int = 16,
        keep: str = PREFERRED,
        split: str = ALL,
        shuffle: bool = True,
        seed: int = 0,
        bystanders: int = 100,
        format: FactFormat | None = None,
        skip_bad: bool = False,
        keep_repeats: bool = False,
        joint: str = AUTO,
        columns: dict[str, str] | None = None,
        subject: str = FIELD,
    ) -> None:
        super().__init__()
        at_least_one("data", limit=limit, batch_size=batch_size, bystanders=bystanders)
        one_of("data", JOINTS, joint=joint)
        one_of("data", SUBJECTS, subject=subject)
        check_columns(columns or {})
        one_of("data", KEEP, keep=keep)
        one_of("data", SPLITS, split=split)
        self.path = path
        self.limit = limit
        self.batch_size = batch_size
        self.keep = keep
        self.split = split
        self.shuffle = shuffle
        self.seed = seed
        self.bystanders = bystanders
        self.format = format
        self.skip_bad = skip_bad
        self.keep_repeats = keep_repeats
        self.joint = joint
        self.columns = columns
        self.subject = subject
        self.candidates: list[Fact] = []
        self.facts: list[Fact] = []
        self.selection: dict[str, Any] = {}
        """How the facts to edit were selected, for the summary: file, ``keep``, ``split``, and counts of what was
        measured."""
        self.templated: Callable[[Sequence[Fact]], list[Fact]] = list
        """Puts the prompts of further facts into the candidates' chat template. The owner of the model sets it."""
        self.fault: Callable[[Fact], str | None] = lambda fact: None
        """Returns why a fact does not fit the model, as a predicate such as ``has no token ...``, or None if it fits.
        The owner of the model sets this function."""
        self._skipped: set[Fact] = set()

    def setup(self, stage: str | None = None) -> None:
        """Read and order the facts; unless ``keep_repeats`` is set, keep only the first of each subject and prompt.

        Raises:
            UserError: The file cannot be read, or none of its facts is in the half that ``split`` names.
        """
        if self.candidates:
            return
        facts = read_facts(self.path, self.format, self.skip_bad, columns=self.columns, subject=self.subject)
        if self.split != ALL:
            facts = [fact for fact in facts if fact.side == self.split]
            if not facts:
                raise UserError(f"No fact of {self.path} is in the {self.split} half: set data.split to all.")
        if self.shuffle:
            random.Random(self.seed).shuffle(facts)
        first: dict[tuple[str, str], Fact] = {}
        for fact in facts:
            first[fact.slot] = with_questions_of(first.get(fact.slot, fact), fact)
        self.candidates = facts if self.keep_repeats else list(first.values())
        if len(first) < len(facts):
            what = "supersede earlier ones" if self.keep_repeats else "are skipped (data.keep_repeats keeps them)"
            log.info("%d records of %s repeat a subject and prompt and %s", len(facts) - len(first), self.path, what)

    def select(self, holds: Callable[[Sequence[Fact]], Sequence[bool]]) -> None:
        """Fix the facts to edit, without the neighbors whose subject one of them edits.

        Args:
            holds: returns for each of the given facts whether the unedited model prefers or knows its truth, as
                ``keep`` asks; it is called with the facts in order, and only until the limit is reached.

        Raises:
            UserError: A fact has no true target or does not fit the model, or the model holds the truth of none.
        """
        self._name_unchanged_truths()
        self.selection = {"path": self.path, "keep": self.keep, "split": self.split, "facts": len(self.candidates)}
        self.facts = self._first() if self.keep == ALL else self._held(holds)
        self.facts, left_out = without_edited_neighbors(self.facts, self.facts)
        neighbors = left_out + sum(len(fact.neighbors) for fact in self.facts)
        self.selection |= {"neighbors": neighbors, "neighbors_left_out": left_out}
        if left_out:
            log.info(
                "%d of the %d neighbors are about subjects that this run edits, and are left out of NS", left_out,
                neighbors,
            )  # fmt: skip

    def _first(self) -> list[Fact]:
        facts = list(islice(self.fitting(self.candidates), self.limit or len(self.candidates)))
        if not facts:
            raise UserError(f"None of the facts in {self.path} fits the model: shorten them.")
        return facts

    def _held(self, holds: Callable[[Sequence[Fact]], Sequence[bool]]) -> list[Fact]:
        """Return the first facts whose truth the model holds, as many as the limit."""
        predicate = PREDICATES[self.keep]
        if any(fact.target_true is None for fact in self.candidates):
            raise UserError(
                f"{self.path} has facts without a true target, so it cannot be measured which facts are {self.keep}: "
                "set data.keep to all."
            )
        kept: list[Fact] = []
        checked = 0
        wanted, fitting = self.limit or len(self.candidates), self.fitting(self.candidates)
        title = f"{self.keep.capitalize()} facts"
        with progress(total=min(wanted, len(self.candidates)), desc=title, unit="fact") as bar:
            while len(kept) < wanted and (chunk := list(islice(fitting, CHUNK))):
                for fact, held in zip(chunk, holds(chunk), strict=True):
                    if len(kept) < wanted:
                        checked += 1
                        kept += [fact] if held else []
                bar.update(len(kept) - bar.n)
        self.selection |= {"checked": checked, self.keep: len(kept)}
        log.info("The model %s %d of the first %d facts of %s", predicate, len(kept), checked, self.path)
        if not kept:
            raise UserError(f"The model {predicate} none of the facts in {self.path}: set data.keep to all.")
        return kept

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
        bystanders = list(islice(self._unedited(), self.bystanders))
        if not bystanders:
            raise UserError(f"Every subject of {self.path} is edited, so no bystander is left: lower data.limit.")
        return EditStream(bystanders, CHUNK)

    def spare_facts(self, count: int) -> list[Fact]:
        """Return up to ``count`` facts about subjects that are not edited, none of them a bystander of ``test``.

        Facts that are measured during a run must not be those that ``test`` measures, so bystanders are excluded.
        """
        return list(islice(self._unedited(), self.bystanders, self.bystanders + count))

    def other_facts(self, count: int) -> list[Fact]:
        """Return up to ``count`` bystanders of a run: facts with a truth, about subjects that are not edited.

        Where the built-in facts are edited, these are the first of the bystanders of ``test``; otherwise they are
        built-in facts in a fixed random order. Facts that do not fit the model are left out.
        """
        edited = {composed(fact.subject) for fact in self._edited()}
        others: list[Fact] = []
        if self.path == WORLDFACTS:
            own = (fact for fact in reversed(self.candidates) if composed(fact.subject) not in edited)
            others = list(islice((fact for fact in own if self.fault(fact) is None), self.bystanders))
        if not others and count:  # facts of another file, or facts given from Python
            builtin = self.templated(read_facts(WORLDFACTS))
            random.Random(0).shuffle(builtin)
            others = [f for f in builtin if composed(f.subject) not in edited and self.fault(f) is None]
        return [fact for fact in others if fact.target_true is not None][:count]

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

    def _unedited(self) -> Iterator[Fact]:
        """Yield the facts about subjects that are not edited, the last first, without neighbors about edited ones."""
        edited = self._edited()
        subjects = {composed(fact.subject) for fact in edited}
        others = [fact for fact in reversed(self.candidates) if composed(fact.subject) not in subjects]
        return self.fitting(without_edited_neighbors(others, edited)[0])

    def _edited(self) -> list[Fact]:
        return self.facts or list(getattr(self.trainer and self.trainer.lightning_module, "edited_facts", []))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Return the batch unchanged, because facts hold no tensors."""
        return batch
