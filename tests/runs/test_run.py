"""``editlab.Run``: a run's files as frames, and one sentence for each file that is missing or damaged."""

import json
import sys

import pytest

import editlab
from editlab.errors import UserError

METRICS = "edits,before/ES,retained/accuracy\n2,0.0,\n4,0.5,0.75\n"
OUTCOMES = (
    "edit,id,subject,prompt,target_new,target_true,step,status,factor,immediate/logp_new,immediate/hit,retained/hit\n"
    "1,7,NA,{} is,b,c,0,kept,1.0,-0.5,1,0\n2,8,None,{} is,b,,0,rolled back,0.0,-0.25,0,\n"
)


@pytest.fixture
def folder(tmp_path):
    """A finished run's folder."""
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "outcomes.csv").write_text(OUTCOMES)
    (tmp_path / "summary.json").write_text(json.dumps({"edits": 1, "metrics": {"retained/accuracy": 0.75}}))
    (tmp_path / "config.yaml").write_text("model: {layers: [1, 2]}\n")
    (tmp_path / "trust_events.jsonl").write_text('{"step": 0, "decision": "keep", "score": 0.5}\n{"step": 1}\n{"st')
    (tmp_path / "lora_events.jsonl").write_text('{"step": 1, "decision": "keep"}\n')
    return tmp_path


def test_frames(folder):
    pytest.importorskip("pandas")
    run = editlab.Run(folder)
    assert run.metrics.index.tolist() == [2, 4]
    assert run.metrics["retained/accuracy"].dropna().to_dict() == {4: 0.75}
    forgotten = run.outcomes.query("`immediate/hit` == 1 and `retained/hit` == 0")
    assert forgotten["subject"].to_dict() == {1: "NA"}
    assert run.outcomes["subject"].tolist() == ["NA", "None"]  # no text is taken for a missing value
    assert run.outcomes["retained/hit"].mean() == 0.0  # of what was measured
    assert run.outcomes["retained/hit"].isna().tolist() == [False, True]
    assert run.outcomes["target_true"].isna().tolist() == [False, True]
    assert run.outcomes["immediate/logp_new"].tolist() == [-0.5, -0.25]
    assert run.events[["log", "step"]].to_numpy().tolist() == [["lora", 1], ["trust", 0], ["trust", 1]]
    assert run.events["score"].dropna().tolist() == [0.5]


def test_dicts_need_no_pandas(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    run = editlab.Run(str(folder))
    assert run.summary["metrics"] == {"retained/accuracy": 0.75}
    assert run.config == {"model": {"layers": [1, 2]}}
    assert repr(run) == f"Run({str(folder)!r})"
    for name in ("metrics", "outcomes", "events"):
        with pytest.raises(UserError, match=r"Frames need the package pandas: pip install 'editlab\[pandas\]'"):
            getattr(run, name)


def test_a_run_without_events_and_without_edits(tmp_path):
    pytest.importorskip("pandas")
    (tmp_path / "metrics.csv").write_text("edits\n")
    (tmp_path / "outcomes.csv").write_text(OUTCOMES.splitlines(keepends=True)[0])
    run = editlab.Run(tmp_path)
    assert (len(run.events), run.events.columns.tolist(), len(run.metrics), len(run.outcomes)) == (
        0, ["log", "step"], 0, 0,
    )  # fmt: skip


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="There is no folder 'nowhere': give a run's"):
        editlab.Run("nowhere")
    with pytest.raises(
        UserError, match=r"is not a run's folder, as it has no metrics\.csv: give a run's own folder\.$"
    ):
        editlab.Run(tmp_path)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text(METRICS)
    with pytest.raises(UserError, match=r"own folder, such as .*version_0\.$"):
        editlab.Run(tmp_path)


@pytest.mark.parametrize(("file", "name", "missing", "damaged"), [
    ("metrics.csv", "metrics", r"no .*metrics\.csv: the run had no RunLogger", "is damaged or not one of editlab's"),
    ("outcomes.csv", "outcomes", r"no .*outcomes\.csv: the run has not finished", "is damaged or not one of editlab's"),
    ("summary.json", "summary", r"no summary\.json: the run has not finished", "is damaged, or not of this version"),
    ("config.yaml", "config", r"no .*config\.yaml: editlab fit writes it", "is not a recipe"),
])  # fmt: skip
def test_a_missing_or_a_damaged_file_is_one_sentence(folder, file, name, missing, damaged):
    if name in ("metrics", "outcomes"):
        pytest.importorskip("pandas")
    (folder / file).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=damaged):
        getattr(editlab.Run(folder), name)
    (folder / file).unlink()
    with pytest.raises(UserError, match=missing):
        getattr(editlab.Run(folder), name)


def test_a_config_that_is_no_yaml(folder):
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        _ = editlab.Run(folder).config
