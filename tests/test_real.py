"""Real edits of SmolLM2-135M, from fetching the model to the exported folder: the whole path on the real thing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlab.cli.main import main
from editlab.data.fact import Fact

pytestmark = pytest.mark.real


@pytest.mark.parametrize(("precision", "dtype"), [
    ("32-true", torch.float32),
    pytest.param("bf16-true", torch.bfloat16, marks=pytest.mark.thorough),
])  # fmt: skip
def test_the_built_in_model_learns_and_keeps_facts(tmp_path, monkeypatch, precision, dtype):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "real.yaml"
    recipe.write_text(
        "model:\n  layers: [4, 5, 6]\n  method: {class_path: EMMET, init_args: {covariance_weight: 300}}\n"
        "  preserve_prompt_tokens: 1.0\n  moments: {tokens: 2048}\n  contexts: {count: 2}\n"
        "  evaluation: {heldout_tokens: 512, generated_texts: 0, generation: 4, bystanders: 4}\n"
        "data: {limit: 4, batch_size: 2}\n"
        "trainer:\n  accelerator: cpu\n  enable_progress_bar: false\n  callbacks: [{class_path: MemoryReplay}]\n"
    )
    assert main(["fit", "--config", str(recipe), "--trainer.precision", precision]) == 0
    run = tmp_path / "lightning_logs" / "real" / "version_0"
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    # Four facts are no sequence: all of them must be there, argmax and all, and the language must not have suffered.
    assert metrics["before/ES"] == 0  # known facts: the truth was likelier
    assert metrics["immediate/ES"] == metrics["retained/ES"] == 1
    assert metrics["retained/accuracy"] == 1
    assert metrics["retained/perplexity"] < 1.03 * metrics["before/perplexity"]
    assert main(["export", "--ckpt_path", str(run), "--out", "edited"]) == 0
    model = AutoModelForCausalLM.from_pretrained("edited")
    assert model.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained("edited")
    ledger = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["editor"]["ledger"]
    for entry in ledger:
        fact = Fact.from_dict(entry["fact"])
        prompt = tokenizer(fact.question, return_tensors="pt")
        with torch.no_grad():
            said = model.generate(**prompt, do_sample=False, max_new_tokens=4)[0, prompt.input_ids.shape[1] :]
        assert tokenizer.decode(said).strip().startswith(fact.target_new)
