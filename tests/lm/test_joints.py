"""What stands between a prompt and its continuation, by hand, in the languages that the rule is about."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from editlab.data.datamodule import EditDataModule
from editlab.edits.edited_model import EditedModel
from editlab.errors import UserError
from editlab.lm.joints import JOINTS, boundary, join

JOINED = {
    "english": ("The capital of France is", "Paris", "The capital of France is Paris"),
    "accents": ("La capitale de la Pologne est à", "Łódź", "La capitale de la Pologne est à Łódź"),
    "cyrillic": ("Столица Японии —", "Токио", "Столица Японии — Токио"),
    "arabic": ("عاصمة فرنسا هي", "باريس", "عاصمة فرنسا هي باريس"),
    "devanagari": ("भारत की राजधानी", "दिल्ली", "भारत की राजधानी दिल्ली"),
    "korean": ("일본의 수도는", "도쿄", "일본의 수도는 도쿄"),
    "korean and hanja": ("일본의 수도는", "東京", "일본의 수도는 東京"),
    "chinese": ("日本的首都是", "东京", "日本的首都是东京"),
    "chinese, a latin target": ("法国的首都是", "Paris", "法国的首都是Paris"),
    "chinese punctuation": ("问：日本的首都？答：", "东京", "问：日本的首都？答：东京"),
    "chinese, ascii colon": ("日本的首都是:", "东京", "日本的首都是:东京"),
    "chinese, ascii colon and a latin target": ("法国的首都是:", "Paris", "法国的首都是: Paris"),
    "chinese, digits": ("他出生于1990", "年", "他出生于1990年"),
    "an english prompt about it": ("The capital of 日本 is", "東京", "The capital of 日本 is 東京"),
    "an english label after it": ("日本の首都は?\nA:", "東京", "日本の首都は?\nA: 東京"),
    "japanese, hiragana": ("日本の首都は", "東京", "日本の首都は東京"),
    "japanese, katakana": ("答えはパリ", "だ", "答えはパリだ"),
    "japanese, half width": ("ｺﾀｴﾊ", "ﾊﾟﾘ", "ｺﾀｴﾊﾊﾟﾘ"),
    "japanese, a quotation": ("首都は「", "東京", "首都は「東京"),
    "rare ideographs": ("𠮷野家は", "𠮷", "𠮷野家は𠮷"),
    "bopomofo": ("ㄒㄧㄣ", "ㄓㄨ", "ㄒㄧㄣㄓㄨ"),
    "thai": ("เมืองหลวงของญี่ปุ่นคือ", "โตเกียว", "เมืองหลวงของญี่ปุ่นคือโตเกียว"),
    "thai, a latin target": ("ผลิตโดย", "Apple", "ผลิตโดย Apple"),
    "lao": ("ນະຄອນຫຼວງແມ່ນ", "ວຽງຈັນ", "ນະຄອນຫຼວງແມ່ນວຽງຈັນ"),
    "khmer": ("រដ្ឋធានីគឺ", "ភ្នំពេញ", "រដ្ឋធានីគឺភ្នំពេញ"),
    "burmese": ("မြို့တော်မှာ", "နေပြည်တော်", "မြို့တော်မှာနေပြည်တော်"),
}


@pytest.mark.parametrize(("prompt", "target", "expected"), JOINED.values(), ids=JOINED)
def test_a_space_stands_where_the_language_writes_one(prompt, target, expected):
    assert join(prompt, target) == expected
    assert join(prompt, f" {target}\n") == expected
    assert expected[boundary(prompt) :].strip() == target


WHITE = [" ", "\n", "\t", "\u3000", "\n\n", "<|assistant|>\n"]


@pytest.mark.parametrize("end", WHITE)
@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize(("prompt", "target"), [("The capital of France is", "Paris"), ("日本の首都は", "東京")])
def test_nothing_is_added_after_white_space(prompt, target, end, joint):
    """The line break at the end of a rendered chat prompt is a part of the prompt that every answer follows."""
    assert join(prompt + end, target, joint) == prompt + end + target


@pytest.mark.parametrize(
    ("prompt", "index"),
    [("ab", 2), ("ab ", 2), ("ab\n", 3), ("ab  ", 3), ("ab\n ", 3), ("", 0), (" ", 0), ("は", 1)],
)
def test_one_space_at_the_end_belongs_to_the_continuation(prompt, index):
    assert boundary(prompt) == index


@pytest.mark.parametrize(("prompt", "target", "_"), JOINED.values(), ids=JOINED)
def test_the_setting_overrides_the_language(prompt, target, _):
    assert join(prompt, target, "space") == f"{prompt} {target}"
    assert join(prompt, target, "none") == prompt + target


@pytest.mark.parametrize("prompt", ["", " ", "\n"])
@pytest.mark.parametrize("target", ["Paris", "東京"])
def test_a_blank_prompt_is_empty(prompt, target):
    assert join(prompt, target) == f" {target}"


@pytest.mark.parametrize("joint", JOINTS)
def test_the_model_follows_the_data(joint):
    """Lightning calls configure_model before every verb, also for a model that is loaded already."""

    class WithModel(EditedModel):
        def _load(self):
            self.lm = SimpleNamespace(tokenizer=None)

    module = WithModel("any", [1], None, None)
    module._trainer = SimpleNamespace(datamodule=EditDataModule(joint=joint))
    module.configure_model()
    assert module.lm.joint == joint


def test_errors_name_an_unknown_joint():
    with pytest.raises(UserError, match=r"data\.joint is 'comma': it must be one of auto, space, none\."):
        EditDataModule(joint="comma")
