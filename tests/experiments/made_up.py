"""Made-up finished runs: the files that tables and figures read, without a model."""

import json

from editlab.experiments.plan import Case, Options, Run


def finish(folder, metrics=None, edits=8, **more):
    """Writes a run's summary, and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"edits": edits, "metrics": metrics or {}, **more}
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def run(work, name, seed, metrics=None, callbacks=(), labels=None, **more):
    """A finished run in the folder of the runs."""
    folder = finish(work / name / f"version_{seed}", metrics, **more)
    return Run(Case(name, {}, callbacks, labels or {}), seed, folder, "a.yaml", work)


def options(folder, **values):
    """Options with the folders of runs and results below one folder."""
    return Options(**{"work": folder / "runs", "out": folder / "out", **values})


SCORES = {"retained/ES": 1.0, "retained/accuracy": 0.5, "retained/NS": 0.7, "before/NS": 0.8,
          "before/perplexity": 20.0, "retained/perplexity": 22.0}  # fmt: skip
