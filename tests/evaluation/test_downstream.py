"""Downstream tasks: the real harness on a small task against scores of our own, its stand-in, and bad tasks."""

import random
import sys

import pytest
import torch

from editlab.errors import EditLabError, UserError
from editlab.evaluation.downstream import Downstream, Score, found_in, require_harness
from editlab.evaluation.scoring import score_pairs
from editlab.lm.language_model import LanguageModel
from tests.harness import DOCUMENTS, stand_in, write_task
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


@pytest.mark.filterwarnings("ignore")
def test_the_real_harness_scores_as_editlab_does(lm, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'editlab[lm-eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    padding, state = lm.tokenizer.pad_token, random.getstate()
    task = write_task(tmp_path)
    found = Downstream([task]).scores(lm, stderr=True)
    # Its accuracy: the choice with the largest sum of log-probabilities; ours are means, of as many tokens here.
    right = 0
    for prompt, choices, answer in DOCUMENTS:
        logps, _ = score_pairs(lm, [(prompt, choice) for choice in choices])
        counts = [len(lm.encode_pair(prompt, c)[0].ids) - lm.encode_pair(prompt, c)[1] for c in choices]
        sums = [float(logp) * count for logp, count in zip(logps, counts, strict=True)]
        right += sums.index(max(sums)) == answer
    assert found["capitals"]["acc"].value == pytest.approx(right / 3)
    # The standard error of a mean of three hits.
    p = right / 3
    assert found["capitals"]["acc"].stderr == pytest.approx((p * (1 - p) / 2) ** 0.5)
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
    assert (lm.tokenizer.pad_token, random.getstate()) == (padding, state)
    first = Downstream([task], limit=1, batch_size=1).scores(lm)
    assert first["capitals"]["acc"].stderr is None
    assert first["capitals"]["acc"].value in (0.0, 1.0)
    with pytest.raises(UserError, match="There is no task 'capitols': give a name that 'lm-eval ls tasks' lists"):
        Downstream(["capitols", task])
    (tmp_path / "capitals.jsonl").unlink()
    with pytest.raises(UserError, match="A task of capitals cannot be loaded"):
        Downstream([task]).load()


def test_what_the_harness_is_called_with(lm, tmp_path, monkeypatch):
    harness = stand_in(monkeypatch)
    task = write_task(tmp_path)
    state, drawn = torch.get_rng_state(), random.getstate()
    downstream = Downstream([task], limit=2, batch_size=3)
    found = downstream.scores(lm, stderr=True)
    assert harness.calls == ["manager, defaults False", "load", "wrap", "evaluate"]
    assert harness.given == {"num_fewshot": 0, "seed": 1234, "batch_size": 3, "limit": 2, "bootstrap_iters": 1000}
    assert found["capitals"]["acc"].stderr == 0.125
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert lm.tokenizer.pad_token != "<unk>"
    # Data next to the task's file is found from every folder.
    assert downstream.specs[0]["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "capitals.jsonl")}
    assert downstream.scores(lm)["capitals"]["acc"] == Score(found["capitals"]["acc"].value)
    Downstream(["known"])
    assert harness.calls[-1] == "manager, defaults True"


@pytest.mark.parametrize(("content", "kept"), [
    ("task: t\ndoc_to_text: !function utils.text\ndataset_kwargs: {data_files: a.jsonl}\n", True),
    ("task: t\ninclude: base.yaml\ndataset_kwargs: {data_files: a.jsonl}\n", True),
    ("task: t\ndataset_path: glue\n", True),
    ("task: t\ndataset_kwargs: {data_files: [a.jsonl, https://example.org/b.jsonl]}\n", False),
])  # fmt: skip
def test_files_that_the_harness_reads_itself(tmp_path, monkeypatch, content, kept):
    stand_in(monkeypatch)
    (tmp_path / "a.jsonl").touch()
    path = tmp_path / "t.yaml"
    path.write_text(content)
    (spec,) = Downstream([str(path)]).specs
    data = [str(tmp_path / "a.jsonl"), "https://example.org/b.jsonl"]
    assert spec == (str(path) if kept else {"task": "t", "dataset_kwargs": {"data_files": data}})


@pytest.mark.parametrize(("content", "message"), [
    (None, "There is no task file .*: correct its path"),
    ("a: [", "is not valid YAML: correct it"),
    ("- 3", "is not a task of lm-evaluation-harness, as it has no name under 'task'"),
    ("group: g\n", "it has no name under 'task'"),
])  # fmt: skip
def test_a_bad_task_file_is_one_sentence(tmp_path, monkeypatch, content, message):
    stand_in(monkeypatch)
    if content is not None:
        (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        Downstream([str(tmp_path / "t.yaml")])


def test_an_unknown_name_is_one_sentence(monkeypatch):
    stand_in(monkeypatch)
    with pytest.raises(UserError, match="There is no task 'unknown': give a name"):
        Downstream(["known", "unknown"])


def test_failures_of_the_harness_are_one_sentence(lm, monkeypatch):
    harness = stand_in(monkeypatch)

    def fail(*arguments, **named):
        random.random()
        raise RuntimeError("no\nluck")

    harness.evaluate = fail
    state = random.getstate()
    with pytest.raises(EditLabError, match=r"lm-evaluation-harness failed \(RuntimeError: no luck\)\."):
        Downstream(["known"]).scores(lm)
    assert random.getstate() == state
    downstream = Downstream(["known"])
    downstream.manager.load = fail
    with pytest.raises(UserError, match=r"A task of known cannot be loaded \(no luck\): check its file, and fetch"):
        downstream.load()


def test_without_the_extra_the_sentence_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"need lm-evaluation-harness: pip install 'editlab\[lm-eval\]'\.$"):
        require_harness()


def test_groups_and_filters_have_names_of_their_own():
    tasks = {"gsm8k": {"alias": "gsm8k", "sample_len": 8, "exact_match,strict-match": 0.25,
                       "exact_match_stderr,strict-match": 0.1, "exact_match,flexible-extract": 0.5}}  # fmt: skip
    groups = {"mmlu": {"acc,none": 0.75, "acc_stderr,none": "N/A", "alias": "mmlu"}}
    assert found_in(tasks, groups) == {
        "gsm8k": {"exact_match_strict-match": Score(0.25, 0.1), "exact_match_flexible-extract": Score(0.5)},
        "mmlu": {"acc": Score(0.75)},
    }
