"""Listing what ships with editlab."""

import pytest

from editlab.cli.commands.ls import TITLES, lines
from editlab.cli.main import main
from editlab.utils.shipped import MODELS, RECIPES, shipped


def test_everything_is_listed(capsys):
    assert main(["ls"]) == 0
    shown = capsys.readouterr().out
    assert [title in shown for title in TITLES.values()] == [True] * 3
    assert "\n  rome  " in shown
    assert "  GPT-2 XL: 1.5 billion parameters, 48 layers; 6.2 GB in float32.\n" in shown
    assert "\n  targets  " in shown


def test_one_kind_is_listed(capsys):
    assert main(["ls", "models"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == TITLES[MODELS]
    assert [row.split()[0] for row in rows] == [one.name for one in shipped(MODELS)]


def test_a_line_is_cut_to_a_terminal_s_width():
    whole, cut = (list(lines(RECIPES, shipped(RECIPES), width)) for width in (None, 60))
    assert max(map(len, whole)) > 100
    assert max(map(len, cut)) == 60
    assert cut[1].endswith("…")


@pytest.mark.parametrize("arguments", [["ls", "recipe"], ["ls", "models", "recipes"]])
def test_an_unknown_kind(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("editlab: ")
