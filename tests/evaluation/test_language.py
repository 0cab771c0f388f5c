"""Perplexities of several texts, of the beginning of one, of blocks, and their intervals."""

import math

import pytest
from scipy import stats

from editlab.errors import UserError
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.language import BUILTIN_TEXT, LanguageMeter, block_perplexities
from editlab.evaluation.scoring import token_log_probs
from editlab.evaluation.settings import EvaluationSettings
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import first_ids
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())


@pytest.fixture(scope="module")
def text():
    return BUILTIN_TEXT.read_text()


def perplexity(lm, ids):
    """Exp of the mean negative log-probability, in one line."""
    return float((-token_log_probs(lm, ids)).mean().exp())


def test_the_interval_is_the_t_interval_over_whole_windows(lm, text):
    found = LanguageMeter(EvaluationSettings(heldout_tokens=1000, generated_texts=0)).measure(lm)
    ids = first_ids(lm, text, 1000)
    means = [float((-token_log_probs(lm, ids[i : i + 256])).mean()) for i in (0, 256, 512)]  # the fourth is shorter
    expected = stats.t.interval(0.95, 2, loc=sum(means) / 3, scale=stats.sem(means))
    assert (found["perplexity_low"], found["perplexity_high"]) == pytest.approx(
        [math.exp(e) for e in expected], rel=1e-4
    )
    assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]
    one = LanguageMeter(EvaluationSettings(heldout_tokens=200, generated_texts=0)).measure(lm)
    assert set(one) == {"perplexity"}  # of one window there is no interval


def test_the_beginning_is_measured_on_the_way_and_at_the_ends(lm, text):
    """Its windows are those of the whole text, the last one cut short."""
    meter = LanguageMeter(EvaluationSettings(heldout_tokens=700, snapshot_tokens=300, generated_texts=0))
    ids = first_ids(lm, text, 700)
    whole, snapshot = meter.measure(lm), meter.measure(lm, snapshot=True)
    assert whole["perplexity"] == pytest.approx(perplexity(lm, ids), rel=1e-5)
    assert snapshot == pytest.approx({"perplexity_start": perplexity(lm, ids[:300])}, rel=1e-5)
    assert whole["perplexity_start"] == pytest.approx(snapshot["perplexity_start"], rel=1e-5)
    short = LanguageMeter(EvaluationSettings(heldout_tokens=300, snapshot_tokens=400, generated_texts=0))
    assert set(short.measure(lm, snapshot=True)) == {"perplexity"}
    assert "perplexity_start" not in short.measure(lm)
    none = LanguageMeter(EvaluationSettings(heldout_tokens=300, snapshot_tokens=0, generated_texts=0))
    assert none.measure(lm, snapshot=True) == {}


def test_several_texts_have_names(lm, text, tmp_path):
    (tmp_path / "some.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 9)
    heldout = {"some": str(tmp_path / "some.txt"), "prose": "builtin"}
    found = LanguageMeter(EvaluationSettings(heldout=heldout, heldout_tokens=300, generated_texts=0)).measure(lm)
    assert found["perplexity_prose"] == pytest.approx(perplexity(lm, first_ids(lm, text, 300)), rel=1e-5)
    assert found["perplexity"] == found["perplexity_some"] != found["perplexity_prose"]


def test_a_shorter_text_is_measured_as_a_whole(lm, tmp_path, caplog):
    path = tmp_path / "some.txt"
    path.write_text("The capital of France is Paris.")
    ids = first_ids(lm, path.read_text(), 10**6)
    with caplog.at_level("INFO"):
        found = LanguageMeter(EvaluationSettings(heldout=str(path), generated_texts=0)).measure(lm)
    assert found == {"perplexity": pytest.approx(perplexity(lm, ids), rel=1e-5)}
    assert f"on all {len(ids)} tokens of the held-out text {path}" in caplog.text
    path.write_text("")
    with pytest.raises(UserError, match="has 0 tokens, and the perplexity needs two: give a longer text"):
        LanguageMeter(EvaluationSettings(heldout=str(path))).measure(lm)


def test_blocks_are_the_perplexities_of_parts_of_a_text(lm, text):
    ids = first_ids(lm, text, 300)
    expected = [perplexity(lm, ids[start : start + 100]) for start in (0, 100, 200)]
    assert block_perplexities(lm, text, 3, 100) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="3 blocks of 100 need 300: give a longer text"):
        block_perplexities(lm, text[:50], 3, 100)


def test_the_unedited_models_text_is_read_once(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))
    settings = EvaluationSettings(heldout_tokens=300, generated_texts=0)
    cache = Evaluation(settings).cache(lm, "f" * 64)
    first = LanguageMeter(settings).measure(lm, cache=cache)
    monkeypatch.setattr("editlab.evaluation.language.window_log_probs", None)  # would fail if it were measured again
    assert LanguageMeter(settings).measure(lm, cache=cache) == first


@pytest.mark.parametrize(
    ("heldout", "message"),
    [({}, "heldout is empty"), ({"a b": "builtin"}, "has the name 'a b'"), ({"low": "builtin"}, "none of start, low")],
)
def test_bad_names(heldout, message):
    with pytest.raises(UserError, match=message):
        EvaluationSettings(heldout=heldout)
