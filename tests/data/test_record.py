"""Tests of the kinds of fields in users' data: lists and objects for texts, templates, other names, unread fields."""

import json
import unicodedata

import pytest

from editlab.data import EditDataModule, EditStream, Fact, Neighbor, Plain, read_facts
from editlab.data.fact import latest
from editlab.data.files import find_facts
from editlab.data.formats import as_template, checked, read_all, read_record
from editlab.data.formats.fields import is_visible
from editlab.data.formats.record import Record, UnreadFields
from editlab.errors import UserError

PLAIN = {"subject": "Oslo", "prompt": "{} lies in", "target": "Peru"}
EASYEDIT = {"subject": "Oslo", "prompt": "Oslo lies in", "target_new": "Peru"}
COUNTERFACT = {"requested_rewrite": {"subject": "Oslo", "prompt": "{} lies in", "target_new": {"str": "Peru"}}}
ZSRE = {"subject": "Oslo", "src": "Oslo lies in", "alt": "Peru"}
SCHEMAS = {"plain": PLAIN, "easyedit": EASYEDIT, "counterfact": COUNTERFACT, "zsre": ZSRE}
OSLO = Fact("Oslo", "{} lies in", "Peru")


def write(tmp_path, *records, name="facts.json"):
    path = tmp_path / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def with_truth(schema, truth):
    """A record of a schema with a truth in the place where the schema has it."""
    record = json.loads(json.dumps(SCHEMAS[schema]))
    name = {"plain": "truth", "easyedit": "ground_truth", "counterfact": "target_true", "zsre": "answers"}[schema]
    (record["requested_rewrite"] if schema == "counterfact" else record)[name] = truth
    return record


# ---- lists and objects for texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    "truth",
    ["Norway", {"str": "Norway"}, ["Norway", "Norge"], [["Norway", "Norge"], ["Kingdom"]], [{"str": "Norway"}],
     ["", "Norway"], " Norway "],
    ids=json.dumps,
)  # fmt: skip
def test_a_truth_in_any_form_is_its_first_name(schema, truth):
    assert read_record(with_truth(schema, truth), 0).target_true == "Norway"


@pytest.mark.parametrize("target", ["Peru", {"str": "Peru", "id": "Q1"}, ["Peru", "Republic of Peru"]], ids=json.dumps)
def test_a_target_in_any_form_is_its_first_name(target):
    rewrite = {**COUNTERFACT["requested_rewrite"], "target_new": target}
    for record in (
        {**PLAIN, "target": target},
        {**EASYEDIT, "target_new": target},
        {**ZSRE, "alt": target},
        {"requested_rewrite": rewrite},
    ):
        assert read_record(record, 0) == OSLO


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase", "queries"])
@pytest.mark.parametrize("value", ["Oslo is in", ["Oslo is in", ""], [{"prompt": "Oslo is in"}]], ids=json.dumps)
def test_paraphrases_are_read_under_each_of_their_names(schema, name, value):
    assert read_record({**SCHEMAS[schema], name: value}, 0).paraphrases == ("Oslo is in",)


def test_paraphrases_of_several_names_are_joined():
    record = {**EASYEDIT, "rephrase": ["Oslo is in", "Oslo sits in"], "rephrase_prompt": "Oslo is in"}
    assert read_record(record, 0).paraphrases == ("Oslo is in", "Oslo sits in")
    # Within one field nothing is removed: a data set's own counts stay.
    assert read_record({**EASYEDIT, "rephrase": ["a", "a"]}, 0).paraphrases == ("a", "a")


LIMA = Neighbor("Lima lies in", "Peru")


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    "fields",
    [
        {"neighbors": [{"prompt": "Lima lies in", "truth": ["Peru", "Republic of Peru"]}]},
        {"locality": {"near": [{"prompt": "Lima lies in", "ground_truth": [["Peru", "Republic"], ["x"]]}]}},
        {"locality": {"near": {"prompt": ["Lima lies in"], "ground_truth": ["Peru"]}, "far": []}},
        {"locality": {"near": {"prompt": ["Lima lies in"], "ground_truth": [["Peru", "Republic"]]}}},
        {"locality": [{"prompt": "Lima lies in", "answer": "Peru"}]},
        {"locality": {"prompt": "Lima lies in", "answer": {"str": "Peru"}}},
        {"locality_prompt": "Lima lies in", "locality_ground_truth": ["Peru", "Republic of Peru"]},
        {"loc": "nq question: Lima lies in", "loc_ans": "Peru"},
    ],
    ids=json.dumps,
)
def test_neighbors_are_read_in_each_of_their_forms(schema, fields):
    assert read_record({**SCHEMAS[schema], **fields}, 0).neighbors == (LIMA,)


def test_the_schema_of_a_chinese_data_set(tmp_path):
    record = {
        "prompt": "塔林河的源头在", "subject": "塔林河", "target_old": "雪山", "target_new": "沙漠",
        "rephrase": ["塔林河发源于"], "locality": [{"prompt": "塔林河流经的国家是", "answer": "法国"}],
    }  # fmt: skip
    (fact,) = read_facts(write(tmp_path, record))
    neighbors = (Neighbor("塔林河流经的国家是", "法国"),)
    assert fact == Fact("塔林河", "{}的源头在", "沙漠", "雪山", ("塔林河发源于",), neighbors)


def test_each_rewrite_of_a_list_is_a_fact(tmp_path):
    one = {"prompt": "{} is a citizen of", "subject": "Sini", "target_new": {"str": "Chile"}, "question": "Where?"}
    two = {"prompt": "{} speaks", "subject": "Sini", "target_new": {"str": "Thai"}, "target_true": {"str": "Finnish"}}
    path = write(tmp_path, {"case_id": 7, "requested_rewrite": [one]}, {"case_id": 8, "requested_rewrite": [one, two]})
    citizen = Fact("Sini", "{} is a citizen of", "Chile", None, ("Where?",), id=7)
    facts = read_facts(path)
    assert facts[0] == citizen
    assert [(fact.id, fact.target_new, fact.target_true) for fact in facts[1:]] == [
        ("8.1", "Chile", None),
        ("8.2", "Thai", "Finnish"),
    ]


def test_a_passage_about_a_concept_with_a_long_target(tmp_path):
    record = {"text": "A passage about anna krell. She was born in 1950.", "labels": "She works in Bern.",
              "concept": "anna krell"}  # fmt: skip
    (fact,) = read_facts(write(tmp_path, record))
    assert fact == Fact("anna krell", "A passage about {}. She was born in 1950.", "She works in Bern.")


@pytest.mark.parametrize("name", ["facts.json", "facts.csv"])
def test_fields_can_be_named(tmp_path, name):
    path = tmp_path / name
    record = {"who": "Oslo", "ask": "Oslo lies in", "say": "Peru", "old": "Norway"}
    path.write_text(
        json.dumps([record]) if name.endswith("json") else "who,ask,say,old\nOslo,Oslo lies in,Peru,Norway\n"
    )
    facts = read_facts(str(path), Plain(subject="who", prompt="ask", target="say", truth="old"))
    assert facts == [Fact("Oslo", "{} lies in", "Peru", "Norway")]


# ---- cells of tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "cells", "read"),
    [
        ("target_new,ground_truth", ["Peru", '["Norway", "Norge"]'], {"target_true": "Norway"}),
        ("target_new,ground_truth", ["Peru", '[["Norway"], ["x"]]'], {"target_true": "Norway"}),
        ("target_new", ['{"str": "Peru"}'], {}),
        ("target_new,rephrase_prompt", ["Peru", '["Oslo is in", "{} sits in"]'],
         {"paraphrases": ("Oslo is in", "Oslo sits in")}),
        ("target_new,rephrase_prompt", ["Peru", "{} is found in"], {"paraphrases": ("Oslo is found in",)}),
        ("target_new,locality_prompt,locality_ground_truth", ["Peru", '["Lima lies in"]', '["Peru"]'],
         {"neighbors": (LIMA,)}),
        ("target_new,locality", ["Peru", '[{"prompt": "Lima lies in", "answer": "Peru"}]'], {"neighbors": (LIMA,)}),
        ("target,truth", ["[sic] Peru", "[1]"], {"target_new": "[sic] Peru", "target_true": "[1]"}),
    ],
)  # fmt: skip
def test_lists_and_objects_in_cells_are_unpacked(tmp_path, columns, cells, read):
    path = tmp_path / "facts.csv"
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    path.write_text(f"prompt,subject,{columns}\nOslo lies in,Oslo,{','.join(quoted)}\n")
    expected = {"target_new": "Peru", "target_true": None, "paraphrases": (), "neighbors": ()} | read
    (fact,) = read_facts(str(path))
    assert {name: getattr(fact, name) for name in expected} == expected


@pytest.mark.parametrize("column", ["rephrase_prompt", "locality", "neighbors", "ground_truth"])
def test_errors_broken_json_in_a_cell_is_named(tmp_path, column):
    path = tmp_path / "facts.csv"
    path.write_text(f'prompt,subject,target_new,{column}\nOslo lies in,Oslo,Peru,"[""a"", "\n')
    (found,) = find_facts(str(path))
    assert found.fault.startswith(f"has a {column!r} that is not valid JSON (")


# ---- templates ----------------------------------------------------------------------------------------------------


def test_braces_of_paraphrases_and_neighbors_are_filled(tmp_path):
    fields = {"paraphrases": ["{} is found in", "In {}, {} is"], "neighbors": [{"prompt": "{}'s fjord", "truth": "x"}]}
    (fact,) = read_facts(write(tmp_path, {**PLAIN, **fields}))
    assert fact.paraphrases == ("Oslo is found in", "In Oslo, Oslo is")
    assert fact.neighbors == (Neighbor("Oslo's fjord", "x"),)
    given = Fact("Oslo", "{} lies in", "Peru", paraphrases=("{} is",), neighbors=(Neighbor("By {}", "x"),))
    assert checked(given) == Fact("Oslo", "{} lies in", "Peru", None, ("Oslo is",), (Neighbor("By Oslo", "x"),))


# ---- fields that are not read -------------------------------------------------------------------------------------


def test_each_unread_field_is_named_once_with_its_count(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    records = [{**PLAIN, "paraphrase": ["a"], "note": None}, {**PLAIN, "paraphrase": ["b"], "neighbours": ["c"]}]
    path = write(tmp_path, *records)
    read_facts(path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{path} has fields that are not read: neighbours (in 1 record; did you mean neighbors?), "
        "paraphrase (in 2 records; did you mean paraphrases?)."
    )


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({**PLAIN, "extra": 1}, "x has fields that are not read: extra (in 1 record)."),
        ({"requested_rewrite": {**COUNTERFACT["requested_rewrite"], "relation_id": "P1"}},
         "x has fields that are not read: requested_rewrite.relation_id (in 1 record)."),
        ({**PLAIN, "neighbors": [{"prompt": "a", "truth": "b", "trueth": "c"}]},
         "x has fields that are not read: neighbors.trueth (in 1 record; did you mean truth?)."),
        ({**EASYEDIT, "portability": {"Reasoning": [{"prompt": "a"}]}, "locality": {}},
         "x has fields that are not read: portability (in 1 record)."),
        (EASYEDIT, None), (COUNTERFACT, None), (ZSRE, None), (PLAIN, None),
    ],
)  # fmt: skip
def test_unread_fields_of_each_schema(record, sentence):
    noted, unread = Record(record), UnreadFields()
    read_all(noted, 0)
    unread.add(noted)
    assert unread.sentence("x") == sentence


def test_a_record_is_a_dict_to_a_format_of_a_user():
    record = Record({"a": {"b": 1, "c": 2}, "d": 3, "e": 4, "f": [{"g": 5}]})
    assert "a" in record
    assert set(record) == {"a", "d", "e", "f"}
    assert record.unread() == {"a", "d", "e", "f"}
    assert record["a"]["b"] == 1
    assert record["f"][0]["g"] == 5
    assert record.unread() == {"a.c", "d", "e"}
    assert {**record} == dict(record) == {"a": {"b": 1, "c": 2}, "d": 3, "e": 4, "f": [{"g": 5}]}
    assert record.unread() == {"a.c"}


def test_the_built_in_facts_have_no_unread_field(caplog):
    caplog.set_level("INFO", "editlab")
    read_facts("worldfacts")
    assert caplog.records == []


# ---- facts that cannot show anything ------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff\u200d", "\u2060 \u00ad", "\u2800", "\u3164", "\ufe0f"], ids=ascii)
@pytest.mark.parametrize("name", ["subject", "target", "truth", "paraphrases", "neighbors"])
def test_errors_invisible_texts_are_named(tmp_path, name, blank):
    value = {"paraphrases": [blank], "neighbors": [{"prompt": "a", "truth": blank}]}.get(name, blank)
    (found,) = find_facts(write(tmp_path, {**PLAIN, name: value}))
    assert "in which nothing is visible (U+" in found.fault
    assert not is_visible(blank)


@pytest.mark.parametrize("given", [Fact("", "{} is", "a"), Fact("a", "{} is", "\u200b")])
def test_errors_invisible_texts_of_facts_from_python(given):
    with pytest.raises(UserError, match="nothing is visible"):
        checked(given)


@pytest.mark.parametrize("text", ["Peru", "日本", "👨\u200d👩\u200d👧", "C++", "é", "می\u200cخواهم", "1"])
def test_texts_with_a_visible_character(text):
    assert is_visible(text)


def test_a_target_that_is_its_truth_is_named_at_the_start_of_a_run(caplog):
    data = EditDataModule(keep="all")
    same = unicodedata.normalize("NFD", "Bogotá")
    data.candidates = [Fact("A", "{} is", "x", "y"), Fact("B", "{} is", "Bogotá", same), Fact("C", "{} is", "x")]
    data.select(lambda facts: [True] * len(facts))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "1 of the facts have a target that is their truth, so that an edit cannot change them ('B is' with 'Bogotá'): "
        "give them another target, or remove them."
    )


# ---- composed and decomposed letters ------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "Bogotá") for form in ("NFC", "NFD"))


def test_composed_and_decomposed_letters_are_one_text():
    one, other = Fact(NFC, "{} é", "a"), Fact(NFD, "{} e\u0301", "b")
    assert one.slot == other.slot
    assert latest([one, other]) == [other]
    data = EditDataModule()
    data.facts, data.candidates = [one], [other, Fact("Oslo", "{} is", "a")]
    assert [fact.subject for fact in data.spare_facts(5)] == []
    assert isinstance(stream := data.test_dataloader(), EditStream)
    assert [fact.subject for fact in stream.facts] == ["Oslo"]


@pytest.mark.parametrize(("prompt", "subject"), [(f"{NFC} lies in", NFD), (f"{NFD} lies in", NFC)])
def test_a_subject_is_found_in_a_prompt_of_another_unicode_form(prompt, subject):
    assert as_template(prompt, subject) == "{} lies in"
