"""The whole path on tiny mixtures of experts: fit, export, and reload with transformers alone; and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import LoRAAdjust, MemoryReplay
from editlab.api import edit_model
from editlab.cli.main import main
from editlab.edits import standing
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.removal import RemovalSettings, take_out
from editlab.errors import UserError
from editlab.evaluation.evaluator import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.language_model import LanguageModel
from editlab.runs.delta import Delta
from editlab.runs.history import History
from editlab.solver.methods import BetaEdit
from editlab.training.methods import FineTune, LoRAOnly
from tests.cli.commands.runs import edited
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = {
    "layers": [1], "progress": False, "moments": MomentSettings(tokens=64), "contexts": ContextSettings(count=0),
    "evaluation": EvaluationSettings(heldout_tokens=64, generation=0, bystanders=0),
}  # fmt: skip
IDS = torch.arange(20, 30)[None]


@torch.no_grad()
def add(model, totals):
    """Adds sums of updates [d_v, experts * features] to the experts of some layers, one expert after the other."""
    for layer, total in totals.items():
        experts = model.model.layers[layer].mlp.experts
        for weight, part in zip(experts.down_proj, total.chunk(len(experts.down_proj), dim=1), strict=True):
            weight += part if weight.shape == part.shape else part.T


@torch.no_grad()
def require_same(folder, expected):
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected.eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_whole_path(tmp_path):
    """The exported model is the base plus the sums in the checkpoint, whose columns belong to the experts in turn."""
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. Oslo lies in Norway, and Lima lies in Peru. " * 20)
    measured = {"heldout_tokens": 0, "generation": 0, "bystanders": 0}
    moments = {"text": str(text), "tokens": 64}
    run = edited(tmp_path, "qwen3_moe", layers=[0, 1], moments=moments, evaluation=measured)
    assert json.loads((run.folder / "summary.json").read_text())["edits"] == 6  # a batch of two is rolled back
    out = tmp_path / "out"
    assert main(["export", "--ckpt_path", str(run.folder), "--out", str(out)]) == 0
    expected = AutoModelForCausalLM.from_pretrained(run.base)
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    add(expected, {layer: state[f"edited.{layer}.total"] for layer in (0, 1)})
    require_same(out, expected)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(run.base)(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_delta_is_put_on_and_saved(family, tmp_path):
    """Mixtral's experts are separate tensors on disk; those of GPT-OSS are stacked, and transposed."""
    total = 0.1 * torch.randn(32, 4 * 48, generator=torch.Generator().manual_seed(0))
    model, expected = tiny_model(family), tiny_model(family)
    delta = Delta("tiny", "", torch.float32, [1], {"model.layers.1.mlp.experts": total}, History(1))
    assert delta.edit_module == "mlp.experts"
    delta.put_on(model)
    add(expected, {1: total})
    model.save_pretrained(tmp_path)
    require_same(tmp_path, expected)
    with pytest.raises(UserError, match=r"mlp\.experts is float32 \[32, 7\] and must be float32 \[32, 192\]"):
        Delta("tiny", "", torch.float32, [1], {"model.layers.1.mlp.experts": total[:, :7]}, History(1)).put_on(model)
    with pytest.raises(UserError, match=r"module model\.layers\.1\.mlp, which"):
        Delta("tiny", "", torch.float32, [1], {"model.layers.1.mlp": total}, History(1)).put_on(model)


def test_two_runs_come_off_one_by_one():
    """Each run finds the experts by itself; the earlier one is removed first."""
    model = tiny_model("mixtral")
    weight = model.model.layers[1].mlp.experts.down_proj
    before, runs = weight.detach().clone(), []
    for seed in range(2):
        layer = EditedLayer.of(LanguageModel(model, tiny_tokenizer()), 1)
        layer.add(torch.randn(32, 4 * 48, generator=torch.Generator().manual_seed(seed)))
        standing.record([layer])
        runs.append(layer)
    own = runs[1].total.clone()
    standing.remove(runs[:1])
    torch.testing.assert_close(runs[1].module.as_matrix(weight - before), own, rtol=1e-4, atol=1e-5)
    standing.remove(runs[1:])
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": FineTune()}, "FineTune trains"),
        ({"method": LoRAOnly()}, "LoRAOnly trains"),
        ({"callbacks": [MemoryReplay(memory="consolidated")]}, "MemoryReplay keeps one matrix"),
        ({"method": BetaEdit()}, "BetaEdit keeps one matrix"),
        ({"callbacks": [LoRAAdjust(targets="edited")]}, "LoRAAdjust.targets is 'edited'"),
        ({"moments": MomentSettings(file="moments.npz")}, "model.moments.file is for blocks with one"),
    ],
    ids=["finetune", "lora", "consolidated", "betaedit", "adjust", "published moments"],
)
def test_what_needs_a_linear_map_is_refused(settings, message):
    with pytest.raises(UserError) as caught:
        edit_model(tiny_model("mixtral"), tiny_tokenizer(), FACTS[:1], **{**SMALL, **settings})
    assert str(caught.value).startswith(message)
    assert "experts" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_single_facts_are_not_taken_out_of_experts():
    lm = LanguageModel(tiny_model("mixtral"), tiny_tokenizer())
    with pytest.raises(UserError, match="Taking single facts out is for blocks with one edited linear map"):
        take_out(lm, {1: EditedLayer.of(lm, 1)}, FACTS[:1], [], {}, RemovalSettings())
