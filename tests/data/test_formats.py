"""Tests of each schema by an example, of the real files if present, and of the error message of each bad input."""

import json
from pathlib import Path

import pytest

from editlab.data import CounterFact, EasyEdit, Fact, Neighbor, ZsRE, read_facts
from editlab.data.formats import as_template, format_of, read_record
from editlab.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"

COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux",
        "target_new": {"str": "English"}, "target_true": {"str": "French"},
    },
    "paraphrase_prompts": ["Danielle Darrieux speaks"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of"],
}  # fmt: skip
EASYEDIT = {
    "prompt": "BBC One is owned by", "subject": "BBC One", "target_new": "Sega", "ground_truth": "BBC",
    "rephrase_prompt": "BBC One belongs to", "locality_prompt": "BBC Radio is owned by", "locality_ground_truth": "BBC",
}  # fmt: skip
ZSRE = {
    "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"], "rephrase": "Where did Watts Humphrey study?",
    "loc": "nq question: who played desmond doss father", "loc_ans": "Hugo Weaving",
}  # fmt: skip


def write(tmp_path, content):
    path = tmp_path / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_counterfact(tmp_path):
    (fact,) = read_facts(write(tmp_path, [COUNTERFACT]))
    assert fact == Fact(
        "Danielle Darrieux", "The mother tongue of {} is", "English", "French", ("Danielle Darrieux speaks",),
        (Neighbor("Michel Rocard is a native speaker of", "French"),), 3,
    )  # fmt: skip
    assert fact.question == "The mother tongue of Danielle Darrieux is"
    assert fact.question[slice(*fact.subject_span)] == "Danielle Darrieux"
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


def test_counterfact_with_the_required_fields_only(tmp_path):
    rewrite = {"prompt": "{} is in", "subject": "Oslo", "target_new": {"str": " Peru "}}
    (fact,) = read_facts(write(tmp_path, [{"requested_rewrite": rewrite}]))
    assert fact == Fact("Oslo", "{} is in", "Peru", id=0)


def test_easyedit(tmp_path):
    (fact,) = read_facts(write(tmp_path, [EASYEDIT]))
    assert fact.prompt == "{} is owned by"
    assert (fact.target_new, fact.target_true) == ("Sega", "BBC")
    assert fact.neighbors == (Neighbor("BBC Radio is owned by", "BBC"),)
    nested = {**EASYEDIT, "locality": {"n": {"prompt": ["A is", "B is"], "ground_truth": ["a", "b"]}}}
    del nested["locality_prompt"]
    (fact,) = read_facts(write(tmp_path, [nested]))
    assert fact.neighbors == (Neighbor("A is", "a"), Neighbor("B is", "b"))


@pytest.mark.parametrize("nested", [False, True])
def test_easyedit_neighbors_keep_their_truths(tmp_path, nested):
    """Prompts and truths are paired by index; a pair without a prompt or a truth is dropped."""
    asked, answers = ["a is", "", "c is", "d is"], ["x", "y", "z", " "]
    record = {**EASYEDIT, "locality_prompt": asked, "locality_ground_truth": answers}
    if nested:
        record = {**EASYEDIT, "locality_prompt": [], "locality": {"n": {"prompt": asked, "ground_truth": answers}}}
    (fact,) = read_facts(write(tmp_path, [record]))
    assert fact.neighbors == (Neighbor("a is", "x"), Neighbor("c is", "z"))


def test_easyedit_takes_the_first_of_several_names_of_a_truth(tmp_path):
    record = {**EASYEDIT, "ground_truth": ["BBC", "the BBC"], "locality_ground_truth": ["BBC", "the BBC"]}
    absent = [{**EASYEDIT, "ground_truth": truth} for truth in (None, "", [], [" "])]
    first, *others = read_facts(write(tmp_path, [record, *absent]))
    assert (first.target_true, first.neighbors) == ("BBC", (Neighbor("BBC Radio is owned by", "BBC"),))
    assert [fact.target_true for fact in others] == [None] * 4


def test_zsre(tmp_path):
    (fact,) = read_facts(write(tmp_path, [ZSRE]))
    assert fact.prompt == "What university did {} attend?"
    assert fact.target_true == "Illinois Institute of Technology"
    assert fact.neighbors == (Neighbor("who played desmond doss father", "Hugo Weaving"),)


def test_jsonl_and_a_named_format(tmp_path):
    path = write(tmp_path, "\n".join(json.dumps(r) for r in [COUNTERFACT, COUNTERFACT]))
    assert len(read_facts(path, CounterFact())) == 2
    with pytest.raises(UserError, match="lacks 'subject'"):
        read_facts(path, EasyEdit())


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("Niger borders Nigeria and", "Niger", "{} borders Nigeria and"),  # not the occurrence in Nigeria
        ("Nigeria's people", "Niger", "{}ia's people"),  # there is no other occurrence
        ("東京は日本の首都。東京の", "東京", "東京は日本の首都。{}の"),  # a language without spaces
        ("In C++ and C, C++ is", "C++", "In C++ and C, {} is"),
    ],
)
def test_the_subject_is_a_separate_word_if_possible(prompt, subject, template):
    assert as_template(prompt, subject) == template


def test_the_template_is_cut_at_the_subjects_last_occurrence(tmp_path):
    record = {**EASYEDIT, "prompt": "Java runs on Java and {x}", "subject": "Java"}
    (fact,) = read_facts(write(tmp_path, [record]))
    assert fact.prompt == "Java runs on {} and {x}"
    assert fact.question == record["prompt"]  # other braces are plain text


@pytest.mark.parametrize(
    ("name", "count", "fmt"),
    [
        ("counterfact.json", 11919, CounterFact),
        ("counterfact_easyedit_40.json", 40, EasyEdit),
        ("zsre_mend_1k.json", 998, ZsRE),
    ],
)
def test_real_files(name, count, fmt):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    facts = read_facts(str(SHARED / name), skip_bad=True)  # records 534 and 723 of the zsRE file have an empty target
    assert len(facts) == count
    assert all(fact.question and fact.target_new for fact in facts)
    assert len(read_facts(str(SHARED / name), fmt(), skip_bad=True)) == count


def without(record, *path):
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def changed(record, value, *path):
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


BAD = {
    "no subject": (without(COUNTERFACT, "requested_rewrite", "subject"), "lacks 'subject'"),
    "no prompt": (without(COUNTERFACT, "requested_rewrite", "prompt"), "lacks 'prompt'"),
    "no target": (without(COUNTERFACT, "requested_rewrite", "target_new"), "lacks 'target_new'"),
    "target without text": (changed(COUNTERFACT, {}, "requested_rewrite", "target_new"), "lacks 'str'"),
    "target a number": (changed(COUNTERFACT, 5, "requested_rewrite", "target_new"), "'target_new' that is not a text"),
    "rewrite a text": (changed(COUNTERFACT, "x", "requested_rewrite"), "'requested_rewrite' that is not an object"),
    "no rewrite": (changed(COUNTERFACT, [], "requested_rewrite"), "an empty 'requested_rewrite'"),
    "several subjects": (changed(COUNTERFACT, ["a", "b"], "requested_rewrite", "subject"), "that is a list of 2"),
    "empty subject": (changed(COUNTERFACT, " ", "requested_rewrite", "subject"), "empty 'subject'"),
    "no place": (changed(COUNTERFACT, "He is", "requested_rewrite", "prompt"), "does not occur: write {}"),
    "two places": (
        changed(COUNTERFACT, "{} is {}", "requested_rewrite", "prompt"),
        "2 times {}",
    ),
    "neighbors no list": (changed(COUNTERFACT, {"a": 1}, "neighborhood_prompts"), "not a list of texts"),
    "easyedit no subject": (without(EASYEDIT, "subject"), "lacks 'subject'"),
    "easyedit subject elsewhere": (changed(EASYEDIT, "CNN", "subject"), "'CNN' does not occur"),
    "easyedit uneven": (changed(EASYEDIT, ["a", "b"], "locality_prompt"), "2 locality_prompt but 1"),
    "easyedit number": (changed(EASYEDIT, 5, "target_new"), "'target_new' that is not a text"),
    "easyedit locality a list": ({**EASYEDIT, "locality": ["a"]}, "a part that is not an object"),
    "easyedit nested uneven": (
        {**EASYEDIT, "locality": {"near": {"prompt": ["a is", "b is", "c is"], "ground_truth": ["x"]}}},
        "3 prompt but 1 ground_truth",
    ),
    "easyedit truth a number": (changed(EASYEDIT, 1984, "ground_truth"), "'ground_truth' that is not a text"),
    "easyedit truth nested": (changed(EASYEDIT, [[5]], "ground_truth"), "'ground_truth' that is not a text"),
    "easyedit nested truth a number": (
        {**EASYEDIT, "locality": {"near": {"prompt": "a is", "ground_truth": 1}}},
        "'ground_truth' that is not a text",
    ),
    "easyedit nested truth absent": (
        {**EASYEDIT, "locality": {"near": {"prompt": "a is"}}},
        "1 prompt but 0 ground_truth",
    ),
    "half a character": (
        changed(COUNTERFACT, "Paris \ud83d", "requested_rewrite", "target_new", "str"),
        r"has '\ud83d' in its target_new, which is half a character",
    ),
    "half a character in a neighbor": (
        changed(COUNTERFACT, ["a \udc00 is"], "neighborhood_prompts"),
        r"has '\udc00' in its neighbors, which is half a character",
    ),
    "easyedit locality a text": ({**EASYEDIT, "locality": {"near": "a"}}, "a part that is not an object"),
    "zsre no subject": (without(ZSRE, "subject"), "lacks 'subject'"),
    "zsre empty target": (changed(ZSRE, "", "alt"), "empty 'alt'"),
    "zsre no answer to loc": (without(ZSRE, "loc_ans"), "lacks 'loc_ans'"),
    "no object": (["a list"], "is a list"),
    "unknown fields": ({"question": 1, "answer": 2}, "which no format has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(tmp_path, case):
    record, message = BAD[case]
    good = ZSRE if case.startswith("zsre") else EASYEDIT if case.startswith("easyedit") else COUNTERFACT
    rows = [record] if case == "unknown fields" else [good, record]
    path = write(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        read_facts(path)
    assert f"Record {len(rows) - 1} of {path}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_records_are_skipped_with_skip_bad(tmp_path, caplog):
    path = write(tmp_path, [ZSRE, BAD["zsre empty target"][0], ZSRE])
    with pytest.raises(UserError, match=r"data\.skip_bad"):
        read_facts(path)
    assert len(read_facts(path, skip_bad=True)) == 2
    assert "Record 1" in caplog.text
    with pytest.raises(UserError, match="no record"):
        read_facts(write(tmp_path, [BAD["zsre empty target"][0]]), ZsRE(), skip_bad=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no record"), ("[]", "no record"), ("{not json", "not valid JSON"), ("[1", "not valid JSON")],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_facts(write(tmp_path, content))


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_facts(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="cannot be read"):
        read_facts(str(tmp_path))
    (tmp_path / "latin").write_bytes(b'["\xe9\xff"]')
    with pytest.raises(UserError, match="cannot be read"):
        read_facts(str(tmp_path / "latin"))


# line breaks at the end of prompts

CHAT = " User: Where is the {}?\nAssistant:\n"
CHAT_RECORDS = {
    "CounterFact": {
        "requested_rewrite": {"subject": "Louvre", "prompt": CHAT, "target_new": {"str": "Rome\n"},
                              "target_true": {"str": "Paris\n"}},
        "paraphrase_prompts": [CHAT], "neighborhood_prompts": [CHAT],
    },
    "ZsRE": {"subject": "Louvre", "src": CHAT, "alt": "Rome\n", "answers": ["Paris\n"], "rephrase": CHAT,
             "loc": f"nq question: {CHAT}", "loc_ans": "Paris\n"},
    "EasyEdit": {"subject": "Louvre", "prompt": CHAT, "target_new": "Rome\n", "ground_truth": ["Paris\n"],
                 "rephrase_prompt": CHAT, "locality_prompt": [CHAT], "locality_ground_truth": ["Paris\n"]},
    "Plain": {"subject": "Louvre\n", "prompt": CHAT, "target": "Rome\n", "truth": "Paris\n", "paraphrases": [CHAT],
              "neighbors": [{"prompt": CHAT, "truth": "Paris\n"}]},
}  # fmt: skip


@pytest.mark.parametrize(("name", "record"), CHAT_RECORDS.items(), ids=CHAT_RECORDS)
def test_the_line_break_at_the_end_of_a_chat_prompt_is_kept(name, record):
    """Everything else is trimmed: spaces around prompts, and all white space around subjects and targets."""
    fact = read_record(record, 0)
    assert type(format_of(record)).__name__ == name
    assert (fact.subject, fact.target_new, fact.target_true) == ("Louvre", "Rome", "Paris")
    expected = CHAT.lstrip().replace("{}", "Louvre")
    assert fact.question == fact.paraphrases[0] == fact.neighbors[0].prompt == expected
    assert fact.neighbors[0].truth == "Paris"
    assert read_record({"subject": "Oslo", "prompt": " Oslo is ", "target": "Peru"}, 0).prompt == "{} is"
