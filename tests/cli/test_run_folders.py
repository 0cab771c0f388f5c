"""Where a run writes, what it must not write, and what Lightning's own callbacks see of its numbers."""

import json
import shutil

import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Trainer

from editlab.cli.main import main
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.runs.folder_lock import NAME
from editlab.runs.trainer import TRAINER_DEFAULTS
from tests.recipes import write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

USERS = {"summary.json": b"mine", "config.yaml": b"mine", "checkpoints/last.ckpt": b"mine", "metrics.csv": b"mine"}
"""Files in the working directory that have names of a run's files."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A working directory with a recipe and files of the user."""
    monkeypatch.chdir(tmp_path)
    settings = {"method": {"class_path": "EMMET"}, "layers": [1], "evaluation": {"heldout_tokens": 0}}
    write_recipe(tmp_path, tiny, model=settings)
    for name, content in USERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def new_files(place):
    """Paths of the files that are not the test's own, after a check that these have not changed."""
    assert {name: (place / name).read_bytes() for name in USERS} == USERS
    own = {"facts.json", "tiny.yaml", *USERS}
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    return sorted(name for name in found - own if not name.endswith(NAME) and "tfevents" not in name)


RUN = ["checkpoints/last.ckpt", "config.yaml", "outcomes.csv", "summary.json"]


def fit(*arguments):
    return main(["fit", "--config", "tiny.yaml", *arguments])


def test_a_trial_run_writes_nothing(place, capsys):
    (place / "held_out.txt").write_text("Oslo lies in Norway, and Lima lies in Peru. " * 20)
    trust = {"class_path": "TrustRollback", "init_args": {"heldout": "held_out.txt"}}  # all facts are edited
    for callback in (trust, {"class_path": "ForgettingCurve"}):
        assert fit("--trainer.fast_dev_run", "true", f"--trainer.callbacks={json.dumps([callback])}") == 0
        assert new_files(place) == ["held_out.txt"]
    assert "nothing was kept, because trainer.fast_dev_run is set" in capsys.readouterr().out


def test_a_run_without_a_logger_gets_a_folder_of_its_own(place, capsys):
    for number in range(2):
        assert fit("--trainer.logger", "false") == 0
        expected = [f"lightning_logs/tiny/version_{n}/{name}" for n in range(number + 1) for name in RUN]
        assert new_files(place) == sorted(expected)
    assert fit("--trainer.logger", "false", "--ckpt_path", "last") == 0
    assert not (place / "lightning_logs/tiny/version_2").exists()
    capsys.readouterr()
    assert fit("--trainer.logger", "false", "--model.layers", "[7]") == 2
    assert not (place / "lightning_logs/tiny/version_2").exists()


@pytest.mark.parametrize(("logger", "runs"), [("default", "mine/lightning_logs/tiny"), ("false", "mine")])
def test_the_root_folder_holds_the_runs(place, logger, runs):
    arguments = [] if logger == "default" else ["--trainer.logger", logger]
    assert fit("--trainer.default_root_dir", "mine", *arguments) == 0
    found = new_files(place)
    assert {name.partition("version_0/")[0] for name in found} == {f"{runs}/"}
    assert {f"{runs}/version_0/{name}" for name in RUN} <= set(found)
    again = ["--config", f"{runs}/version_0/config.yaml"]
    assert main(["fit", *again]) == 0  # the saved recipe names the same folder
    assert f"{runs}/version_1/summary.json" in new_files(place)


def test_a_logger_s_own_folder_stays(place):
    assert fit("--trainer.default_root_dir", "mine", "--trainer.logger.init_args.save_dir", "logs") == 0
    assert {name.partition("/version")[0] for name in new_files(place)} == {"logs/tiny"}


@pytest.mark.parametrize("logger", ["RunLogger", pytest.param("CSVRunLogger", marks=pytest.mark.thorough), "false"])
def test_home_and_variables_mean_one_folder_to_all_parts_of_a_run(place, logger, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("USERPROFILE", str(place / "home"))
    monkeypatch.setenv("SCRATCH", str(place / "scratch"))
    for given, folder in (("~/runs", "home/runs"), ("$SCRATCH/runs", "scratch/runs")):
        arguments = [f"--trainer.logger={logger}", "--trainer.default_root_dir", given]
        assert fit(*arguments) == 0
        run = place / folder / ("version_0" if logger == "false" else "lightning_logs/tiny/version_0")
        assert set(RUN) <= {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        if logger != "false":
            assert fit(f"--trainer.logger={logger}", f"--trainer.logger.init_args.save_dir={given}") == 0
            assert (place / folder / "tiny/version_0/checkpoints/last.ckpt").exists()
            assert fit(f"--trainer.logger={logger}", f"--trainer.logger.init_args.save_dir={given}", "--ckpt_path",
                       "last") == 0  # fmt: skip
            assert not (place / folder / "tiny/version_1").exists()
        assert main(["export", "--ckpt_path", str(run), "--out", str(place / folder / "out")]) == 0
    assert not {path.name for path in place.iterdir()} & {"~", "$SCRATCH"}


def test_a_second_table_in_the_run_s_folder_is_refused(place, capsys):
    table = {"class_path": "CSVLogger", "init_args": {"save_dir": "lightning_logs", "name": "tiny"}}
    assert fit(f"--trainer.logger={json.dumps(['RunLogger', table])}") == 2
    assert "its metrics.csv would be written over theirs: leave it out" in capsys.readouterr().err
    assert not (place / "lightning_logs").exists()
    table["init_args"]["name"] = "theirs"
    assert fit(f"--trainer.logger={json.dumps(['RunLogger', table])}") == 0


def test_a_new_run_in_an_old_one_s_folder_has_nothing_of_it(place, monkeypatch):
    """What a run shows that fails in its first batch is its own, and no earlier run's."""
    version = ["--trainer.logger.init_args.version", "7"]
    assert fit(*version) == 0
    run = place / "lightning_logs/tiny/version_7"
    assert (run / "summary.json").exists()
    monkeypatch.setattr(SequentialEditor, "training_step", lambda *_: 1 / 0)
    assert fit(*version, "--model.values.steps", "3") == 1
    assert not {"summary.json", "outcomes.csv", "checkpoints/last.ckpt"} & {
        path.relative_to(run).as_posix() for path in run.rglob("*")
    }


def test_a_run_resumed_from_an_earlier_state_is_not_finished(place, monkeypatch):
    keep = json.dumps([{"class_path": "EditCheckpoint", "init_args": {"keep_all": True}}])
    assert fit(f"--trainer.callbacks={keep}") == 0
    run = place / "lightning_logs/tiny/version_0"
    first = min((run / "checkpoints").glob("batch_*.ckpt"))
    monkeypatch.setattr(SequentialEditor, "training_step", lambda *_: 1 / 0)
    assert fit(f"--trainer.callbacks={keep}", "--ckpt_path", str(first)) == 1
    assert not (run / "summary.json").exists()
    assert (run / "checkpoints/last.ckpt").exists()


def test_two_resumes_of_one_run(place, capsys):
    assert fit() == 0
    run = place / "lightning_logs/tiny/version_0"
    with FileLock(run / NAME):  # an instance of its own locks like another process
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for verb in ("fit", "validate"):
            capsys.readouterr()
            assert main([verb, "--config", "tiny.yaml", "--ckpt_path", "last"]) == 2
            error = capsys.readouterr().err
            assert error.count("editlab: ") == 1
            assert "Another process is writing into the run's folder" in error
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert fit("--ckpt_path", "last") == 0


def test_errors_of_checkpoints_that_do_not_fit(place, capsys):
    assert fit() == 0
    run = place / "lightning_logs/tiny/version_0"
    path = run / "checkpoints/last.ckpt"
    whole = torch.load(path, weights_only=True)
    total = whole["state_dict"]["edited.1.total"]
    for bad, sentence in (
        (total[:-1], "The checkpoint's edited.1.total has the shape [31, 48] and the weight [32, 48]"),
        (total.double(), "no float32 matrix as edited.1.total"),
    ):
        whole["state_dict"]["edited.1.total"] = bad
        torch.save(whole, path)
        capsys.readouterr()
        assert fit("--ckpt_path", "last") == 2
        assert sentence in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:2000])
    for arguments in (
        ["fit", "--config", "tiny.yaml", "--ckpt_path", "last"],
        ["validate", "--config", "tiny.yaml", "--ckpt_path", "last"],
        ["export", "--ckpt_path", str(run), "--out", "out"],
        ["ask", "--ckpt_path", str(run), "France"],
        ["report", str(run)],
        ["revert", "--ckpt_path", str(run), "--out", "out"],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert "cannot be read, because it is damaged or of another kind" in error, (arguments, error)


def test_weights_only_cannot_be_switched_off_from_python(place):
    assert fit() == 0
    checkpoint = "lightning_logs/tiny/version_0/checkpoints/last.ckpt"
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    editor = SequentialEditor(recipe["model"]["language_model"], layers=[1])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=place / "other", **TRAINER_DEFAULTS,
    )  # fmt: skip
    data = EditDataModule("facts.json", limit=4, batch_size=2, keep="all")
    with pytest.raises(Exception, match="weights_only is False, and loading a checkpoint would then run any code"):
        trainer.fit(editor, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    shutil.rmtree(place / "other", ignore_errors=True)


WATCHED = [
    ("immediate/accuracy", []),
    ("solve/layer_1/update_norm", []),
    ("retained/accuracy", ["ForgettingCurve"]),
]


@pytest.mark.parametrize(("name", "others"), WATCHED)
def test_a_run_stops_early_by_any_number_that_it_logs(place, name, others):
    """A threshold that every value passes stops the run after the first batch at which the number is logged."""
    early = {"monitor": name, "mode": "max", "stopping_threshold": -1e9, "check_finite": False}
    callbacks = [{"class_path": "EarlyStopping", "init_args": early}]
    callbacks += [{"class_path": other, "init_args": {"every_n_edits": 2}} for other in others]
    assert fit(f"--trainer.callbacks={json.dumps(callbacks)}") == 0
    summary = json.loads((place / "lightning_logs/tiny/version_0/summary.json").read_text())
    assert summary["batches"] == 1


def test_facts_that_were_not_edited_are_named(place, capsys):
    assert fit("--model.values.lr", "1e30") == 0
    said = capsys.readouterr().out
    assert "Batch 0: 2 of 2 facts got no update, because their values equal what the layer outputs already" in said
    assert "In all: 4 of 4 facts got no update" in said
    assert fit() == 0
    assert "got no update" not in capsys.readouterr().out


def test_validate_says_which_facts_it_evaluates(place, capsys):
    assert fit() == 0
    capsys.readouterr()
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last", "--data.limit", "2"]) == 0
    assert "Evaluating the checkpoint's 4 edits again; data.path is not used" in capsys.readouterr().out
