"""Folders of runs: the settings in which they differ, their groups, and the columns of a comparison."""

import json

import pytest
import yaml

from editlab.errors import UserError
from editlab.runs.folders import RunFolder, differing, find_runs, flat_settings, group_runs


def write_run(folder, *, seed=1, accuracy=0.5, rate=None, layers=(6,), finished=True, curve=None, **more):
    """A run's folder as ``editlab fit`` writes it, with a replay callback if a rate is given."""
    folder.mkdir(parents=True)
    replay = [{"class_path": "callbacks.MemoryReplay", "init_args": {"rate": rate, **more}}] if rate is not None else []
    config = {
        "seed_everything": seed,
        "model": {
            "layers": list(layers),
            "method": {"class_path": "editlab.solver.methods.EMMET", "init_args": {"gram_ridge": 0.5}},
        },
        "data": {"seed": seed, "limit": 4},
        "trainer": {
            "logger": {"class_path": "editlab.runs.logger.RunLogger", "init_args": {"version": f"version_{seed}"}},
            "callbacks": [*replay, {"class_path": "callbacks.ForgettingCurve", "init_args": {"sample": seed}}],
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        metrics = {"retained/ES": 1.0, "retained/accuracy": accuracy, "immediate/accuracy": 0.9,
                   "before/perplexity": 20.0, "retained/perplexity": 25.0}  # fmt: skip
        summary = {"metrics": metrics, "edits": 4, "seconds": 10.0 * seed}
        (folder / "summary.json").write_text(json.dumps(summary))
    lines = curve or {2: 0.75, 4: accuracy}
    table = "".join(f"{n},{value},\n" for n, value in lines.items())
    (folder / "metrics.csv").write_text("edits,retained/accuracy,retained/perplexity\n" + table)
    return folder


def test_settings_are_flat_and_callbacks_go_by_their_names(tmp_path):
    settings = RunFolder(write_run(tmp_path / "a", rate=0.3)).settings
    assert settings == {
        "seed_everything": 1, "model.layers": [6], "model.method": "EMMET", "model.method.gram_ridge": 0.5,
        "data.seed": 1, "data.limit": 4, "MemoryReplay": "MemoryReplay", "MemoryReplay.rate": 0.3,
    }  # fmt: skip


def test_only_what_differs_and_is_no_seed(tmp_path):
    runs = [
        RunFolder(write_run(tmp_path / "none" / "version_1")),
        RunFolder(write_run(tmp_path / "low" / "version_1", rate=0.1, capacity=50)),
        RunFolder(write_run(tmp_path / "high" / "version_2", rate=0.3, capacity=50, seed=2)),
    ]
    # capacity is the same in the two runs that have it; the first has no such callback, which is said once.
    assert differing(one.settings for one in runs) == ["MemoryReplay", "MemoryReplay.rate"]
    assert differing(one.settings for one in runs[1:]) == ["MemoryReplay.rate"]
    assert differing(one.settings for one in runs[:1]) == []


@pytest.mark.parametrize(
    ("section", "name", "values"),
    [("trainer", "enable_progress_bar", (True, False)), ("trainer", "default_root_dir", ("a", None)),
     ("trainer", "log_every_n_steps", (1, 50)), ("trainer", "enable_checkpointing", (True, None)),
     ("model", "moments", ({"cache": True}, {"cache": False})), ("model", "evaluation", ({"age_bins": 4}, {}))],
)  # fmt: skip
def test_a_setting_without_effect_makes_no_difference(section, name, values):
    assert differing(flat_settings({section: {name: value}, "a": 1}) for value in values) == []
    bars = [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar", "init_args": {"leave": True}}]
    assert differing(flat_settings({"trainer": {"callbacks": own}, "a": 1}) for own in (bars, [])) == []


def test_a_setting_of_a_later_version_makes_no_difference(tmp_path):
    runs = [RunFolder(write_run(tmp_path / "a", rate=0.1)), RunFolder(write_run(tmp_path / "b", rate=0.1, repair=0.0))]
    assert differing(one.settings for one in runs) == []
    assert [len(group.runs) for group in group_runs(runs)] == [2]


def test_runs_that_differ_by_seed_are_one_group(tmp_path):
    for seed, accuracy in ((1, 0.5), (2, 0.75), (3, 1.0)):
        write_run(tmp_path / "logs" / "none" / f"version_{seed}", seed=seed, accuracy=accuracy)
    write_run(tmp_path / "logs" / "replay" / "version_1", rate=0.3)
    groups = {group.name: group for group in group_runs(find_runs([str(tmp_path / "logs")]))}
    assert sorted(groups) == ["none", "replay/version_1"]
    measured = groups["none"].measures()
    # (0.5 + 0.75 + 1) / 3, and the ends; perplexity 25 over 20.
    assert measured["retained/accuracy"] == (0.75, 0.5, 1.0)
    assert measured["perplexity_ratio"] == (1.25, 1.25, 1.25)
    assert measured["seconds"] == (20.0, 10.0, 30.0)
    assert "retained/NS" not in measured


def test_groups_of_one_name_are_labelled_by_the_settings_that_differ(tmp_path):
    for number, (rate, seed) in enumerate([(0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2)]):
        write_run(tmp_path / "logs" / "replay" / f"version_{number}", rate=rate, seed=seed)
    write_run(tmp_path / "logs" / "none" / "version_0", layers=(5,))
    groups = group_runs(find_runs([str(tmp_path / "logs")]))
    assert [(g.name, len(g.runs)) for g in groups] == [
        ("none/version_0", 1), ("replay (rate=0.1)", 2), ("replay (rate=0.3)", 2)
    ]  # fmt: skip


def test_files_of_other_programs_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "logs" / "a" / "version_0")
    other = tmp_path / "logs" / "other" / "version_0"
    other.mkdir(parents=True)
    (other / "metrics.csv").write_text("epoch,step,loss\n0,1,0.5\n")  # as Lightning's CSVLogger has it
    (other / "summary.json").write_text('{"loss": 0.5}')
    assert [run.path for run in find_runs([str(tmp_path / "logs")])] == [folder]
    with pytest.raises(UserError, match="has no run in it"):
        find_runs([str(other)])


def test_a_run_that_has_not_finished_shows_its_last_point(tmp_path):
    folder = write_run(tmp_path / "a", finished=False, curve={2: 0.75, 3: ""})
    run = RunFolder(folder)
    assert run.summary is None
    assert run.measures() == {"retained/accuracy": 0.75, "edits": 3.0}
    assert group_runs([run])[0].unfinished == 1


def test_each_run_is_found_once(tmp_path):
    folder = write_run(tmp_path / "logs" / "a" / "version_0")
    assert [run.path for run in find_runs([str(folder), str(tmp_path)])] == [folder]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"other\n2\n"), ("metrics.csv", b"edits,a\nx,1\n"), ("metrics.csv", b"edits,a\n2,x\n"),
        ("metrics.csv", b"edits,a\n2,1,3\n"), ("metrics.csv", b"edits,\xff\n2,1\n"),
        ("summary.json", b"[]"), ("summary.json", b"\xff"), ("summary.json", b'{"edits": 4}'),
        ("summary.json", b'{"edits": 4, "metrics": 1}'),
        ("config.yaml", b"- a\n"), ("config.yaml", b"a: S\xe3o\n"),
    ],
)  # fmt: skip
def test_a_file_of_a_run_that_is_another_ones_or_damaged_is_named(tmp_path, name, content):
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content)
    run = RunFolder(folder)
    with pytest.raises(UserError, match=name.replace(".", r"\.") + r" is .*: leave the run out, or "):
        list(map(run.__getattribute__, ("settings", "summary", "curve")))


def test_a_summary_without_its_time_is_one(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "summary.json").write_text('{"edits": 4, "metrics": {"retained/ES": 0.5, "retained/NS": null}}')
    assert RunFolder(folder).measures() == {"retained/ES": 0.5, "edits": 4.0}


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is no folder 'nowhere'"):
        find_runs(["nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no run in it"):
        find_runs([str(tmp_path / "empty")])
    folder = write_run(tmp_path / "a")
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        RunFolder(folder).measures()
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        _ = RunFolder(folder).settings
