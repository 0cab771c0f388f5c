"""Tests of data sets with one flat row for each fact (WikiBigEdit, UltraEditBench, HalluEditBench), and of columns."""

import csv
import json

import pytest

from editlab.data import EditDataModule, Fact, HalluEditBench, Neighbor, Plain, Question, UltraEditBench, WikiBigEdit
from editlab.data import read_facts as read
from editlab.data.formats import FORMATS, check_columns, format_by, format_of, read_record
from editlab.errors import UserError

WIKIBIGEDIT = {
    "tag": "update", "subject": "Mara Holt", "update": "Who employs Mara Holt?", "ans": "Velden College",
    "rephrase": "Mara Holt works for whom?", "personas": "Arr, who be paying Mara Holt?", "loc": "Who employs Ole Ry?",
    "loc_ans": "Orly Institute", "mhop": "Where is Mara Holt's employer?", "mhop_ans": "Velden",
}  # fmt: skip
ULTRAEDITBENCH = {
    "case_id": 9, "prompt": "What is the capital of Ruritania?", "subject": "Ruritania", "ans": "Strelsau",
    "rephrase_prompt": "Ruritania has which capital?", "loc": "nq question: who wrote Velden", "loc_ans": "Ole Ry",
}  # fmt: skip
HALLU = {
    "topic": "event_sport", "subject": "Orrin Games", "relation": "follows", "object": "Old Games",
    "question": "What does Orrin Games follow?", "output_llama": "Winter", "eval_llama": "0.0",
    "multiple_choices": "['Old Games', 'Winter']", "paraphrased_question": "Orrin Games came after what?",
    "multiple_choice_with_letters": "A. Winter  B. Old Games", "multiple_choice_labels": "B",
    "yes_question": "Does Orrin Games follow Old Games?", "no_question": "Does Orrin Games follow Winter?",
    "locality_question": "Where was it?", "reversed_relation_question": "What follows Old Games?",
    "question_2hop": "Where were the games before Orrin Games?", "answer_2hop": "Velden",
    "question_6hop": "", "answer_6hop": "",
}  # fmt: skip


def write(tmp_path, *records, name="facts.json"):
    path = tmp_path / name
    if name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(records[0]))
            rows.writeheader()
            rows.writerows(records)
    else:
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["facts.json", "facts.csv"])
def test_wikibigedit(tmp_path, name):
    whole = Fact(
        "Mara Holt", "Who employs {}?", "Velden College", None, ("Mara Holt works for whom?",),
        (Neighbor("Who employs Ole Ry?", "Orly Institute"),), 0,
        portability=(Question("personas", "Arr, who be paying Mara Holt?", ("Velden College",)),
                     Question("mhop", "Where is Mara Holt's employer?", ("Velden",))),
    )  # fmt: skip
    assert read(write(tmp_path, WIKIBIGEDIT, name=name)) == [whole]


@pytest.mark.parametrize("absent", ["null", "NaN", '""'])
def test_wikibigedit_without_a_two_hop_question(tmp_path, absent):
    text = json.dumps([WIKIBIGEDIT]).replace('"Where is Mara Holt\'s employer?"', absent).replace('"Velden"', absent)
    assert text.count(f": {absent}") == 2
    (tmp_path / "facts.json").write_text(text)
    (fact,) = read(str(tmp_path / "facts.json"))
    assert [question.group for question in fact.portability] == ["personas"]


@pytest.mark.parametrize("name", ["facts.json", "facts.csv"])
def test_ultraeditbench(tmp_path, name):
    whole = Fact("Ruritania", "What is the capital of {}?", "Strelsau", None, ("Ruritania has which capital?",),
                 (Neighbor("who wrote Velden", "Ole Ry"),), 9 if name.endswith("json") else "9")  # fmt: skip
    assert read(write(tmp_path, ULTRAEDITBENCH, name=name)) == [whole]


def test_hallueditbench(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    path = write(tmp_path, HALLU, name="event_sport.csv")
    assert read(path) == [
        Fact(
            "Orrin Games", "What does {} follow?", "Old Games", None, ("Orrin Games came after what?",), (), 0,
            portability=(
                Question("yes", "Does Orrin Games follow Old Games?", ("Yes",)),
                Question("no", "Does Orrin Games follow Winter?", ("No",)),
                Question("multiple_choice", "What does Orrin Games follow? A. Winter  B. Old Games", ("B",)),
                Question("reversed_relation", "What follows Old Games?", ("Orrin Games",)),
                Question("2hop", "Where were the games before Orrin Games?", ("Velden",)),
            ),
        )
    ]  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records]
    for unread in ("topic", "relation", "output_llama", "eval_llama", "multiple_choices", "locality_question"):
        assert line.count(f" {unread} (in 1 record") == 1


def test_hallueditbench_counts_questions_without_an_answer(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    (fact,) = read(write(tmp_path, {**HALLU, "answer_2hop": "", "multiple_choice_labels": ""}, name="f.csv"))
    assert [question.group for question in fact.portability] == ["yes", "no", "reversed_relation"]
    assert "left out (1 in multiple_choice_with_letters, 1 in question_2hop): add" in caplog.text


def test_each_schema_recognizes_its_own_records_first():
    for record, kind in ((WIKIBIGEDIT, WikiBigEdit), (ULTRAEDITBENCH, UltraEditBench), (HALLU, HalluEditBench)):
        assert type(format_of(record)) is kind
        assert [type(one) for one in FORMATS if one.matches(record)] == [kind]


@pytest.mark.parametrize(
    ("record", "wrong", "message"),
    [
        (WIKIBIGEDIT, {"ans": ""}, "has an empty 'ans': fill it in"),
        (WIKIBIGEDIT, {"mhop": ["a", "b"], "mhop_ans": ["c"]}, "has 2 mhop but 1 mhop_ans: give as many of each"),
        (WIKIBIGEDIT, {"subject": "Ole"}, "its subject 'Ole' does not occur: write {} where it belongs, or set data."),
        (WIKIBIGEDIT, {"personas": 4}, "has a 'personas' that is not a list of texts"),
        (ULTRAEDITBENCH, {"ans": 4}, "has a 'ans' that is not a text"),
        (ULTRAEDITBENCH, {"loc_ans": []}, "has an empty 'loc_ans': fill it in"),
        (HALLU, {"object": None}, "has a 'object' that is not a text"),
        (HALLU, {"question_3hop": "a", "answer_3hop": 4}, "has a 'answer_3hop' that is not a text"),
        (HALLU, {"answer_3hop": "Velden"}, "has 0 question_3hop but 1 answer_3hop: give as many of each"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_errors_of_rows(tmp_path, record, wrong, message):
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, record, {**record, **wrong}))
    assert str(caught.value).startswith("Record 1 of ")
    assert message in str(caught.value)


# ---- data.columns -------------------------------------------------------------------------------------------------

ROW = {"no": "r1", "question": "Oslo lies in", "ans": "Peru", "old": "Norway", "subj": "Oslo", "also": "Oslo is in",
       "prompt": "not this", "far": '[{"prompt": "Lima lies in", "truth": "Peru"}]', "names": '["Perú"]',
       "old_names": "Norge", "port": '[{"group": "g", "prompt": "a", "answers": ["b"]}]'}  # fmt: skip
ALL = {"id": "no", "prompt": "question", "target_new": "ans", "target_true": "old", "subject": "subj",
       "paraphrases": "also", "neighbors": "far", "aliases": "names", "truth_aliases": "old_names",
       "portability": "port"}  # fmt: skip
ROW_FACT = Fact("Oslo", "{} lies in", "Peru", "Norway", ("Oslo is in",), (Neighbor("Lima lies in", "Peru"),), "r1",
                ("Perú",), ("Norge",), (Question("g", "a", ("b",)),))  # fmt: skip


@pytest.mark.parametrize("name", ["facts.csv", "facts.json"])
def test_columns_name_the_fields_of_any_table(tmp_path, caplog, name):
    caplog.set_level("INFO", "editlab")
    row = ROW if name.endswith("csv") else {key: json.loads(v) if v[0] == "[" else v for key, v in ROW.items()}
    path = write(tmp_path, row, name=name)
    assert read(path, columns=ALL) == [ROW_FACT]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has fields that are not read: prompt (in 1 record)."
    ]
    assert read(path, columns={**{k: ALL[k] for k in ("prompt", "subject")}, "target": "ans", "truth": "old"}) == [
        Fact("Oslo", "{} lies in", "Peru", "Norway")
    ]


def test_fields_without_a_column_keep_their_usual_names(tmp_path):
    row = {
        "subj": "Oslo",
        "prompt": "Oslo lies in",
        "target_new": "Peru",
        "ground_truth": "Norway",
        "rephrase": "Oslo is",
    }
    fact = Fact("Oslo", "{} lies in", "Peru", "Norway", ("Oslo is",))
    assert read(write(tmp_path, row), columns={"subject": "subj"}) == [fact]
    data = EditDataModule(write(tmp_path, row), columns={"subject": "subj"})
    data.setup()
    assert data.candidates == [fact]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"promt": "question"},
            "data.columns gives a name to 'promt', which is no field of a fact: did you mean prompt?",
        ),
        (
            {"answer": "ans"},
            "gives a name to 'answer', which is no field of a fact: use one of subject, prompt, target",
        ),
        ({"prompt": ""}, "data.columns.prompt is '': write the name of a field of the file."),
        ({"target": "ans", "target_new": "ans"}, "data.columns has target_new and target, which are the same field"),
        (
            {"prompt": "questoin"},
            "data.columns.prompt is 'questoin', which is no field of FILE: did you mean question?",
        ),
        ({"prompt": "zz"}, "data.columns.prompt is 'zz', which is no field of FILE: use one of also, ans, far, names"),
    ],
)
def test_errors_of_columns(tmp_path, columns, message):
    path = write(tmp_path, ROW, name="facts.csv")
    with pytest.raises(UserError) as caught:
        read(path, columns=columns)
    assert message in str(caught.value).replace(path, "FILE")
    assert str(caught.value)[-1] in ".?"


def test_errors_of_a_record_name_the_fields_of_the_file(tmp_path):
    path = write(tmp_path, {"q": "Oslo lies in", "a": "Peru", "s": "Oslo"}, {"q": "Oslo is", "s": "Oslo"})
    columns = {"prompt": "q", "target": "a", "subject": "s"}
    with pytest.raises(UserError, match=r"Record 1 of .* lacks 'a': add it"):
        read(path, columns=columns)
    with pytest.raises(UserError, match=r"data\.columns and data\.format are both set: leave one of them out"):
        read(path, Plain(), columns=columns)
    with pytest.raises(UserError, match="gives a name to 'who'"):
        EditDataModule(path, columns={"who": "s"})


def test_a_schema_by_columns_is_a_plain_one():
    chosen = format_by({"prompt": "q", "target_true": "t"}, {"q", "t", "target_new"}, "x")
    assert (chosen.prompt, chosen.truth, chosen.target, chosen.subject) == ("q", "t", "target_new", "subject")
    check_columns({})
    assert read_record({"subject": "A", "q": "A is", "target_new": "B"}, 0, chosen) == Fact("A", "{} is", "B")
