"""The learned score by hand-worked cases, the shipped file, and the fit where scikit-learn is installed."""

import json
import math
import random
from dataclasses import replace

import pytest

from callbacks import TrustRollback
from callbacks.trust.learned import LIMIT, SHIPPED, LearnedScorer, features, replayed
from callbacks.trust.score import GAIN, PENALTIES, SCALES, TrustMetrics
from callbacks.trust.training import fit_score
from editlab.errors import EditLabError, UserError


@pytest.fixture
def by_hand(tmp_path):
    path = tmp_path / "score.json"
    path.write_text(json.dumps({"intercept": -1.0, "weights": {"update_norm": 2.0, "certainty": -1.0, GAIN: -0.5}}))
    return LearnedScorer(path, calibrate=0)


def test_features_by_hand():
    # The norm's scale is [.5, .5]: its usual value is 0, and .5 is one width above it. The gain's half is 1.5, which is
    # half of what is usual, so that 3 nats are 1. Confidence has [.02, .05]: 1 is 19.6 widths and is cut.
    found = features(TrustMetrics(3.0, 0.25, update_norm=0.5, confidence_shift=1.0), SCALES)
    assert (found[GAIN], found["certainty"], found["update_norm"]) == (1.0, 0.25, 1.0)
    assert found["confidence_shift"] == LIMIT


def test_a_learned_score_by_hand(by_hand):
    # -1 + 2 * 1 - .25 - .5 * 1 = .25
    metrics = TrustMetrics(3.0, 0.25, update_norm=0.5)
    assert by_hand.score(metrics) == pytest.approx(1 / (1 + math.exp(0.25)))
    # Without harm the norm counts as usual: -1 - .25 - .5.
    assert by_hand.ceiling(metrics) == pytest.approx(1 / (1 + math.exp(-1.75)))
    assert by_hand.costliest(metrics) == "update_norm"
    assert by_hand.costliest(TrustMetrics(3.0, 0.0)) == "certainty"
    assert 0 <= by_hand.score(TrustMetrics(update_norm=1e30)) < 1e-3


def test_the_shipped_score_never_punishes_learning_nor_rewards_harm():
    scorer, content = LearnedScorer(calibrate=0), json.loads(SHIPPED.read_text())
    assert scorer.coefficients
    assert content["trained_on"]["bad"] > 0
    usual = TrustMetrics(3.0, 0.5, **{name: SCALES[name].free for name in PENALTIES})
    for name in (GAIN, "certainty", *PENALTIES):
        more = scorer.score(replace(usual, **{name: getattr(usual, name) + 0.3}))
        if name in (GAIN, "certainty"):
            assert more >= scorer.score(usual)
        else:
            assert more <= scorer.score(usual)


def test_events_are_scored_as_in_the_run(by_hand):
    # The first two batches calibrate the third: a usual norm of .2 is no reason for suspicion then.
    scorer = LearnedScorer(SHIPPED, calibrate=2)
    events = [{"signals": {"update_norm": 0.2, "certainty": 1.0}}] * 2
    scores = replayed([*events, {"signals": None}, events[0]], scorer)
    assert scores[2] is None
    assert scores[0] == scores[1]
    assert scorer.scales["update_norm"].free == pytest.approx(0.3)  # the median and the least width, .1
    assert scores[3] == scorer.score(TrustMetrics(update_norm=0.2, certainty=1.0))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"intercept": 0, "weights": {"charm": 1}}'])
def test_errors_of_a_damaged_file(tmp_path, content):
    (tmp_path / "score.json").write_text(content)
    with pytest.raises(EditLabError, match="install editlab again"):
        LearnedScorer(tmp_path / "score.json")


def test_errors_of_settings():
    with pytest.raises(UserError, match="was fitted on whole batches: set granularity: batch"):
        TrustRollback(score="learned", granularity="edit")
    with pytest.raises(UserError, match="weights are those of score: hand"):
        TrustRollback(score="learned", weights={GAIN: 1.0})
    with pytest.raises(UserError, match="score is 'oracle'"):
        TrustRollback(score="oracle")


def test_the_fit_keeps_what_tells_bad_batches_apart():
    # Made up: bad batches have a norm of .5 in place of .2, all else is noise; the condition is always the same.
    pytest.importorskip("sklearn", exc_type=ImportError)
    draw = random.Random(0)
    rows = []
    for step in range(40):
        bad = step > 4 and step % 4 == 0
        noise = {name: draw.gauss(0, 0.01) for name in ("heldout_ppl_delta", "confidence_shift", "singular_growth")}
        noise["update_norm"] = (0.5 if bad else 0.2) + draw.gauss(0, 0.02)
        rows.append({"case": "made up", "seed": "1", "bad": int(bad), "score": 0.9, "gram_condition": 1.0, GAIN: 5.0,
                     "certainty": 0.9, **noise})  # fmt: skip
    found = fit_score(rows)
    assert found["weights"]["update_norm"] > 0
    assert "gram_condition" not in found["weights"]
    assert (found["trained_on"]["batches"], found["trained_on"]["bad"]) == (36, 8)  # four calibrate
    assert found["trained_on"]["areas"]["norm only"]["ROC_AUC"] == 1.0
    with pytest.raises(UserError, match=r"0 of 1 batches are bad: run more of .*trust_labels\.yaml"):
        fit_score(rows[:5])
