"""Scores of generated answers, each worked out by hand."""

import pytest
import torch

from editlab.metrics import AnswerScore, CaseScore
from editlab.metrics.functional import answer_score, answer_scores, normalized


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),  # the three steps of SQuAD's script: case, punctuation, articles
        ("An apple a day, the U.S.", "apple day us"),
        ("theatre and Anna", "theatre and anna"),  # an article is a whole word
        ("French-speaking / Swiss\u2013German", "french speaking swiss german"),
        ("Caf\u00e9 \u201cde\u201d l\u2019Op\u00e9ra", "caf\u00e9 de lop\u00e9ra"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u6771\u4eac\u3002", "\u6771\u4eac"),
        ("The", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("text", "names", "contains", "exact", "f1"),
    [
        ("Rome.", ["Rome"], True, True, 1.0),
        # Five words without the article, one of them right: precision 1/5, recall 1, so 2 * 0.2 / 1.2.
        ("in the city of Rome, Italy", ["Rome"], True, False, 2 / 6),
        ("Romeo and Juliet", ["Rome"], False, False, 0.0),  # whole words
        ("an Australian band", ["US", "Australia"], False, False, 0.0),
        # Of 'new york city' two words are in a text of three: precision 2/3, recall 2/3.
        ("New York State", ["New York City"], False, False, 2 / 3),
        ("New York State", ["Boston", "New York City", "new york"], True, False, 4 / 5),
        ("the the cat", ["cat"], True, True, 1.0),
        ("Paris Paris", ["Paris"], True, False, 2 / 3),  # a word of the name counts once
        ("", ["Rome"], False, False, 0.0),
        ("The", ["the"], True, True, 1.0),  # of an article alone nothing remains: compared as it is
        ("Rome", ["!!"], False, False, 0.0),
        ("\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059", ["\u6771\u4eac"], True, False, 0.0),  # no spaces in Japanese
        ("it is not Rome", ["Rome"], True, False, 2 / 5),  # a denial counts, as for every string match
    ],
)
def test_scores_of_one_answer(text, names, contains, exact, f1):
    found = answer_scores(text, names)
    assert (found.contains, found.exact) == (contains, exact)
    assert found.f1 == pytest.approx(f1)


def test_a_record_counts_by_the_mean_or_by_the_best_of_its_prompts():
    texts, names = ["Rome", "Paris", "Oslo", "in Lima"], [["Rome"], ["Rome"], ["Bergen"], ["Lima"]]
    record = torch.tensor([3, 3, 1, 2])
    # Records 1, 2, 3 by the mean: 0, 1, 1/2; by the best: 0, 1, 1. Exact: record 2 is missed.
    expected = {
        ("contains", False): 1.5 / 3,
        ("contains", True): 2 / 3,
        ("exact", False): 0.5 / 3,
        ("exact", True): 1 / 3,
    }
    for (kind, any_prompt), value in expected.items():
        assert float(answer_score(texts, names, record, kind, any_prompt)) == pytest.approx(value)
        metric = AnswerScore(kind, any_prompt)
        metric.update(texts[:1], names[:1], record[:1])  # a record may come in several updates
        metric.update(texts[1:], names[1:], record[1:])
        assert float(metric.compute()) == pytest.approx(value)


def test_bad_input():
    with pytest.raises(ValueError, match="kind is 'starts': it must be one of contains, exact, f1"):
        AnswerScore("starts")
    with pytest.raises(ValueError, match="no name of the answer"):
        answer_scores("Rome", [])
    with pytest.raises(ValueError, match="1 texts, but 2 record numbers"):
        AnswerScore().update(["Rome"], [["Rome"]], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"shape \(2,\) and the record numbers \(1,\)"):
        CaseScore().update(torch.zeros(2), torch.tensor([0]))
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(AnswerScore().compute())  # no prompt
