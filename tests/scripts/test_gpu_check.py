"""The check for GPUs: its rehearsal on a CPU, and its message without a GPU."""

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def check(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_the_rehearsal_times_every_part():
    done = check("--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("random weights", "values, first", "values, again", "second moments", "factor and solve"):
        assert done.stdout.count(part) == 2
    assert "FAILED" not in done.stdout


def test_without_a_gpu_the_message_is_one_sentence():
    missing = f"cuda:{torch.cuda.device_count()}"
    done = check("--device", missing)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"There is no device {missing} on this machine, so nothing was measured."
    )
