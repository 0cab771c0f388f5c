"""Rows of tables as points of a fit: means over seeds, forecasts, and laws that are found again."""

import math
from pathlib import Path

import pytest
import torch

import editlab.experiments.plan_calibration as module
from editlab.edits.calibration import AccuracyLaw, PerplexityLaw
from editlab.edits.forecast import Candidate, Forecast
from editlab.errors import UserError
from editlab.experiments.plan_calibration import fit, forecast_rows, measured
from tests.edits.made_up_laws import row
from tests.facts import write_counterfact

RUNS = """case,seed,edits,retained/accuracy,before/perplexity,perplexity_ratio
a,1,4,0.5,20,1.1
a,2,4,0.7,20,1.21
b,1,4,0.9,20,
"""
CURVES = """case,seed,edits,retained/accuracy,retained/perplexity
a,1,2,0.8,21
a,1,4,0.1,99
c,1,2,,21
"""


@pytest.fixture
def tables(tmp_path):
    (tmp_path / "runs.csv").write_text(RUNS)
    (tmp_path / "curves.csv").write_text(CURVES)
    return [tmp_path / "runs.csv", tmp_path / "curves.csv"]


def test_means_over_seeds_and_snapshots(tables):
    found = {(one.case, one.edits): one for one in measured(tables)}
    assert found.keys() == {("a", 4), ("b", 4), ("a", 2)}
    last = found["a", 4]
    assert (last.source, last.seeds, last.accuracy) == ("runs.csv: a", 2, pytest.approx(0.6))
    assert last.ratio == pytest.approx(math.sqrt(1.1 * 1.21))  # the geometric mean
    assert found["b", 4].ratio is None
    assert found["a", 2].ratio == pytest.approx(21 / 20)


def test_snapshots_are_compared_with_the_beginning_of_the_text(tmp_path):
    """They read no more of it; of the whole text the unedited model has another perplexity."""
    start = "case,seed,edits,retained/accuracy,before/perplexity,before/perplexity_start,perplexity_ratio\n"
    (tmp_path / "runs.csv").write_text(start + "a,1,4,0.5,20,30,1.0\nb,1,4,0.5,20,,1.0\n")
    (tmp_path / "curves.csv").write_text(
        "case,seed,edits,retained/accuracy,retained/perplexity\na,1,2,0.8,30\nb,1,2,0.8,20\n"
    )
    found = {(one.case, one.edits): one.ratio for one in measured([tmp_path / "runs.csv", tmp_path / "curves.csv"])}
    assert found["a", 2] == found["b", 2] == 1.0


def test_neighboring_snapshots_are_left_out():
    rows = [module.Measured("t.csv: a", "a", edits, 1, 0.5, None) for edits in (9, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert [row.edits for row in module.thinned(rows)] == [3, 5, 7, 9]
    assert [row.edits for row in module.thinned(rows[:3])] == [1, 2, 9]


EXPERIMENT = """
recipe: recipe.yaml
seeds: [1]
cases:
  a: {}
  b: {callbacks: [{class_path: MemoryReplay, init_args: {memory: consolidated}}]}
  c: {flags: {model.passes: 2}}
"""


def test_rows_and_their_forecasts(tables, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_counterfact(tmp_path / "facts.json")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{language_model: {tiny_folder}, layers: [1, 2], method: {{class_path: MEMIT}}, "
        "values: {reference: original}, moments: {tokens: 256}}\ndata: {path: facts.json, batch_size: 2}\n"
    )
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    pairs, model, _ = forecast_rows(tmp_path / "experiment.yaml", tables)
    assert model == str(tiny_folder)
    assert {(one.source, one.edits) for one, _ in pairs} == {
        ("runs.csv: a", 4),
        ("curves.csv: a", 2),
        ("runs.csv: b", 4),
    }
    for one, forecast in pairs:
        assert one.candidate == forecast.candidate == Candidate((1, 2), 15000.0, 0.0, one.source.endswith("b"))
        assert one.held == pytest.approx(float(forecast.held.mean()), abs=1e-4)
    (tables[0]).write_text(RUNS.replace("a,", "gone,").replace("b,", "c,"))
    with pytest.raises(UserError, match=r"No row of .* can be forecast"):
        forecast_rows(tmp_path / "experiment.yaml", tables[:1])


def made_up(count):
    """Rows that follow two laws exactly, in as many configurations."""
    draw = torch.Generator().manual_seed(0)
    accuracy, perplexity = AccuracyLaw(4.0, 3.0, 8.0, 2.0, 0.0), PerplexityLaw(2.5, 1.1, 0.0)
    pairs = []
    for index in range(count):
        held, crosstalk = torch.rand(2, 20, generator=draw, dtype=torch.float64)
        candidate = Candidate((1, 2), 100.0 + index, 0.0, index % 2 == 0)
        forecast = Forecast(
            candidate,
            20,
            4,
            (held + index / count) / 2,
            crosstalk / 2,
            0.3 * (index % 3),
            0.01 * (index + 1),
            (0.1, 0.1),
        )
        ratio = perplexity(forecast.harm) if index != 2 else None
        pairs.append((row(20, accuracy=accuracy(forecast), ratio=ratio), forecast))
    return pairs


def test_laws_are_found_again():
    found = fit(made_up(8), "m", "abc", {"tables": ["t.csv"]})
    assert (found.accuracy.intercept, found.accuracy.held, found.accuracy.crosstalk) == pytest.approx(
        (4, 3, 8), abs=0.01
    )
    assert (found.perplexity.slope, found.perplexity.power) == pytest.approx((2.5, 1.1), abs=0.01)
    assert found.accuracy.error < 1e-3
    assert found.perplexity.error < 1e-3
    assert (found.model, found.fingerprint, len(found.rows)) == ("m", "abc", 8)


def test_a_table_of_predictions(monkeypatch):
    pairs = made_up(8)
    monkeypatch.setattr(module, "forecast_rows", lambda experiment, tables, moments: (pairs, "m", "abc"))
    laws, rows = module.calibrate([[Path("e.yaml"), Path("t.csv")]], "self", {"revision": "r"})
    assert laws.provenance == {"tables": ["t.csv"], "moments": "self", "revision": "r"}
    assert (rows[0]["table"], rows[0]["case"], rows[0]["revision"]) == ("made_up.csv", "20_1000", "r")
    assert all(abs(row["predicted/accuracy"] - row["retained/accuracy"]) < 1e-3 for row in rows)
    assert "perplexity_ratio" not in rows[2]
    other = iter([(pairs, "m", "abc"), (pairs, "n", "def")])
    monkeypatch.setattr(module, "forecast_rows", lambda *given: next(other))
    with pytest.raises(UserError, match="The experiments have several models"):
        module.calibrate([[Path("e.yaml")], [Path("f.yaml")]], None, {})


def test_too_few_configurations():
    with pytest.raises(UserError, match="There are 3 measured configurations: give tables with four or more"):
        fit(made_up(3), "m", "abc", {})
    with pytest.raises(UserError, match="There are 3 measured configurations with a perplexity"):
        fit(made_up(4), "m", "abc", {})
