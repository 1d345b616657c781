"""Which implementation of an op runs, for which GPU its launches are chosen, and the one import of Triton.

`TRITIUM_BACKEND=auto|triton|torch`: auto is Triton for tensors on a GPU and torch for tensors on a CPU. `triton` on
CPU tensors needs Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported). Kernels compute in fp32:
a call with an fp64 tensor takes the torch path under every setting. `tritium doctor` says which op uses what, and why.

`TRITIUM_DEBUG=1` checks on the GPU what can't be checked there without waiting for it: see `device_assert`.

Files with kernels write `from tritium.kernels.backend import tl, triton`: where triton is not installed (it exists on
Linux only) the two names are stand-ins, with which kernels can be defined but not launched.
"""

import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "triton", "torch")
HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:

    class triton:
        jit = staticmethod(lambda fn=None, **_: fn or (lambda fn: fn))

    class tl:
        constexpr = staticmethod(lambda value: value)


@dataclass(frozen=True)
class Target:
    """A GPU as launch configurations see it: how Triton names it, and the shared memory that one block may have."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # compute capability × 10, or AMD's name
    warp_size: int
    shared_bytes: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_86", "cuda", 86, 32, 99 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("sm_120", "cuda", 120, 32, 99 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; for a CPU, where kernels are interpreted, sm_80."""
    if device.type == "cpu":
        return TARGETS["sm_80"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], "hip", properties.gcnArchName, 64, 64 * 1024)
    arch = 10 * properties.major + properties.minor
    return Target(f"sm_{arch}", "cuda", arch, 32, properties.shared_memory_per_block_optin)


def require_one_device(x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError for tensors on several devices, and for what is no tensor."""
    for other in others:
        if other is not None and not isinstance(other, Tensor):
            raise ValueError(f"got a {type(other).__name__} ({str(other)[:60]}), wanted a tensor on {x.device}")
        if other is not None and other.device != x.device:
            raise ValueError(f"tensors on {x.device} and on {other.device}: move them to one device")


def use_triton(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op with a Triton kernel should launch it for these tensors. Called outside the registered op.

    Raises: ValueError for tensors on several devices and for an unknown TRITIUM_BACKEND; RuntimeError if Triton is
    asked for and can't run.
    """
    require_one_device(x, *others)
    choice = os.environ.get("TRITIUM_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"TRITIUM_BACKEND={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and not (HAS_TRITON and x.is_cuda)):
        return False
    if any(each is not None and each.dtype == torch.float64 for each in (x, *others)):
        return False
    if not HAS_TRITON:
        raise RuntimeError("TRITIUM_BACKEND=triton, but triton is not installed: pip install triton, or unset it")
    if x.device.type == "cpu":
        from tritium.kernels import interpreter

        interpreter.require()
    return True


@functools.cache
def fp32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of many rows faster in fp32 than in `dtype`.

    Told by its instructions and not by a trial, so that all processes of a run agree, and a resumed one with itself.
    avx512_bf16 on Intel's without AMX has half the rate of fp32 (measured: 82 against 150 GFLOP/s a core), on AMD's
    twice that rate; without either, bf16 is emulated. Other processors are taken to be fast in bf16.
    """
    if dtype == torch.float32:
        return True
    if dtype != torch.bfloat16 or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if torch.cpu._is_amx_tile_supported():
        return False
    information = Path("/proc/cpuinfo")
    vendor = information.read_text() if information.exists() else platform.processor()
    return not (torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in vendor)


def _first_tensor(arguments: tuple) -> Tensor | None:
    listed = (value if isinstance(value, list | tuple) else (value,) for value in arguments)
    return next((x for values in listed for x in values if isinstance(x, Tensor)), None)


def without_autocast(function: Callable) -> Callable:
    """`function`, not changed by autocast: the dtypes of an op are those of its arguments, and are chosen inside."""

    @functools.wraps(function)
    def run(*arguments, **options):
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments, **options)
        first = _first_tensor(arguments)
        device = "cpu" if first is None else first.device.type  # None: the gradients of outputs that nobody used
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)

    return run


def graph_break(function: Callable) -> Callable:
    """`function`, never traced: `torch.compiler.disable`, whose import takes a second, where something is compiled."""

    @functools.wraps(function)
    def run(*arguments):
        if torch.compiler.is_compiling():
            return torch._dynamo.disable(function)(*arguments)
        return function(*arguments)

    return run


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, which torch.compile traces for distinct tensors only: a tensor that comes again, as in
    swiglu(x, x), comes as a view."""
    if torch.compiler.is_compiling():
        again = [isinstance(x, Tensor) and any(x is y for y in arguments[:i]) for i, x in enumerate(arguments)]
        arguments = [x.view_as(x) if repeated else x for x, repeated in zip(arguments, again, strict=True)]
    return function.apply(*arguments)


def operator(name: str, outputs: Callable, mutates_args: Sequence[str] = ()) -> Callable:
    """Register a function with launches as the operator tritium::name.

    `outputs` takes the same arguments and allocates what the function returns: torch.compile calls it with tensors that
    have no memory. The body runs without autocast, on the device of its first tensor: Triton launches on the current
    one. Gradients are the business of who calls it.
    """

    def define(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def run(*arguments):
            with torch.cuda.device_of(_first_tensor(arguments)):
                return function(*arguments)

        made = torch.library.custom_op(f"tritium::{name}", without_autocast(run), mutates_args=mutates_args)
        made.register_fake(outputs)
        return made

    return define


def device_assert(holds: Callable[[], Tensor], message: str) -> None:
    """With TRITIUM_DEBUG=1, stop the program where `holds()` (a bool scalar on a GPU) is false; no wait."""
    if os.environ.get("TRITIUM_DEBUG") == "1":
        torch._assert_async(holds(), message)
