"""Tests of complete runs on two ranks (gloo) against the same run in one process, and of failures of a rank."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import StrategyRegistry

from editlab.distributed.strategy import NAME, EditStrategy
from tests import ranked
from tests.runs.test_resume import last, outcome, same, shrunk

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""Relative tolerance for second moments that were summed in another order: float32 rounds to 1e-7, and the condition
numbers of the tiny model's systems amplify that only a little."""

needs_gloo = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")


def prepared(folder, tiny, recipe, **changes):
    """Write a small version of a recipe (5 facts in batches of 3) into ``folder``; return the command's arguments."""
    folder.mkdir()
    arguments = shrunk(ROOT / "configs" / f"{recipe}.yaml", folder, tiny)
    config = yaml.safe_load((folder / f"{recipe}.yaml").read_text())
    config["data"] |= {"limit": 5, "batch_size": 3}
    config["model"]["values"] |= {"batch_tokens": 30, "matmul": "float32"}
    config["model"]["moments"] = {"tokens": 128 * 130}  # two passes of sampling, five of sums
    for section, values in changes.items():
        config[section] |= values
    (folder / f"{recipe}.yaml").write_text(yaml.safe_dump(config))
    return arguments


def output_of(folder, rank):
    return (folder / f"said_{rank}.txt").read_text()


def table(folder):
    with (last(folder).parents[1] / "metrics.csv").open() as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def summary(folder):
    return json.loads((last(folder).parents[1] / "summary.json").read_text())


def close(a, b):
    """Return whether two nested structures are equal, with numbers compared up to the tolerance."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return a == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE)
    return a == b


def test_the_strategy_can_be_named():
    assert NAME in StrategyRegistry
    assert isinstance(StrategyRegistry.get(NAME), EditStrategy)


@needs_gloo
@pytest.mark.parametrize(
    "recipe",
    ["emmet_replay_trust", "memit_consolidated", pytest.param("emmet_replay_lora", marks=pytest.mark.thorough)],
)
def test_every_rank_ends_with_the_weights_of_one_process(recipe, tiny_folder, tmp_path):
    runs = {count: tmp_path / f"ranks_{count}" for count in (1, 2)}
    for count, folder in runs.items():
        arguments = prepared(folder, tiny_folder, recipe)
        assert ranked.command(count, arguments, folder) == [0] * count, output_of(folder, 0)[-3000:]
    (one,), two = ([torch.load(folder / f"weights_{rank}.pt") for rank in range(n)] for n, folder in runs.items())
    assert same(two[0], two[1])
    assert all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(one, two[0], strict=True))
    for row, other in zip(table(runs[1]), table(runs[2]), strict=True):
        assert close(row, other)
    # Only one rank prints and writes: there is one run folder, with the files of one run.
    assert output_of(runs[2], 0).count("facts edited") == 1
    assert output_of(runs[2], 1) == ""
    assert [p.name for p in last(runs[2]).parents[2].iterdir()] == ["version_0"]
    files = {n: sorted(p.name for p in last(folder).parents[1].iterdir() if "tfevents" not in p.name)
             for n, folder in runs.items()}  # fmt: skip
    assert files[1] == files[2]


@needs_gloo
def test_the_command_starts_its_ranks(tiny_folder, tmp_path):
    # The only test that runs the command `editlab fit`, which starts the second process itself.
    one, two = tmp_path / "one", tmp_path / "two"
    assert ranked.command(1, prepared(one, tiny_folder, "emmet"), one) == [0]
    arguments = [*prepared(two, tiny_folder, "emmet"), "--trainer.devices", "2", "--trainer.strategy", "editlab_ddp"]
    environment = {**os.environ, "EDITLAB_CACHE": str(two / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "editlab.cli.main", *arguments],
        cwd=two, env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("5 facts edited in 2 batches") == 1
    a, b = (torch.load(last(folder), weights_only=True)["state_dict"] for folder in (one, two))
    assert all(torch.allclose(a[name], b[name], rtol=TOLERANCE, atol=TOLERANCE) for name in a)
    differing = ("seconds", "evaluation_seconds", "peak_memory_mb", "ranks")
    found = [{k: v for k, v in summary(folder).items() if k not in differing} for folder in (one, two)]
    for numbers in found:
        del numbers["facts"]["path"]
    assert close(*found)
    assert [summary(folder)["ranks"] for folder in (one, two)] == [1, 2]


@needs_gloo
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_killed_and_resumed_on_two_ranks(rank, tiny_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = prepared(whole, tiny_folder, "emmet_replay", data={"batch_size": 2})
    assert ranked.command(2, arguments, whole) == [0, 0]
    prepared(killed, tiny_folder, "emmet_replay", data={"batch_size": 2})
    codes = ranked.command(2, arguments, killed, dies=(rank, 2))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1  # the other rank noticed it and ended with an error
    assert "editlab: The other ranks cannot be reached" in output_of(killed, 1 - rank)
    # If rank 0 was killed, the second batch was not saved yet; if rank 1 was killed, rank 0 could still save it.
    assert torch.load(last(killed), weights_only=True)["global_step"] in (1, 1 + rank)
    assert ranked.command(2, [*arguments, "--ckpt_path", "last"], killed) == [0, 0], output_of(killed, 0)[-3000:]
    assert same(outcome(killed), outcome(whole))
    assert [p.name for p in last(killed).parents[2].iterdir()] == ["version_0"]


@needs_gloo
def test_validate_and_test_on_two_ranks(tiny_folder, tmp_path):
    folder = tmp_path / "run"
    arguments = prepared(folder, tiny_folder, "emmet")
    assert ranked.command(1, arguments, folder) == [0]
    for verb, group in (("validate", "retained"), ("test", "bystanders")):
        shown = []
        for count in (1, 2):
            (folder / "said_0.txt").unlink()
            command = [verb, *arguments[1:], "--ckpt_path", str(last(folder))]
            assert ranked.command(count, command, folder) == [0] * count, output_of(folder, 0)[-3000:]
            shown.append([line.split() for line in output_of(folder, 0).splitlines() if f"{group}/" in line])
        assert shown[0]
        assert shown[0] == shown[1]


FAULTS = {
    "on every rank": ({"data": {"path": "none.json"}}, "The fact file none.json does not exist"),
    "after an exchange": ({"model": {"evaluation": {"heldout": "none.txt"}}}, "The text 'none.txt' does not exist"),
    "on the first rank": ({}, "is in its way"),
}


@needs_gloo
@pytest.mark.parametrize("fault", FAULTS)
def test_a_user_error_is_reported_once_by_one_rank(fault, tiny_folder, tmp_path):
    changes, message = FAULTS[fault]
    folder = tmp_path / "run"
    arguments = prepared(folder, tiny_folder, "emmet", **changes)
    if not changes:  # only rank 0 tries to write to this cache, while the other rank waits
        (folder / "cache").mkdir()
        (folder / "cache" / "moments").touch()
    codes = ranked.command(2, arguments, folder)
    lines = [line for rank in (0, 1) for line in output_of(folder, rank).splitlines() if "editlab: " in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert codes == [2, 0]  # rank 0 reports the error for both


def test_another_strategy_is_rejected(tiny_folder, tmp_path, monkeypatch, capsys):
    from editlab.cli.main import main

    arguments = prepared(tmp_path / "run", tiny_folder, "emmet")
    monkeypatch.chdir(tmp_path / "run")
    for strategy in ([], ["--trainer.strategy", "ddp"]):
        assert main([*arguments, "--trainer.devices", "2", *strategy]) == 2
        assert "2 processes can share edits only with --trainer.strategy editlab_ddp" in capsys.readouterr().err


@needs_gloo
def test_a_device_map_is_for_one_process_of_a_machine(tiny_folder, tmp_path):
    weights = {}
    for name, model in (("plain", {}), ("spread", {"device_map": {"": "disk"}})):
        folder = tmp_path / name
        arguments = prepared(folder, tiny_folder, "emmet", model=model)
        assert ranked.command(2, arguments, folder, nodes=True) == [0, 0], output_of(folder, 0)[-3000:]
        weights[name] = [torch.load(folder / f"weights_{rank}.pt") for rank in (0, 1)]
    assert same(weights["spread"], weights["plain"])
    assert ranked.command(2, arguments, folder) == [2, 0]
    assert "set --trainer.devices 1" in output_of(folder, 0)
