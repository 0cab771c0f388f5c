"""The page of one run: its content, and that all texts are escaped."""

import re
from html.parser import HTMLParser

from editlab.runs.report import Example, Missed, Page

SUMMARY = {
    "edits": 4, "rolled_back": 1, "superseded": 0, "batches": 2, "seconds": 12.3, "seed": 7,
    "versions": {"torch": "2.13"},
    "metrics": {
        "before/ES": 0.0, "before/NS": 0.75, "immediate/ES": 1.0, "retained/ES": 0.5, "retained/NS": 0.625,
        "before/perplexity": 20.0, "retained/perplexity": 25.5,
    },
}  # fmt: skip
CURVE = {
    2: {"before/ES": 0.0, "immediate/ES": 1.0},
    4: {"before/ES": 0.0, "immediate/ES": 1.0, "retained/ES": 0.5, "retained/perplexity": 25.5},
}
EVIL = "<script>alert('x')</script> & \"quotes\""


class Seen(HTMLParser):
    """Collects tags and texts, and every address that a browser would fetch."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.fetched = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_metrics_as_they_are_on_the_screen():
    texts = Seen(Page("a run", "model: {}", SUMMARY, CURVE, ["kept", "rolled back"], []).to_html()).texts
    start = texts.index("ES")
    assert [t for t in texts[start : start + 8] if t][:4] == ["ES", "0.000", "1.000", "0.500"]
    assert "4 facts edited, 1 rolled back in 2 batches; 12 s; seed 7. torch 2.13." in texts
    assert {"20.00", "25.50"} <= set(texts)


def test_a_score_that_is_not_a_number_is_an_empty_cell():
    broken = {**SUMMARY, "metrics": {**SUMMARY["metrics"], "retained/perplexity": None}}
    texts = Seen(Page("a run", "", broken).to_html()).texts
    assert "20.00" in texts
    assert "25.50" not in texts


def test_events_of_another_program_are_not_decisions():
    events = [{"step": 0}, {"step": 1, "fact": 3}, {"step": 2, "decision": "drop", "fact": 3}]
    summary = {"edits": 4, "versions": {"torch": "2.13"}}
    page = Page("a run", "", summary, events={"x_events": events, "y": [{"step": 1}]})
    texts = Seen(page.to_html()).texts
    assert "4 facts edited. torch 2.13." in texts
    assert "1 drop" in texts
    assert "Y" not in texts


def test_the_answers_to_edits_that_were_lost():
    missed = [Missed(1, 1, "The capital of France is", "Tokyo", "Paris", True), Missed(4, 2, "a", "b", "c", False)]
    page = Seen(Page("a run", "", SUMMARY, missed=missed).to_html())
    assert any(text.startswith("1 forgotten, 1 never learnt") for text in page.texts)
    start = page.texts.index("The capital of France is")
    assert [t for t in page.texts[start : start + 8] if t][:4] == [
        "The capital of France is",
        "Tokyo",
        "Paris",
        "forgotten",
    ]


def test_edits_before_and_after_in_the_given_order():
    examples = [Example(3, "a is", "Lima", "Oslo", "Rome", 0.0125, False), Example(1, "b is", "x", "y", "x", 0.5, True)]
    page = Page("a run", "", SUMMARY, examples=examples).to_html()
    texts = [text for text in Seen(page).texts if text]
    start = texts.index("a is")
    assert texts[start - 1 : start + 11] == [
        "3", "a is", "Lima", "Oslo", "Rome", "0.013", "1", "b is", "x", "y", "x", "0.500",
    ]  # fmt: skip
    assert '<td class="worse" data-label="after"><bdi>Rome</bdi></td>' in page
    assert '<td class="better" data-label="after"><bdi>x</bdi></td>' in page


def test_texts_with_marks_of_direction_are_isolated():
    rtl = "\u202eabc \u05d0\u05d1"
    page = Page(rtl, "", SUMMARY, missed=[Missed(1, 1, rtl, rtl, rtl, True)]).to_html()
    assert page.count(f"<bdi>{rtl}</bdi>") == 4
    assert page.replace(f"<title>{rtl}</title>", "").count("\u202e") == 4


def test_figures_are_drawn_for_wide_and_for_narrow_screens():
    page = Page("a run", "", SUMMARY, CURVE).to_html()
    assert [page.count(f'<figure class="{kind}"') for kind in ("wide", "narrow")] == [1, 1]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_no_text_of_a_user_becomes_markup():
    events = [{"step": 0, "decision": "rollback", "score": 0.25, "reason": EVIL}, {"step": 1, "decision": "keep"}]
    page = Page(EVIL, EVIL, SUMMARY, CURVE, [EVIL], [Missed(1, 1, EVIL, EVIL, EVIL, True)], {"trust_events": events})
    seen = Seen(page.to_html())
    assert "script" not in seen.tags
    assert EVIL in seen.texts
    assert seen.fetched == []  # nothing is loaded from anywhere


def test_events_that_did_not_let_things_be():
    events = [
        {"step": 0, "decision": "keep", "score": 0.9},
        {"step": 1, "decision": "rollback", "score": 0.256, "reason": "score 0.26 is under 0.50"},
        {"step": 2, "decision": "leave_out", "fact": {"subject": "France", "target_new": "Lima"}},
    ]
    page = Page("a run", "", SUMMARY, events={"trust_events": events, "empty_events": []})
    texts = [text for text in Seen(page.to_html()).texts if text]
    assert texts[texts.index("Trust") + 1] == "1 keep, 1 rollback, 1 leave_out"
    start = texts.index("2", texts.index("reason"))
    assert texts[start : start + 7] == [
        "2",
        "rollback",
        "0.26",
        "score 0.26 is under 0.50",
        "3",
        "leave_out",
        "France: Lima",
    ]
    assert "Empty" not in texts


def test_an_unfinished_run_and_a_model_that_was_not_evaluated():
    texts = Seen(Page("a run", "", None, CURVE).to_html()).texts
    assert "This run has not finished; --ckpt_path last resumes it after its last saved batch." in texts
    assert "The model was not evaluated (--no_answers)." in texts


def test_fates_are_counted_by_kind():
    fates = ["kept", "superseded by edit 4", "scaled to 0.5", "superseded by edit 9", "kept"]
    texts = [text for text in Seen(Page("a run", "", SUMMARY, fates=fates).to_html()).texts if text]
    start = texts.index("What became of the edits")
    assert texts[start + 2 : start + 8] == ["kept", "2", "superseded", "2", "scaled", "1"]


def outcome(edit, status="kept", hit=None, logp=None, **more):
    row = {"edit": edit, "subject": "France", "prompt": "The capital of {} is", "target_new": f"T{edit}", "step": 0}
    measured = {} if hit is None else {"retained/hit": hit, "retained/logp_new": logp}
    return {**row, "status": status, "immediate/hit": 1, "immediate/logp_new": 0.0, **measured, **more}


def test_outcomes_of_edits_the_worst_first():
    counts = {"retained/paraphrases": 2, "retained/paraphrase_hits": 1}
    rows = [outcome(1, hit=1, logp=-0.5), outcome(2, "rolled back"), outcome(3, hit=0, logp=-1.0, **counts),
            outcome(4, hit=0, logp=-2.0)]  # fmt: skip
    page = Page("a run", "", SUMMARY, outcomes=rows).to_html()
    texts = [text for text in Seen(page).texts if text]
    start = texts.index("Every edit, the worst first")
    cells = texts[texts.index("paraphrases", start) + 1 :]
    # exp(-2), exp(-1) and exp(-0.5); nothing was measured before, and there are no neighbors: no such columns.
    assert cells[:25] == [
        "4", "The capital of France is", "T4", "kept", "1.000", "0.135",
        "3", "The capital of France is", "T3", "kept", "1.000", "0.368", "1 of 2",
        "1", "The capital of France is", "T1", "kept", "1.000", "0.607",
        "2", "The capital of France is", "T2", "rolled back", "1.000", "Recipe",
    ]  # fmt: skip
    assert texts[start : texts.index("4", start)].count("neighbors") == 0
    assert '<td class="n worse" data-label="P now"><bdi>0.135</bdi></td>' in page
    assert '<td class="n better" data-label="P now"><bdi>0.607</bdi></td>' in page


def test_of_many_outcomes_the_worst_are_shown():
    rows = [outcome(i, hit=1, logp=-0.001 * i) for i in range(1, 251)]
    page = Page("a run", "", SUMMARY, outcomes=rows).to_html()
    assert "200 edits, the worst first" in page
    assert "<bdi>T250</bdi>" in page
    assert "<bdi>T50</bdi>" not in page
