"""What ``editlab plan`` prints: the choice, what to expect of it, and the measured rows behind it."""

from __future__ import annotations

from collections.abc import Sequence

from editlab.edits.calibration import Calibration, MeasuredRow
from editlab.edits.forecast import FactSample, Forecast
from editlab.edits.planning import Search
from editlab.runs.tables import Table

SHOWN = 8
"""Number of candidates that are listed."""


def report(
    name: str, sample: FactSample, search: Search, chosen: Forecast, budget: float, calibrated: bool
) -> list[str]:
    """The lines to print; the first four say what was chosen and what to expect.

    Args:
        name: what is planned, such as ``500 edits of facts.json in smollm2-135m``.
        sample: what was measured on the model.
        search: the candidates.
        chosen: the choice among them.
        budget: the largest perplexity ratio that was asked for.
        calibrated: whether the calibration is of this model.
    """
    laws = search.laws
    lines = [f"Plan for {name}: MEMIT, {chosen.candidate}"]
    lines += _expected(laws, chosen, calibrated)
    lines += _budget(search, chosen, budget, calibrated)
    errors = ", ".join(
        f"{layer}: {error:.3f}" for layer, error in zip(chosen.candidate.layers, chosen.output_errors, strict=True)
    )
    lines.append(f"Relative error of each layer's output on ordinary text: {errors}")
    if sample.read < sample.edits:
        lines.append(
            f"Only {sample.read} facts are at hand: the keys of the other {sample.edits - sample.read} are drawn at "
            "random, as new to each other as the last ones that were read, which is a guess."
        )
    shown = sorted(
        search.found.values(), key=lambda one: (one.harm > search.limit, -round(laws.accuracy(one), 2), one.harm)
    )
    lines += ["", "Forecasts (* chosen):", _candidates(laws, shown[:SHOWN], chosen, calibrated).to_text()]
    lines += ["", f"The nearest runs that were measured, of {laws.model} ({_source(laws)}):"]
    lines.append(_rows(laws.nearest(chosen)).to_text())
    return lines


def _expected(laws: Calibration, chosen: Forecast, calibrated: bool) -> list[str]:
    held = f"an edit keeps {float(chosen.held.mean()):.2f} of its residual, and others add {_mean(chosen):.2f} of one"
    if not calibrated:
        return [
            f"Expected at the end: {held}; harm {chosen.harm:.4f}",
            f"Nothing is said about accuracy and perplexity: they were calibrated on {laws.model} alone, whose laws "
            "only put the candidates in an order here.",
        ]
    low, high = laws.accuracy.range(chosen)
    least, most = laws.perplexity.range(chosen.harm)
    outside = laws.outside(chosen)
    beyond = f"Outside of what was measured, so a guess: {'; '.join(outside)}." if outside else (
        "All of these settings lie within what was measured."
    )  # fmt: skip
    return [
        f"Expected at the end: retained accuracy {laws.accuracy(chosen):.2f} ({low:.2f} to {high:.2f}), perplexity "
        f"x{laws.perplexity(chosen.harm):.3f} (x{least:.3f} to x{most:.3f}); {held}",
        beyond,
    ]


def _budget(search: Search, chosen: Forecast, budget: float, calibrated: bool) -> list[str]:
    laws = search.laws
    if not calibrated:
        verb = "is" if chosen.harm <= search.limit else "exceeds"
        return [
            f"The harm {verb} {'within' if verb == 'is' else 'the'} {search.limit:.4f}, which costs x{budget:g} on "
            f"{laws.model}; for this model that is a guess."
        ]
    if chosen.harm <= search.limit:
        return [f"It is the strongest of the {len(search.found)} forecasts within x{budget:g}."]
    return [
        f"None of the {len(search.found)} forecasts is within x{budget:g}: this is the one that costs the least. Edit "
        "fewer facts, or raise --budget."
    ]


def _candidates(laws: Calibration, shown: Sequence[Forecast], chosen: Forecast, calibrated: bool) -> Table:
    header = ["", "layers", "lambda", "context", "memory", "held", "crosstalk", "drift", "harm"]
    header += ["accuracy", "perplexity"] if calibrated else []
    rows = []
    for one in shown:
        candidate = one.candidate
        row = [
            "*" if one is chosen else "", _span(candidate.layers), f"{candidate.weight:g}",
            f"{candidate.context_weight:g}", "consolidated" if candidate.memory else "none",
            f"{float(one.held.mean()):.3f}", f"{_mean(one):.3f}", f"{one.drift:.3f}", f"{one.harm:.4f}",
        ]  # fmt: skip
        row += [f"{laws.accuracy(one):.3f}", f"x{laws.perplexity(one.harm):.3f}"] if calibrated else []
        rows.append(row)
    return Table(header, rows, numbers=[2, 3, *range(5, len(header))])


def _rows(rows: Sequence[MeasuredRow]) -> Table:
    header = ["edits", "batch", "layers", "lambda", "context", "memory", "held", "crosstalk", "drift", "harm",
              "accuracy", "perplexity", "source"]  # fmt: skip
    cells = [
        [
            str(row.edits), str(row.batch_size), _span(row.candidate.layers), f"{row.candidate.weight:g}",
            f"{row.candidate.context_weight:g}", "consolidated" if row.candidate.memory else "none",
            f"{row.held:.3f}", f"{row.crosstalk:.3f}", f"{row.drift:.3f}", f"{row.harm:.4f}", f"{row.accuracy:.3f}",
            "" if row.ratio is None else f"x{row.ratio:.3f}", row.source,
        ]
        for row in rows
    ]  # fmt: skip
    return Table(header, cells, numbers=[0, 1, 3, 4, *range(6, 12)])


def _span(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}-{layers[-1]}" if contiguous else ",".join(map(str, layers))


def _mean(forecast: Forecast) -> float:
    return float(forecast.crosstalk.mean())


def _source(laws: Calibration) -> str:
    return ", ".join(laws.provenance["tables"])
