"""Runs as processes on this machine and on Ray: the same files and exit codes; failures are kept, stops are none."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from editlab.errors import UserError
from editlab.experiments import launch, provenance
from tests.facts import FACTS, write_counterfact

PROJECT = Path(__file__).parents[2]


def jobs(tmp_path):
    """Two that end well, and one that does not."""
    facts = write_counterfact(tmp_path / "facts.json", FACTS[:3])
    checks = {"one": str(facts), "two": str(facts), "bad": "nowhere.json"}  # a command that starts without torch
    return [
        launch.Job(tmp_path / name / "version_1", ("facts", "check", path), 1, PROJECT)
        for name, path in checks.items()
    ]  # fmt: skip


def check(found, tmp_path):
    codes = {job.folder.parent.name: code for job, code in found}
    assert sorted(codes) == ["bad", "one", "two"]
    assert codes["one"] == codes["two"] == 0
    assert codes["bad"] != 0
    for name in codes:
        folder = tmp_path / name / "version_1"
        noted = json.loads((folder / "provenance.json").read_text())
        assert noted.pop("settings") == next(job.settings for job, _ in found if job.folder == folder)
        assert noted.pop(provenance.RECIPE_CONTENT) == "unknown"  # these jobs have no recipe
        assert noted == provenance.provenance(PROJECT)
        assert (folder / "failed.json").exists() == (name == "bad")
    assert "3 facts in" in (tmp_path / "one" / "version_1" / "run.log").read_text()
    assert "nowhere.json" in (tmp_path / "bad" / "version_1" / "run.log").read_text()
    assert json.loads((tmp_path / "bad" / "version_1" / "failed.json").read_text())["why"] == (
        f"it ended with exit code {codes['bad']}"
    )


def test_processes_of_this_machine(tmp_path):
    one, two, bad = jobs(tmp_path)
    found = list(launch.processes([one, two, bad], 2, {one: bad}))
    check(found, tmp_path)
    order = [job for job, _ in found]
    assert order.index(bad) < order.index(one)  # though it ended badly


def test_an_interrupt_begins_nothing_more_and_leaves_nothing_running(tmp_path, monkeypatch):
    children, late, plain = [], threading.Event(), subprocess.Popen
    some = [launch.Job(tmp_path / str(i), (), 1, PROJECT) for i in range(4)]

    def slow_provenance(project):
        if children:  # the second one is on its way while all are stopped
            late.set()
            while not launch._PROCESSES.stopping:
                time.sleep(0.01)
        return {}

    def sleeper(command, **how):
        children.append(plain([sys.executable, "-c", "import time; time.sleep(60)"], **how))
        return children[-1]

    def interrupted(running, **rest):
        assert late.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_PROCESSES", launch._Processes())
    monkeypatch.setattr(launch, "provenance", slow_provenance)
    monkeypatch.setattr(launch.subprocess, "Popen", sleeper)
    monkeypatch.setattr(launch, "wait", interrupted)
    first = launch.start
    monkeypatch.setattr(launch, "start", lambda job: (job == some[1] and _until(lambda: children), first(job))[1])
    with pytest.raises(KeyboardInterrupt):
        next(launch.processes(some, 2, {}))
    (child,) = children
    assert child.returncode is not None
    assert not list(tmp_path.rglob("failed.json"))


def _until(holds):
    while not holds():
        time.sleep(0.01)


def test_a_folder_that_can_not_be_written_to_fails_its_run_alone(tmp_path):
    one, two, _ = jobs(tmp_path)
    (tmp_path / "two").touch()  # a file in the way of the folder
    codes = {job.folder.parent.name: code for job, code in launch.processes([two, one], 1, {})}
    assert codes == {"two": 1, "one": 0}


def test_damaged_provenance_is_none(tmp_path):
    assert provenance.read_provenance(tmp_path) == {}
    for damaged in ("", '{"revision": "abc"', "[]"):
        (tmp_path / provenance.FILE).write_text(damaged)
        assert provenance.read_provenance(tmp_path) == {}


def test_a_resumed_run_keeps_all_that_it_was_started_with():
    earlier = {"revision": "abc", "machine": "a CPU"}
    assert provenance.with_earlier(earlier, {"revision": "def", "machine": "a CPU"}) == {
        "revision": "abc | def", "machine": "a CPU",
    }  # fmt: skip
    assert provenance.with_earlier({}, {"revision": "def"}) == {"revision": "unknown | def"}


def test_the_digest_of_settings_depends_on_neither_the_run_s_folder_nor_the_checkout(tmp_path):
    def settings(work, path, rate, project=PROJECT):
        arguments = ("fit", f"--data.path={path}", f'--trainer.callbacks=[{{"text": "{path}", "rate": {rate}}}]')
        arguments = (*arguments, f"--trainer.logger.init_args.save_dir={work}")
        return launch.Job(tmp_path, arguments, 1, project).settings

    first = settings("one", PROJECT.parent / "shared" / "facts.json", 0.5)
    assert settings("two", PROJECT.parent / "shared" / "facts.json", 0.5) == first
    assert settings("one", PROJECT.parent / "shared" / "facts.json", 0.3) != first
    assert settings("one", "/elsewhere/facts.json", 0.5) != first
    assert settings("one", tmp_path / "shared" / "facts.json", 0.5, tmp_path / "checkout") == first


def test_jobs_start_as_soon_as_what_they_wait_for_has_ended(tmp_path):
    """Six jobs on two workers, by hand: 0 and 3 run first; 1 and 2 wait for 0, 4 and 5 for 3, which takes longest."""
    some = [launch.Job(tmp_path / str(i), (), 1, PROJECT) for i in range(6)]
    after = {some[1]: some[0], some[2]: some[0], some[4]: some[3], some[5]: some[3]}
    submitted = []

    def submit(job):
        submitted.append(int(job.folder.name))
        return submitted[-1]

    def next_of(running):
        return min(running, key=lambda number: (number == 3, number))  # 3 ends last of all that run

    found = [task for _, task in launch._in_order_of_end(some, after, submit, next_of)]
    assert submitted == [0, 3, 1, 2, 4, 5]
    assert found == [0, 1, 2, 3, 4, 5]


# Ray's own warnings and unclosed sockets are not ours to fix.
@pytest.mark.filterwarnings("default")
@pytest.mark.thorough
def test_two_workers_of_ray(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'editlab[ray]')")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        check(list(launch.over_ray(jobs(tmp_path), 2, {})), tmp_path)
        assert ray.is_initialized()  # a cluster that was there stays
    finally:
        ray.shutdown()


def test_the_machine_has_its_gpus(monkeypatch):
    outputs = {"git rev-parse": "abc1234", "git status": " M x", "nvidia-smi --query-gpu=name": "Card A\nCard B"}
    monkeypatch.setattr(provenance, "_output", lambda folder, *command: outputs[" ".join(command[:2])])
    cpu = f"{provenance.cores()} x {provenance.cpu_name()}"
    assert provenance.provenance(PROJECT) == {"revision": "abc1234+", "machine": f"{cpu}, Card A, Card B"}
    monkeypatch.undo()
    assert provenance._output(PROJECT, "no-such-command-anywhere") == ""
    assert provenance._output(PROJECT, sys.executable, "-c", "print(1); raise SystemExit(1)") == ""


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'editlab\[ray\]'"):
        list(launch.over_ray([], 1, {}))


def test_a_stopped_run_has_not_failed_and_a_new_start_removes_an_earlier_failure(tmp_path, monkeypatch):
    (job, *_) = jobs(tmp_path)
    plain = subprocess.Popen
    monkeypatch.setattr(launch, "provenance", lambda project: {})
    for code, failed in ((3, True), (0, False), (-9, True), (130, False)):
        ends = f"import os; os.kill(os.getpid(), {-code}) if {code} < 0 else os._exit({code})"
        command = [sys.executable, "-c", ends]
        monkeypatch.setattr(launch, "_PROCESSES", launch._Processes())
        monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, command=command, **k: plain(command))
        assert launch.start(job) == code
        assert (job.folder / "failed.json").exists() == failed


def test_tables_and_figures_are_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("results", "figs", "editlab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    plain = provenance.provenance(tmp_path)["revision"]
    assert len(plain) >= 7
    for name in ("results", "figs"):
        (tmp_path / name / "file").write_text("after")
    assert provenance.provenance(tmp_path)["revision"] == plain
    (tmp_path / "editlab" / "file").write_text("after")
    assert provenance.provenance(tmp_path)["revision"] == plain + "+"
