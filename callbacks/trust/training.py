"""The fit of the learned trust score on labelled batches; it needs scikit-learn, which a run does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.trust.labels import areas
from callbacks.trust.learned import FEATURES, features
from callbacks.trust.score import GAIN, TrustMetrics, TrustScorer
from editlab.errors import UserError

FOLDS = 5
"""Parts of the cross-validation; as many as there are batches of the rarer kind, if those are fewer."""
GOOD = (GAIN, "certainty")
"""Features of which more is better."""


def with_features(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[dict[str, float]]]:
    """The batches after those that each run calibrates on, and their features in units of their own run.

    Args:
        rows: of :func:`callbacks.trust.tables.labelled_batches`; the batches of a run in their order.
    """
    scorers: dict[tuple[str, str], TrustScorer] = {}
    kept, found = [], []
    for row in rows:
        scorer = scorers.setdefault((str(row["case"]), str(row["seed"])), TrustScorer())
        metrics = TrustMetrics(**{name: float(row.get(name, 0.0)) for name in FEATURES})
        if len(scorer.seen) < scorer.calibrate:  # their features would be in the built-in units
            scorer.observe(metrics)
            continue
        kept.append(row)
        found.append(features(metrics, scorer.scales))
    return kept, found


def fit_score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fits the logistic regression of ``learned_score.json``, with the signals that carry something.

    Bad and good batches weigh the same. A signal is dropped if its weight has the wrong sign (more learnt must not be
    worse, more harm not better), and otherwise as long as the cross-validated log loss is no worse without it.

    Args:
        rows: of :func:`callbacks.trust.tables.labelled_batches`.

    Returns:
        ``intercept`` and ``weights`` by signal, and ``trained_on``: numbers of batches, and areas under the curves of
        the cross-validated score, of the norm alone and of the run's own score on the same batches.

    Raises:
        UserError: scikit-learn is not installed, or fewer than two batches are bad, or good.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    except ImportError as error:
        raise UserError("Fitting the trust score needs scikit-learn: pip install scikit-learn.") from error
    rows, found = with_features(rows)
    bad = [int(row["bad"]) for row in rows]
    rarer = min(sum(bad), len(bad) - sum(bad))
    if rarer < 2:
        raise UserError(f"{sum(bad)} of {len(bad)} batches are bad: run more of configs/experiments/trust_labels.yaml.")
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(FOLDS, rarer), shuffle=True, random_state=0)
    balance = [len(bad) / 2 / (sum(bad) if label else len(bad) - sum(bad)) for label in bad]

    def columns(names: Sequence[str]) -> list[list[float]]:
        return [[each[name] for name in names] for each in found]

    def predicted(names: Sequence[str]) -> list[float]:
        chances = cross_val_predict(model, columns(names), bad, cv=folds, method="predict_proba")
        return [float(row[1]) for row in chances]

    def loss(names: Sequence[str]) -> float:
        return float(log_loss(bad, predicted(names), sample_weight=balance))

    names = [name for name in FEATURES if len({each[name] for each in found}) > 1]
    while True:
        model.fit(columns(names), bad)
        right = {name: (-w if name in GOOD else w) for name, w in zip(names, model.coef_[0].tolist(), strict=True)}
        worst = min(right, key=lambda name: right[name])
        if len(names) > 1 and right[worst] <= 0:
            names.remove(worst)
            continue
        without = {name: loss([n for n in names if n != name]) for name in names if len(names) > 1}
        least = min(without, key=lambda name: without[name], default=None)
        if least is None or without[least] > loss(names):
            break
        names.remove(least)
    weights = {name: round(w, 4) for name, w in zip(names, model.coef_[0].tolist(), strict=True)}
    if min(right.values()) <= 0:
        raise UserError(
            "No signal tells bad batches from good ones: run more of configs/experiments/trust_labels.yaml."
        )
    gates = {"learned": predicted(names), "norm only": [each["update_norm"] for each in found],
             "hand": [1 - float(row["score"]) for row in rows]}  # fmt: skip
    return {
        "intercept": round(float(model.intercept_[0]), 4),
        "weights": weights,
        "trained_on": {
            "batches": len(bad),
            "bad": sum(bad),
            "runs": len({(row["case"], row["seed"]) for row in rows}),
            "areas": {name: areas(values, [bool(b) for b in bad]) for name, values in gates.items()},
        },
    }
