"""A language model with its edited layers and its original weights, as a LightningModule without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Final, Literal

import lightning
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editlab.data.chat import as_edited
from editlab.distributed import ranks
from editlab.edits.edited_layer import EditedLayer, unedited
from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.chat import MODES, NONE, Chat
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.joints import AUTO as AUTO_JOINT
from editlab.lm.language_model import LanguageModel
from editlab.lm.quantized import in_full_precision, is_quantized
from editlab.utils import compat
from editlab.utils.validation import one_of

AUTO: Final = "auto"
"""Setting of ``layers`` that leaves the choice to :mod:`editlab.edits.layer_search`."""


class EditedModel(lightning.LightningModule):
    """A causal language model some of whose layers are edited.

    Its attribute ``site_setting`` names the output that targets replace (:meth:`Site.of
    <editlab.keys.subject_keys.Site.of>`); it is None unless a subclass sets it.

    Args:
        language_model: ``smollm2-135m`` (built in), a transformers hub id, or a folder.
        layers: blocks whose MLP output projection is edited, or ``auto``: :meth:`edit_at` sets them later.
        edit_module: path of the edited module inside a block; default: found by structure.
        device_map: transformers' ``device_map``; the Trainer then does not move the model.
        chat_template: where prompts go through the tokenizer's chat template: ``none``, ``edit``, ``evaluate``,
            ``both``.
        made_for: entries of the model's configuration that the settings were chosen for, such as ``model_type`` and
            ``num_hidden_layers``; the presets in ``configs/models`` set it.

    Raises:
        UserError: ``layers`` is empty or has a layer twice, or there is no such use of the template.
    """

    def __init__(
        self,
        language_model: str,
        layers: list[int] | Literal["auto"],
        edit_module: str | None,
        device_map: str | dict[str, int | str] | None,
        chat_template: str = NONE,
        made_for: dict[str, int | str] | None = None,
    ) -> None:
        super().__init__()
        self.site_setting: str | None = None
        one_of("model", MODES, chat_template=chat_template)
        named = [] if isinstance(layers, str) else layers
        if layers != AUTO and (not named or len(set(named)) != len(named)):
            raise UserError(f"model.layers is {layers}: give at least one layer, and each once, or {AUTO}.")
        self.language_model = language_model
        self.layer_numbers = sorted(named)
        self.edit_module = edit_module
        self.device_map = device_map
        self.chat_template = chat_template
        self.made_for = made_for or {}
        self.strict_loading = False
        self.edited: nn.ModuleDict = nn.ModuleDict()
        self.adjusted: nn.ModuleDict = nn.ModuleDict()

    def configure_model(self) -> None:
        """Loads the language model once, in the Trainer's dtype, and sets how it joins prompts and targets.

        With a chat template for edits, the facts of the data module get templated prompts.

        Raises:
            UserError: The model cannot be loaded, or its tokenizer has no chat template that can be used.
        """
        if not hasattr(self, "lm"):
            self._load()
        data = getattr(compat.trainer_of(self), "datamodule", None)
        self.lm.joint = getattr(data, "joint", AUTO_JOINT)
        self.lm.chat = Chat.of(self.lm.tokenizer, self.chat_template)
        if data is not None:
            data.templated = partial(as_edited, chat=self.lm.chat)
            data.candidates = data.templated(data.candidates)

    def _load(self) -> None:
        if self.device_map is not None and ranks.count() > 1 and self.trainer.num_devices > 1:
            raise UserError(
                "model.device_map spreads one copy of the model over all devices, and each of several processes has a "
                "copy: set --trainer.devices 1, or remove model.device_map."
            )
        trainer = compat.trainer_of(self)
        if getattr(trainer.precision_plugin if trainer else None, "scaler", None) is not None:
            raise UserError(
                "trainer.precision 16-mixed scales gradients, and an edit has none: set bf16-mixed or 16-true."
            )
        dtype, device = torch.get_default_dtype(), trainer.strategy.root_device if trainer else None
        self.use(LanguageModel.from_name(self.language_model, dtype, self.edit_module, self.device_map, device))

    def use(self, lm: LanguageModel) -> None:
        """Sets the model to edit; :meth:`configure_model` does this with the model that it loads.

        Raises:
            UserError: The settings were made for another kind of model; the model does not have these layers, or an
                edit cannot be spread over them.
        """
        self._require_kind(lm)
        self.lm = lm
        if is_quantized(lm.model):  # the fingerprint is that of the weights as they were loaded
            self.fingerprint = fingerprint(lm.model)
        if self.layer_numbers:
            self.edit_at(self.layer_numbers)

    def _require_kind(self, lm: LanguageModel) -> None:
        config = lm.model.config.get_text_config(decoder=True)
        found = {name: getattr(config, name, None) for name in self.made_for}
        if found != self.made_for:
            raise UserError(
                f"The settings were chosen for a model with {_listed(self.made_for)} (model.made_for), and "
                f"{self.language_model} has {_listed(found)}: use the preset of this model, if configs/models has one, "
                "or set model.made_for to null and model.layers to auto."
            )

    def edit_at(self, layers: Sequence[int]) -> None:
        """Sets the layers to edit; raises as :meth:`use` does."""
        self.layer_numbers = sorted(layers)
        for layer in self.layer_numbers:
            self.edited[str(layer)] = EditedLayer.of(self.lm, layer)
        self.site = Site.of(self.lm, self.layer_numbers[-1], self.site_setting)
        if not self.site.in_stream and len(self.layer_numbers) > 1:
            why = (
                "model.site is mlp (as model.conventions published sets it for ROME)"
                if self.lm.anatomy.additive
                else f"{self.language_model} has a norm after its MLP"
            )
            raise UserError(f"{why}, so an edit cannot be spread over several layers: give one layer in model.layers.")

    @property
    def layers(self) -> list[EditedLayer]:
        """The edited layers, lowest first."""
        return [self.edited[str(layer)] for layer in self.layer_numbers]  # type: ignore[misc]

    @property
    def layers_by_number(self) -> dict[int, EditedLayer]:
        """Layer number -> the edited layer, lowest first."""
        return dict(zip(self.layer_numbers, self.layers, strict=True))

    @property
    def changed_layers(self) -> list[EditedLayer]:
        """Every weight that may differ from the original: the edited layers, and maps that a callback adjusts."""
        return [*self.layers, *self.adjusted.values()]  # type: ignore[list-item]

    def changed_layer(self, path: str) -> EditedLayer:
        """The linear map at ``path`` in the language model, as a layer whose weight may be changed."""
        anatomy = self.lm.anatomy
        paths = {anatomy.edit_name(n): n for n in self.layer_numbers}
        if path in paths:
            return self.edited[str(paths[path])]  # type: ignore[return-value]
        key = path.replace(".", "/")  # a module's name cannot contain a dot
        if key not in self.adjusted:
            module = in_full_precision(self.lm.model, path)
            self.adjusted[key] = EditedLayer(module, isinstance(module, Conv1D))
        return self.adjusted[key]  # type: ignore[return-value]

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the unedited weights."""
        with self.unedited():
            return fingerprint(self.lm.model)

    @cached_property
    def model_key(self) -> str:
        """Key of the unedited model in the cache folder."""
        return model_key(self.fingerprint, self.lm.model)

    def unedited(self) -> AbstractContextManager[None]:
        """Puts the original weights in place inside the ``with``."""
        return unedited(self.changed_layers)


def _listed(entries: Mapping[str, object]) -> str:
    return " and ".join(f"{name} {value}" for name, value in entries.items())
