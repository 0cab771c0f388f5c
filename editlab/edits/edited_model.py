"""EditedModel: a language model, loaded once, with the layers that are edited and the original weights at hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Literal

import lightning
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editlab.distributed import ranks
from editlab.edits.edited_layer import EditedLayer, unedited
from editlab.edits.layer_search import AUTO
from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import room_beside
from editlab.solver.device import AUTO as AUTO_DEVICE
from editlab.solver.device import choose_device


class EditedModel(lightning.LightningModule):
    """A causal language model some of whose layers are edited.

    Args:
        language_model: ``smollm2-135m`` (built in), a transformers hub id, or a folder.
        layers: blocks whose MLP output projection is edited, or ``auto``: :meth:`edit_at` names them later.
        edit_module: path of the edited module inside a block, where it is not found by structure.
        device_map: transformers' own; the Trainer then does not move the model.

    Raises:
        UserError: for layers that can not be.
    """

    def __init__(
        self,
        language_model: str,
        layers: list[int] | Literal["auto"],
        edit_module: str | None,
        device_map: str | dict[str, int | str] | None,
    ) -> None:
        super().__init__()
        named = [] if isinstance(layers, str) else layers
        if layers != AUTO and (not named or len(set(named)) != len(named)):
            raise UserError(f"model.layers is {layers}: name at least one layer, and each once, or say {AUTO}.")
        self.language_model = language_model
        self.layer_numbers = sorted(named)
        self.edit_module = edit_module
        self.device_map = device_map
        self.solver_setting = AUTO_DEVICE
        self.strict_loading = False
        self.edited: nn.ModuleDict = nn.ModuleDict()
        self.adjusted: nn.ModuleDict = nn.ModuleDict()

    def configure_model(self) -> None:
        """Loads the language model once, in the Trainer's dtype."""
        if hasattr(self, "lm"):
            return
        if self.device_map is not None and ranks.count() > 1 and self.trainer.num_devices > 1:
            raise UserError(
                "model.device_map spreads one copy of the model over a machine's devices, and each process has a copy "
                "of its own: set --trainer.devices 1, or leave it out."
            )
        if getattr(self._trainer.precision_plugin if self._trainer else None, "scaler", None) is not None:
            raise UserError(
                "trainer.precision 16-mixed scales gradients, of which an edit has none: set bf16-mixed or 16-true."
            )
        dtype, device = torch.get_default_dtype(), self._trainer.strategy.root_device if self._trainer else None
        self.use(LanguageModel.from_name(self.language_model, dtype, self.edit_module, self.device_map, device))

    def use(self, lm: LanguageModel) -> None:
        """Takes this model to edit; what :meth:`configure_model` does with the one that it loads.

        Raises:
            UserError: where ``layers`` are not its own, or can not share an edit.
        """
        self.lm = lm
        if self.layer_numbers:
            self.edit_at(self.layer_numbers)

    def edit_at(self, layers: Sequence[int]) -> None:
        """Takes these of the model's layers to edit; raises as :meth:`use` does."""
        self.layer_numbers = sorted(layers)
        anatomy = self.lm.anatomy
        for layer in self.layer_numbers:
            self.edited[str(layer)] = EditedLayer(anatomy.edit_module(layer), anatomy.transposed(layer))
        self.site = Site.of(self.lm, self.layer_numbers[-1])
        if not self.site.in_stream and len(self.layer_numbers) > 1:
            raise UserError(
                f"{self.language_model} has a norm after its MLP, so an edit can not be spread over several layers: "
                "give one layer in model.layers."
            )

    @property
    def layers(self) -> list[EditedLayer]:
        """The edited layers, lowest first."""
        return [self.edited[str(layer)] for layer in self.layer_numbers]  # type: ignore[misc]

    @property
    def changed_layers(self) -> list[EditedLayer]:
        """Every weight that may differ from the original: the edited ones, and others that a callback adjusts."""
        return [*self.layers, *self.adjusted.values()]  # type: ignore[list-item]

    def changed_layer(self, path: str) -> EditedLayer:
        """The linear map at ``path`` in the language model as one that may be changed; made so where it is not yet."""
        anatomy = self.lm.anatomy
        paths = {anatomy.edit_name(n): n for n in self.layer_numbers}
        if path in paths:
            return self.edited[str(paths[path])]  # type: ignore[return-value]
        key = path.replace(".", "/")  # a dot can not be in a module's name
        if key not in self.adjusted:
            module = self.lm.model.get_submodule(path)
            self.adjusted[key] = EditedLayer(module, isinstance(module, Conv1D))
        return self.adjusted[key]  # type: ignore[return-value]

    @cached_property
    def fingerprint(self) -> str:
        """Of the unedited weights."""
        with self.unedited():
            return fingerprint(self.lm.model)

    @cached_property
    def model_key(self) -> str:
        """Of the unedited model: what is found with it and kept in the cache folder is kept under this."""
        return model_key(self.fingerprint, self.lm.model)

    def unedited(self) -> AbstractContextManager[None]:
        """Within it the model is the original one."""
        return unedited(self.changed_layers)

    @property
    def solver_device(self) -> torch.device:
        """Where the closed form is solved; see :func:`editlab.solver.device.choose_device`."""
        sizes = [self.lm.anatomy.key_size(layer) for layer in self.layer_numbers]
        return choose_device(self.solver_setting, self.lm.device, sizes, room_beside(self.lm.model))
