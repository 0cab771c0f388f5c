"""Tests of the size of weights, of the free memory, and of work that does not fit into memory."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from editlab.errors import EditLabError
from editlab.lm import memory
from editlab.lm.loading.load import load
from editlab.lm.memory import by_halves, free_memory, lacks_memory, require_memory, spare_gpu_memory, weight_bytes
from tests.ggufs import write_gguf
from tests.tiny import FAMILIES, OTHERS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_weights_are_counted_as_stored_in_the_model(family, dtype):
    model = tiny_model(family).to(dtype)  # it has each parameter once, also tied ones
    rng = torch.get_rng_state()
    assert weight_bytes(model.config, dtype) == sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("dtype", "device", "fix"),
    [
        (torch.float32, "cpu", "set trainer.precision to bf16-true (2.0 GiB), or choose a smaller model"),
        (torch.bfloat16, "cpu", "2.9 GiB of memory are free: choose a smaller model"),
        (
            torch.bfloat16,
            "cuda:0",
            "of the memory of cuda:0 are free: distribute it by model.device_map auto, or",
        ),
    ],
)
def test_insufficient_memory_raises_an_error_with_a_fix(monkeypatch, dtype, device, fix):
    monkeypatch.setattr(memory, "free_memory", lambda device: int(2.9 * GIB))
    require_memory("it", int(2.9 * GIB), dtype, torch.device(device))
    with pytest.raises(EditLabError) as caught:
        require_memory("it", 4 * GIB, dtype, torch.device(device))
    assert type(caught.value) is EditLabError
    assert str(caught.value).startswith("the weights of it take 4.0 GiB in ")
    assert fix in str(caught.value)


def test_unknown_free_memory_raises_no_error(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    require_memory("it", 2**60, torch.float32, CPU)


def test_a_gguf_file_takes_four_bytes_a_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    model = write_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=True)
    needed = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 1)
    with pytest.raises(EditLabError, match=r"the weights of .*tiny\.gguf take"):
        load(str(tmp_path / "tiny.gguf"), torch.bfloat16)
    assert not (tmp_path / "cache" / "models").exists() or not list((tmp_path / "cache" / "models").iterdir())
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    load(str(tmp_path / "tiny.gguf"), torch.bfloat16)


def test_the_target_device_must_also_have_enough_memory(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**40 if device.type == "cpu" else 1000)
    load(str(tmp_path), torch.float32)
    load(str(tmp_path), torch.float32, device_map="cpu", device=torch.device("cuda:0"))
    with pytest.raises(EditLabError, match="of the memory of cuda:0 are free"):
        load(str(tmp_path), torch.float32, device=torch.device("cuda:0"))


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of which 3 GiB are available and 1 GiB of swap is free, and the files of its control group."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB, available=3 * GIB, free=GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=2 * GIB, free=GIB))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_available_memory_and_swap_are_free(system):
    assert free_memory(CPU) == 4 * GIB


@pytest.mark.parametrize(("limit", "free"), [("max", 4 * GIB), (str(100 * GIB), 4 * GIB), (str(2 * GIB), GIB)])
def test_the_limit_of_a_container_counts(system, limit, free):
    (system / "memory.max").write_text(limit + "\n")
    (system / "memory.current").write_text(f"{3 * GIB // 2}\n")
    (system / "memory.stat").write_text(f"anon {GIB}\ninactive_file {GIB // 2}\n")
    assert free_memory(CPU) == free


def test_this_machine_reports_free_memory():
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total + psutil.swap_memory().total


def test_other_devices_report_no_free_memory(system):
    assert free_memory(torch.device("mps")) is None


def test_work_that_does_not_fit_is_done_by_halves(caplog):
    seen = []

    def work(items):
        seen.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * item for item in items]

    assert by_halves(work, range(10)) == [10 * item for item in range(10)]
    assert seen == [10, 5, 2, 3, 5, 2, 3]
    assert "Memory is insufficient for 10 rows at once" in caplog.text


@pytest.mark.parametrize(("error", "items"), [(torch.OutOfMemoryError("out"), 1), (ValueError("other"), 8)])
def test_errors_that_halving_cannot_fix_are_raised(error, items):
    calls = []

    def work(some):
        calls.append(len(some))
        raise error

    with pytest.raises(type(error), match=str(error)):
        by_halves(work, range(items))
    assert calls == [items]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    ],
)
def test_errors_of_insufficient_memory_are_recognized(error):
    assert lacks_memory(error)


def test_other_errors_are_not_taken_for_insufficient_memory():
    assert not lacks_memory(RuntimeError("shapes do not fit"))
    assert not lacks_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_model_on_the_cpu_has_no_spare_gpu_memory():
    assert spare_gpu_memory(tiny_model("llama")) is None
