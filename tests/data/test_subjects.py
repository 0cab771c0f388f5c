"""Tests of facts without a subject: what is inferred from their texts, and edits at the prompt's last token."""

import json

import pytest

from editlab.api import edit_model
from editlab.data import EditDataModule, Fact, Neighbor, read_facts
from editlab.data.formats import INFER, LAST_TOKEN, Subjects, read_all
from editlab.data.formats.subjects import CAPITALS, SHARED, inferred, last_capitals, shared_words
from editlab.errors import UserError
from editlab.keys.subject_keys import locate
from editlab.lm.language_model import LanguageModel
from editlab.values.loss import rows_of
from tests.tiny import tiny_model, tiny_tokenizer


def write(tmp_path, *records):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("prompt", "others", "shared"),
    [
        ("The capital of New Zealand is", ["In new zealand, the capital is"], "New Zealand"),  # names first
        ("The capital of Peru is", ["The capital of Peru is what?", "Peru's capital"], "Peru"),
        ("who won the first cup final", ["name the winner of the first cup final?"], "first cup final"),
        ("the river of the city of lyon is", ["of the lyon is the river"], "river"),  # as many words, more letters
        ("the east or the west", ["west and east"], "west"),  # as many letters: the last one
        ("What is the iPhone's maker?", ["Who makes the iPhone?"], "iPhone"),
        ("Mary-Ann O'Hara was born in", ["Where was Mary-Ann O'Hara born?"], "Mary-Ann O'Hara"),
        ("Nigeria is in", ["Niger is in"], None),  # whole words only; "is" and "in" alone are no subject
        ("塔林河的源头在", ["塔林河发源于", "塔林河从哪里来？"], "塔林河"),  # a script without spaces
        ("What is it?", ["What was it?"], None),
        ("Oslo lies in", [], None),
        ("Oslo lies in", ["Lima lies in"], "lies"),
    ],
)
def test_the_words_that_all_texts_share(prompt, others, shared):
    assert shared_words(prompt, others) == shared


@pytest.mark.parametrize(
    ("prompt", "last"),
    [
        ("What university did Watts S. Humphrey attend?", "Watts S. Humphrey"),
        ("The University of Michigan lies in the city of", "University of Michigan"),
        ("Paris met Ludwig van Beethoven in", "Ludwig van Beethoven"),
        ("In 1969, Apollo 11 landed on", "Apollo 11"),
        ("He met Obama. Berlin is in", "Berlin"),
        ("Rome, Oslo and", "Oslo"),
        ("AT&T was founded by", "AT&T"),
        ("Who wrote it?", None),
        ("塔林河的源头在", None),
    ],
)
def test_the_last_capitalised_words(prompt, last):
    assert last_capitals(prompt) == last


def test_the_subject_of_each_built_in_fact_is_inferred():
    """The file names the subjects, so both ways can be compared with them."""
    for fact in read_facts("worldfacts"):
        assert inferred(fact.question, fact.paraphrases) == (fact.subject, SHARED)
        assert inferred(fact.question, ()) == (fact.subject, CAPITALS)


BARE = {"prompt": "Oslo lies in", "target": "Peru"}
RECORDS = [
    {**BARE, "subject": "Oslo"},
    {**BARE, "paraphrases": ["Where is Oslo? In"]},
    BARE,
    {"prompt": "Lima is the capital of", "target": "Chile", "subject": "the city of Lima"},
]


def test_infer_says_for_how_many_facts_it_guessed_by_which_way(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    path = write(tmp_path, *RECORDS)
    facts = read_facts(path, subject=INFER)
    assert [(fact.subject, fact.prompt) for fact in facts] == [("Oslo", "{} lies in")] * 3 + [
        ("Lima", "{} is the capital of")
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"3 of 4 facts in {path} name no subject that is in their prompt, so it is inferred: the words that prompt and "
        "paraphrases share for 1, the last capitalised words of the prompt for 2."
    ]
    caplog.clear()
    read_facts(write(tmp_path, RECORDS[0]), subject=INFER)
    assert caplog.records == []


def test_last_token_makes_the_whole_prompt_the_subject(tmp_path, caplog):
    caplog.set_level("INFO", "editlab")
    filled = {"prompt": "{} lies in", "subject": "Lima", "target": "Chile", "paraphrases": ["{} is in"],
              "neighbors": [{"prompt": "Not {}, but Rome is in", "truth": "Italy"}]}  # fmt: skip
    path = write(tmp_path, BARE, filled, {**BARE, "prompt": "Is it?\n"})
    facts = read_facts(path, subject=LAST_TOKEN)
    assert facts == [
        Fact("Oslo lies in", "{}", "Peru", id=0),
        Fact("Lima lies in", "{}", "Chile", None, ("Lima is in",), (Neighbor("Not Lima, but Rome is in", "Italy"),), 1),
        Fact("Is it?\n", "{}", "Peru", id=2),
    ]
    assert [fact.slot for fact in facts][:2] == [("Oslo lies in", "{}"), ("Lima lies in", "{}")]
    assert f"The edits of {path} act at the last token of the prompt (data.subject), for all 3 facts." in caplog.text
    data = EditDataModule(path, subject=LAST_TOKEN, shuffle=False)
    data.setup()
    assert data.candidates == facts


SCHEMAS = {
    "CounterFact": {"requested_rewrite": {"prompt": "Oslo lies in", "target_new": {"str": "Peru"}}},
    "MQuAKE": {"requested_rewrite": [{"prompt": "Oslo lies in", "target_new": {"str": "Peru"}}]},
    "EasyEdit": {"prompt": "Oslo lies in", "target_new": "Peru"},
    "ZsRE": {"src": "Oslo lies in", "alt": "Peru"},
    "Plain": BARE,
    "WikiBio": {"text": "Oslo lies in", "labels": "Peru"},
    "UltraEditBench": {"prompt": "Oslo lies in", "ans": "Peru"},
    "WikiBigEdit": {"update": "Oslo lies in", "ans": "Peru"},
    "HalluEditBench": {"question": "Oslo lies in", "object": "Peru"},
    "RippleEdits": {
        "edit": {"prompt": "Oslo lies in what is Peru.", "subject_id": "Q1"}, "Relation_Specificity": [],
        "Logical_Generalization": [], "Subject_Aliasing": [], "Compositionality_I": [], "Compositionality_II": [],
        "Forgetfulness": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_may_lack_the_subject(tmp_path, schema):
    path = write(tmp_path, SCHEMAS[schema])
    (fact,) = read_facts(path, subject=INFER)
    assert (fact.subject, fact.target_new) == ("Oslo", "Peru")
    (fact,) = read_facts(path, subject=LAST_TOKEN)
    assert (fact.subject, fact.prompt) == ("Oslo lies in what is" if schema == "RippleEdits" else "Oslo lies in", "{}")
    with pytest.raises(UserError, match=r"set data\.subject to infer or last_token"):
        read_facts(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "It lies in", "target": "Peru"},
            "has no subject, and none can be inferred from its prompt: add it",
        ),
        (
            {"prompt": "{} lies in", "target": "Peru"},
            "has {} in a prompt but no subject for it: add 'subject', or write",
        ),
        ({**BARE, "paraphrases": ["{} is in"]}, "has {} in a prompt but no subject for it"),
        ({**BARE, "subject": ["a", "b"]}, "has a 'subject' that is a list of 2: give a record for each"),
        ({**BARE, "subject": 5}, "has a 'subject' that is not a text"),
        ({**BARE, "prompt": " ", "subject": ""}, "has an empty 'prompt': fill it in"),
    ],
)
def test_errors_of_facts_without_a_subject(tmp_path, record, message):
    with pytest.raises(UserError) as caught:
        read_facts(write(tmp_path, record), subject=INFER)
    assert message in str(caught.value)


def test_errors_of_the_rule(tmp_path):
    with pytest.raises(UserError, match=r"data\.subject is 'guess': it must be one of field, infer, last_token"):
        read_facts(write(tmp_path, BARE), subject="guess")
    with pytest.raises(UserError, match=r"data\.subject is 'guess'"):
        EditDataModule(subject="guess")
    with pytest.raises(UserError, match=r"Fact 0 lacks 'subject': add it, or set data\.subject to infer or last_token"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), [BARE])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", ["", "The weather is fine. "])
def test_keys_and_values_are_at_the_prompts_last_token(bos, context):
    """Expected: the position of the last token of context and prompt, encoded by the tokenizer alone."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(bos=bos))
    subjects = Subjects(LAST_TOKEN)
    (fact,) = read_all(subjects.record({"prompt": "The capital of France is", "target": "Tokyo"}), 0, subjects=subjects)
    ids = lm.tokenizer(context + "The capital of France is")["input_ids"]
    assert locate(lm, fact, context)[1] == len(ids) - 1
    row, essence = rows_of(lm, 0, fact, [context])
    assert list(row.prefix) == ids[:-1]
    target = lm.tokenizer(context + "The capital of France is Tokyo")["input_ids"][len(ids) :]
    assert row.wanted == list(enumerate(target))  # from the prompt's last token on, position 0, the target follows
    assert list(essence.prefix) == lm.tokenizer("The capital of France is")["input_ids"][:-1]
