"""Tests of the schemas of data sets about what follows from an edit: MQuAKE, RippleEdits and EVOKE."""

import json

import pytest

from editlab.data import EVOKE, Fact, MQuAKE, Neighbor, Question, RippleEdits, read_facts
from editlab.data.formats import FORMATS, format_of, read_record
from editlab.errors import UserError


def write(tmp_path, *records):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def changed(record, value, *path):
    """A copy of a record with another value in one place; ``...`` removes the field."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


# ---- MQuAKE -------------------------------------------------------------------------------------------------------

MQUAKE = {
    "case_id": 15,
    "requested_rewrite": [
        {"prompt": "{} plays", "relation_id": "P641", "target_new": {"str": "curling", "id": "Q1"},
         "target_true": {"str": "football", "id": "Q2"}, "subject": "Orrin F.C.",
         "question": "Which sport does Orrin F.C. play?"},
        {"prompt": "{} comes from", "relation_id": "P495", "target_new": {"str": "Peru", "id": "Q3"},
         "target_true": {"str": "Scotland", "id": "Q4"}, "subject": "curling", "question": "Where is curling from?"},
    ],
    "questions": ["Capital of the origin of Orrin's sport?", "Orrin's sport comes from which capital's country?", "C?"],
    "answer": "London", "answer_alias": ["London UK"], "new_answer": "Lima", "new_answer_alias": ["City of Kings", ""],
    "answer_extended": ["London"],
    "single_hops": [
        {"question": "Which sport does Orrin F.C. play?", "cloze": "Orrin F.C. plays", "answer": "football",
         "answer_alias": ["soccer"]},
    ],
    "new_single_hops": [
        {"question": "Which sport does Orrin F.C. play?", "cloze": "Orrin F.C. plays", "answer": "curling",
         "answer_alias": []},
        {"question": "What is curling's origin?", "cloze": "curling comes from", "answer": "Peru",
         "answer_alias": ["Perú", "Republic of Peru"]},
        {"question": "What is the capital of Peru?", "cloze": "The capital of Peru is", "answer": "Lima",
         "answer_alias": ["City of Kings"]},
    ],
    "orig": {"triples": [["Q9", "P641", "Q2"]]},
}  # fmt: skip
LIMA = ("Lima", "City of Kings")


def test_mquake_has_a_fact_for_each_rewrite_and_the_questions_on_the_last(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    path = write(tmp_path, MQUAKE)
    club, sport = read_facts(path)
    assert club == Fact("Orrin F.C.", "{} plays", "curling", "football", ("Which sport does Orrin F.C. play?",), id=15,
                        truth_aliases=("soccer",))  # fmt: skip
    assert sport == Fact(
        "curling", "{} comes from", "Peru", "Scotland", ("Where is curling from?",), id=15,
        aliases=("Perú", "Republic of Peru"),
        portability=(
            *(Question("multi-hop", question, LIMA) for question in MQUAKE["questions"]),
            Question("single-hop", "Which sport does Orrin F.C. play?", ("curling",)),
            Question("single-hop", "What is curling's origin?", ("Peru", "Perú", "Republic of Peru")),
            Question("single-hop", "What is the capital of Peru?", LIMA),
        ),
    )  # fmt: skip
    assert Fact.from_dict(json.loads(json.dumps(sport.to_dict()))) == sport
    (line,) = [record.getMessage() for record in caplog.records]
    for name in ("answer ", "answer_alias ", "answer_extended ", "orig ", "requested_rewrite.relation_id "):
        assert line.count(f" {name}(in 1 record") == 1


def test_mquake_with_one_rewrite_and_without_questions():
    one = changed(MQUAKE, MQUAKE["requested_rewrite"][:1], "requested_rewrite")
    assert [type(format_of(record)) for record in (MQUAKE, one)] == [MQuAKE] * 2
    assert len(read_record(one, 0).portability) == 6
    bare = {"requested_rewrite": one["requested_rewrite"]}
    named = changed(bare, ["curling", "roarin' game"], "requested_rewrite", 0, "target_new")
    assert read_record(named, 0).aliases == ("roarin' game",)
    assert (read_record(bare, 4).portability, read_record(bare, 4).id) == ((), 4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(MQUAKE, ..., "new_answer"), "lacks 'new_answer': add it"),
        (changed(MQUAKE, "", "new_answer"), "has an empty 'new_answer': fill it in"),
        (changed(MQUAKE, 3, "new_answer_alias"), "has a 'new_answer_alias' that is not a text"),
        (changed(MQUAKE, {"a": 1}, "questions"), "has a 'questions' that is not a list of texts"),
        (changed(MQUAKE, ["a"], "new_single_hops"), "has 'new_single_hops' that are not a list of objects: give each"),
        (changed(MQUAKE, {}, "single_hops", 0), None),  # a hop without fields is no hop
        (changed(MQUAKE, [], "requested_rewrite"), "has an empty 'requested_rewrite': give at least one"),
        (changed(MQUAKE, ..., "requested_rewrite", 1, "subject"), "lacks 'subject': add it, or set data.subject to"),
    ],
)
def test_errors_of_mquake(tmp_path, record, message):
    path = write(tmp_path, MQUAKE, record)
    if message is None:
        assert len(read_facts(path)) == 4
        return
    with pytest.raises(UserError) as caught:
        read_facts(path)
    assert f"Record 1 of {path} {message}" in str(caught.value)


# ---- RippleEdits --------------------------------------------------------------------------------------------------


def answer(value, *aliases):
    return {"value": value, "aliases": list(aliases)}


def a_test(prompt, answers, subject="Q1", targets=("Q9",), **fields):
    query = {"prompt": prompt, "answers": answers, "query_type": "regular", "subject_id": subject, "relation": "X",
             "target_ids": list(targets), "phrase": None, **fields}  # fmt: skip
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": [query]}


NAME = "The name of the"
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": f"{NAME} capital city of Ruritania is Oslo.", "subject_id": "Q1", "relation": "CAPITAL",
        "target_id": "Q2",
        "previous_fact": {"prompt": f"{NAME} capital city of Ruritania is Strelsau City.", "subject_id": "Q1",
                          "relation": "CAPITAL", "target_id": "Q3"},
    },
    "Relation_Specificity": [a_test(f"{NAME} currency in Ruritania is", [answer("krone", "kr")])],
    "Logical_Generalization": [a_test(f"{NAME} country which Oslo is the capital of is", [answer("?", "R")], "Q2")],
    "Subject_Aliasing": [a_test(f"{NAME} capital city of the Realm is", [answer("Oslo", "Kristiania")], "Q1", ["Q2"])],
    "Compositionality_I": [
        a_test(f"{NAME} mayor of the capital city of Ruritania is", [answer("Anne", "A. L."), answer("Bo")],
               query_type="two_hop", second_relation="MAYOR", second_hop_target_ids=["Q7", "Q8"]),
    ],
    "Compositionality_II": [],
    "Forgetfulness": [a_test(f"{NAME} language of Ruritania is", [])],
}  # fmt: skip
RIPPLE_FACT = Fact(
    "Ruritania", f"{NAME} capital city of {{}} is", "Oslo", "Strelsau City",
    neighbors=(Neighbor(f"{NAME} currency in Ruritania is", "krone"),), aliases=("Kristiania",),
    portability=(
        Question("Logical_Generalization", f"{NAME} country which Oslo is the capital of is", ("?", "R")),
        Question("Subject_Aliasing", f"{NAME} capital city of the Realm is", ("Oslo", "Kristiania")),
        Question("Compositionality_I", f"{NAME} mayor of the capital city of Ruritania is", ("Anne", "A. L.", "Bo")),
    ),
)  # fmt: skip


def test_rippleedits_with_ids(tmp_path, caplog):
    """Subject and target are named by Wikidata ids alone; the sentence of the edit and the tests show their labels."""
    caplog.set_level("INFO", "editlab")
    (fact,) = read_facts(write(tmp_path, RIPPLE))
    assert fact == RIPPLE_FACT
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact
    (line,) = [record.getMessage() for record in caplog.records]
    assert "test_condition (in 5 objects, such as Compositionality_I; in up to 1 record)" in line
    assert "condition_queries (in 5 objects" in line
    assert "left out (1 in Forgetfulness.test_queries.prompt)" in line


def test_rippleedits_with_labels():
    record = changed(RIPPLE, [], "Relation_Specificity")
    labels = {"fact_prompt": f"{NAME} capital city of Ruritania is",
              "subject_label": "Ruritania", "target_label": "Oslo",
              "fact_query": {"prompt": "", "answers": [answer("Oslo", "Christiania")]}}  # fmt: skip
    record["edit"] |= labels
    record["edit"]["original_fact"] = {**record["edit"].pop("previous_fact"), "target_label": "Strelsau"}
    fact = read_record(record, 2)
    assert (fact.subject, fact.prompt, fact.target_new) == ("Ruritania", f"{NAME} capital city of {{}} is", "Oslo")
    assert (fact.target_true, fact.aliases, fact.id) == ("Strelsau", ("Kristiania", "Christiania"), 2)
    short = changed(RIPPLE, "Ruritania", "edit", "subject")
    short["edit"] |= {"target": "Oslo"}
    assert read_record(short, 0) == RIPPLE_FACT


def test_the_label_of_an_id_is_preferred_to_what_follows_the_last_is():
    """Without the label of Q2, what follows "is" in the target would be taken for all of it."""
    record = changed(RIPPLE, f"{NAME} anthem of Ruritania is This is Home.", "edit", "prompt")
    record["edit"].pop("previous_fact")
    record["Subject_Aliasing"] = [a_test(f"{NAME} anthem of R. is", [answer("This is Home")], "Q1", ["Q2"])]
    fact = read_record(record, 0)
    assert (fact.prompt, fact.target_new, fact.target_true) == (f"{NAME} anthem of {{}} is", "This is Home", None)
    record["Subject_Aliasing"] = []
    assert read_record(record, 0).target_new == "Home"


def test_the_label_of_the_subject_is_preferred_to_the_shared_words():
    record = changed(RIPPLE, [], "Relation_Specificity")
    record |= {"Compositionality_I": [], "Forgetfulness": []}
    record["Logical_Generalization"] = [a_test(f"{NAME} country of Oslo is", [answer("Ruritania")], "Q2", ["Q1"])]
    assert read_record(record, 0).subject == "Ruritania"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        *((changed(RIPPLE, ..., group), f"lacks {group!r}: add it, as an empty list if the record has no such test")
          for group in list(RIPPLE)[2:]),
        (changed(RIPPLE, "x", "edit"), "has a 'edit' that is not an object: make it an object"),
        (changed(RIPPLE, ..., "edit", "prompt"), "lacks 'prompt': add it"),
        (changed(RIPPLE, "Ruritania wins.", "edit", "prompt"), "in which no target is found after 'is': add"),
        (changed(RIPPLE, ["x"], "Forgetfulness"), "has a 'Forgetfulness' with a test that is not an object with"),
        (changed(RIPPLE, [{}], "Forgetfulness"), "has a 'Forgetfulness' with a test that is not an object with"),
        (changed(RIPPLE, ..., "Forgetfulness", 0, "test_queries", 0, "prompt"), "lacks 'prompt': add it"),
        (changed(RIPPLE, 1, "Compositionality_I", 0, "test_queries", 0, "answers"), "has a 'answers' that is not a"),
        (changed(RIPPLE, "Q77", "edit", "subject_id"), "names its subject by the id 'Q77' alone, and no test shows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors_of_rippleedits(tmp_path, record, message):
    with pytest.raises(UserError) as caught:
        read_facts(write(tmp_path, RIPPLE, record))
    assert str(caught.value).startswith("Record 1 of ")
    assert message in str(caught.value)


def test_a_misspelt_group_of_the_description_is_read():
    """The data set's description spells one group Relation_Specifity, its code Relation_Specificity."""
    record = {("Relation_Specifity" if key == "Relation_Specificity" else key): value for key, value in RIPPLE.items()}
    assert read_record(record, 0) == RIPPLE_FACT
    assert isinstance(format_of(record), RippleEdits)


# ---- EVOKE --------------------------------------------------------------------------------------------------------

EVOKE_RECORD = {
    "case_id": 3,
    "requested_rewrite": {"prompt": "The mother tongue of {} is", "subject": "Mara Holt", "relation_id": "P103",
                          "target_new": {"str": "English"}, "target_true": {"str": "French"}},
    "paraphrase_prompts": ["Mara Holt, a native"], "neighborhood_prompts": ["The mother tongue of Ole Ry is"],
    "portability": {"Recalled Relation": "(English, family, Germanic)",
                    "New Question": "Mara Holt's tongue is of which family?",
                    "New Answer": "Germanic"},
    "prefix_distraction": ["The mother tongue of Mara Holt is English. The mother tongue of Ole Ry is"],
    "subject_specificity": {"prompt": "Mara Holt was born in", "answer": {"value": "Velden", "aliases": ["V."]}},
}  # fmt: skip


def test_evoke():
    assert isinstance(format_of(EVOKE_RECORD), EVOKE)
    assert read_record(EVOKE_RECORD, 0) == Fact(
        "Mara Holt", "The mother tongue of {} is", "English", "French", ("Mara Holt, a native",),
        (Neighbor("The mother tongue of Ole Ry is", "French"),
         Neighbor("The mother tongue of Mara Holt is English. The mother tongue of Ole Ry is", "French"),
         Neighbor("Mara Holt was born in", "Velden")),
        3, portability=(Question("portability", "Mara Holt's tongue is of which family?", ("Germanic",)),),
    )  # fmt: skip
    assert read_record(changed(EVOKE_RECORD, {}, "portability"), 0).portability == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(EVOKE_RECORD, ..., "requested_rewrite", "target_true"), "but no 'target_true', which is their answer"),
        (changed(EVOKE_RECORD, ..., "subject_specificity", "answer"), "has a 'subject_specificity' without an answer"),
        (changed(EVOKE_RECORD, "x", "subject_specificity"), "has a 'subject_specificity' that is not an object"),
        (changed(EVOKE_RECORD, ..., "subject_specificity", "prompt"), "lacks 'prompt': add it"),
        (changed(EVOKE_RECORD, 5, "prefix_distraction"), "has a 'prefix_distraction' that is not a list of texts"),
        (changed(EVOKE_RECORD, 5, "portability"), "has a 'portability' that is no list"),
    ],
)
def test_errors_of_evoke(tmp_path, record, message):
    with pytest.raises(UserError) as caught:
        read_facts(write(tmp_path, EVOKE_RECORD, record))
    assert message in str(caught.value)


def test_each_schema_recognizes_its_own_records_first():
    """No schema before it in the list takes them."""
    for record, name in ((MQUAKE, "MQuAKE"), (RIPPLE, "RippleEdits"), (EVOKE_RECORD, "EVOKE")):
        assert next(type(one).__name__ for one in FORMATS if one.matches(record)) == name
