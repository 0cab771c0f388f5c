"""Figures of experiments hold the means, ranges and places that can be worked out from a few made-up rows."""

import math

import pytest

from editlab.experiments.figures import (
    bars_figure,
    frontier_figure,
    heat_figure,
    lines_figure,
    radar_figure,
    roc_figure,
)

ROWS = [
    {"batch": "8", "rate": "0.0", "seed": "1", "ES": "0.5", "NS": "0.9"},
    {"batch": "8", "rate": "0.0", "seed": "2", "ES": "0.7", "NS": "0.9"},
    {"batch": "32", "rate": "0.0", "seed": "1", "ES": "0.8"},
    {"batch": "32", "rate": "0.0", "seed": "2", "ES": "0.8"},
    {"batch": "32", "rate": "0.3", "seed": "1", "ES": "1.0", "NS": "0.8"},
]


def test_lines_are_means_over_seeds():
    groups = {"none": ROWS[:4], "some": ROWS[4:]}
    figure = lines_figure(groups, "batch", {"ES": "efficacy", "NS": "neighbors"}, "batch size")
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines["none"].get_xdata()) == [8, 32]
    assert list(lines["none"].get_ydata()) == pytest.approx([0.6, 0.8])
    assert list(lines["some"].get_ydata()) == [1.0]
    assert list(right.get_lines()[0].get_xdata()) == [8]  # NS of 32 was not measured
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "some"]
    assert [text.get_text() for text in left.get_xticklabels()] == ["8", "32"]


def test_a_heat_map_has_the_mean_at_its_place_and_nothing_where_nothing_was_measured():
    (ax,) = heat_figure(ROWS, "batch", "rate", {"ES": "efficacy"}, ("batch", "rate")).axes
    grid = ax.get_images()[0].get_array().filled(math.nan)
    assert grid[0].tolist() == pytest.approx([0.6, 0.8])  # rate 0 below
    assert math.isnan(grid[1, 0])
    assert grid[1, 1] == 1.0
    assert [text.get_text() for text in ax.texts] == ["0.600", "0.800", "1.000"]


def test_a_radar_has_a_closed_line_for_each_group_that_has_all_measures():
    panels = {"in sequence": {"a": ROWS[:2], "b": ROWS[2:4]}, "alone": {"b": ROWS[2:4]}}
    left, right = radar_figure(panels, {"ES": "ES", "NS": "NS"}).axes
    (line,) = left.get_lines()  # b has no NS
    assert list(line.get_ydata()) == pytest.approx([0.6, 0.9, 0.6])
    assert list(line.get_xdata()) == pytest.approx([0, math.pi, 0])
    # Where no row has NS there is no spoke for it.
    assert [mark.get_text() for mark in right.get_xticklabels()] == ["ES"]
    assert len(right.get_lines()) == 1


def test_bars_are_means_with_their_range_and_an_absent_group_leaves_its_place_empty():
    (ax,) = bars_figure({"a": ROWS[:2], "b": [], "c": ROWS[4:]}, {"ES": "efficacy"}).axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.6, 1.0])
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([0, 2])
    (whisker,) = ax.collections[0].get_segments()
    assert whisker[:, 1].tolist() == pytest.approx([0.5, 0.7])


def test_a_frontier_joins_the_means_of_a_familys_settings_in_their_order():
    families = {"plain": {"soft": ROWS[2:4], "firm": ROWS[:2], "never run": []}, "other": {"only": ROWS[4:]}}
    (ax,) = frontier_figure(families, "ES", {"NS": "neighbors"}, "efficacy").axes
    plain, other = ax.get_lines()
    # The rows of "soft" have no NS; those of "firm" have means (0.5 + 0.7) / 2 and 0.9.
    assert list(zip(*plain.get_data(), strict=True)) == [(pytest.approx(0.6), pytest.approx(0.9))]
    assert list(zip(*other.get_data(), strict=True)) == [(1.0, 0.8)]
    assert [text.get_text() for text in ax.texts] == ["firm", "only"]
    (ax,) = frontier_figure(families, "ES", {"ES": "efficacy"}, "efficacy").axes
    assert list(ax.get_lines()[0].get_xdata()) == pytest.approx([0.8, 0.6])


def test_an_roc_runs_from_rejecting_nothing_to_rejecting_everything():
    # Two bad ones of four: the most suspicious and the third.
    rows = [
        {"labels": "made up", "gate": "trust", "false_positive_rate": f, "recall": r, "precision": p}
        for f, r, p in ((0, 0, 0), (0, 0.5, 1.0), (0.5, 0.5, 0.5), (0.5, 1.0, 2 / 3), (1, 1, 0.5))
    ]
    left, right = roc_figure(rows[::-1]).axes
    assert list(left.get_lines()[0].get_xdata()) == [0, 0, 0.5, 0.5, 1]
    assert list(left.get_lines()[0].get_ydata()) == [0, 0.5, 0.5, 1, 1]
    assert list(right.get_lines()[0].get_ydata()) == pytest.approx([1, 0.5, 2 / 3, 0.5])
    assert right.get_lines()[1].get_ydata()[0] == 0.5  # the base rate


def test_nothing_measured_is_an_empty_figure(tmp_path):
    for number, figure in enumerate((lines_figure({}, "x", {"ES": "ES"}, "x"), bars_figure({}, {"ES": "ES"}),
                                     radar_figure({"alone": {}}, {"ES": "ES"}), roc_figure([]),
                                     frontier_figure({"a": {"b": []}}, "x", {"ES": "ES"}, "x"))):  # fmt: skip
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 0
