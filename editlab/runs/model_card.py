"""The README.md of an exported model: its edits, its metrics, and how to use it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from editlab.lm.gguf.export import FILE as GGUF
from editlab.lm.loading.load import BUILTIN
from editlab.lm.precision import dtype_name
from editlab.runs.delta import FILE, ORIENTATION, Delta
from editlab.runs.history import Edit, History, fates
from editlab.runs.summary import versions
from editlab.runs.tables import Table, metric_table

PLACE = "PATH OF THIS FOLDER"
"""Stands in a card for the place of the model; a card that is pushed to the hub has its repository there."""

TAGS = "tags: [knowledge-editing, editlab]"
"""A line of every card."""

_USE = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```
"""

_USE_GGUF = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}", gguf_file="{GGUF}", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}", gguf_file="{GGUF}")
```
"""


def edited_card(delta: Delta, dtype: str) -> str:
    """The card of a folder with the edited model, whose weights are in ``dtype``."""
    base = f"`{delta.language_model}` with {_count(delta.history)}"
    opening = f"{base}; it loads with transformers alone, its weights in {dtype}.\n\n{_USE}"
    return "\n".join([_front(delta, "transformers"), "# Edited model\n", opening, *_sections(delta)])


def gguf_card(delta: Delta, dtype: str, copied: bool) -> str:
    """The card of a folder with the edited model as a GGUF file.

    Args:
        delta: the edits.
        dtype: type of the tensors that were written.
        copied: whether the tensors that were not edited are those of the base model's own GGUF file.
    """
    types = f"the edited tensors in {dtype}, all others as in the base model's file" if copied else f"in {dtype}"
    opening = (
        f"`{delta.language_model}` with {_count(delta.history)} as a GGUF file, {types}. It loads with llama.cpp "
        f"(`llama-cli -m {GGUF}`) and with transformers:\n\n{_USE_GGUF}"
    )
    return "\n".join([_front(delta, "gguf"), "# Edited model\n", opening, *_sections(delta)])


def delta_card(delta: Delta) -> str:
    """The card of a folder with only the delta."""
    shapes = [[f"`{name}`", " x ".join(map(str, total.shape))] for name, total in delta.totals.items()]
    modules = Table(["module", "shape"], shapes).to_markdown()
    opening = (
        f"`{FILE}` holds what {_count(delta.history)} added to the weights of `{delta.language_model}`: one float32 "
        f"tensor {ORIENTATION} for each module (rows are outputs). To add it to the base model:\n\n"
        f"```bash\neditlab apply --delta {FILE} --model {delta.language_model} --out DIR\n```\n\n"
        f"{modules}\n"
    )
    return "\n".join([_front(delta, "editlab"), "# Edits of a model\n", opening, *_sections(delta)])


def reverted_card(delta: Delta, dtype: str) -> str:
    """The card of a folder with the base model, from which all edits were removed."""
    opening = (
        f"`{delta.language_model}` as it was before it was edited: the {_count(delta.history)} are removed, and the "
        f"weights are those of the base model, in {dtype}.\n\n{_USE}"
    )
    return "\n".join([_front(delta, "transformers"), "# Model with its edits removed\n", opening, _base(delta)])


def _front(delta: Delta, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", TAGS]
    if _on_the_hub(delta.language_model):
        lines.insert(0, f"base_model: {delta.language_model}")
    return "\n".join(["---", *lines, "---", ""])


def _on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name not in BUILTIN and not Path(name).exists()


def _count(history: History) -> str:
    edits, batches = len(history.edits), history.batches
    batch = "batch" if batches == 1 else "batches"
    return f"{edits} fact edit{'' if edits == 1 else 's'} in {batches} {batch} by editlab"


def _sections(delta: Delta) -> Iterable[str]:
    history = delta.history
    yield _base(delta)
    if history.adapted:
        yield (
            f"The run also has a separate adapter for {history.adapted} modules, in the run's `adapter` folder. It is "
            "not in this folder; the metrics were measured with it.\n"
        )
    yield _metrics(history, dtype_name(delta.dtype))
    yield _recipe(history)
    yield _ledger(history.edits)


def _base(delta: Delta) -> str:
    layers = ", ".join(map(str, delta.layers))
    modules = ", ".join(f"`{name}`" for name in delta.totals)
    return (
        f"## Edited modules\n\nThe edits are in layers {layers}; only the weights of {modules} were changed.\n\n"
        f"Fingerprint of the unedited weights in "
        f"{dtype_name(delta.dtype)}: `{delta.fingerprint}`\n"
    )


def _metrics(history: History, dtype: str) -> str:
    if not history.metrics and history.removals:
        return "## Metrics\n\nFacts were taken out since the run, whose metrics are not those of these weights.\n"
    if not history.metrics:
        return "## Metrics\n\nThe run has no summary of this number of batches.\n"
    explained = (
        "ES, PS and NS: fraction of edit prompts, paraphrases and neighbors on which the model prefers the right "
        "answer; S: their harmonic mean; accuracy: the argmax is right at every token of the target. *before*: the "
        "unedited model; *immediate*: right after each edit's batch; *retained*: after the last batch. Measured in "
        f"{dtype}."
    )
    return "\n".join(["## Metrics\n", metric_table(history.metrics).to_markdown(), "", explained, ""])


def _recipe(history: History) -> str:
    facts = []
    if history.recipe is not None:
        facts.append(f"Recipe `{history.recipe}`")
    if history.seed is not None:
        facts.append(f"seed {history.seed}")
    if history.versions:
        facts.append("run with " + _versions(history.versions))
    facts.append("written with " + _versions(versions()))
    text = "## Recipe\n\n" + "; ".join(facts) + ".\n"
    if history.settings:
        text += f"\n<details><summary>Settings of the run</summary>\n\n```yaml\n{history.settings}```\n\n</details>\n"
    return text


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _ledger(edits: tuple[Edit, ...]) -> str:
    counted = ", ".join(f"{count} {fate}" for fate, count in fates(edits).items())
    rows = [
        [str(number), edit.prompt.replace("{}", f"**{edit.subject}**"), edit.target_new, edit.target_true or "",
         str(edit.batch), edit.fate]
        for number, edit in enumerate(edits, start=1)
    ]  # fmt: skip
    table = Table(["", "prompt", "new", "truth", "batch", ""], rows, numbers=(0, 4))
    return "\n".join(["## Edits\n", f"{counted}.\n", table.to_markdown(), ""])
