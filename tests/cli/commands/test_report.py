"""``editlab report``: the lost edits against the exported model's own generation, and bad arguments."""

import json
import math
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlab.cli.commands.report import ANSWER_TOKENS, inspect_edits
from editlab.cli.main import main
from editlab.edits.ledger import Ledger
from editlab.runs.checkpoint import find_checkpoint, read_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.outcomes import read_outcomes
from tests.cli.commands.runs import EDITS, FATES
from tests.recipes import write_recipe
from tests.runs.test_report import Seen
from tests.tiny import tiny_model, tiny_tokenizer


def report(*arguments):
    return main(["report", *map(str, arguments)])


def test_lost_edits_are_those_that_the_exported_model_does_not_say(runs, tmp_path, capsys):
    run = runs("llama")
    assert report(run.folder, "--out", tmp_path / "page.html") == 0
    assert main(["export", "--ckpt_path", str(run.folder), "--out", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    scores = read_checkpoint(run.checkpoint)["editor"]["evaluation"]["scores"]["immediate"]
    learnt = scores["edit"]["hit_new"].tolist()
    expected = []
    for number, (fact, fate) in enumerate(zip(EDITS, FATES, strict=True), start=1):
        if fate.startswith(("superseded", "rolled")):
            continue  # not in the weights, so not lost
        ids = tokenizer(fact.question, return_tensors="pt").input_ids
        target = tokenizer(f"{fact.question} {fact.target_new}", return_tensors="pt").input_ids[0, ids.shape[1] :]
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS,
            )  # fmt: skip
        new = out[0, ids.shape[1] :]
        if new[: len(target)].tolist() != target.tolist():
            words = tokenizer.decode(new, skip_special_tokens=True).strip()
            kind = "forgotten" if learnt[number - 1] else "never learnt"
            expected.append([str(number), str((number + 1) // 2), fact.question, fact.target_new, words, kind])
    page = Seen((tmp_path / "page.html").read_text(encoding="utf-8"))
    texts = [t for t in page.texts if t]
    rows = texts[texts.index("Edits that the model does not hold") :]
    assert expected, "the tiny run should have lost some edits, or this test shows nothing"
    for row in expected:
        start = rows.index(row[2])
        assert rows[start - 2 : start + 4] == [cell for cell in row if cell], row
    # Ten edits with the answers before and after; those that were lost first, with the least likely target first.
    shown = texts[texts.index("P") + 1 : len(texts) - len(rows)]
    prompts = {fact.question for fact in EDITS}
    numbers = [shown[i - 1] for i, text in enumerate(shown) if text in prompts]
    lost = [row[0] for row in expected]
    assert set(numbers[: len(lost)]) == set(lost)
    likely = [float(text) for text in shown if re.fullmatch(r"0\.\d{3}|1\.000", text)]
    assert len(likely) == len(numbers)
    assert likely[: len(lost)] == sorted(likely[: len(lost)])
    assert sum(kind in rows for kind in ("forgotten", "never learnt")) >= 1


def test_the_page_is_written_into_the_run_without_loading_the_model(runs, capsys):
    run = runs("llama")
    assert report(run.folder, "--no_answers", "--model", "nowhere") == 0
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    (run.folder / "report.html").unlink()
    assert "The model was not evaluated" in page
    summary = json.loads((run.folder / "summary.json").read_text())
    assert f"{summary['edits']} facts edited" in page
    assert "rolled back" in page


def test_independent_batches_and_an_adapter_are_not_taken_for_losses(runs, tmp_path):
    independent = runs("llama", restore_between_batches=True)
    assert report(independent.folder, "--out", tmp_path / "page.html") == 0
    texts = Seen((tmp_path / "page.html").read_text(encoding="utf-8")).texts
    asked = {fact.question for fact in EDITS} & set(texts[: texts.index("Every edit, the worst first")])
    assert asked <= {fact.question for fact in EDITS[6:]}  # only the last batch of two is in the weights
    assert "taken out" in texts
    adapted = runs("llama", lora="adapter")
    assert report(adapted.folder, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "without the separate adapter that the run keeps for" in page


def test_a_run_with_a_given_edit_module_is_reported_with_it(tmp_path, monkeypatch):
    """In a mixture of experts the structure does not determine which map was edited."""
    monkeypatch.chdir(tmp_path)
    config = transformers.Qwen2MoeConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    module = "mlp.shared_expert.down_proj"
    write_recipe(tmp_path, tmp_path / "base", model={"layers": [1], "edit_module": module})
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert Delta.from_checkpoint(find_checkpoint("lightning_logs/tiny/version_0")).edit_module == module
    assert report("lightning_logs/tiny/version_0", "--out", "page.html") == 0
    assert "4 facts edited" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["edit", "evaluate"])
def test_a_chat_s_facts_are_asked_as_the_run_asked_them(mode, tmp_path, monkeypatch):
    """The probabilities of the page are those of the run's outcomes."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>user\n{{ m.content }}\n{% endfor %}<s>bot\n"
    tiny_model("llama").save_pretrained("base")
    tokenizer.save_pretrained("base")
    write_recipe(tmp_path, tmp_path / "base", model={"chat_template": mode})
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = tmp_path / "lightning_logs/tiny/version_0"
    delta, saved = (
        Delta.from_checkpoint(find_checkpoint(str(run))),
        read_checkpoint(find_checkpoint(str(run)))["editor"],
    )
    examples, _ = inspect_edits(delta, Ledger.of(saved), [], None)
    expected = {row["edit"]: math.exp(row["retained/logp_new"]) for row in read_outcomes(run / "outcomes.csv")}
    assert {one.number for one in examples} <= expected.keys()
    for one in examples:
        assert one.probability == pytest.approx(expected[one.number], rel=0.01)  # of another prompt: 25% and more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "There is no folder 'nowhere'"), (["."], "checkpoint"), ([], "run is missing")],
)
def test_bad_arguments_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
