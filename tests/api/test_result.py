"""The result of ``edit_model``, read like a run; and its delta against the weights themselves."""

import inspect
import logging

import pytest
import torch

import editlab
from editlab import edit_model
from editlab.api.surroundings import root_folder
from editlab.callback import EditCallback
from editlab.editor import SequentialEditor
from editlab.errors import UserError
from editlab.runs import summary
from editlab.runs.delta import Delta
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder
from tests.test_api import PLAIN, SMALL
from tests.tiny import tiny_model, tiny_tokenizer


class Logged(EditCallback):
    """Writes an event for each batch."""

    def on_edit_done(self, trainer, editor, outcome):
        EventLog(run_folder(trainer) / "test_events.jsonl").append({"step": outcome.plan.step})


def test_every_setting_of_the_editor_is_an_argument_with_a_type():
    own, editor = inspect.signature(edit_model).parameters, inspect.signature(SequentialEditor).parameters
    assert set(editor) - set(own) == {"device_map"}  # the model is loaded already
    assert not [name for name, one in own.items() if one.annotation is one.empty or one.kind is one.VAR_KEYWORD]
    recommended = {"language_model", "layers", "method", "values", "moments", "contexts", "evaluation", "post_steps",
                   "preserve_prompt_tokens"}  # fmt: skip
    for name in set(editor) & set(own) - recommended:
        assert own[name].default == editor[name].default, name


def test_a_misspelt_setting_is_no_setting():
    with pytest.raises(TypeError, match="unexpected keyword argument 'valus'"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, valus=1)


def test_the_frames_of_a_folder_are_those_of_its_run(tmp_path):
    pandas = pytest.importorskip("pandas")
    _, result = edit_model(
        tiny_model("llama"),
        tiny_tokenizer(),
        PLAIN,
        folder=tmp_path,
        callbacks=[Logged()],
        **{**SMALL, "batch_size": 1},
    )
    run = editlab.Run(result.folder)
    assert list(result.metrics.index) == [1, 2]
    for name in ("metrics", "outcomes", "events"):
        pandas.testing.assert_frame_equal(getattr(result, name), getattr(run, name))
    assert result.events.to_dict("list") == {"log": ["test"] * 2, "step": [0, 1]}
    assert str(result) == str(run)
    assert (result.before, result.immediate, result.retained) == (run.before, run.immediate, run.retained)


def test_frames_without_a_folder(edited):
    pytest.importorskip("pandas")
    result = edited.result
    assert result.folder is None
    assert list(result.metrics.index) == [2]
    row = result.metrics.loc[2]
    assert {f"retained/{name}": value for name, value in result.retained.items()} == {
        name: row[name] for name in row.index if name.startswith("retained/")
    }
    assert list(result.outcomes["subject"]) == ["France", "Brazil"]
    assert result.outcomes["retained/hit"].mean() == result.retained["accuracy"]
    assert list(result.events.columns) == ["log", "step"]


def test_the_delta_is_the_difference_of_the_weights(edited, tmp_path):
    delta = edited.result.delta()
    assert (delta.language_model, delta.layers, delta.dtype) == ("LlamaForCausalLM", [1, 2], torch.float32)
    assert [(edit.subject, edit.fate) for edit in delta.history.edits] == [("France", "kept"), ("Brazil", "kept")]
    delta.save(tmp_path / "delta.safetensors")
    model = tiny_model("llama")
    Delta.load(tmp_path / "delta.safetensors").put_on(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, edited.model.get_parameter(name)), name


def test_after_a_revert_there_is_nothing_to_save():
    _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **SMALL)
    assert result.summary["facts"]["path"] == "facts given from Python"
    result.revert()
    for method in ("delta", "changes"):
        with pytest.raises(UserError, match=rf"taken out by revert\(\): call {method}\(\) before it"):
            getattr(result, method)()


def test_no_message_names_a_file_that_is_removed(caplog):
    caplog.set_level("INFO")
    log = logging.getLogger(summary.__name__)
    with root_folder(None) as folder:
        assert folder.is_dir()
        log.info("tables in %s", folder)
        log.warning("this matters")
    assert not folder.exists()
    log.info("of another run")
    assert [record.message for record in caplog.records] == ["this matters", "of another run"]
