"""Names of recipes on the command line of the Trainer's verbs."""

import logging

import pytest
import yaml

from editlab.cli.main import main
from editlab.cli.training import with_paths
from editlab.errors import UserError
from editlab.utils.shipped import shipped_folder

ROME, GPT2 = (str(shipped_folder() / name) for name in ("rome.yaml", "models/gpt2-xl.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_names_after_config_become_paths():
    given = ["fit", "--config", "rome", "-c", "gpt2-xl", "--config=models/gpt2-xl", "-c=rome", "--data.path", "rome"]
    assert with_paths(given) == [
        "fit", "--config", ROME, "-c", GPT2, f"--config={GPT2}", f"-c={ROME}", "--data.path", "rome",
    ]  # fmt: skip
    assert with_paths(["fit", "--conf", "rome", "--c", "rome"]) == ["fit", "--conf", ROME, "--c", "rome"]
    assert with_paths(["fit", "--config"]) == ["fit", "--config"]
    assert with_paths(["fit", "--config", "targets"]) == ["fit", "--config", "targets"]  # an experiment


def test_a_file_without_an_end_is_refused():
    with pytest.raises(UserError, match="is a device or a socket"):
        with_paths(["fit", "--config=/dev/zero"])


def test_a_printed_configuration_holds_no_message(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "rome", "--config", "gpt2-xl", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)["model"]
    assert config["method"]["class_path"].endswith(".ROME")  # of the recipe
    assert config["layers"] == [13, 14, 15, 16, 17]  # of the preset, which is the later one


def test_an_unknown_name_gets_the_closest_ones(capsys):
    assert main(["fit", "--config", "emmet_reply"]) == 2
    said = capsys.readouterr().err
    assert "emmet_reply' does not exist: check --config; did you mean emmet_replay" in said
    assert main(["fit", "--config", "targets"]) == 2
    assert "targets is the name of an experiment, for editlab sweep targets." in capsys.readouterr().err


def test_the_log_says_which_file_was_taken(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("editlab"), "propagate", True)
    (tmp_path / "rome.yaml").write_text("")
    with caplog.at_level(logging.INFO, "editlab"):
        assert with_paths(["--config", "rome"]) == ["--config", "rome.yaml"]
    assert "the file rome.yaml of this folder, and not the recipe that ships" in caplog.text
