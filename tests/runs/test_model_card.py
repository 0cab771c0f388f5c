"""Model cards: special characters in facts, the hub's front matter, and unknown parts, which are absent."""

from dataclasses import replace

import torch
import yaml

from editlab.runs.delta import Delta
from editlab.runs.history import Edit, History
from editlab.runs.model_card import delta_card, edited_card

EDITS = (
    Edit("a|b", "{} is\nin <b>", "c\\d", None, 1, "kept"),
    Edit("x", "{} is", "y", "z", 1, "scaled to 0.5"),
    Edit("x", "{} is", "w", "z", 2, "superseded by edit 4"),
    Edit("x", "{} is", "v", "z", 2, "scaled to 0.25"),
)
DELTA = Delta("owner/model", "f00d", torch.float32, [3], {"h.3.out": torch.zeros(2, 3)}, History(2, edits=EDITS))


def test_no_text_breaks_out_of_its_cell():
    rows = [line for line in edited_card(DELTA, "float32").splitlines() if line.startswith("| 1 ")]
    assert rows == ["| 1 | **a\\|b** is in &lt;b> | c\\\\d |  | 1 | kept |"]


def test_fates_are_counted():
    assert "\n1 kept, 2 scaled, 1 superseded.\n" in edited_card(DELTA, "float32")


def test_front_matter():
    for card, library in ((edited_card(DELTA, "float16"), "transformers"), (delta_card(DELTA), "editlab")):
        said = yaml.safe_load(card.split("---")[1])
        assert (said["library_name"], said["base_model"]) == (library, "owner/model")
    assert "base_model" not in edited_card(replace(DELTA, language_model="smollm2-135m"), "float32")  # built in
    assert "base_model" not in edited_card(replace(DELTA, language_model="/some/folder/of/mine"), "float32")


def test_unknown_parts_are_absent():
    card = edited_card(DELTA, "float32")
    for word in ("| ES |", "Recipe `", "seed", "run with", "Settings of the run"):
        assert word not in card
    history = replace(
        DELTA.history,
        recipe="mine",
        seed=0,
        versions={"torch": "1"},
        settings="a: 1\n",
        metrics={"before/ES": 0.5, "retained/accuracy_age_1": 1.0, "retained/perplexity": None},
    )
    card = edited_card(replace(DELTA, history=history), "float32")
    for word in ("| ES | 0.500 |  |  |", "Recipe `mine`; seed 0; run with torch 1; written", "```yaml\na: 1\n```"):
        assert word in card


def test_a_history_goes_round():
    assert History.from_json(DELTA.history.to_json()) == DELTA.history
