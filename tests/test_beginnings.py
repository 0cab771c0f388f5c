"""How texts begin: every text that editlab reads begins, and is scored, as the tokenizer begins a text.

The model is a chain of tokens whose next-token table is known: no block changes the stream, so that the logits after a
token are computed from its embedding alone. The first token of a window is scored behind
``<s>``; without it there is nothing that it could be predicted from.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from callbacks.lora.objective import distributions, prompt_rows, short_windows, text_rows
from callbacks.trust.probes import TEXT_WINDOW, measure_heldout, sentences_of_facts, sentences_of_text
from editlab.data.fact import Fact, Neighbor
from editlab.editor import SequentialEditor
from editlab.edits.layer_search import SearchSetup, TrialEvaluator
from editlab.errors import UserError
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.scoring import score_facts, score_pairs, token_log_probs
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys import moments
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings, accumulate, second_moments
from editlab.keys.subject_keys import Site, locate, read_keys
from editlab.lm import text as corpus
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.generate import answer
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import cut, read_ids, read_windows, sample_text, self_text, text_key
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.training.rows import edit_rows
from editlab.utils.disk_cache import key_of
from editlab.values.cache import name_of
from editlab.values.loss import rows_of
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

BOS = 1
LONG = "\n".join(TEXT * 10)


def chain(bos: bool = True, **changes) -> LanguageModel:
    """A model in which the next token depends on the last one alone."""
    model = tiny_model("llama", **changes)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return LanguageModel(model, tiny_tokenizer(bos=bos))


def table(lm: LanguageModel) -> torch.Tensor:
    """Log-probability of each token after each, [vocabulary, vocabulary], by the definition of the root mean square."""
    embedded = lm.model.get_input_embeddings().weight.detach().double()
    normed = embedded / (embedded.square().mean(1, keepdim=True) + lm.model.config.rms_norm_eps).sqrt()
    return (normed @ lm.model.lm_head.weight.detach().double().T).log_softmax(1)


@pytest.fixture(scope="module")
def lms():
    return {True: chain(True), False: chain(False)}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(LONG, encoding="utf-8")
    return str(tmp_path / "text.txt")


# ---- what is scored


@pytest.mark.parametrize("window", [16, 256])  # the model takes 128 tokens: windows of 127 after <s>
@pytest.mark.parametrize("bos", [True, False])
def test_the_first_token_of_a_window_is_scored_behind_bos_alone(lms, bos, window):
    lm = lms[bos]
    ids, p = lm.tokenizer(LONG, add_special_tokens=False)["input_ids"][:300], table(lm)
    size = min(window, 128 - bos)
    expected = []
    for start in range(0, 300, size):
        some = ids[start : start + size]
        before = [BOS, *some[:-1]] if bos else some[:-1]
        expected += [float(p[a, b]) for a, b in zip(before, some if bos else some[1:], strict=True)]
    torch.testing.assert_close(token_log_probs(lm, ids, window), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_perplexity_without_bos_is_another(lms, text):
    """The held-out perplexity is that of the table, <s> included, and far from that of the bare windows."""
    settings = EvaluationSettings(heldout=text, heldout_tokens=64, generated_texts=0)
    found = {bos: Evaluation(settings).language(lm)["perplexity"] for bos, lm in lms.items()}
    ids, p = lms[True].tokenizer(LONG, add_special_tokens=False)["input_ids"][:64], table(lms[True])
    nll = [-float(p[a, b]) for a, b in zip([BOS, *ids[:-1]], ids, strict=True)]
    assert found[True] == pytest.approx(math.exp(sum(nll) / 64), rel=1e-4)
    assert found[False] == pytest.approx(math.exp(sum(nll[1:]) / 63), rel=1e-4)


def test_statements_and_windows_of_trust_are_scored_behind_bos(lms, text):
    lm, p = lms[True], table(lms[True])
    sentences = sentences_of_text(lm, LONG, 3)
    ids = lm.tokenizer(LONG, add_special_tokens=False)["input_ids"][: 3 * TEXT_WINDOW]
    parts = [ids[i : i + TEXT_WINDOW] for i in (0, 32, 64)]
    assert [s.ids for s in sentences] == [(BOS, *part) for part in parts]
    nll = [-float(p[a, b]) for part in parts for a, b in zip([BOS, *part[:-1]], part, strict=True)]
    measured = measure_heldout(lm, sentences)
    assert measured.nll == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    likeliest = [float(p[part[-2]].max().exp()) for part in parts]  # where the last token is predicted
    assert measured.confidence == pytest.approx(sum(likeliest) / 3, rel=1e-4)


def test_rows_of_text_count_the_first_token_behind_bos(lms):
    windows = cut(lms[True], [5, 6, 7, 8], 3)
    assert windows == [[BOS, 5, 6, 7], [BOS, 8]]
    rows = text_rows(lms[True], windows)
    assert [(row.ids, row.indices, row.following) for row in rows] == [
        ((BOS, 5, 6), (0, 1, 2), (5, 6, 7)),
        ((BOS,), (0,), (8,)),
    ]
    p = table(lms[True])
    found = torch.cat(distributions(lms[True], rows))
    torch.testing.assert_close(found.double(), p[[BOS, 5, 6, BOS]], rtol=1e-3, atol=1e-3)


# ---- what is sampled


def test_sampled_text_begins_with_bos_and_not_with_a_random_token(lms, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW", 4)
    lm = chain()
    with torch.no_grad():  # <s> is followed by token 77 for certain
        lm.model.lm_head.weight[77] = 50 * lm.model.get_input_embeddings().weight[BOS]
    windows = sample_text(lm, 10, 0, "")
    assert [window[:2] for window in windows] == [[BOS, 77]] * 3
    assert [len(window) - 1 for window in windows] == [4, 4, 2]
    assert self_text(lm, 10, 0, "") == self_text(lm, 10, 0, "") == windows  # sampled, then from the cache
    assert {window[0] for window in sample_text(lms[False], 40, 0, "")} != {BOS}


# ---- what the moments count


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("bos", [True, False])
def test_the_key_of_bos_is_no_part_of_the_moments(bos, tolerance, text, monkeypatch):
    monkeypatch.setattr(moments, "KEYS_A_FEATURE", 1)
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(bos=bos))
    ids = lm.tokenizer(LONG, add_special_tokens=False)["input_ids"][:300]
    size = 127 if bos else 128
    keys = []
    handle = lm.anatomy.edit_module(1).register_forward_pre_hook(lambda m, args: keys.append(args[0][0]))
    for start in range(0, 300, size):
        lm.model(input_ids=torch.tensor([[BOS] * bos + ids[start : start + size]]))
        keys[-1] = keys[-1][bos:]
    handle.remove()
    every = torch.cat(keys).double()
    got = second_moments(lm, [1], MomentSettings(text=text, tokens=300, tolerance=tolerance), "tiny")[1]
    torch.testing.assert_close(got, every.T @ every / 300, rtol=1e-4, atol=1e-7)


# ---- all that reads a text


class Rows(list):
    """The token ids of all rows that a model is run on from their first token, without padding."""

    def __init__(self, lm):
        lm.packs = False  # rows one below the other
        self.handle = lm.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, given):
        if given.get("past_key_values") is None or given["past_key_values"].get_seq_length() == 0:
            ids, mask = given["input_ids"], given.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            self.extend(row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))


FACT = Fact(
    "France", "The capital of {} is", "Tokyo", "Paris", ("France is ruled from",), (Neighbor("Oslo lies in", "Norway"),)
)


def setup_of(lm):
    module = SequentialEditor("tiny", layers=[1], moments=MomentSettings(tokens=40, cache=False))
    module.use(lm)
    return SearchSetup(lm, "tiny", "key", module.solve_settings, module.values, module.moments, ContextSettings())


READERS = {
    "perplexity and generated texts": lambda lm, text: Evaluation(
        EvaluationSettings(heldout=text, heldout_tokens=64, generated_texts=2, generated_tokens=3)
    ).language(lm),
    "perplexity of the fork": lambda lm, text: token_log_probs(lm, read_ids(lm, corpus.read_file(text), 100), 30),
    "moments of a file": lambda lm, text: second_moments(lm, [1], MomentSettings(text=text, tokens=200), "tiny"),
    "moments of sampled text": lambda lm, text: second_moments(lm, [1], MomentSettings(tokens=40, cache=False), "tiny"),
    "moments of the layer search": lambda lm, text: accumulate(
        lm, [1], moments.text_windows(lm, setup_of(lm).moments, "")
    ),
    "prompts of the layer search": lambda lm, text: TrialEvaluator(lm, [FACT], ContextSettings(length=3)),
    "sampled text": lambda lm, text: sample_text(lm, 20, 0, ""),
    "contexts": lambda lm, text: sample_contexts(lm, ContextSettings(length=3)),
    "keys": lambda lm, text: read_keys(lm, [FACT], 1, Site.of(lm, 1), ["", "Lima lies. "], "mean"),
    "scores": lambda lm, text: score_facts(lm, [FACT]),
    "answers": lambda lm, text: answer(lm.model, lm.tokenizer, "The capital of France is", 2, 1),
    "text of LoRA, a file": lambda lm, text: distributions(lm, text_rows(lm, short_windows(lm, text, 3, 0))),
    "text of LoRA, sampled": lambda lm, text: distributions(lm, text_rows(lm, short_windows(lm, "self", 3, 0))),
    "edits of LoRA": lambda lm, text: distributions(lm, edit_rows(lm, [FACT], ["", "Lima lies. "])),
    "prompts of LoRA": lambda lm, text: distributions(lm, prompt_rows(lm, [FACT])),
    "statements of trust": lambda lm, text: measure_heldout(lm, sentences_of_facts(lm, [FACT], 1)),
    "windows of trust": lambda lm, text: measure_heldout(lm, sentences_of_text(lm, LONG, 3)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("bos", [True, False])
def test_every_text_begins_as_the_tokenizer_begins_it(read, bos, text, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW", 16)
    lm = chain(bos)
    rows = Rows(lm)
    read(lm, text)
    assert rows
    assert [row.count(BOS) for row in rows] == [int(bos)] * len(rows)
    if bos:
        assert {row[0] for row in rows} == {BOS}


# ---- prompts that bring the token themselves


OWN = replace(FACT, prompt="<s>The capital of {} is", paraphrases=("<s>France is ruled from",),
              neighbors=(Neighbor("<s>Oslo lies in", "Norway"),))  # fmt: skip
CONTEXTS = ["", "Lima lies. "]
USES = {
    "values": lambda lm, fact: rows_of(lm, 0, fact, CONTEXTS),
    "keys": lambda lm, fact: read_keys(lm, [fact], 1, Site.of(lm, 1), CONTEXTS, "mean").keys.tolist(),
    "subjects": lambda lm, fact: [(locate(lm, fact, c)[0].ids, locate(lm, fact, c)[1]) for c in CONTEXTS],
    "scores": lambda lm, fact: score_facts(lm, [fact]).neighbors.logp_new.tolist(),
    "edits of LoRA": lambda lm, fact: edit_rows(lm, [fact], CONTEXTS),
    "prompts of LoRA": lambda lm, fact: prompt_rows(lm, [fact]),
    "statements of trust": lambda lm, fact: [s.ids for s in sentences_of_facts(lm, [fact], 1)],
    "answers": lambda lm, fact: answer(lm.model, lm.tokenizer, fact.question, 3, 2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_prompt_with_a_bos_of_its_own_is_the_prompt_without(use, lms):
    """Also behind a context, which then stands between the special token and the prompt."""
    assert use(lms[True], OWN) == use(lms[True], FACT)


def test_a_file_with_a_bos_of_its_own_has_one(lms, tmp_path):
    (tmp_path / "own.txt").write_text("<s>" + LONG)
    (tmp_path / "plain.txt").write_text(LONG)
    found = [read_windows(lms[True], str(tmp_path / f"{name}.txt"), 100) for name in ("own", "plain")]
    assert found[0] == found[1]


# ---- joints


JAPAN = Fact("日本", "{}の首都は", "東京", "京都", neighbors=(Neighbor("法国的首都是", "巴黎"),))
JOINING = {
    "values": lambda lm: [[*row.prefix, *row.tail, row.wanted[-1][1]] for row in rows_of(lm, 0, JAPAN, [""])[:1]],
    "scores": lambda lm: scored_rows(lm, lambda: score_facts(lm, [JAPAN])),
    "edits of LoRA": lambda lm: [[*row.ids, row.following[-1]] for row in edit_rows(lm, [JAPAN], [""])],
    "statements of trust": lambda lm: [s.ids for s in sentences_of_facts(lm, [JAPAN], 1)],
}


def scored_rows(lm, score):
    """The rows that are scored, each with its last token, which is not run."""
    requests = []
    original = LanguageModel.encode_pair

    def noted(self, prompt, continuation):
        found = original(self, prompt, continuation)
        requests.append(found[0].ids)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "encode_pair", noted)
        score()
    return requests


@pytest.mark.parametrize("join", JOINING.values(), ids=JOINING)
@pytest.mark.parametrize(("joint", "between"), [("auto", ""), ("none", ""), ("space", " ")])
def test_all_that_joins_prompt_and_target_follows_the_setting(join, joint, between):
    lm = chain()
    lm.joint = joint
    texts = {lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in join(lm)}
    possible = {f"日本の首都は{between}{answer}" for answer in ("東京", "京都")}
    possible |= {f"法国的首都是{between}{answer}" for answer in ("東京", "巴黎")}
    assert texts
    assert texts <= possible


def test_the_joint_changes_a_score(lms):
    lm = chain()
    found = []
    for lm.joint in ("auto", "none", "space"):
        found.append(float(score_pairs(lm, [("日本の首都は", "東京")])[0]))
    assert found[0] == found[1] != found[2]


# ---- keys of caches


def test_cache_keys_without_special_tokens_are_the_old_ones(lms, text, tmp_path):
    """Texts that are read as before are found under their old keys; with <s> before them they have others."""
    names = {}
    for bos, lm in lms.items():
        second_moments(lm, [1], MomentSettings(text=text, tokens=100), "tiny")
        self_text(lm, 3, 0, "")
        identity = {"model": model_key(fingerprint(lm.model), lm.model),
                    "tokenizer": tokenizer_fingerprint(lm.tokenizer)}  # fmt: skip
        moments_key = key_of(**identity, layer=1, module="mlp.down_proj", text=text_key(text, 0), tokens=100, stop=None)
        text_name = key_of(**identity, seed=0, tokens=3, window=128, rows=128, device="cpu")
        names[bos] = [
            (tmp_path / "cache" / folder / f"{key}.cache").exists()
            for folder, key in (("moments", moments_key), ("texts", text_name))
        ]
    assert names == {True: [False, False], False: [True, True]}


def test_the_names_of_values_change_with_the_text_alone(lms):
    def name(lm, fact):
        return name_of(fact, lm.unusual_texts([(fact.question, fact.target_new)]))

    lm = chain()
    plain = key_of(prompt=FACT.prompt, subject=FACT.subject, target_new=FACT.target_new)
    assert name(lm, FACT) == plain  # as before there were joints
    own, chat = OWN, replace(FACT, prompt="The capital of {} is\n")
    found = [name(lm, fact) for fact in (own, chat, JAPAN)]
    lm.joint = "space"
    assert name(lm, FACT) == plain
    found.append(name(lm, JAPAN))
    lm.joint = "none"
    found += [name(lm, FACT), name(lm, JAPAN)]
    assert found[2] == found[5]  # auto is none here
    assert len({plain, *found}) == 6


def test_the_key_of_a_choice_of_layers_changes_with_the_texts(lms):
    found = []
    for bos, facts, joint in (
        (False, [FACT], "auto"), (True, [FACT], "auto"), (True, [JAPAN], "auto"), (True, [JAPAN], "none"),
        (True, [JAPAN], "space"), (True, [FACT], "space"),
    ):  # fmt: skip
        setup = setup_of(chain(bos))
        setup.lm.joint = joint
        found.append(setup.cache_key(facts))
    assert found[2] == found[3]
    assert found[1] == found[5]
    assert len(set(found)) == 4


# ---- tokens without an embedding


def too_many(**changes):
    """A model with one embedding less than its tokenizer has tokens, of which the last is special."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), **changes)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LanguageModel(model, tokenizer)


BAD_TEXTS = {
    "a prompt": lambda lm, path: lm.encode("The <image> is"),
    "a target": lambda lm, path: lm.encode_pair("The capital is", "<image>"),
    "scores": lambda lm, path: score_pairs(lm, [("The <image> is", "Paris")]),
    "a text": lambda lm, path: read_windows(lm, path, 20),
    "an answer": lambda lm, path: answer(lm.model, lm.tokenizer, "The <image> is", 1, 1),
    "held-out windows": lambda lm, path: sentences_of_text(lm, "<image> is here", 1),
}


@pytest.mark.parametrize("read", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_errors_of_a_token_without_embedding(read, tmp_path):
    (tmp_path / "text.txt").write_text("The <image> is. " * 20)
    with pytest.raises(UserError, match=r"has the token '<image>', but the tokenizer has .*resize_token_embeddings"):
        read(too_many(), str(tmp_path / "text.txt"))


def test_errors_of_a_model_with_fewer_embeddings_than_tokens():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["Zyzzxq"])
    with pytest.raises(UserError, match=rf"resize_token_embeddings\({len(tokenizer)}\)"):
        LanguageModel(model, tokenizer)
