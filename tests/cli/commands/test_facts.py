"""``facts check``: every bad record named and exit code 2, or a count and 0; and a plain CSV through a whole run."""

import json
import re

import torch

from editlab.cli.main import main
from editlab.evaluation.known import knows_truth
from editlab.evaluation.scoring import prefers_truth
from editlab.lm.language_model import LanguageModel
from editlab.metrics.names import of_group
from tests.facts import FACTS, write_counterfact
from tests.recipes import write_recipe

COLUMNS = "subject,prompt,target\n"


def check(path, capsys, code):
    assert main(["facts", "check", str(path)]) == code
    said = capsys.readouterr()
    return said.out.splitlines(), said.err.strip().splitlines()


def test_all_bad_records_are_named(tmp_path, capsys):
    path = tmp_path / "facts.csv"
    path.write_text(COLUMNS + "Oslo,It lies in,Peru\nLima,{} lies in,Peru\n,{} is,Rome\n")
    out, err = check(path, capsys, 2)
    assert [line.split(":")[0] for line in out] == [
        "Record 0 (line 2) has a prompt in which its subject 'Oslo' does not occur",
        "Record 2 (line 4) lacks 'subject'",
    ]
    assert err == [f"editlab: 2 of 3 records of {path} are wrong: correct or remove those named above."]


def test_half_a_character_is_named(tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"subject": "\\ud83d", "prompt": "{} is", "target": "Rome"}\n')
    out, _ = check(path, capsys, 2)
    assert out == [
        r"Record 0 (line 1) has '\ud83d' in its subject, which is half a character: write the whole character, or none."
    ]


def test_facts_that_an_edit_cannot_show_are_named(tmp_path, capsys):
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target,truth,paraphrase\nBogot\u00e1,{} is in,Peru,Peru,\n"
                    "Bogota\u0301,{} is in,Rome,Peru,so\n", encoding="utf-8")  # fmt: skip
    out, _ = check(path, capsys, 0)
    assert out[:3] == [
        "Record 0 (line 2) has the target 'Peru', which is its truth, so that an edit cannot change it: give it "
        "another target, or remove it.",
        "Record 1 (line 3) repeats subject and prompt of record 0 (line 2), in another Unicode form (accented letters "
        "as one character or as two): one of them is edited, or all with data.keep_repeats.",
        f"{path} has fields that are not read: paraphrase (in 1 record; did you mean paraphrases?).",
    ]
    path.write_text(COLUMNS + "Oslo,{} is in,\u200b\n", encoding="utf-8")
    out, _ = check(path, capsys, 2)
    assert out == ["Record 0 (line 2) has a target_new in which nothing is visible (U+200B): write it out."]


def test_good_files_are_counted(tmp_path, capsys):
    path = tmp_path / "facts.csv"
    path.write_text(COLUMNS + "Oslo,Oslo lies in,Peru\nOslo,Oslo lies in,Rome\n")
    out, err = check(path, capsys, 0)
    assert out == [
        "Record 1 (line 3) repeats subject and prompt of record 0 (line 2): one of them is edited, or all with "
        "data.keep_repeats.",
        f"2 facts in {path}, none of them wrong; 0 with a truth, 0 with paraphrases, 0 with neighbors.",
        "Set data.keep to all: without a truth it is unknown whether the model prefers or knows it.",
    ]
    assert err == []
    out, _ = check(write_counterfact(tmp_path / "facts.json"), capsys, 0)
    assert len(out) == 1
    assert "21 facts in" in out[0]
    assert "21 with a truth, 6 with paraphrases, 6 with neighbors" in out[0]


def test_facts_that_a_model_holds_are_counted(tmp_path, tiny_folder, capsys):
    path = write_counterfact(tmp_path / "facts.json")
    assert main(["facts", "check", str(path), "--model", str(tiny_folder)]) == 0
    counted = capsys.readouterr().out.splitlines()[-1]
    preferred, known = map(int, re.fullmatch(
        rf"The model {re.escape(str(tiny_folder))} prefers the truth of (\d+) of 21 facts \(.*%\) and knows (\d+) "
        r"\(.*%\)\.", counted,
    ).groups())  # fmt: skip
    assert 0 <= known <= 21
    lm = LanguageModel.from_name(str(tiny_folder), torch.float32)
    assert (preferred, known) == (sum(prefers_truth(lm, FACTS)), sum(knows_truth(lm, FACTS)))
    bare = tmp_path / "bare.csv"
    bare.write_text(COLUMNS + "Oslo,Oslo lies in,Peru\n")
    assert main(["facts", "check", str(bare), "--model", str(tiny_folder)]) == 2
    assert "No fact has a truth, so none can be preferred or known" in capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.csv", "does not exist: check the path"), ("empty.jsonl", "holds no record")):
        out, err = check(tmp_path / name, capsys, 2)
        assert out == []
        assert len(err) == 1
        assert message in err[0]


def test_metrics_of_absent_columns_are_absent(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(
        COLUMNS + "Oslo,Oslo lies in,Peru\nLima,The city of Lima lies in,France\n" + "Rome,Rome is in,Peru\n"
    )
    write_recipe(
        tmp_path, tiny_folder, facts=None, name="mine", model={"layers": [1]},
        data={"path": "mine.csv", "batch_size": 1, "shuffle": False, "limit": 2},
        trainer={"callbacks": [{"class_path": name} for name in ("MemoryReplay", "ForgettingCurve")]},
    )  # fmt: skip
    assert main(["fit", "--config", "mine.yaml"]) == 0
    run = tmp_path / "lightning_logs" / "mine" / "version_0"
    for verb in ("validate", "test"):
        assert main([verb, "--config", "mine.yaml", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    summary = json.loads((run / "summary.json").read_text())
    for group in ("before", "immediate", "retained"):
        measured = of_group(summary["metrics"], group)
        assert "accuracy" in measured
        assert {"ES", "PS", "NS", "S", "paraphrase_accuracy", "neighbor_accuracy"}.isdisjoint(measured)
    assert main(["export", "--ckpt_path", str(run), "--out", "out"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | **Oslo** lies in | Peru |  | 1 | " in card
    assert "| ES |" not in card
