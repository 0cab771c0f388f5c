"""lm-evaluation-harness for tests: a stand-in that notes its calls, and a task with its data for the real one."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import torch

TASK = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {test: capitals.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
DOCUMENTS = [
    ("The capital of France is", ["Paris", "Tokyo"], 0),
    ("The capital of Japan is", ["Paris", "Tokyo"], 1),
    ("The capital of Norway is", ["Lima", "Oslo"], 1),
]


def write_task(folder):
    """Writes a task of three documents, and returns the path of its YAML file."""
    lines = [json.dumps({"prompt": p, "choices": c, "answer": a}) for p, c, a in DOCUMENTS]
    (folder / "capitals.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "capitals.yaml").write_text(TASK)
    return str(folder / "capitals.yaml")


class StandIn:
    """What editlab uses of ``lm_eval``: it knows the task ``known``, and its accuracy is of the weights' bits.

    It draws from all random generators and gives its tokenizer a padding token, as the real one does.

    Attributes:
        calls: names of what was called, in order.
        given: arguments of the last evaluation.
    """

    def __init__(self):
        self.calls, self.given = [], {}
        self.tasks = SimpleNamespace(TaskManager=self._manager)
        self.models = SimpleNamespace(huggingface=SimpleNamespace(HFLM=self._wrapped))

    def _manager(self, include_defaults):
        self.calls.append(f"manager, defaults {include_defaults}")
        return SimpleNamespace(all_tasks=["known"], load=self._load)

    def _load(self, specs):
        self.calls.append("load")
        names = [spec if isinstance(spec, str) else spec["task"] for spec in specs]
        task = SimpleNamespace(
            get_config=lambda key: None,
            set_config=lambda key, value: self.given.update({key: value}),
            set_fewshot_seed=lambda seed: self.given.update(seed=seed),
        )
        return {"tasks": dict.fromkeys(names, task), "groups": {}}

    def _wrapped(self, pretrained, tokenizer, batch_size):
        self.calls.append("wrap")
        tokenizer.pad_token = "<unk>"
        self.given["batch_size"] = batch_size
        return pretrained

    def evaluate(self, lm, task_dict, limit, bootstrap_iters, log_samples):
        self.calls.append("evaluate")
        self.given |= {"limit": limit, "bootstrap_iters": bootstrap_iters}
        random.random(), np.random.rand(), torch.rand(1)
        bits = sum(int(p.detach().flatten()[:8].view(torch.int32).sum()) for p in lm.parameters())
        error = 0.125 if bootstrap_iters else "N/A"
        row = {"alias": "x", "acc,none": (bits % 997) / 997, "acc_stderr,none": error}
        return {"results": {name: dict(row) for name in task_dict["tasks"]}}


def stand_in(monkeypatch):
    """Puts a stand-in in the harness's place, and returns it."""
    harness = StandIn()
    monkeypatch.setattr("editlab.evaluation.downstream.require_harness", lambda: harness)
    return harness
