"""Figures show the given numbers, and are drawn without those that are absent."""

import pytest

from editlab.runs.figures import (
    BLUE,
    PANELS,
    comparison_figure,
    draw_band,
    forgetting_figure,
    new_figure,
    perplexity_of_curve,
)


def test_every_series_is_drawn_at_its_edits():
    curve = {
        16: {"retained/ES": 1.0, "retained/perplexity": 30.0},
        8: {"before/ES": 0.0, "immediate/ES": 1.0, "retained/ES": 0.5, "retained/perplexity": 29.0},
    }
    figure = forgetting_figure(curve, 28.0)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["before", "immediate", "retained"]
    assert list(lines["retained"].get_xdata()) == [8, 16]
    assert list(lines["retained"].get_ydata()) == [0.5, 1.0]
    perplexity = {line.get_label(): line for line in figure.axes[-1].get_lines()}
    assert list(perplexity["edited"].get_ydata()) == [29.0, 30.0]


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("absent", [*(name for name, _ in PANELS), "perplexity", None])
def test_what_was_not_measured_has_no_panel(absent, columns):
    names = [name for name in (*(name for name, _ in PANELS), "perplexity") if name != absent]
    figure = forgetting_figure({4: {f"retained/{name}": 0.5 for name in names}}, None, columns)
    titles = dict(PANELS) | {"perplexity": "held-out perplexity"}
    assert [ax.get_title() for ax in figure.axes] == [titles[name] for name in names]
    assert all(ax.get_lines() for ax in figure.axes)
    assert figure.axes[0].get_gridspec().ncols == columns


def test_nothing_measured_is_an_empty_figure(tmp_path):
    forgetting_figure({}, None).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_a_band_is_the_range_and_the_line_the_mean():
    _, (ax,) = new_figure(1, 1)
    curves = [{10: {"a": 0.0}, 20: {"a": 0.5}, 30: {"a": 1.0}}, {10: {"a": 1.0}, 20: {"a": 0.7}, 30: {"b": 1.0}}]
    draw_band(ax, curves, "a", label="x", color=BLUE, linestyle="-")
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == [10, 20]  # 30 is not in both
    assert list(line.get_ydata()) == [0.5, 0.6]
    corners = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices.round(6).tolist()}
    assert {(10, 0), (10, 1), (20, 0.5), (20, 0.7)} <= corners
    draw_band(ax, [], "a", label="none", color=BLUE, linestyle="-")
    draw_band(ax, curves, "absent", label="none", color=BLUE, linestyle="-")
    assert len(ax.get_lines()) == 1


@pytest.mark.parametrize(("highest", "scale"), [(40.0, "linear"), (4000.0, "log")])
def test_perplexities_far_apart_are_compared_by_their_logarithm(highest, scale):
    curves = {
        "a": ([{8: {"retained/perplexity": 30.0}}], BLUE, "-"),
        "b": ([{8: {"retained/perplexity": highest}}], BLUE, ":"),
    }
    assert [ax.get_yscale() for ax in comparison_figure(curves).axes] == ["linear", "linear", "linear", scale]


def test_each_row_of_a_comparison_has_its_own_lines_and_legend():
    line = ([{8: {"retained/ES": 0.5}}], BLUE, "-")
    figure = comparison_figure({"a": line, "b": line}, {"c": line})
    assert [[text.get_label() for text in ax.get_lines()] for ax in figure.axes[::4]] == [["a", "b"], ["c"]]
    legends = [[text.get_text() for text in part.legends[0].get_texts()] for part in figure.subfigs]
    assert legends == [["a", "b"], ["c"]]


def test_a_curve_has_the_perplexity_of_the_same_tokens_at_every_point():
    """The end has that of the whole text too, which is another number."""
    ends = {"retained/perplexity": 40.0, "retained/perplexity_start": 31.0}
    curve = {8: {"retained/perplexity_start": 30.0}, 16: ends}
    drawn = [figure.axes[-1].get_lines()[-1] for figure in (
        forgetting_figure(curve, 29.0), comparison_figure({"a": ([curve], BLUE, "-")})
    )]  # fmt: skip
    assert [list(line.get_ydata()) for line in drawn] == [[30.0, 31.0]] * 2
    assert perplexity_of_curve({"before/perplexity": 39.0, "before/perplexity_start": 29.0}, "before") == 29.0
    assert perplexity_of_curve({"before/perplexity": 39.0}, "before") == 39.0
    assert perplexity_of_curve({}, "before") is None
