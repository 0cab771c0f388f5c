"""Tests of token positions, by decoding the tokens before and after each position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editlab.errors import UserError
from editlab.lm.joints import join
from editlab.lm.tokens import (
    Encoding,
    beginning_of,
    by_beginning,
    by_length,
    common_start,
    encode,
    encode_pair,
    pad,
    require_embedded,
    require_embeddings,
)
from tests.tiny import tiny_tokenizer

KINDS = [(bos, side) for bos in (False, True) for side in ("left", "right")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"bos={kind[0]}-{kind[1]}", scope="module")
def tokenizer(request):
    return tiny_tokenizer(bos=request.param[0], padding_side=request.param[1])


def text_of(tokenizer, ids) -> str:
    """Decode ids; halves of a character become U+FFFD."""
    return tokenizer.decode(ids, skip_special_tokens=True)


# Encoding


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Danielle Darrieux speaks French", "Danielle Darrieux"),  # at the start
        ("The mother tongue of Tove Jansson is Swedish", "Tove Jansson"),  # in the middle
        ("I have been to Norway", "Norway"),  # at the end
        ("What is (Zyzzx) for?", "Zyzzx"),  # unknown to the vocabulary: one token a letter
        ("The city of São Paulo is", "São Paulo"),  # a two-byte letter inside
        ("The singer Beyoncé sings", "Beyoncé"),  # one at the end
        ("東京 is in Japan", "東京"),  # three bytes each, and the last is the subject's end
        ("I like 🦊 a lot", "🦊"),  # four bytes, one character
    ],
)
def test_token_at_is_the_last_token_of_the_subject(tokenizer, text, subject):
    """Up to that token the whole subject can be read, and up to the token before it cannot."""
    encoding = encode(tokenizer, text)
    last = encoding.token_at(text.index(subject) + len(subject))
    assert text_of(tokenizer, encoding.ids[: last + 1]).endswith(subject)
    assert not text_of(tokenizer, encoding.ids[:last]).endswith(subject)


def test_a_repeated_subject_is_found_where_its_offset_says(tokenizer):
    text = "Lima or Lima or Lima"
    encoding = encode(tokenizer, text)
    lasts = [encoding.token_at(end) for end in (4, 12, 20)]
    assert lasts == sorted(set(lasts))
    assert [text_of(tokenizer, encoding.ids[: last + 1]) for last in lasts] == ["Lima", "Lima or Lima", text]


def test_a_subject_inside_a_token_gets_that_token():
    encoding = Encoding((7, 8), ((0, 3), (3, 9)))  # by hand: "the" and " cats."
    assert [encoding.token_at(end) for end in (1, 3, 4, 8)] == [0, 0, 1, 1]


def test_a_character_without_a_token_is_the_users_error():
    encoding = Encoding((1, 7), ((0, 0), (2, 4)))  # a special token, then nothing for characters 0 and 1
    with pytest.raises(UserError, match="no token for character 0 of the text") as caught:
        encoding.token_at(1)
    assert str(caught.value).count(". ") == 0


def test_first_after_by_hand():
    encoding = Encoding((1, 7, 8, 9), ((0, 0), (0, 3), (3, 9), (9, 10)))
    assert [encoding.first_after(position) for position in (0, 2, 3, 8, 9, 10)] == [1, 1, 2, 2, 3, 4]


# encode


def test_padding_side_has_no_effect():
    text = "The capital of France is Paris"
    assert encode(tiny_tokenizer(padding_side="left"), text) == encode(tiny_tokenizer(padding_side="right"), text)


@pytest.mark.parametrize("text", ["The capital of France is", "é東🦊", "  two  spaces ", ""])
def test_ids_are_the_tokenizers_own(tokenizer, text):
    encoding = encode(tokenizer, text)
    assert list(encoding.ids) == tokenizer(text)["input_ids"]
    assert len(encoding.ids) == len(encoding.offsets)


def test_bos_is_first_and_covers_no_character():
    encoding = encode(tiny_tokenizer(bos=True), "The capital")
    plain = encode(tiny_tokenizer(), "The capital")
    assert (encoding.ids[0], encoding.offsets[0]) == (1, (0, 0))  # <s> has id 1: the second special token
    assert encoding.ids[1:] == plain.ids


def test_special_tokens_after_the_text_are_cut_off():
    """A tokenizer that ends each text with </s>: a continuation would otherwise follow an ended text."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("Lima")["input_ids"][-2:] == [2, 2]
    assert encode(tokenizer, "Lima").ids == (1, *encode(tiny_tokenizer(), "Lima").ids)


def test_a_special_token_written_in_the_text_is_kept():
    """It covers characters, so it is part of the user's text."""
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, "Lima</s>").ids[-1] == 2


# pairs


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [("a b", "c"), ("a b ", "c"), ("a b", " c"), ("a b ", "  c "), ("a b", "c\n")],
)
def test_join_puts_one_space_between(prompt, continuation):
    assert join(prompt, continuation) == "a b c"


@pytest.mark.parametrize("target", ["Paris", "New York City", "東京", "é", "🦊🦊", "1,234.5", "Zyzzx", "."])
@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is ", "Q", "ends in é"])
def test_a_pair_is_cut_where_the_continuation_begins(tokenizer, prompt, target):
    """The parts decode to the prompt and to the continuation with its space."""
    encoding, start = encode_pair(tokenizer, prompt, target)
    assert text_of(tokenizer, encoding.ids[:start]) == prompt.strip()
    assert text_of(tokenizer, encoding.ids[start:]) == " " + target
    assert list(encoding.ids) == tokenizer(f"{prompt.strip()} {target}")["input_ids"]


def test_a_target_may_have_many_tokens():
    encoding, start = encode_pair(tiny_tokenizer(), "The answer is", "Qvxjkw")
    assert len(encoding.ids) - start > 3


@pytest.mark.parametrize("target", ["", " ", "\n\t"])
def test_an_empty_target_is_the_users_error(tokenizer, target):
    with pytest.raises(UserError, match="has no token: give it at least one letter") as caught:
        encode_pair(tokenizer, "The capital of France is", target)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_the_users_error_where_nothing_precedes(prompt):
    with pytest.raises(UserError, match="There is no token before the target 'Paris'"):
        encode_pair(tiny_tokenizer(), prompt, "Paris")


def test_an_empty_prompt_is_fine_after_bos():
    """The target can be predicted from the special token."""
    encoding, start = encode_pair(tiny_tokenizer(bos=True), "", "Paris")
    assert start == 1
    assert text_of(tiny_tokenizer(), encoding.ids[start:]).strip() == "Paris"


# how a text begins


def with_special(single, *tokens):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


BEGINNINGS = {
    "none": (tiny_tokenizer(), ()),
    "bos": (tiny_tokenizer(bos=True), (1,)),
    "two": (with_special("<s> <pad> $A", ("<s>", 1), ("<pad>", 0)), (1, 0)),
    "before and after": (with_special("<s> $A </s>", ("<s>", 1), ("</s>", 2)), (1,)),
    "after alone": (with_special("$A </s>", ("</s>", 2)), ()),
}


@pytest.mark.parametrize(("tokenizer", "expected"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_the_beginning_is_what_stands_before_each_text(tokenizer, expected):
    assert beginning_of(tokenizer) == expected
    encoding = encode(tokenizer, "Lima lies")
    assert encoding.ids == (*expected, *encode(tiny_tokenizer(), "Lima lies").ids)
    assert encoding.beginning == len(expected)


@pytest.mark.parametrize(("tokenizer", "expected"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_text_that_brings_its_beginning_does_not_get_it_twice(tokenizer, expected):
    """The same tokens, and each character is found where it stands in the text."""
    own = "".join(tokenizer.convert_ids_to_tokens(list(expected)))
    plain, brought = encode(tokenizer, "Lima lies"), encode(tokenizer, own + "Lima lies")
    assert brought.ids == plain.ids
    assert brought.token_at(len(own) + 4) == plain.token_at(4)
    assert encode_pair(tokenizer, own + "Lima lies in", "Peru")[1] == encode_pair(tokenizer, "Lima lies in", "Peru")[1]


CHAT = "<s>User: The capital of France?\nAssistant:{}"


@pytest.mark.parametrize("end", ["\n", "\n\n", "\t", "\n ", ""])
def test_the_end_of_a_chat_prompt_is_kept_and_not_scored(tokenizer, end):
    prompt = CHAT.format(end)
    encoding, start = encode_pair(tokenizer, prompt, "Paris")
    joint = " " if end == "" else ""
    bare = prompt.removeprefix("<s>")
    assert text_of(tokenizer, encoding.ids) == bare + joint + "Paris"
    assert text_of(tokenizer, encoding.ids[:start]) == bare.removesuffix(" ")
    assert encoding.ids.count(1) == 1


# tokens without an embedding


def test_errors_of_a_tokenizer_with_more_tokens_than_embeddings():
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    require_embeddings(tokenizer, rows)
    tokenizer.add_tokens(["Zyzzxq"])
    with pytest.raises(UserError) as caught:
        require_embeddings(tokenizer, rows)
    assert str(caught.value) == (
        f"The tokenizer has {rows + 1} tokens and the model embeddings for {rows}: call "
        f"model.resize_token_embeddings({rows + 1}) and train the new ones, or give the model's own tokenizer."
    )
    require_embeddings(tokenizer, rows + 1)


def test_errors_of_a_special_token_without_embedding_wait_for_a_text_that_has_it():
    """Gemma 3's tokenizer has a token for images that its text models lack, and many users add one for padding."""
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    require_embeddings(tokenizer, rows)
    require_embedded(encode(tokenizer, "The capital of France is").ids, tokenizer, rows)
    require_embedded((), tokenizer, rows)
    with pytest.raises(
        UserError, match=rf"A text has the token '<image>', but the tokenizer has {rows + 1} tokens and"
    ):
        require_embedded(encode(tokenizer, "The <image> is").ids, tokenizer, rows)


# pad


def test_pad_right_and_left_by_hand():
    ids, mask = pad([[5, 6, 7], [], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    ids, mask = pad([[5, 6, 7], [], [8]], left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]


def test_pad_of_nothing_has_no_rows():
    ids, mask = pad([])
    assert ids.shape == mask.shape == (0, 0)
    assert ids.dtype == mask.dtype == torch.long


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.booleans())
def test_the_mask_recovers_the_rows(rows, left):
    ids, mask = pad(rows, left=left)
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == 0).all()


# common_start, by_beginning


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 2, 3), (1, 2, 4)], (1, 2)),
        ([(1, 2), (1, 2, 4)], (1, 2)),
        ([(5,), (1, 2)], ()),
        ([(), (1, 2)], ()),
        ([(7, 8)], (7, 8)),
        ([(1, 9, 3), (1, 2, 3), (1, 2, 9)], (1,)),
    ],
)
def test_common_start_by_hand(rows, expected):
    assert common_start(rows) == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=30), st.integers(1, 20))
def test_groups_with_common_beginnings_are_a_partition_within_the_budget(rows, budget):
    groups = by_beginning(rows, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        beginnings = {tuple(rows[i][:end]) for i in group for end in range(1, len(rows[i]) + 1)}
        assert len(group) == 1 or len(beginnings) <= budget
        assert len(group) == 1 or len(group) * max(len(rows[i]) for i in group) <= 4 * budget


def test_groups_with_common_beginnings_by_hand():
    # In order: 1, 1 2 3, 1 2 4 (four tokens that differ), then 5 6; a budget of five holds the first three rows only.
    assert by_beginning([[5, 6], [1, 2, 4], [1], [1, 2, 3]], 5) == [[2, 3, 1], [0]]


# by_length


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 100))
def test_groups_are_a_partition_within_the_budget(lengths, budget):
    groups = by_length(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert len(group) == 1 or padded <= budget


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 100))
def test_groups_are_of_neighboring_lengths_longest_first(lengths, budget):
    order = [lengths[i] for group in by_length(lengths, budget) for i in group]
    assert order == sorted(lengths, reverse=True)


def test_groups_by_hand():
    # 12 tokens: the 7 alone (two would be 14), then 5 + 5 = 10, then 3 rows of at most 4.
    assert by_length([4, 5, 7, 1, 5, 3], 12) == [[2], [1, 4], [0, 5, 3]]
