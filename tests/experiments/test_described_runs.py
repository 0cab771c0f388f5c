"""Settings of cases over their recipes, and runs that no dry solve describes."""

import pytest

from editlab.edits.forecast import Candidate
from editlab.experiments.described_runs import NotDescribed, described
from editlab.experiments.plan import Case

RECIPE = {
    "model": {
        "language_model": "m", "layers": [2, 3],
        "method": {"class_path": "MEMIT", "init_args": {"covariance_weight": 9}},
        "values": {"reference": "original"},
    },
    "data": {"limit": 5, "batch_size": 4, "path": "facts.json"},
}  # fmt: skip
REPLAY = {"class_path": "callbacks.MemoryReplay", "init_args": {"memory": "consolidated"}}


def test_settings_of_a_case():
    case = Case("c", {"model.layers": [6], "model.method.init_args.mu": 3, "data.split": "dev"},
                [REPLAY, {"class_path": "ForgettingCurve"}])  # fmt: skip
    found = described(RECIPE, case)
    assert found.candidate == Candidate((6,), 9.0, 0.0, True, mu=3.0)
    assert found.batch_size == 4
    assert dict(found.data) == {"path": "facts.json", "split": "dev"}
    assert dict(found.moments) == {"text": "self", "tokens": 24576}
    # A method that is named replaces the one before, with its own defaults.
    assert described(RECIPE, Case("c", {"model.method": "MEMIT"})).candidate.weight == 15000
    assert RECIPE["model"]["layers"] == [2, 3]


@pytest.mark.parametrize(
    ("flags", "callbacks", "why"),
    [
        ({"model.method": "AlphaEdit"}, [], "the method is not MEMIT"),
        ({"model.method.init_args.ridge": 1}, [], "the method has other settings"),
        ({"model.values.early_stop": 2}, [], "values are found in another way"),
        ({"model.keys": "mean"}, [], "model.keys is mean"),
        ({"model.layers": "auto"}, [], "the layers are not named"),
        ({}, [{"class_path": "LoRAAdjust"}], "it has the callback LoRAAdjust"),
        ({}, [{"class_path": "MemoryReplay", "init_args": {"memory": "both"}}], "it has the callback MemoryReplay"),
    ],
)
def test_runs_that_a_dry_solve_does_not_describe(flags, callbacks, why):
    with pytest.raises(NotDescribed, match=why):
        described(RECIPE, Case("c", flags, callbacks))
