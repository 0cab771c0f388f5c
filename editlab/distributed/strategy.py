"""A Lightning strategy for several processes that share forward passes (:mod:`editlab.distributed.ranks`)."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from editlab.distributed import ranks
from editlab.utils import compat

NAME = "editlab_ddp"
"""Name of the strategy in ``--trainer.strategy``."""


class EditStrategy(DDPStrategy):
    """Strategy with one process per device and the whole model in each; all processes end with the same weights.

    The processes divide the forward passes among themselves. Launching, devices and the process group are those of
    Lightning's DDP. The module is not wrapped: a closed form has no backward pass whose gradients would be averaged.
    """

    strategy_name = NAME

    def setup_distributed(self) -> None:
        """Initialize the process group and join it as a rank."""
        super().setup_distributed()
        ranks.join(compat.timeout_of(self))

    def configure_ddp(self) -> None:
        """Do nothing: the module is not wrapped for averaging gradients."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait until all ranks have reached this call.

        Raises:
            EditLabError: Another rank was killed.
        """
        with ranks.explained():
            super().barrier(*args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        """Send the error to the other ranks; kill those that do not receive it, if this process started them."""
        if not ranks.notify(exception) and self.launcher is not None and hasattr(self.launcher, "kill"):
            self.launcher.kill(signal.SIGTERM)

    def teardown(self) -> None:
        """Tear down the process group and leave it."""
        super().teardown()
        ranks.leave()


StrategyRegistry.register(NAME, EditStrategy, description="One process per device; the facts are divided among them.")
