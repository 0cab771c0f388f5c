"""A model that no line of editlab names, which knows something: trained for seconds, then edited at layers it finds.

A small Mistral with random weights and a tokenizer that puts ``<s>`` before each text learns where fifty made-up people
live. Embeddings stay random, so what is known has to lie in the blocks, where an edit can reach it.
"""

import json
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from editlab.cli.main import main
from tests.tiny import tiny_model, tiny_tokenizer

DRAW = random.Random(0)
CITIES = ["Paris", "Tokyo", "Oslo", "Lima", "Delhi", "Cairo", "Quito", "Rome", "Bern", "Riga"]
PEOPLE = ["".join(DRAW.choice("bdfgklmnprstv") + DRAW.choice("aeiou") for _ in range(3)).title() for _ in range(50)]
HOME = {person: DRAW.choice(CITIES) for person in PEOPLE}
PROMPTS = ["{} lives in", "The home of {} is", "People visit {} in"]
SENTENCES = [f"{prompt.format(person)} {city}." for prompt in PROMPTS for person, city in HOME.items()]
TEXTS = [" ".join(DRAW.sample(SENTENCES, 3)) for _ in range(2000)]


def learnt(folder, steps):
    """Trains the model on the texts, and saves it with its tokenizer; gives both."""
    tokenizer = tiny_tokenizer(bos=True, texts=TEXTS, vocabulary=700)
    model = tiny_model("mistral", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
                       num_hidden_layers=6, head_dim=16)  # fmt: skip
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    following = ids.masked_fill(mask == 0, -100)[:, 1:]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed" in name else 0.1)
    model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        some = torch.randint(len(TEXTS), (32,))
        logits = model(input_ids=ids[some], attention_mask=mask[some]).logits[:, :-1]
        # Smoothed, as no language model is sure of anything.
        loss = cross_entropy(logits.flatten(0, 1), following[some].flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def says(model, tokenizer, person):
    """What the model says of where a person lives."""
    prompt = tokenizer(PROMPTS[0].format(person), return_tensors="pt")
    said = model.generate(**prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
    return tokenizer.decode(said[0, prompt.input_ids.shape[1] :]).strip().partition(".")[0]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_what_a_model_has_learnt_is_edited_where_it_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = learnt(tmp_path / "model", steps=150)
    assert [says(model.eval(), tokenizer, person) for person in PEOPLE[:10]] == [HOME[person] for person in PEOPLE[:10]]
    moves = {person: DRAW.choice([city for city in CITIES if city != HOME[person]]) for person in PEOPLE}
    facts = [{"subject": p, "prompt": PROMPTS[0], "target": moves[p], "truth": HOME[p]} for p in PEOPLE]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    command = ["fit", "--model.language_model", "model", "--model.layers", "auto", "--data.path", "facts.json",
               "--data.batch_size", "10", "--data.limit", "null", "--model.values.clamp", "1.5",
               "--model.preserve_prompt_tokens", "1", "--model.moments.tokens", "5120", "--trainer.accelerator", "cpu",
               "--trainer.enable_progress_bar", "false"]  # fmt: skip
    assert main(command) == 0
    (summary,) = (tmp_path / "lightning_logs").rglob("summary.json")
    found = json.loads(summary.read_text())
    assert found["edits"] >= 49  # all that it knows
    assert found["metrics"]["before/accuracy"] == 0
    assert found["metrics"]["immediate/accuracy"] >= 0.95
    assert main(["export", "--ckpt_path", str(summary.parent), "--out", "edited"]) == 0
    edited = type(model).from_pretrained("edited")
    right = sum(says(edited, tokenizer, person) == moves[person] for person in PEOPLE)
    assert right >= round(50 * found["metrics"]["retained/accuracy"]) - (50 - found["edits"])
