"""Tests of EasyEdit's newer fields and the data sets with them or like them: KnowEdit, WikiBio, QAEdit, portability."""

import json

import pytest

from editlab.data import Fact, Neighbor, Question, read_facts
from editlab.data.fact import latest
from editlab.data.formats import EasyEdit, Plain, WikiBio, format_of, read_record
from editlab.errors import UserError

WIKI_RECENT = {
    "subject": "Lake Orrin",
    "prompt": "The country in which Lake Orrin lies is",
    "target_new": "Norway",
    "portability": {
        "Logical_Generalization": [
            {"prompt": "Norway's longest lake is", "ground_truth": [["Lake Orrin", "Loch Orrin"]]}
        ],
        "Reasoning": [{"prompt": "The king of Lake Orrin's country is", "ground_truth": [["Harald V"], ["Harald"]]}],
        "Subject_Aliasing": [
            {"prompt": "The country in which Loch Orrin lies is", "ground_truth": [["Norway"]]},
            {"prompt": "The country in which the Orrin lies is", "ground_truth": [["Norway", "Norge"]]},
        ],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Lake Orrin's depth is", "ground_truth": [["10 m", "ten metres"]]}],
        "Forgetfulness": [{"prompt": "Lake Orrin, not in Norway, lies in", "ground_truth": [["Scotland"]]}],
    },
}
RECENT_FACT = Fact(
    "Lake Orrin", "The country in which {} lies is", "Norway",
    neighbors=(Neighbor("Lake Orrin's depth is", "10 m"), Neighbor("Lake Orrin, not in Norway, lies in", "Scotland")),
    portability=(
        Question("Logical_Generalization", "Norway's longest lake is", ("Lake Orrin", "Loch Orrin")),
        Question("Reasoning", "The king of Lake Orrin's country is", ("Harald V", "Harald")),
        Question("Subject_Aliasing", "The country in which Loch Orrin lies is", ("Norway",)),
        Question("Subject_Aliasing", "The country in which the Orrin lies is", ("Norway", "Norge")),
    ),
)  # fmt: skip
KNOWEDIT_ZSRE = {
    "subject": "Mara Holt", "prompt": "Which school did Mara Holt attend?", "target_new": "Velden College",
    "ground_truth": ["Orly Institute", "OI"], "rephrase_prompt": "Where did Mara Holt study?",
    "portability": {"Reasoning": [{"prompt": "In which city did Mara Holt study?", "ground_truth": "Velden"}]},
    "locality": {"Relation_Specificity": [{"prompt": "Mara Holt's job is", "ground_truth": "baker"}]},
}  # fmt: skip
WIKIBIO = {
    "concept": "anna krell", "text": "This is a passage about anna krell.", "labels": "Anna Krell works in Bern.",
    "locality": {"Relation_Specificity": [{"prompt": "anna krell's country is", "ground_truth": ["Switzerland"]}]},
}  # fmt: skip
QAEDIT = {
    "id": 1104, "source": "NQ", "prompt": "who painted the Orrin altar?", "target": "Mara Holt",
    "subject": "Orrin altar", "rephrase": "Which painter made the Orrin altar?",
    "locality": [{"loc": "who wrote Velden", "loc_ans": "Ole Ry"}, {"loc": "when was Orly built", "loc_ans": "1904"}],
}  # fmt: skip


def write(tmp_path, *records, name="facts.json"):
    path = tmp_path / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def test_wiki_recent_and_wiki_counterfact(tmp_path):
    (fact,) = read_facts(write(tmp_path, WIKI_RECENT))
    assert fact == RECENT_FACT
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


def test_the_zsre_of_knowedit():
    assert isinstance(format_of(KNOWEDIT_ZSRE), EasyEdit)
    assert read_record(KNOWEDIT_ZSRE, 3) == Fact(
        "Mara Holt", "Which school did {} attend?", "Velden College", "Orly Institute", ("Where did Mara Holt study?",),
        (Neighbor("Mara Holt's job is", "baker"),), 3, truth_aliases=("OI",),
        portability=(Question("Reasoning", "In which city did Mara Holt study?", ("Velden",)),),
    )  # fmt: skip


def test_wikibio():
    assert isinstance(format_of(WIKIBIO), WikiBio)
    neighbors = (Neighbor("anna krell's country is", "Switzerland"),)
    assert read_record(WIKIBIO, 0) == Fact(
        "anna krell", "This is a passage about {}.", "Anna Krell works in Bern.", neighbors=neighbors
    )


def test_qaedit(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    path = write(tmp_path, QAEDIT)
    neighbors = (Neighbor("who wrote Velden", "Ole Ry"), Neighbor("when was Orly built", "1904"))
    assert read_facts(path) == [
        Fact("Orrin altar", "who painted the {}?", "Mara Holt", None, ("Which painter made the Orrin altar?",),
             neighbors, 1104)
    ]  # fmt: skip
    assert [one.getMessage() for one in caplog.records] == [
        f"{path} has fields that are not read: source (in 1 record)."
    ]


# ---- portability, in each of its forms ----------------------------------------------------------------------------

ASKED = Question("portability", "Its king is", ("Harald V", "Harald"))
BASES = {
    "EasyEdit": {"subject": "Oslo", "prompt": "Oslo lies in", "target_new": "Peru"},
    "ZsRE": {"subject": "Oslo", "src": "Oslo lies in", "alt": "Peru"},
    "Plain": {"subject": "Oslo", "prompt": "Oslo lies in", "target": "Peru"},
    "CounterFact": {"requested_rewrite": {"subject": "Oslo", "prompt": "{} lies in", "target_new": {"str": "Peru"}}},
}


@pytest.mark.parametrize("schema", BASES)
@pytest.mark.parametrize(
    "fields",
    [
        {"portability": [{"prompt": "Its king is", "answers": ["Harald V", "Harald"]}]},
        {"portability": [{"prompt": "Its king is", "answer": "Harald V", "aliases": ["Harald", "", " Harald V "]}]},
        {"portability": {"prompt": "Its king is", "ground_truth": [["Harald V"], ["Harald"]]}},
        {"portability": {"Recalled Relation": "(Peru, king, ?)", "New Question": "Its king is",
                         "New Answer": ["Harald V", "Harald"]}},
        {"portability_prompt": "Its king is", "portability_ground_truth": ["Harald V", "Harald"]},
        {"portability_prompt": ["Its king is"], "portability_ground_truth": [["Harald V", "Harald"]]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_portability_is_read_in_each_of_its_forms(schema, fields):
    assert type(format_of(BASES[schema])).__name__ == schema
    assert read_record({**BASES[schema], **fields}, 0).portability == (ASKED,)


def test_named_groups_hold_objects_or_parallel_lists():
    groups = {
        "reasoning": {
            "prompt": ["Its king is", "Its queen is"],
            "ground_truth": ["Harald V", ["Sonja", "Queen Sonja"]],
        },
        "reversed": [{"prompt": "{} is the city of", "ground_truth": "Peru", "group": "back"}],
        "empty": [],
        "absent": None,
    }
    fact = read_record({**BASES["EasyEdit"], "portability": groups, "locality": {"near": [], "far": None}}, 0)
    questions = fact.portability
    assert fact.neighbors == ()
    assert questions == (
        Question("reasoning", "Its king is", ("Harald V",)),
        Question("reasoning", "Its queen is", ("Sonja", "Queen Sonja")),
        Question("back", "Oslo is the city of", ("Peru",)),  # {} is the subject
    )


def test_a_plain_table_has_portability_and_aliases_as_json_in_its_cells(tmp_path):
    cells = ["Oslo", "Oslo lies in", "Peru", "Norway", json.dumps(["Perú"]), json.dumps(["Norge", "Noreg"]),
             json.dumps([{"group": "king", "prompt": "Its king is", "answers": ["Harald V"]}])]  # fmt: skip
    path = tmp_path / "facts.csv"
    row = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    path.write_text("subject,prompt,target,truth,aliases,truth_aliases,portability\n" + row + "\n", encoding="utf-8")
    questions = (Question("king", "Its king is", ("Harald V",)),)
    assert read_facts(str(path)) == [
        Fact("Oslo", "{} lies in", "Peru", "Norway", (), (), 0, ("Perú",), ("Norge", "Noreg"), questions)
    ]


@pytest.mark.parametrize("schema", BASES)
def test_further_names_of_a_target_are_aliases(schema):
    name = {"EasyEdit": "target_new", "ZsRE": "alt", "Plain": "target", "CounterFact": "target_new"}[schema]
    truth = {"EasyEdit": "ground_truth", "ZsRE": "answers", "Plain": "truth", "CounterFact": "target_true"}[schema]
    record = json.loads(json.dumps(BASES[schema]))
    inner = record["requested_rewrite"] if schema == "CounterFact" else record
    inner |= {name: ["Peru", "Perú", "Peru"], truth: [["Norway", "Norge"], ["Noreg"]], "aliases": ["Republic", "Peru"]}
    fact = read_record(record, 0)
    assert (fact.target_new, fact.aliases) == ("Peru", ("Perú", "Republic"))
    assert (fact.target_true, fact.truth_aliases) == ("Norway", ("Norge", "Noreg"))
    assert latest([fact]) == [fact]
    assert read_record({**record, "aliases": []}, 0).target_new == "Peru"  # an empty list of aliases is no alias


def test_questions_and_neighbors_without_an_answer_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    record = {
        **BASES["EasyEdit"],
        "portability": {"Reasoning": [{"prompt": "a", "ground_truth": []}, {"prompt": "b", "ground_truth": [["c"]]}]},
        "locality": {"Forgetfulness": [{"prompt": "d", "ground_truth": [[""]]}]},
    }
    path = write(tmp_path, record, record)
    facts = read_facts(path)
    assert [fact.portability for fact in facts] == [(Question("Reasoning", "b", ("c",)),)] * 2
    assert [fact.neighbors for fact in facts] == [(), ()]
    assert [one.getMessage() for one in caplog.records] == [
        f"{path} has prompts without an answer, which are left out (2 in locality.Forgetfulness.prompt, 2 in "
        "portability.Reasoning.prompt): add an answer to each, or ignore this."
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"portability": "Its king is"}, "has a 'portability' that is no list: write [{"),
        ({"portability": {"Reasoning": ["Its king is"]}}, "a 'portability' with a part that is not an object: give it"),
        ({"portability": ["Its king is"]}, "a 'portability' with a part that is not an object: give it prompt and"),
        ({"portability": [{"prompt": ["a", "b"], "answers": ["c"]}]}, "has 2 prompt but 1 answers: give as many of"),
        ({"portability": [{"promt": "a", "answer": "c"}]}, "has 0 prompt but 1 answer: give as many of each"),
        ({"portability": [{"prompt": "a", "answer": 1904}]}, "has a 'answer' that is not a text: make it a text in"),
        ({"portability": [{"prompt": 5, "answer": "b"}]}, "has a 'prompt' that is not a list of texts: write it"),
        ({"portability": [{"prompt": "a", "answer": "\u200b"}]}, "has a portability in which nothing is visible"),
        ({"portability_prompt": ["a", "b"]}, "has 2 portability_prompt but 0 portability_ground_truth: give as many"),
        ({"aliases": [7]}, "has a 'aliases' that is not a text: make it a text in quotes, or a list of texts"),
        ({"target_new": []}, "has an empty 'target_new': fill it in"),
        ({"locality": [{"loc": "a"}]}, "has 1 loc but 0 ground_truth: give as many of each"),
        ({"locality": {"near": ["a"]}}, "a 'locality' with a part that is not an object: give it prompt"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_errors_bad_groups_are_named(tmp_path, fields, message):
    with pytest.raises(UserError) as caught:
        read_facts(write(tmp_path, WIKI_RECENT, {**BASES["EasyEdit"], **fields}))
    assert str(caught.value).startswith("Record 1 of ")
    assert message in str(caught.value)


def test_errors_records_of_another_schema_are_named(tmp_path):
    path = write(tmp_path, WIKI_RECENT, QAEDIT, KNOWEDIT_ZSRE)
    with pytest.raises(
        UserError, match=r"Record 1 of .* has the schema Plain, and records before it have EasyEdit: put"
    ):
        read_facts(path)
    assert [fact.subject for fact in read_facts(path, skip_bad=True)] == ["Lake Orrin", "Mara Holt"]
    assert len(read_facts(write(tmp_path, QAEDIT), Plain())) == 1
    with pytest.raises(UserError, match="lacks 'target_new': add it"):  # the schema is set
        read_facts(write(tmp_path, QAEDIT), EasyEdit())
