"""``editlab ask``: the answers against the generation of transformers, and their output as text and as JSON."""

import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlab.cli.commands.ask import Pair, render
from editlab.cli.main import main
from editlab.errors import UserError
from editlab.lm.generate import Answer, answer
from tests.cli.commands.runs import save_tiny

PROMPTS = ["The capital of France is", "Danielle Darrieux speaks", "Oslo"]


def ask(*arguments):
    return main(["ask", *map(str, arguments)])


@pytest.fixture
def exported(run, tmp_path):
    """The folder of the base model and that of the edited model."""
    assert main(["export", "--ckpt_path", str(run.folder), "--out", str(tmp_path / "out")]) == 0
    return run.base, tmp_path / "out"


def by_transformers(folder, prompt, new_tokens, top):
    """Greedy text by ``generate``, and the likeliest next tokens of one forward pass."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        best = model(ids).logits[0, -1].softmax(0).topk(top)
    new = [token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
    return tokenizer.decode(new), list(zip(map(tokenizer.decode, best.indices), best.values.tolist(), strict=True))


def test_json_is_what_both_models_say(run, exported, capsys):
    capsys.readouterr()
    assert ask("--ckpt_path", run.folder, *PROMPTS, "--new_tokens", 7, "--top", 3, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["prompt"] for one in said] == PROMPTS
    differ = 0
    for one in said:
        for side, folder in zip(("before", "after"), exported, strict=True):
            text, tokens = by_transformers(folder, one["prompt"], 7, 3)
            assert one[side]["continuation"] == text
            for found, (token, probability) in zip(one[side]["next"], tokens, strict=True):
                assert found["token"] == token
                assert found["probability"] == pytest.approx(probability, abs=1e-6)
        differ += one["before"] != one["after"]
    assert differ


def test_standard_input(runs, monkeypatch, capsys):
    run = runs("tied")
    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of Peru is\n\n  \nOslo lies in\r\n"))
    assert ask("--ckpt_path", run.checkpoint, "--new_tokens", 1, "--top", 1, "--json") == 0
    assert [one["prompt"] for one in json.loads(capsys.readouterr().out)] == ["The capital of Peru is", "Oslo lies in"]


def test_side_by_side(runs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert ask("--ckpt_path", runs("tied").folder, PROMPTS[0], "--new_tokens", 30, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == PROMPTS[0]
    assert lines[1].split() == ["before", "after"]
    assert any(line.startswith("continuation ") for line in lines)
    assert [line[:13] for line in lines if "next token" in line] == ["1. next token", "2. next token"]
    assert max(map(len, lines)) <= 80


def test_columns_are_aligned(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    before = Answer(" Paris, a large\ncity in France, and more than that", ((" Paris", 0.75), ('"', 0.1)))
    shown = render(Pair("The capital is", before, Answer("", ((" Rome", 1.0),))))
    assert shown.splitlines() == [
        "The capital is",
        "               before                 after",
        "continuation   Paris, a large / city  (the text ends)",
        "               in France, and more",
        "               than that",
        '1. next token  0.750 " Paris"         1.000 " Rome"',
        '2. next token  0.100 "\\""',
    ]
    assert "continuation" not in render(Pair("The capital is", before, before), with_text=False)


def test_a_text_that_ends_is_not_continued(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    free = answer(model, tokenizer, PROMPTS[0], 6, 1)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    new = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :].tolist()
    third = next(token for token in new[2:] if token not in new[:2])
    model.generation_config.eos_token_id = [third, 399]
    stopped = answer(model, tokenizer, PROMPTS[0], 6, 1)
    assert free.continuation == tokenizer.decode(new)
    assert stopped.continuation == tokenizer.decode(new[: new.index(third)])
    assert answer(model, tokenizer, PROMPTS[0], 0, 0) == Answer("", ())
    assert len(answer(model, tokenizer, PROMPTS[0], 0, 10**6).next) == model.config.vocab_size


def test_bad_prompts_and_numbers(runs, tmp_path, monkeypatch, capsys):
    run = runs("gpt2")
    for arguments, typed, message in (
        (["one", " "], "", "A prompt is empty"),
        ([""], "", "A prompt is empty"),
        ([], "\n \n", "There is no prompt"),
        (["word " * 200], "", "the model takes 128: shorten it, or lower --new_tokens"),
        (["word", "--new_tokens", 128], "", "the model takes 128"),
        (["word", "--new_tokens", -1], "", "--new_tokens is -1: it must be at least 0"),
        (["word", "--top", -1], "", "--top is -1: it must be at least 0"),
        (["word", "--top", "many"], "", "top is 'many': it must be int"),
        (["word", "--model", tmp_path / "nowhere"], "", "nowhere"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert ask("--ckpt_path", run.folder, *arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.err.strip().splitlines()[-1].startswith("editlab: ")
        assert message in said.err.strip().splitlines()[-1]
        assert said.out == ""


def test_a_prompt_without_a_token_is_no_crash(tmp_path):
    with pytest.raises(UserError, match="A prompt is empty"):
        answer(None, None, "\t\n", 1, 1)
