"""Tests that the number of threads leaves busy cores to other programs, and that the user's settings are kept."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch

from editlab.utils import machine
from editlab.utils.machine import LoadMeter, choose_threads, restore_threads, usable_cores, wait_passively_if_busy

SCRIPT = """
import os, sys
from editlab.cli import main as command
from editlab.utils.machine import LoadMeter
LoadMeter.free_cores = lambda meter: 0.0  # as beside other busy programs

def stop():
    print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"))
    sys.exit()


command.load_plugins = stop  # the first thing that may import torch
command.main(["compare", "none"])
"""


@pytest.mark.parametrize(
    ("free", "expected"),
    [(0.0, {"OMP_WAIT_POLICY": "PASSIVE"}), (1.2, {"OMP_WAIT_POLICY": "PASSIVE"}), (1.8, {}), (2.0, {}), (None, {})],
)
def test_threads_sleep_while_they_wait_only_on_a_busy_machine(monkeypatch, free, expected):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.0)
    monkeypatch.setattr(machine, "_SHORTEST", 0.0)
    environment = {}
    wait_passively_if_busy(Free(free), environment)
    assert environment == expected


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "10"}, {"KMP_BLOCKTIME": "1"}])
def test_how_the_user_lets_threads_wait_is_kept(own):
    environment = dict(own)
    wait_passively_if_busy(Free(0.0), environment)
    assert environment == own


@pytest.mark.parametrize(("own", "seen"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_command_sets_it_before_torch_is_imported(own, seen):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | own
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == f"False {seen}"


class Times:
    """Hand-made processor times instead of psutil's, in seconds since the start of the machine and of this process."""

    def __init__(self, monkeypatch, cores):
        self.machine = {"user": 100.0, "system": 10.0, "idle": 300.0, "nice": 50.0, "iowait": 5.0, "guest": 40.0}
        self.own = [1.0, 0.5]
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(machine, "usable_cores", lambda: float(cores))
        monkeypatch.setattr(machine, "_is_nice", lambda: False)
        names = "user system idle nice iowait guest"
        make = __import__("collections").namedtuple("scputimes", names)
        monkeypatch.setattr(psutil, "cpu_times", lambda: make(**self.machine))
        own = __import__("collections").namedtuple("pcputimes", "user system")
        process = type("Process", (), {"cpu_times": lambda _: own(*self.own)})
        monkeypatch.setattr(psutil, "Process", process)

    def add(self, own=0.0, **seconds):
        for name, value in seconds.items():
            self.machine[name] += value
        self.own[0] += own


def test_free_cores_are_those_that_other_processes_do_not_use(monkeypatch):
    times = Times(monkeypatch, cores=4)
    meter = LoadMeter()
    # 4 cores have 40 core seconds in 10 s: 12 for other processes, 10 for this one, 3 for niced ones, and 15 idle.
    times.add(user=20, system=2, idle=13, iowait=2, nice=3, own=10)
    assert meter.free_cores() == pytest.approx(4 * (15 + 3 + 10) / 40)
    assert LoadMeter().free_cores() is None  # no time has passed


def test_guests_do_not_count_twice(monkeypatch):
    times = Times(monkeypatch, cores=2)
    meter = LoadMeter()
    times.add(user=10, guest=10, idle=10)  # a guest's time is part of the user's
    assert meter.free_cores() == pytest.approx(1)


def test_a_nice_process_competes_with_nice_ones(monkeypatch):
    times = Times(monkeypatch, cores=2)
    monkeypatch.setattr(machine, "_is_nice", lambda: True)
    meter = LoadMeter()
    times.add(nice=10, idle=10, own=5)
    assert meter.free_cores() == pytest.approx(1.5)


@pytest.fixture
def threads(monkeypatch):
    """Record torch's number of threads, which begins at 4, with no environment variable that fixes it."""
    for name in (*machine.THREAD_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    number = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    return number


class Free:
    """A load meter that reports a given number of free cores."""

    def __init__(self, cores):
        self.cores = cores

    def free_cores(self):
        return self.cores


@pytest.mark.parametrize(("free", "expected"), [(4.0, 4), (3.6, 4), (3.2, 3), (0.9, 1), (0.0, 1), (64.0, 4)])
def test_as_many_threads_as_there_are_free_cores(threads, free, expected, caplog):
    with caplog.at_level("INFO", logger="editlab"):
        choose_threads(Free(free))
    assert threads == [expected]


def test_without_a_measurement_the_usable_cores_count(threads, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.0)  # a container's quota
    choose_threads(Free(None))
    assert threads == [2]


@pytest.mark.parametrize("name", [*machine.THREAD_VARIABLES, "LOCAL_RANK"])
def test_a_number_fixed_by_the_user_is_kept(threads, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    choose_threads(Free(0.0))
    assert threads == [4]
    if name in machine.THREAD_VARIABLES:
        restore_threads(1)
        assert threads == [4]


def test_a_resumed_run_uses_the_number_of_threads_of_its_checkpoint(threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    restore_threads(3)
    assert threads == [3]
    restore_threads(None)  # an older checkpoint
    restore_threads(32)  # from a larger machine
    assert threads == [3]


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000\n", 1.5), ("max 100000\n", float("inf")), (None, float("inf"))]
)
def test_a_containers_quota_limits_the_cores(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert usable_cores() == min(3, expected)


def test_this_machine_can_be_measured():
    assert 0 < usable_cores() <= (os.cpu_count() or 1)
    times = machine._times()
    assert times is not None
    assert times.machine >= times.idle > 0
    assert times.own > 0
