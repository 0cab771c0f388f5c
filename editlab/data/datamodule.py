"""Facts for a run: which are edited, in which order, and which must stay as they are."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningDataModule

from editlab.data.fact import Fact
from editlab.data.files import read_facts
from editlab.data.formats import FactFormat
from editlab.data.stream import EditStream
from editlab.errors import UserError
from editlab.progress import progress
from editlab.settings import at_least_one

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
        skip_bad: leave out records that do not fit, and say which; without it they are an error.

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
            UserError: where facts name no truth to know, or none is known.
        """
        wanted = self.limit or len(self.candidates)
        if not self.only_known:
            self.facts = self.candidates[:wanted]
            return
        if any(fact.target_true is None for fact in self.candidates):
            raise UserError(
                f"{self.path} has facts without a true target, so what the model knows can not be told: set "
                "data.only_known to false."
            )
        kept: list[Fact] = []
        looked = 0
        with progress(total=wanted, desc="Known facts", unit="fact") as bar:
            for start in range(0, len(self.candidates), CHUNK):
                chunk = self.candidates[start : start + CHUNK]
                for fact, known in zip(chunk, is_known(chunk), strict=True):
                    if len(kept) < wanted:
                        looked += 1
                        kept += [fact] if known else []
                bar.update(len(kept) - bar.n)
                if len(kept) == wanted:
                    break
        log.info("The model knows %d of the %d facts looked at in %s", len(kept), looked, self.path)
        if not kept:
            raise UserError(f"The model knows none of the facts in {self.path}: set data.only_known to false.")
        self.facts = kept

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
        return EditStream(edited, CHUNK)

    def test_dataloader(self) -> EditStream:
        """For ``editlab test``: facts about subjects that are not edited."""
        others = self._others()
        if not others:
            raise UserError(f"Every subject of {self.path} is edited, so no bystander is left: lower data.limit.")
        return EditStream(others[: self.bystanders], CHUNK)

    def spare_facts(self, count: int) -> list[Fact]:
        """Up to ``count`` facts on subjects that are not edited, none of them among the bystanders of ``test``.

        What a run looks at on its way must not be what ``test`` measures, so bystanders are no reserve.
        """
        return self._others()[self.bystanders :][:count]

    def facts_to_try(self, count: int) -> list[Fact]:
        """Up to ``count`` facts to try something on before those to edit are fixed.

        They come from beyond the limit, and from before the bystanders of ``test``, as far as there are such facts;
        otherwise they are the first ones, which are edited too.
        """
        beyond = self.candidates[self.limit :] if self.limit else []
        spare = beyond[: max(0, len(beyond) - self.bystanders)][-count:]
        return [*spare, *(fact for fact in self.candidates if fact not in spare)][:count]

    def _others(self) -> list[Fact]:
        edited = self.facts or list(getattr(self.trainer and self.trainer.lightning_module, "edited_facts", []))
        subjects = {fact.subject for fact in edited}
        return [fact for fact in reversed(self.candidates) if fact.subject not in subjects]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Batches are lists of facts, which stay as they are."""
        return batch
