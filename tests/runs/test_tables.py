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
        '<div class="scroll"><table><thead><tr><th>a</th><th class="n">b</th></tr></thead>'
        '<tbody><tr><td>x</td><td class="n">&lt;1&gt;</td></tr></tbody></table></div>'
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
