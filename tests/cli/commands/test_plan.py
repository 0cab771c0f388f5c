"""``editlab plan``: what it prints, the recipe that it writes, and bad input."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from editlab.cli.commands.plan import notes, require_described
from editlab.cli.main import main
from editlab.cli.planned_recipe import planned
from editlab.cli.training import without_run
from editlab.editor import SequentialEditor
from editlab.edits.calibration import Calibration
from editlab.edits.forecast import Candidate
from editlab.errors import UserError
from editlab.lm.fingerprint import fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import MEMIT
from editlab.solver.post_steps import RECT
from editlab.values.optimize import ValueSettings
from tests.edits.made_up_laws import laws
from tests.facts import FACTS
from tests.recipes import write_recipe


@pytest.fixture
def recipe(tmp_path, tiny_folder, monkeypatch):
    """The recipe's path, in the working directory; the calibration is of another model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Calibration, "load", classmethod(lambda cls: laws("of another model")))
    write_recipe(tmp_path, tiny_folder, trainer={"callbacks": ["ForgettingCurve", {"class_path": "LoRAAdjust"}]})
    return "tiny.yaml"


def failed(capsys, *arguments):
    """The message of a plan that is refused."""
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("editlab: ")


def test_a_plan_for_the_calibrated_model_and_its_recipe(recipe, tiny_folder, monkeypatch, capsys):
    own = fingerprint(LanguageModel.from_name(str(tiny_folder), torch.float32).model)
    monkeypatch.setattr(Calibration, "load", classmethod(lambda cls: laws(own)))
    arguments = ["--edits", "6", "--config", recipe, "--budget", "1.5", "--out", "planned.yaml", "--set",
                 "data.batch_size=3"]  # fmt: skip
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    first, second, third, *rest = out[out.index("Plan for") :].splitlines()
    assert first.startswith("Plan for 6 edits of facts.json in ")
    assert second.startswith("Expected at the end: retained accuracy 0.")
    assert third.startswith(("Outside of what was measured, so a guess: ", "All of these settings lie within"))
    assert "within x1.5" in rest[0] or "is within x1.5: this is the one that costs the least" in rest[0]
    assert any(line.startswith("* ") for line in rest)
    assert "made_up.csv: 4_1000" in out
    assert "Not part of the forecast, and kept in the recipe: LoRAAdjust." in out
    assert "The recipe's method EMMET is replaced by MEMIT" in out
    text = Path("planned.yaml").read_text(encoding="utf-8")
    assert text.startswith("# editlab fit --config planned.yaml\n#\n# Plan for 6 edits")
    written = yaml.safe_load(text)
    assert (written["data"]["limit"], written["data"]["batch_size"]) == (6, 3)
    editor = without_run(["--config", "planned.yaml"]).model  # it is a recipe of fit
    assert type(editor.method).__name__ == "MEMIT"
    assert f"lambda {editor.method.covariance_weight:g}," in first
    assert f"context keys {editor.solve_settings.context_key_weight:g}," in first
    names = [one if isinstance(one, str) else one["class_path"] for one in written["trainer"]["callbacks"]]
    assert ("MemoryReplay" in names) == ("consolidated memory" in first)
    assert names[-2:] == ["ForgettingCurve", "LoRAAdjust"]


def test_another_model_gets_no_claim_about_perplexity(recipe, capsys):
    assert main(["plan", "--edits", str(len(FACTS) + 3), "--config", recipe]) == 0
    out = capsys.readouterr().out
    assert "Nothing is said about accuracy and perplexity: they were calibrated on a model alone" in out
    assert "for this model that is a guess" in out
    assert "retained accuracy" not in out
    header = next(line for line in out.splitlines() if line.split()[:2] == ["layers", "lambda"])
    assert header.split()[-1] == "harm"
    assert f"Only {len(FACTS)} facts are at hand: the keys of the other 3 are drawn at random" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--edits", "0"], "plan.edits is 0: it must be at least 1."),
        (["--edits", "4", "--budget", "0.9"], "--budget is 0.9: edits do not lower the perplexity, so give a ratio "
         "above 1, such as 1.1."),
        (["--edits", "4", "--out", "tiny.yaml"], "--out tiny.yaml exists, and nothing is overwritten: give a new"),
        (["--edits", "4", "--out", "no/p.yaml"], "--out no/p.yaml is in a folder that does not exist: create it, or "
         "give another file."),
        (["--edits", "4", "--set", "data.limit"], "--set 'data.limit' must have the form NAME=VALUE, such as "
         "data.batch_size=32."),
        (["--edits", "4", "--set", "model.layers=[9]"], "there is no layer 9: the model's layers are 0 to 3"),
    ],
)  # fmt: skip
def test_bad_input(recipe, capsys, arguments, sentence):
    assert sentence in failed(capsys, "--config", recipe, *arguments)


def test_no_facts_and_no_recipe(recipe, tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    assert "empty.json" in failed(capsys, "--edits", "4", "--config", recipe, "--path", "empty.json")
    assert "The recipe gone.yaml cannot be read" in failed(capsys, "--edits", "4", "--config", "gone.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds no settings" in failed(capsys, "--edits", "4", "--config", "list.yaml")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"passes": 2}, "model.passes is not as editlab plan assumes: it solves one pass: set 1."),
        ({"keys": "mean"}, "model.keys is not as editlab plan assumes: it reads keys in the bare prompt: set bare."),
        ({"restore_between_batches": True}, "model.restore_between_batches is not as editlab plan assumes"),
        ({"values": ValueSettings(spread="each")}, "model.values.spread is not as editlab plan assumes: layers share"),
        ({"values": ValueSettings(anchor_facts=4)}, "model.values.anchor_facts is not as editlab plan assumes"),
        ({"post_steps": [RECT()]}, "model.post_steps is not as editlab plan assumes: it has no post-steps: remove"),
    ],
)
def test_what_a_dry_solve_does_not_describe(settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        require_described(SequentialEditor(**settings))


def test_a_recipe_that_ships_is_read_by_its_name(recipe, capsys):
    said = failed(capsys, "--edits", "4", "--config", "sphere")  # it has a post-step, so it was read
    assert "model.post_steps is not as editlab plan assumes" in said


def test_what_of_a_recipe_is_not_forecast_is_named():
    editor = SequentialEditor(method=MEMIT(1000.0, mu=5.0), values=ValueSettings(steps=3, clamp=0.1))
    arguments = {"covariance_weight": 1000, "mu": 5.0}
    found = notes({"model": {"method": {"class_path": "MEMIT", "init_args": arguments}}}, editor)
    assert found == [
        "Not part of the forecast, and left out of the recipe: mu of MEMIT.",
        "The laws were calibrated on the default search for values; of another one (steps, clamp) edits may reach less "
        "of their targets than is forecast.",
    ]
    usual = SequentialEditor(method=MEMIT(1000.0), values=ValueSettings(batch_tokens=64, reference="original"))
    assert notes({}, usual) == []


def test_a_method_s_bare_name_takes_settings():
    settings = [("model.method.init_args.mu", 5)]
    found = planned({"model": {"method": "MEMIT"}}, settings, Candidate((1,), 300.0, 0.0, False), 4)
    assert found["model"]["method"] == {"class_path": "MEMIT", "init_args": {"covariance_weight": 300.0}}


def test_a_mixture_of_experts(recipe, tmp_path, capsys):
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.tiny import tiny_tokenizer

    config = MixtralConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    said = failed(capsys, "--edits", "4", "--config", recipe, "--model", "moe", "--set", "model.layers=[1]")
    assert "editlab plan is for blocks with one edited linear map" in said
