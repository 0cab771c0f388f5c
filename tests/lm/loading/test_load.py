"""Tests that loaded models are ready to be edited, and that bad models raise clear errors with a fix."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from editlab.errors import EditLabError, UserError
from editlab.lm.loading import load as module
from editlab.lm.loading.load import load
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """Copy a model's folder, so that a test can damage it."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_folder_is_ready_to_be_edited(saved, dtype):
    before = torch.get_rng_state()
    model, tokenizer = load(str(saved), dtype)
    assert torch.equal(before, torch.get_rng_state())
    expected = tiny_model("llama").to(dtype).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("Paris", return_offsets_mapping=True)["offset_mapping"][-1][1] == len("Paris")


def test_tied_weights_do_not_count_as_missing(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load(str(tmp_path), torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_built_in_name_is_fetched(saved, monkeypatch):
    monkeypatch.setitem(module.BUILTIN, "smollm2-135m", lambda: saved)
    model, _ = load("smollm2-135m", torch.float32)
    assert model.config.hidden_size == 32


def test_a_user_home_is_expanded(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load("~/tiny", torch.float32)[0].config.model_type == "llama"


def test_the_code_of_a_model_is_never_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match="needs custom code") as caught:
        load(str(copy), torch.float32)
    one_sentence(caught)


class TestWrongFolders:
    """Each damaged folder raises an error that names its fault."""

    def test_no_config(self, copy):
        (copy / "config.json").unlink()
        with pytest.raises(UserError, match=r"has no config\.json: name one that"):
            load(str(copy), torch.float32)

    def test_not_json(self, copy):
        (copy / "config.json").write_text("{oops")
        with pytest.raises(UserError, match=r"cannot be loaded: .*not a valid JSON file") as caught:
            load(str(copy), torch.float32)
        one_sentence(caught)

    def test_unknown_architecture(self, copy):
        (copy / "config.json").write_text('{"model_type": "perceptron"}')
        with pytest.raises(UserError, match=r"cannot be loaded: .*perceptron") as caught:
            load(str(copy), torch.float32)
        one_sentence(caught)

    def test_no_weights(self, copy):
        (copy / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"cannot be loaded: .*model\.safetensors") as caught:
            load(str(copy), torch.float32)
        one_sentence(caught)

    def test_broken_weights(self, copy):
        (copy / "model.safetensors").write_bytes(b"123")
        with pytest.raises(UserError, match=r"cannot be loaded: .*header too small") as caught:
            load(str(copy), torch.float32)
        one_sentence(caught)

    def test_a_missing_tensor_is_not_initialized(self, copy):
        weights = load_file(copy / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"incomplete \(model\.norm\.weight is missing\)"):
            load(str(copy), torch.float32)

    @pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
    def test_no_tokenizer(self, tmp_path, family):
        tiny_model(family).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"tokenizer.*choose a model that comes with a fast") as caught:
            load(str(tmp_path), torch.float32)
        one_sentence(caught)

    def test_a_slow_tokenizer(self, saved, monkeypatch):
        slow = tiny_tokenizer()
        monkeypatch.setattr(type(slow), "is_fast", False)
        with pytest.raises(UserError, match="only a slow tokenizer"):
            load(str(saved), torch.float32)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.T5Config(), "encoder-decoder model"),
        (transformers.BartConfig(), "encoder-decoder model"),
        (transformers.BertConfig(), "not a causal language model"),
        (transformers.ViTConfig(), "not a causal language model"),
    ],
)
def test_other_kinds_are_rejected_before_their_weights_are_read(tmp_path, config, kind):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{kind}.*\({config.model_type}\): choose"):
        load(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 3}, "by an unnamed method"),
    ],
)
def test_quantized_weights_are_rejected_before_they_are_read(copy, quantization, kind):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (copy / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(UserError, match=rf"are quantized \({kind}\).*: name the model in full precision") as caught:
        load(str(copy), torch.float32)
    one_sentence(caught)


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/folder", "a/b/c", "two words", "~/nowhere at all"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(UserError, match=r"there is no folder .* built-in model") as caught:
        load(name, torch.float32)
    one_sentence(caught)


def test_a_file_that_is_not_gguf_is_rejected(saved):
    with pytest.raises(UserError, match="is a file, but not a GGUF file: name a built-in"):
        load(str(saved / "config.json"), torch.float32)


def hub_error(kind: type[Exception]) -> Exception:
    answer = SimpleNamespace(headers={}, request=None, status_code=404, text="")
    return kind("told at length\nover many lines", response=answer)


HUB = [
    (
        hub_error(hub.RepositoryNotFoundError),
        UserError,
        "neither a folder nor a hub model 'org/name'.*spelling",
    ),
    (hub_error(hub.GatedRepoError), UserError, "'org/name' is gated: accept its terms"),
    (hub_error(hub.RemoteEntryNotFoundError), UserError, "holds no model"),
    (hub_error(hub.HfHubHTTPError), EditLabError, r"the hub refused 'org/name' \(told at length\): try"),
    (hub.LocalEntryNotFoundError("offline"), EditLabError, "hub cannot be reached.*smollm2-135m"),
    (hub.OfflineModeIsEnabled("offline"), EditLabError, "hub cannot be reached.*smollm2-135m"),
    (OSError(errno.ENOSPC, "No space left"), EditLabError, "disk is full.*HF_HOME"),
]


@pytest.mark.parametrize("step", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
@pytest.mark.parametrize(("cause", "kind", "says"), HUB)
def test_errors_of_the_hub_are_explained(saved, monkeypatch, step, cause, kind, says):
    """The error is raised as in transformers: an OSError of several lines, caused by the hub's own error."""
    real = {name: getattr(transformers, name).from_pretrained for name in ("AutoConfig", "AutoModelForCausalLM")}

    def fail(*args, **kwargs):
        raise OSError("We could not\ndo it") from cause

    for name, function in real.items():
        monkeypatch.setattr(
            getattr(module, name), "from_pretrained", lambda _, f=function, **kwargs: f(saved, **kwargs)
        )
    monkeypatch.setattr(getattr(module, step), "from_pretrained", fail)
    with pytest.raises(kind, match=says) as caught:
        load("org/name", torch.float32)
    one_sentence(caught)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is not None
