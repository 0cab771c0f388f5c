"""Tests of users' fact files: minimal CSV and JSONL files, and the error message of each kind of broken record."""

import json

import pytest

from editlab.data import Fact, Neighbor, Plain, read_facts
from editlab.data.files import facts_in, find_facts
from editlab.errors import UserError

BERLIN = Fact("Berlin", "{} lies in", "Peru", id=0)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.csv", "subject,prompt,target\nBerlin,Berlin lies in,Peru\n"),
        ("f.csv", "\ufefftarget;prompt;subject\r\nPeru;{} lies in;Berlin\r\n"),  # as spreadsheets write it
        ("f.TSV", "subject\tprompt\ttarget\tnotes\nBerlin\tBerlin lies in\tPeru\tmine\n"),
        ("f.csv", " subject , prompt,target,truth,paraphrases,neighbors\n\nBerlin, Berlin lies in,Peru ,, ,\n\n"),
        ("f.jsonl", '{"subject": "Berlin", "prompt": "Berlin lies in", "target": "Peru"}\n'),
        ("f.json", '[{"subject": "Berlin", "prompt": "{} lies in", "target": "Peru", "truth": null}]'),
    ],
)
def test_a_fact_with_the_required_fields_only(tmp_path, name, text):
    # Optional fields stay empty: no truth, no paraphrases, no neighbors.
    assert read_facts(write(tmp_path, name, text)) == [BERLIN]


def test_a_plain_fact_with_all_optional_fields(tmp_path):
    neighbors = [{"prompt": "Rome lies in", "truth": "Italy"}, {"prompt": "Oslo lies in", "truth": "Norway"}]
    paraphrases = ["Where is Berlin? In", "Berlin, a city of"]
    whole = Fact(
        "Berlin", "{} lies in", "Peru", "Germany", tuple(paraphrases), tuple(Neighbor(**n) for n in neighbors), "b"
    )
    record = {"id": "b", "subject": "Berlin", "prompt": "{} lies in", "target": "Peru", "truth": "Germany",
              "paraphrases": paraphrases, "neighbors": neighbors}  # fmt: skip
    assert read_facts(write(tmp_path, "f.jsonl", json.dumps(record))) == [whole]
    cells = [v if isinstance(v, str) else '"' + json.dumps(v).replace('"', '""') + '"' for v in record.values()]
    assert read_facts(write(tmp_path, "f.csv", ",".join(record) + "\n" + ",".join(cells))) == [whole]
    (one,) = read_facts(write(tmp_path, "g.csv", "subject,prompt,target,paraphrases\nA,A is,B,A was\n"))
    assert one.paraphrases == ("A was",)


def test_other_schemas_in_tables(tmp_path):
    text = "prompt,subject,target_new,ground_truth\nBBC One is owned by,BBC One,Sega,BBC\n"
    assert read_facts(write(tmp_path, "f.csv", text)) == [Fact("BBC One", "{} is owned by", "Sega", "BBC")]


def test_a_cell_of_several_lines(tmp_path):
    path = write(tmp_path, "f.csv", 'subject,prompt,target\nA,"A is,\nas ever,",B\nC,C is\n')
    first, second = find_facts(path)
    assert first.fact == Fact("A", "{} is,\nas ever,", "B", id=0)
    assert (second.where, second.fact) == ("Record 1 (line 4)", None)


def test_a_line_separator_inside_a_json_text_does_not_end_the_record(tmp_path):
    record = {"subject": "A", "prompt": "A \u2028 is", "target": "B"}
    path = write(tmp_path, "f.jsonl", json.dumps(record, ensure_ascii=False))
    assert read_facts(path)[0].question == record["prompt"]


GOOD = {"subject": "A", "prompt": "A is", "target": "B"}

BROKEN = {
    "no object": ("f.jsonl", "5", "is a int and not an object with fields: give it subject, prompt and target"),
    "half a line": (
        "f.jsonl",
        '{"subject": "A"',
        "is not valid JSON (Expecting ',' delimiter at column 16): correct the",
    ),
    "no target": ("f.jsonl", {"subject": "A", "prompt": "A is"}, "lacks 'target': add it"),
    "number": ("f.jsonl", {**GOOD, "target": 5}, "has a 'target' that is not a text: make it a text in quotes"),
    "empty": ("f.jsonl", {**GOOD, "subject": " "}, "has an empty 'subject': fill it in"),
    "elsewhere": ("f.jsonl", {**GOOD, "prompt": "It is"}, "'A' does not occur: write {} where it belongs"),
    "two places": ("f.jsonl", {**GOOD, "prompt": "{} {}"}, "2 times {}: write {} once, in place of the subject"),
    "truth": ("f.jsonl", {**GOOD, "truth": 5}, "has a 'truth' that is not a text"),
    "truth zero": ("f.jsonl", {**GOOD, "truth": 0}, "has a 'truth' that is not a text"),
    "paraphrases": (
        "f.jsonl",
        {**GOOD, "paraphrases": [5]},
        "has a 'paraphrases' that is not a list of texts: write it",
    ),
    "neighbors": ("f.jsonl", {**GOOD, "neighbors": "B is"}, "has 'neighbors' that are not a list: write [{"),
    "neighbor": ("f.jsonl", {**GOOD, "neighbors": [{"prompt": "B is"}]}, "lacks 'truth': add it"),
    "comma": ("f.csv", "A,A is, as ever,B", 'has 4 cells for 3 columns: put texts with a comma in "quotes"'),
    "short": ("f.csv", "A,A is", "lacks 'target': add it"),
    "empty cell": ("f.csv", ",A is,B", "lacks 'subject': add it"),
    "quote": ("f.csv", 'A,"A is,B', "is not valid CSV (unexpected end of data): close every quote"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_reported_with_a_fix_and_skipped(tmp_path, case):
    name, record, message = BROKEN[case]
    record = record if isinstance(record, str) else json.dumps(record)
    good = json.dumps(GOOD) if name == "f.jsonl" else "A,A is,B"
    lines = [good, record] if case == "quote" else [good, record, good]  # an open quote extends to the end of the file
    header = [] if name == "f.jsonl" else ["subject,prompt,target"]
    path = write(tmp_path, name, "\n".join([*header, *lines]))
    found = list(find_facts(path))
    assert [one.fact is None for one in found] == [False, True, False][: len(lines)]
    where = f"Record 1 (line {2 + len(header)})"
    assert found[1].where == where
    assert message in found[1].fault
    with pytest.raises(UserError) as caught:
        read_facts(path)
    assert str(caught.value).startswith(f"{where} of {path} {found[1].fault}, or set data.skip_bad to true")
    assert len(read_facts(path, skip_bad=True)) == len(lines) - 1


def test_a_broken_list_in_a_cell(tmp_path):
    path = write(tmp_path, "f.csv", "subject,prompt,target,paraphrases\nA,A is,B,[A was\n")
    (found,) = find_facts(path)
    assert found.fault.startswith("has a 'paraphrases' that is not valid JSON (")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.csv", "", "The first line of .* must name its columns: write subject,prompt,target there"),
        ("f.csv", "Berlin,Berlin lies in,Peru\n", "The first line of .* must name its columns"),
        ("f.csv", '"subject"x,prompt,target\n', "The first line of .* is not CSV"),
        ("f.csv", "subject,prompt,target\n", "holds no record"),
        ("f.json", '{\n"facts": []\n}', "one JSON object over many lines: write its records as a list"),
    ],
)
def test_files_without_facts(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_facts(write(tmp_path, name, text))


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target,paraphrases,paraphrases\nOslo,Oslo lies in,Peru,one,two\n")
    with pytest.raises(UserError, match="has two columns 'paraphrases': give each column a name of its own"):
        read_facts(str(path))


def test_an_id_of_zero_is_an_id(tmp_path):
    path = tmp_path / "facts.json"
    facts = [{"subject": s, "prompt": "{} is", "target": "x", "id": i} for s, i in (("a", 5), ("b", 0), ("c", ""))]
    path.write_text(json.dumps(facts))
    assert [fact.id for fact in read_facts(str(path))] == [5, 0, 2]  # without one, its number


def test_the_format_is_found_although_the_first_record_is_broken(tmp_path):
    path = write(tmp_path, "f.jsonl", '{"subject": "A"}\n' + json.dumps(GOOD))
    assert "which no format has" in next(iter(find_facts(path))).fault
    assert read_facts(path, skip_bad=True) == read_facts(path, Plain(), skip_bad=True)


def test_facts_of_a_text_that_was_read_elsewhere(caplog):
    caplog.set_level("INFO")
    lines = '{"subject": "Oslo", "prompt": "{} is in", "target": "Peru", "tarth": "x"}\n\n'
    both = [facts_in(lines, "standard input"), facts_in(f"[{lines}]", "standard input")]
    assert both == [[Fact("Oslo", "{} is in", "Peru")]] * 2
    assert "Standard input has fields that are not read: tarth (in 1 record; did you mean truth?)." in caplog.text
    for text, sentence in (
        (lines + "[1", r"Record 1 \(line 3\) of standard input is not valid JSON"),
        ("[1]", r"Record 0 of standard input is a int and not an object with fields"),
        ("[", r"^Standard input is not valid JSON"),
        ("{\n}", r"^Standard input is one JSON object over many lines"),
        ("\n", r"^Standard input holds no record"),
    ):
        with pytest.raises(UserError, match=sentence):
            facts_in(text, "standard input")
    inferred = facts_in('{"prompt": "Oslo is in", "target": "Peru"}', "standard input", "last_token")
    assert inferred == [Fact("Oslo is in", "{}", "Peru")]
