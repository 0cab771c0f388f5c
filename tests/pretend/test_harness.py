"""Tests of the simulated accelerator itself: the operations that it rejects, allows and counts."""

import pytest
import torch

from tests.pretend.device import AVAILABLE, REASON, pretend

pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)


def test_a_tensor_computes_as_on_the_cpu_and_reports_its_device():
    with pretend() as device:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        y = x.to("cuda").requires_grad_()
        assert (y.device, y.is_cuda, y.cpu().device.type) == (device.name, True, "cpu")
        y.square().sum().backward()
        assert torch.equal(y.grad.cpu(), 2 * x)
        assert torch.zeros(2, device="cuda:0").device == device.name
        assert torch.tensor([1.0], device=device.name).device == device.name


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, there: here + there,
        lambda here, there: here @ there,
        lambda here, there: here[there.long().cuda()],
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: there.index_put((torch.tensor([0]),), here[:1]),
        lambda here, there: here.normal_(generator=torch.Generator()),
        lambda here, there: torch.randint(2, (3,), device="cuda", generator=torch.Generator()),
    ],
)
def test_operations_that_cuda_rejects_are_rejected(operation):
    with pretend():
        here, there = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        if operation.__code__.co_names[:1] == ("long",):  # an index on the device into a CPU tensor
            here, there = there, here
        with pytest.raises(RuntimeError):
            operation(here, there)


def test_operations_that_cuda_allows_are_allowed():
    with pretend():
        here = torch.ones(3, 3, device="cuda")
        for result in (here * torch.tensor(2.0), here[torch.tensor([0, 1])], here + 1, torch.where(here > 0, here, 0)):
            assert result.is_cuda
        here[0] = torch.tensor(5.0)
        here.copy_(torch.zeros(3, 3))
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()


def test_mps_has_no_float64():
    with pretend("mps"):
        x = torch.ones(3, device="mps")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.ones(3, dtype=torch.float64).to("mps")
        with pytest.raises(TypeError, match="float64"):  # the cast would come before the copy
            x.to("cpu", torch.float64)
        assert x.cpu().double().dtype == torch.float64


def test_waits_and_launches_are_counted():
    with pretend() as device:
        counts = device.counts
        x = torch.ones(4, device="cuda")

        def waits(operation):
            counts.reset()
            operation()
            return sorted(key.partition("(")[2].rstrip(")") for key in counts.waits.elements())

        assert waits(lambda: x + x[:1]) == []
        assert counts.launches.total() == 1
        assert waits(lambda: float(x.sum())) == ["read"]
        assert waits(lambda: x.tolist()) == ["read"]
        assert waits(lambda: x[x > 0]) == ["shape"]
        assert waits(lambda: x.cpu()) == ["to host"]
        assert waits(lambda: torch.ones(2).to("cuda")) == ["to device"]
        assert waits(lambda: torch.ones(2).to("cuda", non_blocking=True)) == []
        assert waits(lambda: x[[0, 1]]) == ["to device"]


def test_tf32_rounds_the_factors_of_products_to_ten_bits():
    with pretend(tf32=True):
        factor = torch.tensor([[1 + 2.0**-12]], device="cuda")
        assert float(factor @ torch.ones(1, 1, device="cuda")) == 1.0
        assert float(factor * 1) == 1 + 2.0**-12


def test_pytorch_is_unchanged_afterwards():
    before = torch.cuda.is_available()
    with pretend():
        pass
    assert torch.cuda.is_available() == before
    assert torch.ones(2).sum() == 2
