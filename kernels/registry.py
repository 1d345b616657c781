"""The list of ops. Tests, benchmarks, the doctor and the README's table read it; an op's file adds its own entry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tritium.kernels.backend import Target

Shape = dict[str, int]  # the letters of the README (T, E, V, …) and their values


@dataclass(frozen=True)
class Launch:
    """One compilation of a Triton kernel that a real launch would ask for; the doctor compiles it for each target.

    `signature` maps argument names to Triton types ("*bf16", "i64", "fp32"); `constexprs` maps the rest to values;
    `divisible` names the arguments that are multiples of 16 in an aligned launch (pointers and strides).
    """

    kernel: Any  # the @triton.jit function
    name: str  # e.g. "forward E=4096 bf16"
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2


def _none(target: Target) -> tuple[Launch, ...]:
    return ()


@dataclass(frozen=True)
class OpSpec:
    """What is known about an op.

    `function` is the public one and `reference` the same in plain torch, right in any dtype. `example(shape, dtype,
    device)` gives `(args, kwargs)` for both; tensors among `args` that require a gradient are the differentiable
    ones. `flops` and `bytes` are what a call on `shape` must spend and move at the least, forward, with elements of
    `itemsize` bytes; `backward_flops` and `backward_bytes` likewise. `tolerance` is the allowed relative error in
    fp32 against the reference in fp64. `launches(target)`: what a launch on that GPU would compile.

    The traffic of the kernels on `lean_shape` is held to `traffic(shape, itemsize)` = (forward, backward) bytes, plus
    5 %: what must move, or, where tiles are read more than once, the model that the op's docstring derives.
    """

    name: str
    function: Callable
    reference: Callable
    example: Callable[[Shape, torch.dtype, str], tuple[tuple, dict]]
    shapes: tuple[Shape, ...]  # awkward ones for tests first; the last is a realistic one for benchmarks
    flops: Callable[[Shape], int]
    bytes: Callable[[Shape, int], int]
    backward_flops: Callable[[Shape], int] | None = None
    backward_bytes: Callable[[Shape, int], int] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    tolerance: float = 2e-5
    launches: Callable[[Target], tuple[Launch, ...]] = _none  # none: the op has no Triton kernel
    lean_shape: Shape | None = None
    traffic: Callable[[Shape, int], tuple[int, int]] | None = None
    differentiable: bool = True


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Add an op to the list, once.

    Raises: ValueError if the name is taken, which means that the package was imported under two names.
    """
    if spec.name in OPS:
        raise ValueError(f"op {spec.name!r} is registered twice: import it as tritium.kernels, never as kernels")
    OPS[spec.name] = spec
    return spec
