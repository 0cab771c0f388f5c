"""Setting facts in a model that a user names: what is refused before and after :func:`editlab.edit_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.api.edit import edit_model
from editlab.api.result import EditResult
from editlab.api.surroundings import as_it_was
from editlab.data import Fact
from editlab.data.chat import as_edited
from editlab.errors import UserError
from editlab.evaluation.retrieval import as_read
from editlab.evaluation.scoring import score_pairs
from editlab.lm.chat import Chat
from editlab.lm.language_model import LanguageModel

SIZE = {"num_hidden_layers": 30, "hidden_size": 576}
"""Size of the models for which :func:`editlab.edit_model`'s default layers are known to be good ones: SmolLM2-135M."""


def require_changes(facts: Sequence[Fact]) -> None:
    """Make sure that each fact changes something, and that no two of them contradict each other.

    Raises:
        UserError: A target is its fact's truth, or two facts have one subject and prompt.
    """
    seen: set[tuple[str, str]] = set()
    for fact in facts:
        if fact.keeps_the_truth:
            raise UserError(
                f"The target of {fact.question!r} is {fact.target_new!r}, which is also its truth, so there is nothing "
                "to edit: give another target."
            )
        if fact.slot in seen:
            raise UserError(f"Two facts have the subject and prompt of {fact.question!r}: give one of them.")
        seen.add(fact.slot)


def set_facts(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    layers: Sequence[int] | str | None,
    arguments: Mapping[str, Any],
) -> EditResult:
    """Edits facts in a loaded model, by :func:`editlab.edit_model`.

    Args:
        name: the model's name, for messages and for the delta.
        model: the model.
        tokenizer: its fast tokenizer.
        facts: the facts, which :func:`require_changes` has checked.
        layers: as for :func:`editlab.edit_model`; None for its default, where that suits the model.
        arguments: further arguments of :func:`editlab.edit_model`.

    Raises:
        UserError: The layers are not known, the model already says a target, the method changes no weight, a callback
            has rolled back every edit or keeps an adapter next to the weights, or what :func:`editlab.edit_model`
            raises.
    """
    if not arguments["method"].changes_weights:
        method = type(arguments["method"]).__name__
        raise UserError(f"The method {method} changes no weight, so that no fact can be set by it: choose another.")
    if layers is None and any(getattr(model.config, key, None) != value for key, value in SIZE.items()):
        raise UserError(
            f"The layers to edit are not known for {name}: name them (--model.layers '[5]'), give a recipe that has "
            "them (--config), or let them be searched for (--model.layers auto)."
        )
    _require_news(name, model, tokenizer, facts, arguments)
    chosen: dict[str, Any] = {} if layers is None else {"layers": layers}
    _, result = edit_model(model, tokenizer, facts, language_model=name, **chosen, **arguments)
    if not result.facts:
        raise UserError(
            "A callback of the recipe has rolled back all edits, so nothing is changed: leave that callback out, or "
            "lower its threshold."
        )
    if any(layer.adapter is not None for layer in result.editor.changed_layers):
        result.revert()
        raise UserError(
            "LoRAAdjust keeps its adapter next to the weights, where neither a patch nor the model would have it: set "
            "its mode to merge, or leave it out."
        )
    return result


def _require_news(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    arguments: Mapping[str, Any],
) -> None:
    """Refuse a target that the unedited model already says, at every token of it."""
    with as_it_was(model):
        lm = LanguageModel(model, tokenizer, arguments["edit_module"])
        lm.joint, lm.chat = arguments["joint"], Chat.of(tokenizer, arguments["chat_template"])
        read = as_read(lm, as_edited(facts, lm.chat))
        _, hits = score_pairs(lm, [(fact.question, fact.target_new) for fact in read])
    for fact, said in zip(facts, hits.tolist(), strict=True):
        if said:
            raise UserError(
                f"{name} already says {fact.target_new!r} after {fact.question!r}, so there is nothing to edit: give "
                "another target, or leave the fact out."
            )
