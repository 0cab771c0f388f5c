"""The README.md beside an exported model: what was edited, how it went, and how to use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from editlab.lm.loading.load import BUILTIN
from editlab.lm.precision import dtype_name
from editlab.runs.delta import FILE, ORIENTATION, Delta
from editlab.runs.history import Edit, History
from editlab.runs.summary import GROUPS, NAMES, versions

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```
"""


def edited_card(delta: Delta, dtype: str) -> str:
    """Of a folder with the edited model, its weights in ``dtype``."""
    base = f"`{delta.language_model}` with {_count(delta.history)}"
    opening = f"{base}; it loads with transformers alone, its weights in {dtype}.\n\n{_USE}"
    return "\n".join([_front(delta, "transformers"), "# Edited model\n", opening, *_sections(delta)])


def delta_card(delta: Delta) -> str:
    """Of a folder with only the delta."""
    modules = "\n".join(f"| `{name}` | {' x '.join(map(str, total.shape))} |" for name, total in delta.totals.items())
    opening = (
        f"`{FILE}` is what {_count(delta.history)} added to the weights of `{delta.language_model}`: one float32 "
        f"tensor {ORIENTATION} a module (rows are outputs). Put it on the base model:\n\n"
        f"```bash\neditlab apply --delta {FILE} --model {delta.language_model} --out DIR\n```\n\n"
        f"| module | shape |\n| --- | --- |\n{modules}\n"
    )
    return "\n".join([_front(delta, "editlab"), "# Edits of a model\n", opening, *_sections(delta)])


def reverted_card(delta: Delta, dtype: str) -> str:
    """Of a folder with the base model, all edits taken out again."""
    opening = (
        f"`{delta.language_model}` as it was before it was edited: the {_count(delta.history)} are taken out, and the "
        f"weights are the base model's own, in {dtype}.\n\n{_USE}"
    )
    return "\n".join([_front(delta, "transformers"), "# Model with its edits taken out\n", opening, _base(delta)])


def _front(delta: Delta, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [knowledge-editing, editlab]"]
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
            f"The run also kept an adapter beside the weights of {history.adapted} modules. It is not in this folder, "
            "and goes onto the edited model from the run's `adapter` folder; the metrics were measured with it.\n"
        )
    yield _metrics(history, dtype_name(delta.dtype))
    yield _recipe(history)
    yield _ledger(history.edits)


def _base(delta: Delta) -> str:
    layers = ", ".join(map(str, delta.layers))
    modules = ", ".join(f"`{name}`" for name in delta.totals)
    return (
        f"## Edited modules\n\nThe edits act at layers {layers}; the weights of {modules} were changed, and nothing "
        f"else.\n\nFingerprint of the unedited weights in "
        f"{dtype_name(delta.dtype)}: `{delta.fingerprint}`\n"
    )


def _metrics(history: History, dtype: str) -> str:
    if not history.metrics:
        return "## Metrics\n\nThe run's summary was not there, or is of another number of batches.\n"
    lines = [f"| | {' | '.join(GROUPS)} |", "| --- |" + " ---: |" * len(GROUPS)]
    for name in NAMES:
        row = [history.metrics.get(group, {}).get(name) for group in GROUPS]
        if any(value is not None for value in row):
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(_number(value, 3) for value in row)} |")
    for name in ("perplexity", "generation_entropy"):
        if name in history.metrics:
            found = history.metrics[name]
            cells = (found.get("before"), None, found.get("after"))
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(_number(value, 2) for value in cells)} |")
    explained = (
        "ES, PS and NS: share of edits, paraphrases and neighbors on which the model prefers what it should; S: their "
        "harmonic mean; accuracy: argmax at every target token. *before*: the unedited model; *immediate*: right "
        f"after each edit's batch; *retained*: after the last. Measured in {dtype}."
    )
    return "\n".join(["## Metrics\n", *lines, "", explained, ""])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


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
    fates = Counter(edit.fate.split(" by ")[0].split(" to ")[0] for edit in edits)
    lines = [
        "## Edits\n",
        ", ".join(f"{count} {fate}" for fate, count in fates.items()) + ".\n",
        "| | prompt | new | truth | batch | |",
        "| ---: | --- | --- | --- | ---: | --- |",
    ]
    for number, edit in enumerate(edits, start=1):
        cells = (edit.prompt.replace("{}", f"**{edit.subject}**"), edit.target_new, edit.target_true or "")
        lines.append(f"| {number} | {' | '.join(map(_cell, cells))} | {edit.batch} | {edit.fate} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """A text that can not break out of its cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
