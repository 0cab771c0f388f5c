"""A causal language model with its tokenizer and anatomy, the interface that the rest of editlab uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.lm.anatomy import context_length
from editlab.lm.chat import Chat
from editlab.lm.forward import by_row, logits_only_at, reading
from editlab.lm.generate import continue_rows, drawn, most_likely
from editlab.lm.joints import AUTO, join
from editlab.lm.loading.load import load
from editlab.lm.memory import by_halves
from editlab.lm.packing import can_pack, lay_out_whole, pads_between
from editlab.lm.placement import DeviceMap
from editlab.lm.probe import keeps_only_kv_cache
from editlab.lm.runner import ModelRunner
from editlab.lm.tokens import (
    Encoding,
    beginning_of,
    by_beginning,
    by_length,
    encode,
    encode_pair,
    require_embedded,
    require_embeddings,
)
from editlab.utils.rng import private_draws

TOKENS_A_PASS = 4096
"""Largest number of tokens in one forward pass: enough for full-speed matrix products, and few enough for memory."""

MERGE_FIRST = (
    "{} has PEFT adapters, and an edit changes plain weights: merge them first by model = model.merge_and_unload(), "
    "called on the PeftModel."
)
"""Message that refuses such a model; its gap takes the model's class."""


class NextTokenScores(NamedTuple):
    """Scores of the requested tokens, one tensor [n] for each row."""

    logps: list[Tensor]
    """log-probability of each token, float32"""
    hits: list[Tensor]
    """whether each token is the argmax, bool"""
    tops: list[Tensor]
    """log-probability of the argmax at the same position, float32"""
    seconds: list[Tensor]
    """log-probability of the second most likely token at the same position, float32"""


class LanguageModel(ModelRunner):
    """A transformers model in eval mode without gradients, with its tokenizer and the properties that editlab needs.

    Args:
        model: any causal language model of transformers.
        tokenizer: its fast tokenizer.
        edit_module: path of the module to edit inside a block; default: found by structure.
        placed: the model stays on its devices, whatever device the Trainer uses.

    Raises:
        UserError: There is no such module, the model has PEFT adapters or fewer embeddings than the tokenizer tokens,
            its logits are not finite, it keeps a recurrent state, or its attention counts padding as distance.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edit_module: str | None = None,
        placed: bool = False,
    ) -> None:
        _require_plain(model)
        super().__init__(model, edit_module, placed)
        self.tokenizer = tokenizer
        self.embeddings = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        require_embeddings(tokenizer, self.embeddings)
        self.beginning = beginning_of(tokenizer)
        """the special tokens with which every text begins"""
        self.beginning_text = "".join(tokenizer.convert_ids_to_tokens(list(self.beginning)))
        self.joint = AUTO
        """what stands between a prompt and its continuation (:mod:`editlab.lm.joints`)"""
        self.chat: Chat | None = None
        """the chat template through which prompts go; None if they are plain"""
        self.longest = context_length(model)
        self.blocks_give_tuples = self._probe_tuples()
        if not keeps_only_kv_cache(model):
            raise UserError(
                f"{type(model).__name__} keeps more of earlier tokens than a KV cache, such as a recurrent state: "
                "choose a model in which every block has attention."
            )
        self.packs = can_pack(self)
        if not self.packs and not pads_between(self):
            raise UserError(
                f"{type(model).__name__} counts padding in the distance between two tokens, so the result of a prompt "
                "would depend on its padding: choose a model that uses position ids."
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
        """Load a model by name, folder or file; see :func:`editlab.lm.loading.load.load` for arguments and errors."""
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
                "The model's logits are not finite: its weights are damaged, or its data type is too narrow "
                "(trainer.precision)."
            )
        return kinds[0]

    # ---- tokens of texts ----------------------------------------------------------------------------------------

    def encode(self, text: str) -> Encoding:
        """Tokenize a text (:func:`editlab.lm.tokens.encode`).

        Raises:
            UserError: The model has no embedding for one of its tokens.
        """
        encoding = encode(self.tokenizer, text)
        require_embedded(encoding.ids, self.tokenizer, self.embeddings)
        return encoding

    def encode_pair(self, prompt: str, continuation: str) -> tuple[Encoding, int]:
        """Tokenize a prompt with its continuation, joined by :attr:`joint` (:func:`editlab.lm.tokens.encode_pair`).

        Raises:
            UserError: As :meth:`encode`, or the continuation has no token, or no token stands before it.
        """
        encoding, start = encode_pair(self.tokenizer, prompt, continuation, self.joint)
        require_embedded(encoding.ids, self.tokenizer, self.embeddings)
        return encoding, start

    def in_context(self, context: str, prompt: str) -> str:
        """Return a prompt behind a context.

        Special tokens with which the prompt begins stay at the very beginning, and in a chat the context is a part of
        the user's turn. A character of the prompt after these has the same index as in ``context + prompt``.
        """
        for own in (self.chat.head if self.chat else "", self.beginning_text):
            if own and prompt.startswith(own):
                return own + context + prompt.removeprefix(own)
        return context + prompt

    def unusual_texts(self, pairs: Iterable[tuple[str, str]]) -> list[str]:
        """Return the texts of those pairs that are not read as two words with a space between.

        Cache keys name them, so that the keys of all other texts are independent of how joints are chosen.
        """
        own = self.beginning_text
        texts = ((prompt, continuation, join(prompt, continuation, self.joint)) for prompt, continuation in pairs)
        return [
            text
            for prompt, continuation, text in texts
            if text != f"{prompt.rstrip()} {continuation.strip()}" or (own and text.startswith(own))
        ]

    # ---- forward passes -----------------------------------------------------------------------------------------

    def passes(self, rows: Sequence[Sequence[int]], tokens: int | None = None) -> list[list[int]]:
        """Return the indices of the rows that run together, one list for each forward pass.

        Args:
            rows: token ids.
            tokens: largest number of tokens in a pass; default: :data:`TOKENS_A_PASS`. Of packed rows, a common
                beginning counts once; otherwise padding counts too.
        """
        tokens = TOKENS_A_PASS if tokens is None else tokens
        return by_beginning(rows, tokens) if self.packs else by_length([len(row) for row in rows], tokens)

    @torch.no_grad()
    def read(
        self, rows: Sequence[Sequence[int]], modules: dict[Any, tuple[nn.Module, str]], stop: Any
    ) -> list[dict[Any, Tensor]]:
        """Return the inputs or outputs of modules for each row of ids; the model is not run beyond the module ``stop``.

        Args:
            rows: token ids.
            modules: maps a name to a module and ``input`` or ``output``.
            stop: name of the module at which the pass ends.

        Returns:
            For each row, a dict from the name to [tokens of the row, features], in the model's dtype.
        """

        def read(group: Sequence[int]) -> list[dict[Any, Tensor]]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            with reading(modules, stop) as seen:
                layout.run()
            whole = {name: by_row(tensor, layout.rows) for name, tensor in seen.items()}
            indices = [layout.locate(*_all_of(j, len(rows[i]), self.device)) for j, i in enumerate(group)]
            return [{name: t[tuple(p.to(t.device) for p in at)] for name, t in whole.items()} for at in indices]

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
        """Score given next tokens; logits are computed only at their positions, and ranks share the passes.

        Args:
            rows: token ids, one list for each row.
            wanted: for each row, pairs (position, token): the score is that of ``token`` after ``row[: position + 1]``.
            tokens_a_pass: as in :meth:`passes`.

        Returns:
            The scores, one tensor for each row, on the CPU.
        """

        def score(group: Sequence[int]) -> list[tuple[Tensor, ...]]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            requests = [(j, c, t) for j, i in enumerate(group) for c, t in wanted[i]]
            # The explicit dtype and shape also hold if no row of the group has a request.
            row_index, columns, tokens = torch.tensor(requests, dtype=torch.long, device=self.device).view(-1, 3).T
            # Several tokens may be scored at one position, whose logits are computed once.
            distinct, which = torch.stack(layout.locate(row_index, columns)).unique(dim=1, return_inverse=True)
            with logits_only_at(self.anatomy.head, *distinct):
                logits = layout.run().logits[0].float()
            norm = logits.logsumexp(1)
            best, argmax = logits.max(1)
            logps, hits, tops = logits[which, tokens] - norm[which], argmax[which] == tokens, (best - norm)[which]
            second = logits.scatter_(1, argmax[:, None], -torch.inf).amax(1)
            found = (logps, hits, tops, (second - norm)[which])
            counts = [len(wanted[i]) for i in group]
            return list(zip(*(scores.cpu().split(counts) for scores in found), strict=True))

        found = ranks.each(self.passes(rows, tokens_a_pass), partial(by_halves, score))
        return NextTokenScores(*([scores[part] for scores in found] for part in range(4)))

    @torch.no_grad()
    def next_token_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the next-token probabilities after each row of ids, float32 [rows, vocabulary] on the CPU.

        Ranks share the passes.
        """

        def read(group: Sequence[int]) -> list[Tensor]:
            layout = lay_out_whole(self, [rows[i] for i in group])
            order = torch.arange(len(group), device=self.device)
            last = torch.tensor([len(rows[i]) - 1 for i in group], device=self.device)
            with logits_only_at(self.anatomy.head, *layout.locate(order, last)):
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
        """Continue prompts of equal length by exactly ``new_tokens`` tokens, sampled at temperature 1, not truncated.

        End-of-text tokens are never generated, nor those with which a text begins. The global random
        state is not changed.

        Args:
            prompts: token ids; all prompts have the same length.
            new_tokens: number of tokens to generate for each prompt.
            seed: seed of the sampling.
            greedy: use the most likely token at each step instead of sampling.
            tick: called after each step with the number of tokens that the step generated.

        Returns:
            For each prompt, its ids followed by the new ones.

        Raises:
            NonFiniteError: The model's logits are not finite, so no token can be sampled.
        """
        with private_draws(seed):
            pick = most_likely if greedy else drawn
            new = continue_rows(self.model, prompts, new_tokens, pick, never=self.beginning, tick=tick)
        return [[*prompt, *more] for prompt, more in zip(prompts, new, strict=True)]


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse models whose linear maps are wrapped.

    Raises:
        UserError: The model has adapters of PEFT, or a part of it is compiled.
    """
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UserError(MERGE_FIRST.format(type(model).__name__))
        if "_orig_mod" in dict(module.named_children()):
            raise UserError(
                f"A part of the model is compiled ({path or type(model).__name__}): compile it after the edit."
            )


def _all_of(row: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of each token of a row, [tokens] each."""
    columns = torch.arange(tokens, device=device)
    return torch.full_like(columns, row), columns
