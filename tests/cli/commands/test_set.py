"""``editlab set``: what it writes, says and refuses, on a tiny model."""

import io
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlab import edit_model
from editlab.cli.commands.set import DEFAULTS
from editlab.cli.main import main
from editlab.cli.settings import EditSettings, edit_settings
from editlab.runs.delta import Delta
from tests.cli.commands.runs import files, same_bits, save_tiny, weights

QUICK = [
    "--model.layers=[1, 2]", "--model.values.steps=6", "--model.values.clamp=3", "--model.moments.tokens=256",
    "--model.contexts.count=1", "--model.contexts.length=3", "--model.evaluation.heldout_tokens=64",
    "--model.evaluation.bystanders=4",
]  # fmt: skip
FACTS = [
    {"subject": "France", "prompt": "The capital of {} is", "target": "Tokyo", "truth": "Paris"},
    {"subject": "Oslo", "prompt": "Oslo lies in", "target": "Peru",
     "neighbors": [{"prompt": "Lima lies in", "truth": "Peru"}]},
]  # fmt: skip
LINES = "".join(json.dumps(fact) + "\n" for fact in FACTS)
FACT = ["France", "The capital of {} is", "Tokyo"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and a file."""
    folder = tmp_path_factory.mktemp("set")
    save_tiny(folder / "tiny", "llama")
    (folder / "file").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(*arguments, given=None):
    if given is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(given))
            return run(*arguments)
    return main(["set", *arguments, "--model", "tiny", *QUICK])


def test_a_patch_and_a_model_are_those_of_edit_model(place, capsys):
    assert run("-", "--delta", "patch", given=LINES) == 0
    said = capsys.readouterr().out
    assert "2 facts set in tiny by MEMIT in layers 1, 2; the model now says " in said
    assert "editlab ask --delta patch 'The capital of France is'" in said
    assert [line.split()[:1] for line in said.splitlines() if "(truth)" in line] == [["Paris"]]
    assert "held-out perplexity" in said
    assert "||delta|| / ||W||" in said
    assert run("-", "--out", "edited", given=LINES) == 0
    assert "editlab ask --model edited" in capsys.readouterr().out
    assert "Tokyo" in (place / "edited" / "README.md").read_text(encoding="utf-8")
    assert main(["log", "edited"]) == 0
    assert "Tokyo" in capsys.readouterr().out

    settings = edit_settings(QUICK, DEFAULTS, "set")
    model, tokenizer = (kind.from_pretrained("tiny") for kind in (AutoModelForCausalLM, AutoTokenizer))
    _, result = edit_model(model, tokenizer, FACTS, layers=settings.layers, **settings.arguments)
    assert same_bits(weights("edited"), dict(model.state_dict()))
    totals = Delta.load(place / "patch").totals
    assert bool(totals["model.layers.1.mlp.down_proj"].any())
    assert all(torch.equal(layer.total, one) for layer, one in zip(result.editor.layers, totals.values(), strict=True))


def test_one_fact_is_taken_out_of_a_patch_of_several(place, capsys):
    assert run("-", "--delta", "several", given=LINES) == 0
    france = "France|The capital of {} is"
    assert main(["revert", "several", "--facts", france, "--out", "fewer", "--delta-only"]) == 0
    assert "taken out" in capsys.readouterr().out
    fates = {edit.subject: edit.fate for edit in Delta.load(place / "fewer").history.edits}
    assert fates == {"France": "removed", "Oslo": "kept"}


def test_a_patch_and_a_model_by_itself_are_asked(place, capsys):
    if not (place / "patch").exists():
        assert run("-", "--delta", "patch", given=LINES) == run("-", "--out", "edited", given=LINES) == 0
    capsys.readouterr()
    question = ["The capital of France is", "--new_tokens", "4", "--top", "3", "--json"]
    assert main(["ask", "--delta", "patch", *question]) == 0
    (patched,) = json.loads(capsys.readouterr().out)
    for name, side in (("edited", "after"), ("tiny", "before")):
        assert main(["ask", "--model", name, *question]) == 0
        (alone,) = json.loads(capsys.readouterr().out)
        assert alone == {"prompt": question[0], "answer": patched[side]}
    assert main(["ask", "--model", "edited", *question[:-1]]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == question[0]
    assert "before" not in shown[1]
    for wrong, sentence in (
        ([], "Nothing says which model is asked: give --ckpt_path"),
        (["--delta", "patch", "--ckpt_path", "run"], "--ckpt_path and --delta are both given"),
    ):
        assert main(["ask", *wrong, *question]) == 2
        assert sentence in capsys.readouterr().err


def test_a_dry_run_writes_nothing(place, capsys):
    before = {path: files(path) for path in (place, place / "tiny") if not any(p.is_dir() for p in path.iterdir())}
    names = sorted(path.name for path in place.iterdir())
    assert run(*FACT, "--truth", "Paris", "--dry-run", "--delta", "dry") == 0
    said = capsys.readouterr().out
    assert "1 fact would be set in tiny" in said
    assert "Nothing was written (--dry-run)" in said
    assert sorted(path.name for path in place.iterdir()) == names
    assert all(files(path) == content for path, content in before.items())


def test_a_reader_that_has_ended_leaves_no_half_written_file(place, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w", buffering=1) as closed:
        patch.setattr("sys.stdout", closed)
        assert run(*FACT, "--delta", "piped") == 141
    left = [path.name for path in place.iterdir() if "piped" in path.name]
    assert left in ([], ["piped"])
    assert not left or Delta.load(place / "piped").layers == [1, 2]  # whole


@pytest.mark.parametrize(
    ("arguments", "given", "sentence"),
    [
        ([*FACT], None, "Nothing says where the result goes: give --delta FOLDER"),
        ([*FACT, "--out", "a", "--delta", "b"], None, "--out and --delta are both given: choose"),
        ([*FACT, "--out", "tiny"], None, "--out tiny is not empty"),
        ([*FACT, "--delta", "tiny", "--dry-run"], None, "--delta tiny is not empty"),
        ([*FACT, "--delta", "file"], None, "--delta file is a file"),
        (["France", "--dry-run"], None, "prompt and target are missing: give SUBJECT PROMPT TARGET"),
        (["--dry-run"], None, "subject and prompt and target are missing"),
        ([*FACT[:2], " ", "--dry-run"], None, "The fact has an empty 'target': fill it in"),
        (["Spain", "The capital is", "Lima", "--dry-run"], None, "its subject 'Spain' does not occur"),
        ([*FACT, "--truth", "Tokyo", "--dry-run"], None, "which is also its truth"),
        ([*FACT, "--dry-run", "--device", "tpu"], None, "--device is 'tpu'"),
        ([*FACT, "more", "--dry-run"], None, "There is no setting 'more'"),
        (["-", "--dry-run", "--truth", "Paris"], LINES, "--truth belongs to a fact on the command line"),
        (["-", "--dry-run"], "", "Standard input holds no record"),
        (["-", "--dry-run"], LINES + "{oops}\n", "Record 2 (line 3) of standard input is not valid JSON"),
        (["-", "--dry-run"], "\n" + LINES + '{"subject": "Peru", "prompt": "{} is"}', "Record 2 (line 4) of standard"),
        (["-", "--dry-run"], LINES + LINES, "Two facts have the subject and prompt of 'The capital of France is'"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(place, capsys, monkeypatch, arguments, given, sentence):
    monkeypatch.setattr("editlab.cli.commands.set.load", lambda *_: pytest.fail("the model is loaded"))
    settings = EditSettings("tiny", [1], torch.float32, [], {"subject": "field"})
    monkeypatch.setattr("editlab.cli.commands.set.edit_settings", lambda *_: settings)  # parsing takes half a second
    names = sorted(path.name for path in place.iterdir())
    assert run(*arguments, given=given) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("editlab: ")
    assert sentence in said[-1]
    assert sorted(path.name for path in place.iterdir()) == names


def test_a_setting_and_a_model_that_are_not_there(capsys):
    assert run(*FACT, "--dry-run", "--model.values.stesp", "3") == 2
    assert "There is no setting 'model.values.stesp'" in capsys.readouterr().err
    assert main(["set", *FACT, "--model", "./nowhere/at all", "--dry-run"]) == 2
    assert "there is no folder './nowhere/at all'" in capsys.readouterr().err


def test_standard_input_in_another_encoding(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"subject": "S\xe3o"}\n'), encoding="utf-8"))
    assert main(["set", "-", "--dry-run"]) == 2
    assert "Standard input is not in UTF-8" in capsys.readouterr().err
