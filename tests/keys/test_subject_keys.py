"""Keys against hooks on plain full passes, one prompt at a time, for both kinds of linear map."""

from __future__ import annotations

import functools

import pytest
import torch

from editlab.data.fact import Fact, Neighbor
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.subject_keys import Site, check_lengths, locate, read_keys, too_long
from editlab.lm import language_model
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import encode_pair
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

CONTEXTS = ["", "The weather is fine. ", "I lie in Peru. "]
FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("Danielle Darrieux", "{} speaks", "Norway"),  # the subject comes first
    Fact("Lima", "In {} or {} or Lima", "Peru"),  # every {} is filled; the first one counts
    Fact("Beyoncé", "I like {}", "Peru"),  # the subject comes last, and ends in a letter of two bytes
    Fact("Oslo", "{}", "Peru"),  # nothing but the subject
]
LAYER = 2


@functools.cache
def lm_of(family: str, bos: bool = False, side: str = "right") -> LanguageModel:
    return LanguageModel(tiny_model(family), tiny_tokenizer(bos=bos, padding_side=side))


def last_token(lm: LanguageModel, fact: Fact, context: str) -> tuple[list[int], int]:
    """Find the first token up to which context and question can be read as far as the subject's end."""
    text = context + fact.question
    wanted = context + fact.prompt[: fact.prompt.index("{}")] + fact.subject
    ids = lm.tokenizer(text)["input_ids"]
    lengths = range(len(ids))
    return ids, next(
        i for i in lengths if lm.tokenizer.decode(ids[: i + 1], skip_special_tokens=True).startswith(wanted)
    )


@torch.no_grad()
def naive(lm: LanguageModel, fact: Fact, context: str, module: torch.nn.Module, kind: str):
    """Read a module on one whole prompt, float64 [tokens, d], and find the subject's last token."""
    ids, last = last_token(lm, fact, context)
    seen = []
    handle = module.register_forward_hook(
        lambda m, args, out: seen.append(args[0] if kind == "input" else out[0] if isinstance(out, tuple) else out)
    )
    lm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1).double(), last


def keys_of(lm: LanguageModel, facts, context: str) -> torch.Tensor:
    """Stack the facts' naive keys as columns."""
    found = [naive(lm, fact, context, lm.anatomy.edit_module(LAYER), "input") for fact in facts]
    return torch.stack([states[last] for states, last in found], 1)


close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[("llama", False), ("llama", True), ("gpt2", False), ("opt", False), ("gemma2", True)])
def lm(request):
    return lm_of(*request.param)


def read(lm, mode, facts=FACTS, contexts=CONTEXTS):
    return read_keys(lm, facts, LAYER, Site.of(lm, LAYER), contexts, mode)


def test_bare_keys_are_those_of_the_prompts_alone(lm):
    got = read(lm, "bare")
    close(got.keys, keys_of(lm, FACTS, ""))
    assert got.keys.dtype == torch.float64
    assert got.fact.tolist() == [0, 1, 2, 3, 4]


def test_mean_keys_are_averages_over_the_contexts(lm):
    got = read(lm, "mean")
    close(got.keys, sum(keys_of(lm, FACTS, context) for context in CONTEXTS) / 3)
    assert got.fact.tolist() == [0, 1, 2, 3, 4]


def test_a_context_changes_the_key(lm):
    """Otherwise the averages above would prove nothing."""
    assert not torch.allclose(keys_of(lm, FACTS, CONTEXTS[0]), keys_of(lm, FACTS, CONTEXTS[1]), atol=1e-3)


@pytest.mark.parametrize("mode", ["bare", "mean"])
def test_context_keys_leave_out_the_first_token_and_the_subjects_last(lm, mode):
    """Context keys are of the bare prompts alone, in both modes of keys."""
    expected = []
    for fact in FACTS:
        states, last = naive(lm, fact, "", lm.anatomy.edit_module(LAYER), "input")
        expected += [states[t] for t in range(len(states)) if t not in (0, last)]
    got = read(lm, mode)
    close(got.context_keys, torch.stack(expected, 1))
    assert got.context_keys.dtype == torch.float64


@pytest.mark.parametrize("mode", ["bare", "mean"])
def test_current_is_what_the_site_gives_now(lm, mode):
    """The block's output or, if a norm follows the MLP (Gemma 2), that of the edited map itself."""
    in_stream = lm.model.config.model_type != "gemma2"
    module = lm.anatomy.blocks[LAYER] if in_stream else lm.anatomy.edit_module(LAYER)
    found = [naive(lm, fact, "", module, "output") for fact in FACTS]
    got = read(lm, mode)
    close(got.current, torch.stack([states[last] for states, last in found], 1))
    assert got.current.dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_the_site_is_in_the_stream_but_for_gemma(family):
    """Gemma 2 and 3 put a norm behind the MLP (their papers); no other family here does."""
    lm = lm_of(family)
    site = Site.of(lm, LAYER)
    assert (site.layer, site.in_stream) == (LAYER, family not in ("gemma2", "gemma3"))
    assert site.module is (lm.anatomy.blocks[LAYER] if site.in_stream else lm.anatomy.edit_module(LAYER))


def test_keys_below_the_site_come_from_their_own_layer():
    """With several edited layers the target lives at the topmost, and each layer has keys of its own."""
    lm = lm_of("llama")
    got = read_keys(lm, FACTS, 1, Site.of(lm, 3), [""], "bare")
    for i, fact in enumerate(FACTS):
        states, last = naive(lm, fact, "", lm.anatomy.edit_module(1), "input")
        close(got.keys[:, i], states[last])
        states, last = naive(lm, fact, "", lm.anatomy.blocks[3], "output")
        close(got.current[:, i], states[last])


@pytest.mark.parametrize("mode", ["bare", "mean"])
def test_padding_and_company_play_no_part(monkeypatch, mode):
    """A tokenizer that pads on the left gives the same bits; so do, to rounding, passes of single rows."""
    right, left = (read(lm_of("gpt2", True, side), mode) for side in ("right", "left"))
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", 1)
    alone = read(lm_of("gpt2", True), mode)
    for name in ("keys", "current", "context_keys", "fact"):
        assert torch.equal(getattr(left, name), getattr(right, name))
        close(getattr(alone, name), getattr(right, name))


@torch.no_grad()
def test_blocks_above_the_site_never_run():
    lm, ran = lm_of("llama"), []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.anatomy.blocks)]
    read_keys(lm, FACTS, 0, Site.of(lm, 1), [""], "bare")
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}


def test_keys_follow_the_weights():
    """Keys are read with the present weights: halving the layer's input halves its keys."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    before = read(lm, "bare")
    with torch.no_grad():
        lm.anatomy.blocks[LAYER].mlp.up_proj.weight.mul_(0.5)  # llama: k = act(gate x) * (up x)
    close(read(lm, "bare").keys, before.keys / 2)


def test_locate_counts_the_context(lm):
    for context in CONTEXTS:
        for fact in FACTS:
            encoding, last = locate(lm, fact, context)
            ids, expected = last_token(lm, fact, context)
            assert (list(encoding.ids), last) == (ids, expected)


def test_a_subject_without_a_token_is_the_users_error():
    with pytest.raises(UserError, match="no token"):
        locate(lm_of("llama"), Fact("", "{} is", "x"))


# too_long


@pytest.fixture(scope="module")
def short():
    """A GPT-2 of 32 positions, which fails at the 33rd."""
    return LanguageModel(tiny_model("gpt2", n_positions=32), tiny_tokenizer())


TEXTS = {
    "prompt": lambda text: Fact("Oslo", text + "{} is", "Peru"),
    "truth": lambda text: Fact("Oslo", "{} is", "Peru", text),
    "paraphrase": lambda text: Fact("Oslo", "{} is", "Peru", paraphrases=("Oslo is", text)),
    "neighbor": lambda text: Fact("Oslo", "{} is", "Peru", neighbors=(Neighbor(text, "x y"),)),
}


@pytest.mark.parametrize("word", ["Oslo ", "\u00f6 ", "\u6771\u4eac "])
@pytest.mark.parametrize("case", TEXTS)
def test_what_fits_is_what_the_model_can_score(short, case, word):
    """All lengths around the limit; the prompt's target, which values are found with, has to fit in whole."""
    told, failed = [], []
    for count in range(1, 40):
        fact = TEXTS[case](word * count)
        told.append(too_long(short, fact, []) is not None)
        try:
            score_facts(short, [fact])
        except IndexError:
            failed.append(True)
        else:
            failed.append(case == "prompt" and len(encode_pair(short.tokenizer, fact.question, "Peru")[0].ids) > 32)
    assert told == failed
    assert set(told) == {False, True}


def test_a_context_counts_for_the_prompt_alone(short):
    fact = Fact("Oslo", "{} is", "Peru", paraphrases=("Oslo lies in the north of Norway, and is",))
    context = "The capital. " * 4
    ids = [len(short.tokenizer(text)["input_ids"]) for text in (context, "Oslo is Peru")]
    assert too_long(short, fact, ["", context]) is None
    message = too_long(short, fact, ["", context * 3])
    before = len(short.tokenizer(context * 3)["input_ids"])
    assert ids[0] + ids[1] <= 32 < before + ids[1]
    assert message == (
        f"has {before + ids[1]} tokens with its target and a context, and the model takes 32: shorten its prompt"
    )
    with pytest.raises(UserError, match=r"The fact 'Oslo is'\.\.\. has .* shorten its prompt\.$"):
        check_lengths(short, [fact], [context * 3])


def test_short_texts_are_not_tokenized(monkeypatch):
    """All facts of a file are checked at each start."""
    monkeypatch.setattr("editlab.lm.language_model.encode_pair", None)
    assert too_long(lm_of("gpt2"), FACTS[0], [""]) is None


def test_a_model_without_a_limit_takes_all():
    lm = LanguageModel(tiny_model("bloom"), tiny_tokenizer())
    assert lm.longest is None
    assert too_long(lm, Fact("Oslo", "Oslo " * 500 + "{} is", "Peru"), []) is None
