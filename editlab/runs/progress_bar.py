"""The progress bar of a run: one line that counts edits and shows the time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from editlab.metrics.names import IMMEDIATE, of_group
from editlab.utils.progress import within

LAYOUT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
"""Parts of the line; the bar takes the width that the other parts leave."""

EDITS, EVALUATED, BYSTANDERS = "edits", "batches of edits evaluated", "batches of bystanders evaluated"
"""What the bars of ``fit``, ``validate`` and ``test`` count."""


class EditProgressBar(TQDMProgressBar):
    """Counts edited facts instead of epochs and batches, and disappears before the summary is shown.

    Bars of parts of a step, such as the optimization of values, are shown as words in the same line.

    Args:
        refresh_rate: number of batches after which the numbers in the line are renewed; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)
        self.bar: Tqdm | None = None
        """the bar of ``fit`` while it is on the screen"""

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of ``fit``."""
        return self._new(EDITS)

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar of ``validate``."""
        return self._new(EVALUATED)

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar of ``test``."""
        return self._new(BYSTANDERS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, at the number of edits so far, which is above 0 for a resumed run."""
        self.bar = self.train_progress_bar = self.init_train_tqdm()
        facts: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.bar.reset(total=len(facts.facts))
        self.bar.initial = self.bar.n = _edits(pl_module)
        self.bar.refresh()
        within(None if self.bar.disable else self.bar)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Leave the bar as it is: a run is one pass over its facts."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the number of edits so far."""
        if self.bar is None or self.is_disabled:
            return
        self.bar.n = _edits(pl_module)
        if (batch_idx + 1) % self.refresh_rate == 0:
            self.bar.set_postfix_str(_in_words(self.get_metrics(trainer, pl_module)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""

    def on_train_end(self, *_: Any) -> None:
        """Remove the bar, before all edits are evaluated and the summary is shown."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that it is not drawn again after the error message."""
        self._remove()

    def on_validation_batch_start(self, *arguments: Any, **named: Any) -> None:
        """Set the number of batches of ``validate``."""
        super().on_validation_batch_start(*arguments, **named)
        self.val_progress_bar.set_description_str(EVALUATED)

    def on_test_batch_start(self, *arguments: Any, **named: Any) -> None:
        """Set the number of batches of ``test``."""
        super().on_test_batch_start(*arguments, **named)
        self.test_progress_bar.set_description_str(BYSTANDERS)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the numbers of the last batch by their short names: those right after its step."""
        return of_group(dict(super().get_metrics(trainer, pl_module)), IMMEDIATE)

    def _new(self, title: str) -> Tqdm:
        return Tqdm(
            desc=title,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=LAYOUT,
        )

    def _remove(self) -> None:
        within(None)
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _edits(module: Any) -> int:
    return int(module.edits)


def _in_words(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def with_progress_bar(callbacks: Sequence[Callback], wanted: bool) -> list[Callback]:
    """Return the callbacks and, if a bar is wanted and none of them is one, an :class:`EditProgressBar`."""
    own = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return [*callbacks, *([EditProgressBar()] if wanted and not own else [])]
