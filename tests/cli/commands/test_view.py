"""``editlab view``: its mistakes, and what its page reads from the runs that the command has made."""

import json
import shutil

import pytest
import torch

from editlab.cli.main import main
from editlab.errors import UserError
from editlab.lm.generate import Answer
from editlab.view import contents, listing, prompt_box, serving
from tests.cli.commands.runs import FATES

PROMPTS = ["The capital of France is", "Danielle Darrieux speaks"]


@pytest.fixture
def served(monkeypatch):
    """What the verb would serve; the page itself needs a browser."""
    calls = []
    monkeypatch.setattr("editlab.cli.commands.view.serve", lambda *given: calls.append(given))
    monkeypatch.setattr(serving, "find_spec", lambda name: object())
    return calls


def test_the_verb(runs, served, tmp_path, capsys):
    folder = runs("tied").folder
    assert main(["view", str(folder.parents[1]), "--port", "0"]) == 0
    assert served == [(folder.parents[1], 0, "cpu", None)]
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "There is no folder"),
        ([str(tmp_path)], "has no run in it"),
        ([str(folder), "--device", "abacus"], "abacus"),
        ([str(folder), "--port", "many"], "port"),
    ):
        assert main(["view", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("editlab: ")
        assert message in line
    assert len(served) == 1


def test_a_missing_extra_is_one_sentence(runs, monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert main(["view", str(runs("tied").folder)]) == 2
    assert capsys.readouterr().err == "editlab: The page needs the package streamlit: pip install 'editlab[view]'.\n"


def test_facts_of_a_run_that_goes_on_are_those_it_writes_at_its_end(runs, tmp_path):
    finished = runs("tied").folder
    going = tmp_path / "going"
    shutil.copytree(finished, going, ignore=shutil.ignore_patterns("summary.json", "outcomes.csv"))
    assert [run.state for run in listing.list_runs(tmp_path)] == ["killed"]
    expected = {row["edit"]: row for row in contents.outcomes_of(finished)}
    found = {row["edit"]: row for row in contents.outcomes_of(going)}
    assert [fate.startswith(found[edit]["status"]) for edit, fate in enumerate(FATES, start=1)] == [True] * len(FATES)
    for edit, row in expected.items():
        assert found[edit] == {name: value for name, value in row.items() if not name.startswith("retained/")}


def test_the_prompt_box_answers_as_the_verb_does_and_leaves_the_model_unedited(runs, monkeypatch, capsys):
    run = runs("gpt2")
    capsys.readouterr()
    assert main(["ask", "--ckpt_path", str(run.folder), *PROMPTS, "--new_tokens", "5", "--top", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    box = prompt_box.PromptBox()
    checkpoint = prompt_box.checkpoints_in(run.folder)[0]
    assert checkpoint == run.checkpoint
    assert box.needs_loading(checkpoint)
    loads = []
    monkeypatch.setattr(
        prompt_box.Delta, "base", lambda *given, base=prompt_box.Delta.base: loads.append(1) or base(*given)
    )
    for prompt, expected in zip(PROMPTS, said, strict=True):
        asked = box.ask(checkpoint, prompt, 5, 3)
        for side in ("before", "after"):
            tokens = tuple((one["token"], one["probability"]) for one in expected[side]["next"])
            assert getattr(asked, side) == Answer(expected[side]["continuation"], tokens), (prompt, side)
        assert asked.before != asked.after
        assert not box.needs_loading(checkpoint)
    assert loads == [1]
    other = runs("tied").checkpoint
    assert box.needs_loading(other)
    box.ask(other, PROMPTS[0], 1, 1)
    assert box.needs_loading(checkpoint)  # one model at a time
    assert loads == [1, 1]


def test_a_model_that_has_lent_its_weights_has_the_same_bits_again(runs):
    delta = prompt_box.Delta.from_checkpoint(runs("gpt2").checkpoint)
    model, _ = delta.base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with delta.lent_to(model):
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.removesuffix(".weight") for name in changed} == set(delta.totals)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


def test_mistakes_in_the_prompt_box(runs, tmp_path):
    box = prompt_box.PromptBox(base=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="A prompt is empty"):
        box.ask(runs("gpt2").checkpoint, " ")
    with pytest.raises(UserError, match="nowhere"):
        box.ask(runs("gpt2").checkpoint, "one")
    with pytest.raises(UserError, match="does not exist"):
        box.needs_loading(tmp_path / "last.ckpt")
    assert prompt_box.checkpoints_in(tmp_path) == []
