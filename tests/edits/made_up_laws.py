"""A calibration by hand, for tests that need no measured one."""

from editlab.edits.calibration import AccuracyLaw, Calibration, MeasuredRow, PerplexityLaw
from editlab.edits.forecast import Candidate


def row(edits, weight=1000.0, layers=(1, 2), context=0.0, memory=True, **changes):
    """A measured row whose numbers do not matter where they are not given."""
    numbers = {"accuracy": 0.9, "ratio": 1.05, "held": 0.8, "crosstalk": 0.1, "drift": 0.0, "harm": 0.02} | changes
    candidate = Candidate(tuple(layers), weight, context, memory)
    return MeasuredRow(f"made_up.csv: {edits}_{weight:g}", 1, candidate, edits, 2, **numbers)


ROWS = (row(4), row(100, 300.0), row(1000, memory=False, context=1.0))


def laws(fingerprint="", rows=ROWS):
    """Accuracy 1 / (1 + exp(-(2 + log held - 3 crosstalk - drift / 2))), perplexity exp(2 harm)."""
    return Calibration("a model", fingerprint, AccuracyLaw(2.0, 1.0, 3.0, 0.5, 0.05), PerplexityLaw(2.0, 1.0, 0.5),
                       tuple(rows), {"tables": ["made_up.csv"]})  # fmt: skip
