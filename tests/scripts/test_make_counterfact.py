"""Our CounterFact file from the original one: the rule by hand, and the very file where it is at hand."""

import hashlib
import json
from pathlib import Path

import pytest

from editlab.errors import UserError
from scripts import make_counterfact as make

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/counterfact.json"


def record(number, subject, truth, paraphrases, neighbors, prompt="{} lies in"):
    return {
        "case_id": number, "pararel_idx": 7, "generation_prompts": ["x"],
        "requested_rewrite": {
            "prompt": prompt, "relation_id": "P1", "subject": subject,
            "target_new": {"str": "Peru", "id": "Q1"}, "target_true": {"str": truth, "id": "Q2"},
        },
        "paraphrase_prompts": paraphrases, "neighborhood_prompts": neighbors,
    }  # fmt: skip


ORIGINAL = [
    record(3, "Oslo", "Norway", ["where is Oslo", "Oslo is in"], ["Bergen lies in", "Molde is in"]),
    record(5, "Lima", "Asia", ["Lima!", "Lima?"], ["Cusco lies in"]),
    record(9, "Bergen", "Norway", ["Bergen, in", "Bergen:"], ["Oslo is located in", "Bodø, in"]),
    record(11, "Tromsø", "Norway", ["Tromsø:", "Tromsø,"], ["Narvik, in"]),
    record(12, "Paris", "Norway", ["Paris:", "Paris,"], ["Rome, in"], prompt="{} is"),
]


def chosen(number, paraphrase, neighbor):
    return number, make.check_sum(paraphrase), make.check_sum(neighbor)


CHOICE = [
    chosen(3, "Oslo is in", "Molde is in"),
    chosen(9, "Bergen, in", "Oslo is located in"),
    chosen(11, "Tromsø:", "Narvik, in"),
    chosen(12, "Paris,", "Rome, in"),
]


def test_the_rule_by_hand():
    oslo, bergen, tromso, paris = make.rebuild(ORIGINAL, CHOICE)
    assert list(oslo) == ["case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"]
    assert oslo["requested_rewrite"] == {
        "prompt": "{} lies in", "subject": "Oslo", "target_new": {"str": "Peru"}, "target_true": {"str": "Norway"}
    }  # fmt: skip
    assert oslo["paraphrase_prompts"] == ["Oslo is in"]  # the second of the two was chosen
    # Of the same prompt and truth; "Oslo is located in" is about Oslo itself.
    assert oslo["neighborhood_prompts"] == ["Molde is in", "Narvik, in"]
    assert bergen["neighborhood_prompts"][0] == "Oslo is located in"
    assert sorted(bergen["neighborhood_prompts"][1:]) == ["Molde is in", "Narvik, in"]
    assert sorted(tromso["neighborhood_prompts"][1:]) == ["Molde is in", "Oslo is located in"]
    assert paris["neighborhood_prompts"] == ["Rome, in"]  # another prompt


def test_ten_neighbors_at_most_and_the_same_ones_each_time():
    many = [record(i, f"S{i}", "Norway", ["p"], [f"N{i}"]) for i in range(30)]
    choice = [chosen(i, "p", f"N{i}") for i in range(30)]
    once, again = make.rebuild(many, choice), make.rebuild(many, choice)
    assert once == again
    assert all(len(set(one["neighborhood_prompts"])) == 10 for one in once)


def test_what_the_original_lacks_is_named():
    with pytest.raises(UserError, match=r"no record 4: give counterfact\.json with all 21,919"):
        make.rebuild(ORIGINAL, [chosen(4, "", "")])
    with pytest.raises(UserError, match="Record 3 of the original has other paraphrase_prompts"):
        make.rebuild(ORIGINAL, [chosen(3, "Oslo was in", "Molde is in")])


def test_the_choice_is_read_as_it_was_written(tmp_path):
    ours = make.rebuild(ORIGINAL, CHOICE)
    make.write_choice(ours, tmp_path / "choice.txt")
    assert make.read_choice(tmp_path / "choice.txt") == CHOICE
    assert len(make.read_choice()) == 11_919


def test_mistakes_write_nothing(tmp_path, capsys):
    original, out = tmp_path / "original.json", tmp_path / "out.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ('[{"src": "?"}]', "is not in CounterFact's schema"),
        (json.dumps(ORIGINAL), "The original has no record 2"),
    ):
        original.write_text(text, encoding="utf-8")
        assert make.main([str(original), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.write_text("mine")
    assert make.main([str(original), "--out", str(out)]) == 2
    assert "exists: remove it" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.skipif(not SHARED.exists(), reason="CounterFact is not beside the repository")
def test_the_file_of_the_experiments_byte_for_byte(tmp_path):
    """Its own texts stand in for the original's: each record's first neighbor is the chosen one."""
    assert make.main([str(SHARED), "--out", str(tmp_path / "ours.json")]) == 0
    assert hashlib.sha256((tmp_path / "ours.json").read_bytes()).hexdigest() == make.SHA256
