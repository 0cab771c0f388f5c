"""Facts for a run: which are edited, in which order, and which must stay as they are."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from lightning import LightningDataModule

from editlab.data.fact import Fact
from editlab.data.files import read_facts
from editlab.data.formats import FactFormat
from editlab.data.stream import EditStream
from editlab.errors import UserError
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one

log = logging.getLogger(__name__)

CHUNK = 64
"""Facts that the model is asked about at a time."""


class EditDataModule(LightningDataModule):
    """The facts of one file, ordered, chosen and cut into batches.

    Args:
        path: a JSON, JSONL, CSV or TSV file of facts, or ``worldfacts`` (built in).
        limit: facts to edit; all where not given.
        batch_size: facts a step.
        only_known: edit only facts whose truth the unedited model finds likelier than the new target; an edit of a
            fact that the model never knew shows little.
        shuffle: order the facts by ``seed`` and not as in the file.
        seed: of the order.
        bystanders: facts for ``editlab test``, never edited and on other subjects.
        format: the file's schema, by class name; found by looking at the file where not given.
        keep_repeats: edit every fact of one subject and prompt, the later ones superseding the earlier; otherwise only
            the first is edited.
        skip_bad: leave out records that do not fit, into their schema or into the model, and say which; without it they
            are an error.

    Raises:
        UserError: for sizes under 1.
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
    ) -> None:
        super().__init__()
        at_least_one("data", limit=limit, batch_size=batch_size, bystanders=bystanders)
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
        self.candidates: list[Fact] = []
        self.facts: list[Fact] = []
        self.fault: Callable[[Fact], str | None] = lambda fact: None
        """What makes a fact unfit for the model, as the end of a sentence; None for one that is fit. Whoever has the
        model sets it."""
        self._left_out: set[Fact] = set()

    def setup(self, stage: str | None = None) -> None:
        """Reads and orders the facts; of those with one subject and prompt the first is kept, or all."""
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
            what = "supersede earlier ones" if self.keep_repeats else "are left out (data.keep_repeats keeps them)"
            log.info("%d records of %s repeat a subject and prompt and %s", len(facts) - len(first), self.path, what)

    def select(self, is_known: Callable[[Sequence[Fact]], Sequence[bool]]) -> None:
        """Fixes the facts to edit.

        Args:
            is_known: whether the unedited model knows each of some facts; asked in the facts' order, and only until
                the limit is reached.

        Raises:
            UserError: where facts name no truth to know, or none is known, or one does not fit into the model.
        """
        wanted = self.limit or len(self.candidates)
        fitting = self.fitting(self.candidates)
        if not self.only_known:
            self.facts = list(islice(fitting, wanted))
            if not self.facts:
                raise UserError(f"None of the facts in {self.path} fits into the model: shorten them.")
            return
        if any(fact.target_true is None for fact in self.candidates):
            raise UserError(
                f"{self.path} has facts without a true target, so what the model knows can not be told: set "
                "data.only_known to false."
            )
        kept: list[Fact] = []
        looked = 0
        with progress(total=min(wanted, len(self.candidates)), desc="Known facts", unit="fact") as bar:
            while len(kept) < wanted and (chunk := list(islice(fitting, CHUNK))):
                for fact, known in zip(chunk, is_known(chunk), strict=True):
                    if len(kept) < wanted:
                        looked += 1
                        kept += [fact] if known else []
                bar.update(len(kept) - bar.n)
        log.info("The model knows %d of the %d facts looked at in %s", len(kept), looked, self.path)
        if not kept:
            raise UserError(f"The model knows none of the facts in {self.path}: set data.only_known to false.")
        self.facts = kept

    def fitting(self, facts: Iterable[Fact]) -> Iterator[Fact]:
        """Those that fit into the model, each looked at when it is asked for; with ``skip_bad`` others are left out.

        Raises:
            UserError: for one that does not, without ``skip_bad``.
        """
        for fact in facts:
            fault = self.fault(fact)
            if fault is None:
                yield fact
                continue
            named = f"fact {fact.question[:40]!r}... {fault}"
            if not self.skip_bad:
                raise UserError(f"The {named}, or leave the fact out (data.skip_bad).")
            if fact not in self._left_out:
                log.warning("Left out: the %s.", named)
            self._left_out.add(fact)

    def train_dataloader(self) -> EditStream:
        """The batches to edit."""
        return EditStream(self.facts, self.batch_size)

    def val_dataloader(self) -> Any:
        """For ``editlab validate``: the facts that the checkpoint has edited. Empty within ``fit``."""
        if self.trainer is None or self.trainer.state.fn != "validate":
            return []
        edited = getattr(self.trainer.lightning_module, "edited_facts", [])
        if not edited:
            raise UserError("No fact has been edited yet: give a checkpoint with --ckpt_path.")
        return EditStream(list(self.fitting(edited)), CHUNK)

    def test_dataloader(self) -> EditStream:
        """For ``editlab test``: facts about subjects that are not edited."""
        others = list(islice(self.fitting(self._others()), self.bystanders))
        if not others:
            raise UserError(f"Every subject of {self.path} is edited, so no bystander is left: lower data.limit.")
        return EditStream(others, CHUNK)

    def spare_facts(self, count: int) -> list[Fact]:
        """Up to ``count`` facts on subjects that are not edited, none of them among the bystanders of ``test``.

        What a run looks at on its way must not be what ``test`` measures, so bystanders are no reserve.
        """
        return list(islice(self.fitting(self._others()), self.bystanders, self.bystanders + count))

    def facts_to_try(self, count: int) -> list[Fact]:
        """Up to ``count`` facts to try something on before those to edit are fixed.

        They come from beyond the limit, and from before the bystanders of ``test``, as far as there are such facts;
        otherwise they are the first ones, which are edited too.
        """
        candidates = list(self.fitting(self.candidates)) if self.skip_bad else self.candidates
        beyond = candidates[self.limit :] if self.limit else []
        spare = beyond[: max(0, len(beyond) - self.bystanders)][-count:]
        others = (fact for fact in candidates if fact not in spare)
        return list(self.fitting(islice(chain(spare, others), count)))

    def _others(self) -> list[Fact]:
        edited = self.facts or list(getattr(self.trainer and self.trainer.lightning_module, "edited_facts", []))
        subjects = {fact.subject for fact in edited}
        return [fact for fact in reversed(self.candidates) if fact.subject not in subjects]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Batches are lists of facts, which stay as they are."""
        return batch
