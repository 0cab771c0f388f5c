"""A causal language model with its tokenizer and its anatomy: the one object that the rest of editlab talks to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.lm.anatomy import context_length
from editlab.lm.forward import by_row, logits_only_at, reading
from editlab.lm.generate import continue_rows, drawn, most_likely
from editlab.lm.loading.load import load
from editlab.lm.memory import by_halves
from editlab.lm.packing import can_pack, lay_out_whole, pads_between
from editlab.lm.placement import DeviceMap
from editlab.lm.probe import remembers_by_attention
from editlab.lm.runner import ModelRunner
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


class LanguageModel(ModelRunner):
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
        super().__init__(model, edit_module, placed)
        self.tokenizer = tokenizer
        self.longest = context_length(model)
        self.blocks_give_tuples = self._probe_tuples()
        if not remembers_by_attention(model):
            raise UserError(
                f"{type(model).__name__} keeps something else of earlier tokens than their keys and values, such as a "
                "recurrent state: choose a model whose blocks all attend."
            )
        self.packs = can_pack(self)
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

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        seed: int,
        greedy: bool = False,
        tick: Callable[[int], Any] | None = None,
    ) -> list[list[int]]:
        """Continues prompts of one length by exactly ``new_tokens`` tokens, drawn at temperature 1 without cut-offs.

        Tokens that end a text are never generated. The global random state stays as it was.

        Args:
            prompts: token ids, each prompt as long as the others.
            new_tokens: number of tokens to generate for each.
            seed: of the draws.
            greedy: take the most likely token each time instead of drawing.
            tick: called after each step with the number of tokens that it generated.

        Returns:
            For each prompt, its ids followed by the new ones.

        Raises:
            NonFiniteError: the model's logits are not finite, so nothing can be drawn from them.
        """
        with private_draws(seed):
            new = continue_rows(self.model, prompts, new_tokens, most_likely if greedy else drawn, tick=tick)
        return [[*prompt, *more] for prompt, more in zip(prompts, new, strict=True)]


def _all_of(row: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each of a row's tokens."""
    columns = torch.arange(tokens, device=device)
    return torch.full_like(columns, row), columns
