"""The parts of a language model that an edit needs, found by the model's structure and behaviour.

No model family is named here. The transformer blocks are the only list of modules with as many entries as the model
has layers. Within a block the MLP's output projection is recognized by its effect: several copies of a short text run
through the block; the output of every linear map is fixed at its undisturbed value, and in each copy the output of one
map is shifted at the first token (:mod:`editlab.lm.probe`). A shift cannot pass through another linear map, so every
observed change is a direct effect:

- the shift of an MLP's output projection changes the block's output, at the same token only;
- the shift of an attention's output projection does the same, but the input of that projection is a mixture over the
  tokens: a shift of the values at the first token changes it at a later token. No shift changes an MLP's input at a
  later token.

A block with a mixture of experts has no such map. There the edited map is the output projections of its experts side by
side (:mod:`editlab.lm.experts`).

Shapes are not sufficient: an attention's output is as wide as an MLP's, and all maps of a block may be square. A table
of names is not sufficient either: PEFT's covers about thirty model types. It agrees with the probe on them (a test
checks this), but importing it takes more than a second, and the probe takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editlab.errors import UserError
from editlab.lm.experts import JointMap, experts_of, joint_map
from editlab.lm.precision import rounding
from editlab.lm.probe import TOKENS, LinearMap, linear_maps, random_signs, run_block

_LATER = range(1, TOKENS)
_SAME = 0.05
"""Relative error up to which a shift counts as unchanged; bfloat16 rounding changes it less, and a norm more."""
EditedMap = LinearMap | JointMap
"""A map whose weight may be edited."""
_HOW_TO_NAME = "name the linear map to edit with model.edit_module, as a path inside a block"


@dataclass(frozen=True)
class Anatomy:
    """The blocks, the edited maps and the output embeddings of a model."""

    blocks: nn.ModuleList
    """The transformer blocks, lowest first."""
    block_path: str
    """Path of :attr:`blocks` in the model, such as ``model.layers``."""
    edit_path: str
    """Path of the edited map (the MLP's output projection) inside a block, such as ``mlp.down_proj``."""
    head: nn.Module
    """The output embeddings: from the last hidden state to the logits."""
    additive: bool
    """Whether adding x to the edited map's output adds x to the block's output (not if a norm follows it)."""
    joint: Mapping[int, JointMap] = field(default_factory=dict)
    """Number of a block -> the joint map of its experts; empty if the edited map is a linear map."""

    @property
    def editable(self) -> list[int]:
        """Numbers of the blocks that have the edited map."""
        plain = [number for number, block in enumerate(self.blocks) if self.edit_path in linear_maps(block)]
        return sorted(self.joint) or plain

    def edit_module(self, layer: int) -> EditedMap:
        """Return the edited map of block ``layer``, counted from 0.

        Raises:
            UserError: There is no such layer, or its block has no such map.
        """
        if not 0 <= layer < len(self.blocks):
            raise UserError(
                f"there is no layer {layer}: the model's layers are 0 to {len(self.blocks) - 1}; name others in "
                "model.layers, or set it to auto"
            )
        module = self.joint.get(layer) or linear_maps(self.blocks[layer]).get(self.edit_path)
        if module is None:
            raise UserError(
                f"layer {layer} has no linear map {self.edit_path} (layers {self.editable} have): {_HOW_TO_NAME}"
            )
        return module

    def transposed(self, layer: int) -> bool:
        """Return whether the weight is stored as ``[d_k, d_v]`` (GPT-2's Conv1D) and not as ``[d_v, d_k]``."""
        return is_transposed(self.edit_module(layer))

    def require_one_map(self, what: str) -> None:
        """Check that a block has one edited linear map, and not one for each of several experts.

        Args:
            what: what needs that, such as ``editlab plan``.

        Raises:
            UserError: The edited maps are those of experts.
        """
        if self.joint:
            raise UserError(
                f"{what} is for blocks with one edited linear map, and this model's are mixtures of experts: do "
                "without it."
            )

    def moments_shape(self, layer: int) -> tuple[int, ...]:
        """Return the shape of C0: [d_k, d_k], or one block [features, features] for each expert of a joint map."""
        module = self.edit_module(layer)
        if isinstance(module, JointMap):
            return module.count, module.features, module.features
        return self.key_size(layer), self.key_size(layer)

    def edit_name(self, layer: int) -> str:
        """Return the path of the edited map of block ``layer`` in the whole model."""
        return f"{self.block_path}.{layer}.{self.edit_path}"

    def key_size(self, layer: int) -> int:
        """Return d_k, the width of the edited map's input."""
        return _widths(self.edit_module(layer))[0]

    def value_size(self, layer: int) -> int:
        """Return d_v, the width of the edited map's output, which is the width of the residual stream."""
        return _widths(self.edit_module(layer))[1]


def context_length(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a model accepts; None if its configuration does not state it."""
    longest: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear map stores its weight as ``[d_k, d_v]``, as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D)


def read_anatomy(model: PreTrainedModel, edit_module: str | None = None) -> Anatomy:
    """Find the parts of ``model`` that an edit needs, without changing the model.

    ``edit_module`` names the map to edit, so that it is not searched for: a path inside a block (``mlp.c_proj``) or a
    full path with ``{}`` for the layer number (``transformer.h.{}.mlp.c_proj``).

    Raises:
        UserError: The model has no list of blocks or no output embeddings; a block has no single MLP output
            projection and no experts that are one linear map; or ``edit_module`` is not a linear map onto the residual
            stream.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output embeddings: choose a causal language model")
    block_path, blocks = _find_blocks(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    if edit_module is None:
        path = _find_mlp_output(model, blocks[0], width)
    else:
        path = _named(edit_module, block_path, blocks, width)
    joint = _joint_maps(blocks, path, width)
    block = next(block for number, block in enumerate(blocks) if number in joint or path in linear_maps(block))
    return Anatomy(blocks, block_path, path, head, _is_additive(model, block, path), joint)


def _joint_maps(blocks: nn.ModuleList, path: str, width: int) -> dict[int, JointMap]:
    """Number of a block -> the joint map of its experts at ``path``; the first shows which parameter holds them."""
    found: dict[int, JointMap] = {}
    for number, block in enumerate(blocks):
        experts = dict(experts_of(block)).get(path)
        if experts is not None:
            first = next(iter(found.values()), None) or joint_map(experts, width)
            if first is not None:
                found[number] = first.like(experts)
    return found


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the one outermost list of modules with as many entries as the model has layers."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested:
            found[path] = module
    if len(found) != 1:
        lists = f"{len(found)} lists of {depth} modules" if found else f"no list of {depth} modules"
        raise UserError(
            f"{type(model).__name__} has {lists}, one for each layer, so its blocks cannot be identified: "
            "choose a model with one stack of transformer blocks"
        )
    return next(iter(found.items()))


def _find_mlp_output(model: PreTrainedModel, block: nn.Module, width: int) -> str:
    """Find the MLP's output projection of ``block`` by the method in this module's docstring."""
    stacks = dict(experts_of(block))
    if len(stacks) == 1 and joint_map(next(iter(stacks.values())), width) is not None:
        return next(iter(stacks))
    maps = linear_maps(block)
    row = {path: number for number, path in enumerate(maps, start=1)}  # row 0 is left undisturbed

    def fix_and_shift(path: str, output: Tensor, scale: float) -> Tensor:
        fixed = output[:1].expand_as(output).clone()
        fixed[row[path], 0] += scale * random_signs(output)
        return fixed

    trace = run_block(model, block, len(maps) + 1, fix_and_shift)

    def reads_a_mixture(path: str) -> bool:
        return any(_moved(trace.inputs[path], shifted, later) for shifted in row.values() for later in _LATER)

    def writes_to_the_stream(path: str) -> bool:
        moved = [_moved(trace.output, row[path], token) for token in range(TOKENS)]
        return moved == [True] + [False] * (TOKENS - 1)

    found = [
        path
        for path in trace.inputs
        if _widths(maps[path])[1] == width and writes_to_the_stream(path) and not reads_a_mixture(path)
    ]
    unused = {path for path in maps if path not in trace.inputs and _widths(maps[path])[1] == width}
    if len(found) == 1 and not unused and not stacks:
        return found[0]
    raise UserError(
        f"{type(model).__name__} has no single MLP output projection in a block, nor experts that are one linear map: "
        f"{_HOW_TO_NAME}; the maps onto the residual stream are {_listed(block, width)}"
    )


def _moved(x: Tensor, row: int, token: int) -> bool:
    """Return whether more than half of ``x[row, token]`` differs from the undisturbed row 0 by more than rounding."""
    clean, disturbed = x[0, token].float(), x[row, token].float()
    # Rounding inside a 16-bit block changes few elements, because its sums are accumulated in 32 bits.
    tolerance = max(1e-5, rounding(x.dtype, x.device) / 2)
    return ((disturbed - clean).abs() > tolerance * clean.abs()).float().mean().item() > 0.5


def _named(edit_module: str, block_path: str, blocks: nn.ModuleList, width: int) -> str:
    """Resolve the user's ``edit_module`` to a path inside a block."""
    path = edit_module.removeprefix(f"{block_path}.{{}}.")
    if _joint_maps(blocks, path, width):
        return path
    if not any(path in linear_maps(block) and _widths(linear_maps(block)[path])[1] == width for block in blocks):
        raise UserError(
            f"model.edit_module: {edit_module!r} is not a linear map onto the residual stream; in a block of "
            f"{block_path} these are {_listed(blocks[0], width)}"
        )
    return path


def _is_additive(model: PreTrainedModel, block: nn.Module, path: str) -> bool:
    """Measure whether a shift of the edited map's output appears unchanged in the block's output."""
    shift: list[Tensor] = []

    def shift_one_row(name: str, output: Tensor, scale: float) -> Tensor:
        if name != path:
            return output
        shifted = output.clone()
        shifted[1] += scale * random_signs(output)
        shift.append((shifted[1] - output[0]).float())
        return shifted

    trace = run_block(model, block, 2, shift_one_row, dict(experts_of(block)))
    if path not in trace.inputs:  # an expert's output is weighted, and is used for some of the tokens only
        return False
    arrived = (trace.output[1] - trace.output[0]).float()
    # The median ignores the few huge entries of a residual stream, in which 16-bit rounding removes any shift.
    return ((arrived - shift[0]).abs() / shift[0].abs()).median().item() < _SAME


def _widths(module: EditedMap) -> tuple[int, int]:
    """Return the widths of a map's input and output."""
    if isinstance(module, nn.Linear | JointMap):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]


def _listed(block: nn.Module, width: int) -> str:
    return ", ".join(path for path, part in linear_maps(block).items() if _widths(part)[1] == width) or "none"
