"""Reading a written GGUF file back, and comparing it with the model that it was written from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.gguf.layout import CONVERT
from editlab.lm.loading.gguf import SAMPLE, read_gguf
from editlab.lm.memory import require_memory

NEW_TOKENS = 8
"""Tokens of the continuation that both models must agree on."""

_TOLERANCE = 1e-4


@torch.no_grad()
def compare(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expected: Callable[[str, Tensor], bool],
    prompts: Sequence[str],
) -> None:
    """Load a written file with editlab's own reader, and require that its model and tokenizer are those written.

    A model with the settings of ``model`` and the weights of the file must give the same logits and the same greedy
    continuation as the model that was read: otherwise a setting is lost.

    Args:
        file: the GGUF file.
        model: the model that it was written from, on the CPU.
        tokenizer: its tokenizer.
        expected: tells whether the weight that was read for a parameter (name, float32) is the one that was written.
        prompts: texts that the tokenizers must agree on, and from which both models continue.

    Raises:
        UserError: They differ, or memory is insufficient.
    """
    require_memory(f"{file.name}, which is read back", 4 * model.num_parameters(), torch.float32, torch.device("cpu"))
    try:
        read, vocabulary = read_gguf(file)
    except (UserError, RuntimeError) as error:  # the latter where a weight has another shape than its settings say
        raise _differs("the whole of it") from error
    found, written = read.state_dict(), model.state_dict()
    lost = [name for name, weight in written.items() if name not in found or found[name].shape != weight.shape]
    wrong = lost or [name for name in written if not expected(name, found[name])]
    if wrong:
        raise _differs(f"the weight {wrong[0]}")
    special = "".join(tokenizer.all_special_tokens[:4])
    texts = [SAMPLE, f"a{special}b", *prompts]
    for text in texts:
        if vocabulary(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise _differs(f"the tokens of {text!r}")
    # Made anew: in a model that was converted to another type, tables that are no weights were rounded with it.
    same = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    same.load_state_dict(found, assign=True)
    for text in dict.fromkeys(prompts or (SAMPLE,)):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for _ in range(NEW_TOKENS):
            own, other = (one(ids, use_cache=False).logits[0, -1] for one in (same, read.eval()))
            if own.argmax() != other.argmax() or not torch.allclose(own, other, _TOLERANCE, _TOLERANCE):
                raise _differs(f"the answer to {text!r}")
            ids = torch.cat([ids, own.argmax()[None, None]], dim=1)


def _differs(what: str) -> UserError:
    return UserError(
        f"A GGUF file of this model does not give it back ({what} differs when it is read), so none is kept: "
        f"edit a GGUF file of the model, or {CONVERT}."
    )
