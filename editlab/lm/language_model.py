"""A causal language model with its tokenizer and its anatomy: the one object that the rest of editlab talks to."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from editlab.distributed import ranks
from editlab.errors import NotFiniteError, UserError
from editlab.lm.anatomy import Anatomy, context_length, read_anatomy
from editlab.lm.forward import by_row, logits_only_at, reading
from editlab.lm.loading.load import load
from editlab.lm.memory import by_halves
from editlab.lm.packing import can_pack, lay_out_whole, pads_between
from editlab.lm.placement import DeviceMap, runs_on
from editlab.lm.probe import remembers_by_attention
from editlab.lm.tokens import by_beginning, by_length
from editlab.utils.rng import private_draws

TOKENS_A_PASS = 4096
"""Tokens in one forward pass: large enough for full-speed matrix products, small enough for any memory."""


class NextTokenScores(NamedTuple):
    """Of the tokens asked for, one tensor [n] a row."""

    logps: list[Tensor]
    """log-probabilities, float32"""
    hits: list[Tensor]
    """whether each is the argmax, bool"""
    tops: list[Tensor]
    """log-probabilities of the argmax in their places, float32"""


class LanguageModel(nn.Module):
    """A transformers model in eval mode without gradients, with what editlab needs to know of it.

    Args:
        model: any causal language model of transformers.
        tokenizer: its fast tokenizer.
        edit_module: path of the module to edit inside a block; found by structure where not given.
        placed: the model lies where it shall stay, whatever device the Trainer has.

    Raises:
        UserError: where there is no such module, what the model says is not finite, or a recurrent state is part of
            what it keeps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edit_module: str | None = None,
        placed: bool = False,
    ) -> None:
        super().__init__()
        self.placed = placed or getattr(model, "hf_device_map", None) is not None
        self.model = model
        self.tokenizer = tokenizer
        self.anatomy: Anatomy = read_anatomy(model, edit_module)
        self.longest = context_length(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.blocks_give_tuples = self._probe_tuples()
        if not remembers_by_attention(model):
            raise UserError(
                f"{type(model).__name__} keeps something else of earlier tokens than their keys and values, such as a "
                "recurrent state: choose a model whose blocks all attend."
            )
        self.packs: bool = can_pack(self)
        """whether rows may be packed (:mod:`editlab.lm.packing`)"""
        if not self.packs and not pads_between(self):
            raise UserError(
                f"{type(model).__name__} counts padding among the places between two tokens, so prompts of different "
                "lengths would not be read alike: choose a model with positions, or biases by positions."
            )

    @classmethod
    def from_name(
        cls,
        name: str,
        dtype: torch.dtype,
        edit_module: str | None = None,
        device_map: DeviceMap | None = None,
        device: torch.device | None = None,
    ) -> LanguageModel:
        """Loads a model by name, folder or file; see :func:`editlab.lm.loading.load.load` for arguments and errors."""
        return cls(*load(name, dtype, device_map, device), edit_module, placed=device_map is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> LanguageModel:
        # The Trainer moves its module to one device; a model that a device_map has placed stays where it is.
        return self if self.placed else super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings."""
        return runs_on(self.model.get_input_embeddings())

    @torch.no_grad()
    def _probe_tuples(self) -> bool:
        kinds: list[bool] = []
        block = self.anatomy.blocks[0]
        handle = block.register_forward_hook(lambda m, a, output: kinds.append(isinstance(output, tuple)))
        try:
            logits = self.run(torch.zeros(1, 1, dtype=torch.long)).logits
        finally:
            handle.remove()
        if not bool(torch.isfinite(logits).all()):
            raise UserError(
                "What the model says is not finite: its weights are damaged, or its type is too narrow "
                "(trainer.precision)."
            )
        return kinds[0]

    def run(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, **arguments: Any) -> Any:
        """The model's own forward on ids [rows, tokens]; masks and positions go along where the model takes them."""
        if positions is not None and self._takes_positions:
            arguments["position_ids"] = positions.to(self.device)
        if mask is not None:
            arguments["attention_mask"] = mask.to(self.device)
        arguments.setdefault("use_cache", False)
        return self.model(input_ids=ids.to(self.device), **arguments)

    def passes(self, rows: Sequence[Sequence[int]], tokens: int | None = None) -> list[list[int]]:
        """Numbers of the rows that go through the model together.

        Args:
            rows: token ids.
            tokens: in a pass at most, where it shall not be :data:`TOKENS_A_PASS`: padded ones, or where rows are
                packed those that differ or stand behind others.
        """
        tokens = TOKENS_A_PASS if tokens is None else tokens
        return by_beginning(rows, tokens) if self.packs else by_length([len(row) for row in rows], tokens)

    @torch.no_grad()
    def read(
        self, rows: Sequence[Sequence[int]], modules: dict[Any, tuple[nn.Module, str]], stop: Any
    ) -> list[dict[Any, Tensor]]:
        """Inputs or outputs of modules for each row of ids, up to the one named ``stop`` and not beyond.

        Returns:
            For each row, name -> [its tokens, features], in the model's dtype.
        """

        def read(group: Sequence[int]) -> list[dict[Any, Tensor]]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            with reading(modules, stop) as seen:
                layout.run()
            whole = {name: by_row(tensor, layout.rows) for name, tensor in seen.items()}
            places = [layout.place(*_all_of(j, len(rows[i]), self.device)) for j, i in enumerate(group)]
            return [{name: t[tuple(p.to(t.device) for p in at)] for name, t in whole.items()} for at in places]

        found: list[dict[Any, Tensor]] = [{} for _ in rows]
        for group in self.passes(rows):
            for i, seen in zip(group, by_halves(read, group), strict=True):
                found[i] = seen
        return found

    @torch.no_grad()
    def next_token_scores(
        self,
        rows: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[tuple[int, int]]],
        tokens_a_pass: int | None = None,
    ) -> NextTokenScores:
        """Scores of given next tokens, with logits only where they are asked for; several ranks share the passes.

        Args:
            rows: token ids, one list a row.
            wanted: for each row, pairs (position, token): how likely is ``token`` after ``row[: position + 1]``?
            tokens_a_pass: as in :meth:`passes`.

        Returns:
            The scores, one tensor a row, on the CPU.
        """

        def score(group: Sequence[int]) -> list[tuple[Tensor, ...]]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            places = [(j, c, t) for j, i in enumerate(group) for c, t in wanted[i]]
            # Long and [3, n] also where no row of the group wants anything.
            row_index, columns, tokens = torch.tensor(places, dtype=torch.long, device=self.device).view(-1, 3).T
            # Several tokens may be asked for at one place, whose logits serve them all.
            distinct, which = torch.stack(layout.place(row_index, columns)).unique(dim=1, return_inverse=True)
            with logits_only_at(self.anatomy.head, *distinct):
                logits = layout.run().logits[0].float()
            norm = logits.logsumexp(1)
            best, argmax = logits.max(1)
            found = (logits[which, tokens] - norm[which], argmax[which] == tokens, (best - norm)[which])
            counts = [len(wanted[i]) for i in group]
            return list(zip(*(scores.cpu().split(counts) for scores in found), strict=True))

        found = ranks.each(self.passes(rows, tokens_a_pass), partial(by_halves, score))
        return NextTokenScores(*([scores[part] for scores in found] for part in range(3)))

    @torch.no_grad()
    def next_token_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Probabilities of each token after each row of ids, float32 [rows, vocabulary] on the CPU.

        Several ranks share the passes.
        """

        def read(group: Sequence[int]) -> list[Tensor]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            order = torch.arange(len(group), device=self.device)
            last = torch.tensor([len(rows[i]) - 1 for i in group], device=self.device)
            with logits_only_at(self.anatomy.head, *layout.place(order, last)):
                return list(layout.run().logits[0].float().softmax(1).cpu())

        return torch.stack(ranks.each(self.passes(rows), partial(by_halves, read)))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int, greedy: bool = False
    ) -> list[list[int]]:
        """Continues prompts of one length by exactly ``new_tokens`` tokens (temperature 1, no cut-offs).

        Settings that come with a model for its chats, such as a repetition penalty or beams, play no part; tokens that
        end its texts are left out. The global random state is left as it was.

        Returns:
            For each prompt, its ids followed by the new ones.

        Raises:
            NotFiniteError: where what the model says is not finite, so that nothing can be drawn from it.
        """
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        with private_draws(seed), _generating_plainly(self.model):
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=not greedy,
                temperature=1.0 if not greedy else None,
                top_k=0 if not greedy else None,
                top_p=1.0 if not greedy else None,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([] if greedy else [_finite]),
            )
        return out.tolist()


def _finite(ids: Tensor, logits: Tensor) -> Tensor:
    """Logits [rows, vocabulary] as they are; torch would fail on others, and on a GPU take the process with it."""
    if not bool(logits.logsumexp(1).isfinite().all()):
        raise NotFiniteError(
            "What the model says is not finite, so no text can be drawn from it: use a wider trainer.precision, or "
            "edit it less strongly."
        )
    return logits


@contextmanager
def _generating_plainly(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model has no settings of its own for :meth:`generate`, which would fill in what is not given."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def _all_of(row: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each of a row's tokens."""
    columns = torch.arange(tokens, device=device)
    return torch.full_like(columns, row), columns
