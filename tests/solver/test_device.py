"""The device of the closed form: by the accelerator's abilities, and by the user's setting."""

from types import SimpleNamespace

import pytest
import torch

from editlab.errors import UserError
from editlab.solver.device import AUTO, choose_device, metric_bytes, require_setting

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda:0", "mps:0"))
SHAPES = [(14336, 14336)] * 5  # Llama-3-8B: five factors of 1.64 GB


@pytest.fixture
def gpu(monkeypatch):
    """Make torch.cuda describe a made-up GPU."""

    def describe(major, minor, units):
        properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=units)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return describe


def test_a_metric_has_numbers_of_eight_bytes():
    """A matrix [d_k, d_k], and one block for each of five experts."""
    assert metric_bytes([(3, 3), (5, 2, 2)]) == 8 * (9 + 20)


@pytest.mark.parametrize(
    ("capability", "units", "room", "expected"),
    [
        ((9, 0), 132, 60 << 30, CUDA),  # H100
        ((8, 9), 128, 60 << 30, CUDA),  # RTX 4090: two units a multiprocessor, and many of these
        ((7, 5), 14, 60 << 30, CPU),  # GTX 1650: 28 units in all
        ((9, 0), 132, 8 << 30, CPU),  # the weights leave too little
        ((9, 0), 132, None, CUDA),
    ],
)
def test_auto_weighs_speed_and_memory_of_a_gpu(gpu, capability, units, room, expected):
    gpu(*capability, units)
    assert choose_device(AUTO, CUDA, SHAPES, room) == expected


def test_auto_is_the_cpu_without_float64():
    assert choose_device(AUTO, MPS, [(8, 8)], None) == choose_device(AUTO, CPU, [(8, 8)], None) == CPU


@pytest.mark.parametrize("setting", ["cpu", "cuda:0"])
def test_a_given_device_is_used(setting):
    require_setting(setting)
    assert choose_device(setting, MPS, [(8, 8)], 0) == torch.device(setting)


@pytest.mark.parametrize("setting", ["mps", "toaster", ""])
def test_a_device_without_float64_is_refused(setting):
    with pytest.raises(UserError, match=r"model\.solver_device is"):
        require_setting(setting)
