"""Tables by hand: as text, Markdown and HTML, and that no text becomes markup."""

from editlab.runs.tables import Table, metric_table

TABLE = Table(["a", "group/\nb"], [["x", "1"], ["long", ""]], numbers=[1])


def test_text_is_aligned():
    assert TABLE.to_text() == "      group/\na          b\nx          1\nlong       -"


def test_markdown():
    assert TABLE.to_markdown() == "| a | group/ b |\n| --- | ---: |\n| x | 1 |\n| long |  |"
    assert Table(["a"], [["x|y\n<b>\\"]]).to_markdown().splitlines()[-1] == "| x\\|y &lt;b>\\\\ |"


def test_html():
    assert Table(["a", "b"], [["x", "<1>"]], numbers=[1]).to_html().replace("\n", "") == (
        '<div class="scroll"><table><thead><tr><th><bdi>a</bdi></th><th class="n"><bdi>b</bdi></th></tr></thead>'
        '<tbody><tr><td><bdi>x</bdi></td><td class="n"><bdi>&lt;1&gt;</bdi></td></tr></tbody></table></div>'
    )


def test_the_metric_table_has_what_was_measured():
    table = metric_table(
        {"before/ES": 0.5, "retained/ES": None, "retained/perplexity": 28.254, "bystanders/PS": 1.0,
         "retained/accuracy_age_1": 1.0, "immediate/paraphrase_accuracy": 0.25}
    )  # fmt: skip
    assert table.header == ["", "before", "immediate", "retained"]
    assert table.rows == [
        ["ES", "0.500", "", ""], ["paraphrase accuracy", "", "0.250", ""], ["held-out perplexity", "", "", "28.25"],
    ]  # fmt: skip
    assert metric_table({}).rows == []


def test_a_wide_table_can_be_shown_as_cards():
    page = Table(["a", "b", "c", "d", 'e"'], [["1", "2", "3", "4", ""]], classes={(0, 1): "worse"}).to_html()
    assert '<table class="cards">' in page
    assert '<td class="worse" data-label="b"><bdi>2</bdi></td>' in page
    assert '<td data-label="e&quot;"></td>' in page
    assert "data-label" not in Table(["a", "b", "c", "d"], [["1", "2", "3", "4"]]).to_html()


def test_values_after_the_edits_are_better_or_worse_than_before():
    table = metric_table(
        {"before/ES": 0.0, "immediate/ES": 1.0, "retained/ES": 0.0, "before/NS": 0.9, "retained/NS": 0.8,
         "before/perplexity": 20.0, "immediate/perplexity": 19.0, "retained/perplexity": 25.0, "retained/PS": 0.5}
    )  # fmt: skip
    names = [row[0] for row in table.rows]
    found = {(names[row], table.header[column]): kind for (row, column), kind in table.classes.items()}
    assert found == {
        ("ES", "immediate"): "better", ("NS", "retained"): "worse",
        ("held-out perplexity", "immediate"): "better", ("held-out perplexity", "retained"): "worse",
    }  # fmt: skip


WHOLE = {
    "before/perplexity": 20.0, "before/perplexity_low": 18.04, "before/perplexity_high": 22.2,
    "before/perplexity_start": 19.0, "before/perplexity_wiki": 20.0, "before/perplexity_prose": 30.0,
    "before/S": 0.5, "before/generation": 0.25, "before/neighbor_generation": 0.75, "before/bystander_accuracy": 0.5,
    "before/portability/two-hop/accuracy": 0.5, "before/portability/two-hop/generation": 0.25,
    "before/portability/two-hop/generation_f1": 0.3, "before/portability/aliases/accuracy": 1.0,
}  # fmt: skip


def test_the_screen_has_the_main_metrics_and_a_report_all():
    short = [(row[0], row[1]) for row in metric_table(WHOLE).rows]
    assert short == [
        ("generation", "0.250"), ("held-out perplexity", "20.00"), ("  its 95% interval", "18.0 to 22.2"),
        ("perplexity of wiki", "20.00"), ("perplexity of prose", "30.00"), ("bystander accuracy", "0.500"),
        ("two-hop, generation", "0.250"), ("aliases, accuracy", "1.000"),
    ]  # fmt: skip
    more = [row[0] for row in metric_table(WHOLE, full=True).rows]
    assert set(more) - {name for name, _ in short} == {"neighbor generation", "S", "two-hop, accuracy"}
    one = metric_table({"before/perplexity": 20.0, "before/perplexity_wiki": 20.0})
    assert [row[0] for row in one.rows] == ["held-out perplexity"]
    assert [row[0] for row in metric_table({"retained/perplexity_low": 1.0}).rows] == []  # without the upper end
