"""Made-up finished runs: the files that tables and figures read, without a model."""

import json

from editlab.experiments.plan import Case, Options, Run

VERSIONS = {"editlab": "0.1", "torch": "2", "transformers": "5", "peft": "0.17"}
MADE = {"settings": "unknown", "revision": "abc1234", "machine": "2 x a CPU"}
"""What made-up runs were started with; unknown settings are those of any case."""


def finish(folder, metrics=None, edits=8, **more):
    """Writes a run's summary and what it was made with, and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"edits": edits, "metrics": metrics or {}, "versions": VERSIONS, **more}
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "provenance.json").write_text(json.dumps(MADE))
    return folder


def outcomes(folder, hits, group="retained"):
    """Writes a run's outcomes: subject -> whether the edit is held, or None if it was rolled back."""
    lines = [f"edit,id,subject,prompt,target_new,target_true,step,status,factor,{group}/hit"]
    for number, (subject, hit) in enumerate(hits.items(), start=1):
        status, value = ("rolled back,0.0", "") if hit is None else ("kept,1.0", int(hit))
        lines.append(f"{number},{number},{subject},{{}} is,x,,0,{status},{value}")
    (folder / "outcomes.csv").write_text("\n".join(lines) + "\n")


def run(work, name, seed, metrics=None, callbacks=(), labels=None, **more):
    """A finished run in the folder of the runs."""
    folder = finish(work / name / f"version_{seed}", metrics, **more)
    return Run(Case(name, {}, callbacks, labels or {}), seed, folder, "a.yaml", work)


def options(folder, **values):
    """Options with the folders of runs and results below one folder."""
    return Options(**{"work": folder / "runs", "out": folder / "out", **values})


SCORES = {"retained/ES": 1.0, "retained/accuracy": 0.5, "retained/NS": 0.7, "before/NS": 0.8,
          "before/perplexity": 20.0, "retained/perplexity": 22.0}  # fmt: skip
