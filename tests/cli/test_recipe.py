"""The parts of a recipe that the command line completes: the run's folder, the checkpoint to resume, config.yaml."""

import errno
import json
import shutil

import pytest
import yaml

from editlab.cli.main import main
from editlab.editor import SequentialEditor
from tests.recipes import write_recipe


@pytest.fixture
def fit(tiny_folder, tmp_path, monkeypatch):
    """Runs the tiny recipe with flags, in a working directory of its own; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "layers": [1],
        "contexts": {"count": 0},
        "evaluation": {"heldout_tokens": 0, "generation": 0, "bystanders": 0},
    }
    write_recipe(tmp_path, tiny_folder, model=settings)
    return lambda *flags: main(["fit", "--config", "tiny.yaml", *flags])


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def edits_of(run):
    return json.loads((run / "summary.json").read_text())["edits"]


TWO_LOGGERS = '--trainer.logger=[{"class_path":"RunLogger"},{"class_path":"CSVLogger","init_args":{"save_dir":"csv"}}]'


def test_a_run_with_several_loggers_resumes_in_its_own_folder(fit, tmp_path):
    assert fit(TWO_LOGGERS, "--trainer.max_steps", "1") == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    assert edits_of(run) == 2
    assert fit(TWO_LOGGERS, "--ckpt_path", "last") == 0
    assert edits_of(run) == 4
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("logger", "said"),
    [
        ("false", "There is no run with a checkpoint in lightning_logs/tiny to resume"),
        ("null", "trainer.logger has none"),  # Lightning's default logger
    ],
)
def test_the_newest_run_cannot_be_found_without_a_logger(fit, capsys, logger, said):
    assert fit("--trainer.logger", logger, "--ckpt_path", "last") == 2
    assert said in last_line(capsys)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_without_a_logger_the_users_own_config_stays(fit, tmp_path):
    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    recipe["model"]["passes"] = 1
    own = f"# with notes\n{yaml.safe_dump(recipe)}"
    (tmp_path / "config.yaml").write_text(own)
    without = ["fit", "--config", "config.yaml", "--trainer.logger", "false", "--model.passes", "2"]
    assert main([*without, "--trainer.max_steps", "1"]) == 0
    # Nor is it what the run was started with whose checkpoint lies there.
    (tmp_path / "lightning_logs" / "config" / "version_0" / "checkpoints").rename(tmp_path / "checkpoints")
    assert main([*without, "--ckpt_path", "checkpoints/last.ckpt"]) == 0
    assert edits_of(tmp_path / "lightning_logs" / "config" / "version_1") == 4
    assert (tmp_path / "config.yaml").read_text() == own


SHOWS = {"class_path": "ModelSummary"}
"""A callback that changes nothing."""


def callbacks(*given):
    return f"--trainer.callbacks={json.dumps(given[0] if len(given) == 1 else given)}"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (callbacks({"class_path": "MemoryReplay"}), "last.ckpt"),  # one, and no list
        # Writes where something fails, and not on the way.
        (callbacks({"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "x"}}, SHOWS), "last.ckpt"),
        (callbacks({"class_path": "ModelCheckpoint", "init_args": {"filename": "mine"}}, SHOWS), "mine.ckpt"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*No checkpoint will be loaded")
def test_checkpoints_are_editlabs_unless_the_recipe_has_its_own(fit, tmp_path, given, written):
    assert fit(given) == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [written]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.method", "MEMIT"], "(model.method: EMMET then, MEMIT now"),
        (["--model.values.steps", "3"], "(model.values.steps: 2 then, 3 now)"),
        (["--model.passes", "2"], "(model.passes: 1 then, 2 now)"),
        ([callbacks({"class_path": "TrustRollback"})], "(TrustRollback: absent then, present now"),
    ],
)
def test_a_run_resumes_only_with_the_settings_that_it_was_started_with(fit, tmp_path, capsys, flags, said):
    assert fit("--trainer.max_steps", "1") == 0
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit("--ckpt_path", "last", *flags) == 2
    assert said in last_line(capsys)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert after == {path: content for path, content in before.items() if path in after}


def test_settings_that_change_no_edit_may_differ(fit, tmp_path):
    assert fit("--trainer.max_steps", "1") == 0
    assert fit("--ckpt_path", "last", "--model.values.batch_tokens", "64", callbacks(SHOWS)) == 0
    assert edits_of(tmp_path / "lightning_logs" / "tiny" / "version_0") == 4


def test_a_finished_run_takes_no_further_facts(fit, capsys):
    assert fit() == 0
    assert fit("--ckpt_path", "last", "--data.limit", "6") == 2
    assert "was finished with its 4 facts, and 6 are given" in last_line(capsys)
    assert fit("--ckpt_path", "last") == 0


RUN = "lightning_logs/tiny/version_0"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_given_by_its_path_is_compared_with_its_own_run(fit, tmp_path, capsys):
    """It is compared even if the resumed run has another folder, such as that of another recipe."""
    assert fit("--trainer.max_steps", "1") == 0
    shutil.copy("tiny.yaml", "other.yaml")
    going_on = ["fit", "--config", "other.yaml", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt"]
    assert main([*going_on, "--model.method", "MEMIT", "--model.keys", "mean"]) == 2
    assert "(model.method: EMMET then, MEMIT now" in last_line(capsys)
    assert not list(tmp_path.glob("lightning_logs/other/*"))
    assert main(going_on) == 0
    assert edits_of(tmp_path / "lightning_logs" / "other" / "version_0") == 4
    # Given to a folder that has settings of its own, it is held against both.
    named = ["--trainer.logger.init_args.version", "0", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt"]
    shutil.copytree(tmp_path / RUN, tmp_path / "lightning_logs" / "third" / "version_0")
    shutil.copy("tiny.yaml", "third.yaml")
    assert main(["fit", "--config", "third.yaml", "--model.passes", "2", *named]) == 2
    assert "(model.passes: 1 then, 2 now)" in last_line(capsys)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_is_gone_on_with_by_its_folder(fit, tmp_path):
    assert fit("--trainer.max_steps", "1") == 0
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", RUN]) == 0
    assert fit("--ckpt_path", RUN) == 0
    assert edits_of(tmp_path / RUN) == 4
    assert [path.name for path in (tmp_path / RUN).parent.iterdir()] == ["version_0"]


def test_last_is_that_of_the_run_that_the_recipe_names(fit, tmp_path, capsys):
    assert fit("--trainer.max_steps", "1") == 0
    named = ["--trainer.logger.init_args.version", "mine"]
    (tmp_path / "lightning_logs" / "tiny" / "mine").mkdir()
    assert fit("--ckpt_path", "last", *named) == 2
    assert "tiny/mine holds no checkpoints/last.ckpt" in last_line(capsys)
    assert fit("--trainer.max_steps", "1", *named) == 0
    assert fit("--ckpt_path", "last", *named) == 0
    assert edits_of(tmp_path / "lightning_logs" / "tiny" / "mine") == 4
    assert edits_of(tmp_path / RUN) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ckpt_path", "best"], "'best' does not exist: check --ckpt_path"),
        (["--ckpt_path", "hpc"], "'hpc' does not exist: check --ckpt_path"),
        (["--ckpt_path", ""], "'' does not exist: check --ckpt_path"),
        (["--trainer.max_epochs", "2"], "trainer.max_epochs is 2: a run edits each of its facts once"),
    ],
)
def test_settings_without_meaning_for_edits_are_refused(fit, tmp_path, capsys, flags, said):
    assert fit(*flags) == 2
    assert said in last_line(capsys)
    assert not (tmp_path / "lightning_logs").exists()


@pytest.fixture
def fails_at(monkeypatch):
    """Makes the run fail in the step of that number, from 1, with an error that editlab does not know."""
    log_step = SequentialEditor._log_step

    def patch(step, error):
        def failing(self, *given):
            if self.global_step == step:
                raise type(error)(*error.args)  # a new one, as each run has its own
            log_step(self, *given)

        monkeypatch.setattr(SequentialEditor, "_log_step", failing)

    return patch


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOSPC, "No space left"), MemoryError()])
def test_only_a_run_with_a_checkpoint_gets_advice_to_resume(fit, fails_at, capsys, error):
    for step, saved in ((1, False), (2, True)):
        fails_at(step, error)
        assert fit() == 1
        assert ("--ckpt_path last" in last_line(capsys)) == saved
    assert fit("--trainer.logger", "false") == 1  # last finds it without a logger, too
    assert "--ckpt_path last" in last_line(capsys)


def test_partly_written_files_of_a_kill_are_removed(fit, tmp_path):
    assert fit("--trainer.max_steps", "1") == 0
    parts = [tmp_path / RUN / where / f".{name}.{'0a' * 16}.part"
             for where, name in (("checkpoints", "last.ckpt"), (".", "metrics.csv"))]  # fmt: skip
    other = tmp_path / RUN / ".mine.part"
    for path in (*parts, other):
        path.touch()
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", RUN]) == 0
    assert all(path.exists() for path in parts)  # looking at a run changes nothing
    assert fit("--ckpt_path", "last") == 0
    assert [path.exists() for path in (*parts, other)] == [False, False, True]
