"""Lightning's strategy for several processes, which share work (:mod:`editlab.distributed.ranks`), not gradients."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from editlab.distributed import ranks
from editlab.utils import compat

NAME = "editlab_ddp"
"""What ``--trainer.strategy`` takes."""


class EditStrategy(DDPStrategy):
    """One process a device, each with the whole model; they share the forward passes and end with the same weights.

    Launching, devices and the process group are Lightning's DDP's. The module is not wrapped: a closed form has no
    backward pass whose gradients would be averaged.
    """

    strategy_name = NAME

    def setup_distributed(self) -> None:
        """Joins the ranks as soon as there is a process group."""
        super().setup_distributed()
        ranks.join(compat.timeout_of(self))

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the other ranks.

        Raises:
            EditLabError: where one of them is gone.
        """
        with ranks.reaching_others():
            super().barrier(*args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks; those that do not listen are ended, where this process started them."""
        if not ranks.tell(exception) and self.launcher is not None and hasattr(self.launcher, "kill"):
            self.launcher.kill(signal.SIGTERM)

    def teardown(self) -> None:
        """Leaves the ranks."""
        super().teardown()
        ranks.leave()


StrategyRegistry.register(NAME, EditStrategy, description="One process a device; facts are shared among them.")
