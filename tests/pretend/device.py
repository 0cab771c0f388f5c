"""A simulated accelerator on a machine without one, for tests of errors that occur only on a GPU or a Mac.

    with pretend("cuda") as device:       # or "mps", which has no float64
        model.to(device.name)             # runs on the CPU, and raises the errors of the accelerator
    device.counts.waits                   # lines at which the host would have waited for it

How it works: a tensor on the device is a wrapper around a CPU tensor (:class:`~tests.pretend.tensor.PretendTensor`).
For C++ code it is on PyTorch's PrivateUse1 device, whose Python backend (torch 2.10 and later) makes factories,
``.to()`` and autograd treat it as a separate device. A dispatch mode intercepts every operation, checks it
(:mod:`~tests.pretend.rules`), counts it (:mod:`~tests.pretend.counts`) and runs it on the contents. A function mode
translates names: Python code uses ``cuda:0``, and C++ code its own name.

It does not simulate the precision and the errors of real kernels, memory, streams, several devices, or the device of
tensors in a saved file (they are saved as CPU tensors).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend import rules
from tests.pretend.counts import Counts
from tests.pretend.tensor import NAME, Call, PretendTensor, is_pretend, tensors_in, with_tensors

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch has the required Python backend."""
REASON = "this PyTorch has no Python backend for PrivateUse1 (it came with 2.10)"

_INTERNAL = f"{NAME}:0"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@dataclass
class Accelerator:
    """The simulated device."""

    name: torch.device
    float64: bool
    tf32: bool = False
    """Whether factors of float32 matrix products are rounded to TF32's 10 bits of mantissa."""
    counts: Counts = field(default_factory=Counts)
    short_of_memory: Any = None
    """Called with each :class:`Call` before it runs; it may raise the device's error for insufficient memory."""


_active: list[Accelerator] = []


# ---- operations ---------------------------------------------------------------------------------------------------


def execute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation, count it, run it on the contents, and wrap its results."""
    call = Call(function, args, kwargs)
    accelerator = _active[-1] if _active else None
    if accelerator is not None:
        if accelerator.short_of_memory is not None:
            accelerator.short_of_memory(call)
        rules.check(call, accelerator.name)
        accelerator.counts.add(call)
    plain_args, plain_kwargs = _on_contents(call, accelerator is not None and accelerator.tf32)
    with torch.no_grad():
        results = function(*plain_args, **plain_kwargs)
    wrappers = {id(x.content): x for x in call.on_device}
    given = {id(x) for x in call.on_cpu}

    def wrap(x: Tensor) -> Tensor:
        if isinstance(x, PretendTensor):
            return x
        if id(x) in wrappers:  # it was written into
            return wrappers[id(x)]
        if accelerator is not None and not accelerator.float64 and id(x) not in given:
            rules.check_types(call, x, accelerator.name)
        return PretendTensor(x) if call.result_on_device and id(x) not in given else x

    return with_tensors(results, wrap)


def _on_contents(call: Call, tf32: bool) -> tuple[Any, dict[str, Any]]:
    """Return the arguments with contents in place of wrappers, and with the CPU as the device."""
    kwargs = dict(call.kwargs)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs |= {name: False for name in ("pin_memory", "non_blocking") if kwargs.get(name)}

    def content(x: Tensor) -> Tensor:
        if not isinstance(x, PretendTensor):
            return x
        rounded = tf32 and call.name in _PRODUCTS and x.dtype == torch.float32
        return _rounded_to_tf32(x.content) if rounded else x.content

    return with_tensors(call.args, content), with_tensors(kwargs, content)


def _rounded_to_tf32(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class _Dispatch(TorchDispatchMode):
    """Intercepts operations without a :class:`PretendTensor` argument: factories, and copies to the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # in inference mode composite operations are not decomposed
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        ours = any(isinstance(x, PretendTensor) for x in tensors_in((args, kwargs)))
        if ours or is_pretend(kwargs.get("device")):
            return execute(function, args, kwargs)
        return function(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """``scaled_dot_product_attention`` as one operation, because C++ selects its kernel by known devices."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Tensor:
        with torch.enable_grad():
            inputs = [t.content.detach().requires_grad_() for t in (query, key, value)]
            out = torch._C._nn.scaled_dot_product_attention(*inputs, None if mask is None else mask.content, **options)
        ctx.graph = inputs, out
        _active[-1].counts.launch(1 if mask is None else 3)  # the mask is converted to numbers and padded
        return PretendTensor(out.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, out = ctx.graph
        _active[-1].counts.launch(2)
        found = torch.autograd.grad(out, inputs, gradients[0].content)
        return (*map(PretendTensor, found), None, None)


def _attend(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    inputs = [t for t in (query, key, value, attn_mask) if t is not None]
    if not all(isinstance(t, PretendTensor) for t in inputs):
        raise rules.DeviceRuleError("scaled_dot_product_attention: tensors on two devices")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError("Expected attn_mask dtype to be bool or to match query dtype")
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Attention.apply(query, key, value, attn_mask, options)


# ---- names --------------------------------------------------------------------------------------------------------


class _Names(TorchFunctionMode):
    """Makes Python code use the accelerator's name, and C++ code the internal name."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator, kind = accelerator, accelerator.name.type
        self.kind = kind
        self.answers = {
            Tensor.device.__get__: lambda t: accelerator.name,
            Tensor.is_cuda.__get__: lambda t: kind == "cuda",
            Tensor.is_mps.__get__: lambda t: kind == "mps",
            Tensor.cuda: lambda t, *a, **k: t,
            Tensor.tolist: self._listed,
            Tensor.numpy: self._no_numpy,
            Tensor.__array__: self._no_numpy,
            scaled_dot_product_attention: _attend,
            torch._C._nn.scaled_dot_product_attention: _attend,
        }
        self.about_names = {torch.is_autocast_enabled, torch.get_autocast_dtype}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PretendTensor) and function in self.answers:
            return self.answers[function](*args, **kwargs)
        if function is torch.device:
            return function(*args, **kwargs)
        if function is Tensor.cuda:
            return first.to(_INTERNAL)
        if function not in self.about_names:
            args = tuple(map(self._internal, args))
            kwargs = {name: self._internal(x) for name, x in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and is_pretend(kwargs.get("device")):
            # C++ would fill the tensor on the CPU and copy it without calling any mode.
            needs_gradient = kwargs.pop("requires_grad", False)
            made = function(*args, **{**kwargs, "device": "cpu"}).to(_INTERNAL)
            return made.requires_grad_(needs_gradient) if needs_gradient else made
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, PretendTensor):
            args = (first, _with_tensors(args[1]), *args[2:])
        return function(*args, **kwargs)

    def _internal(self, x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == self.kind:
            return torch.device(_INTERNAL)
        return _INTERNAL if isinstance(x, str) and x.partition(":")[0] == self.kind else x

    def _listed(self, tensor: PretendTensor) -> Any:
        self.accelerator.counts.wait("read")
        return tensor.content.tolist()

    def _no_numpy(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"can't convert {self.accelerator.name} device type tensor to numpy. Use Tensor.cpu()")


def _with_tensors(index: Any) -> Any:
    """Convert lists in an index to tensors on the device, which C++ would make without calling any mode."""
    if isinstance(index, list):
        return torch.tensor(index, dtype=None if index else torch.long).to(_INTERNAL)
    return tuple(map(_with_tensors, index)) if isinstance(index, tuple) else index


# ---- the device as a whole ----------------------------------------------------------------------------------------


@contextmanager
def pretend(
    kind: str = "cuda", *, float64: bool | None = None, tf32: bool = False, memory: int = 24 << 30
) -> Iterator[Accelerator]:
    """Simulate one accelerator inside the ``with``.

    Args:
        kind: ``cuda`` or ``mps``.
        float64: whether it supports float64; default: all except ``mps`` do.
        tf32: whether it rounds the factors of float32 matrix products.
        memory: bytes of memory that ``torch.cuda`` reports as total and as free.
    """
    _register()
    has_float64 = kind != "mps" if float64 is None else float64
    accelerator = Accelerator(torch.device(kind, 0), has_float64, tf32)
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for owner, functions in _stand_ins(kind, memory).items():
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, function, create=True))
        # The modes are active in one thread only, so transformers must not load weights in other threads.
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        # PyTorch's backward threads belong to the devices that existed when the first one started.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a module's weights become wrappers in place
        stack.enter_context(_Dispatch())
        stack.enter_context(_Names(accelerator))
        _active.append(accelerator)
        stack.callback(_active.pop)
        yield accelerator


_registered: list[Any] = []


def _register() -> None:
    """Register the device with PyTorch, once for each process."""
    if _registered:
        return
    import torch._dynamo  # it lists the functions of torch.cuda, before they are replaced
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    get_torch_obj_rule_map()

    class Module(backend_registration._DummyBackendModule):
        """The module that PyTorch expects as ``torch.pretend``."""

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.zeros(16, dtype=torch.uint8)

        def set_rng_state(self, state: Tensor, device: Any = None) -> None:
            assert state.device.type == "cpu"

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    _registered.append(True)


def _stand_ins(kind: str, memory: int) -> dict[Any, dict[str, Any]]:
    """Return for each module or class replacements of the functions that Lightning, transformers or editlab call."""

    def state(*args: Any) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    yes = lambda *args, **kwargs: True
    if kind == "mps":
        from lightning.fabric.accelerators.mps import MPSAccelerator as FabricMPS
        from lightning.pytorch.accelerators import MPSAccelerator

        found = {"is_available": staticmethod(lambda: True)}
        torch_mps = {"empty_cache": nothing, "get_rng_state": state, "set_rng_state": nothing, "manual_seed": nothing}
        available = {"is_available": lambda: True}
        return {FabricMPS: found, MPSAccelerator: found, torch.mps: torch_mps, torch.backends.mps: available,
                torch: {"Event": mock.MagicMock()}}  # fmt: skip
    properties = SimpleNamespace(
        name="pretend", total_memory=memory, major=9, minor=0, multi_processor_count=132, is_integrated=False
    )
    return {
        torch: {"Event": mock.MagicMock()},
        torch.cuda: {
            "is_available": yes, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
            "is_initialized": yes, "init": nothing, "_lazy_init": nothing, "synchronize": nothing,
            "get_device_properties": lambda *a: properties, "get_device_capability": lambda *a: (9, 0),
            "get_device_name": lambda *a: "pretend", "mem_get_info": lambda *a: (memory, memory),
            "empty_cache": nothing, "max_memory_allocated": lambda *a: 1 << 20,
            "memory_allocated": lambda *a: 1 << 20, "reset_peak_memory_stats": nothing,
            "get_rng_state": state, "set_rng_state": nothing, "get_rng_state_all": lambda: [state()],
            "set_rng_state_all": nothing, "manual_seed": nothing, "manual_seed_all": nothing,
            "is_bf16_supported": yes, "is_current_stream_capturing": lambda: False,
        },
    }  # fmt: skip
