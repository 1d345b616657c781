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


FLOATS = {"scale", "softcap", "temperature", "dropout", "eps", "offset", "gamma", "lam"}  # scalar arguments in fp32
FLOATS |= {"lr", "weight_decay", "beta1", "beta2", "rest1", "rest2", "log_beta1", "log_beta2"}


def launch_of(
    kernel: Any, name: str, config: dict, types: dict[str, str], odd: tuple[str, ...] = (), data: str = "*fp32"
) -> Launch:
    """The launch of a kernel under `config`: its constexprs, num_warps and num_stages.

    Pointers are of type `data`, numbers are fp32 (FLOATS) or i32, but for `types`; all but floats and `odd` are
    multiples of 16.
    """
    names = [n for n in kernel.arg_names if n not in config]
    kinds = {n: data if n.startswith("p_") else "fp32" if n in FLOATS else "i32" for n in names}
    signature = {n: types.get(n, kind) for n, kind in kinds.items()}
    odd = {*odd, *getattr(kernel, "do_not_specialize", ())}
    divisible = tuple(n for n in names if signature[n] != "fp32" and n not in odd)
    constexprs = {n: config[n] for n in kernel.arg_names if n in config}
    return Launch(kernel, name, signature, constexprs, divisible, config["num_warps"], config.get("num_stages", 2))


@dataclass(frozen=True)
class OpSpec:
    """What is known about an op.

    `function` is the public one and `reference` the same in plain torch, right in any dtype. `example(shape, dtype,
    device)` gives `(args, kwargs)` for both; tensors among `args` that require a gradient are the differentiable
    ones. `flops` and `bytes` are what a call on `shape` must spend and move at the least, forward, with elements of
    `itemsize` bytes; `backward_flops` and `backward_bytes` likewise: tests/traffic.py holds the kernels to them, or,
    where tiles are read more than once, to the model in the op's docstring. `launches(target)`: what a launch on that
    GPU would compile.
    """

    name: str
    function: Callable
    reference: Callable
    example: Callable[[Shape, torch.dtype, str], tuple[tuple, dict]]
    shape: Shape  # a realistic one, for benchmarks
    flops: Callable[[Shape], int]
    bytes: Callable[[Shape, int], int]
    launches: Callable[[Target], tuple[Launch, ...]]
    backward_flops: Callable[[Shape], int] | None = None
    backward_bytes: Callable[[Shape, int], int] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    differentiable: bool = True


OPS: dict[str, OpSpec] = {}


def register(**fields: Any) -> OpSpec:
    """Add an op to the list, once: `fields` are those of its OpSpec.

    Raises: ValueError if the name is taken, which means that the package was imported under two names.
    """
    spec = OpSpec(**fields)
    if spec.name in OPS:
        raise ValueError(f"op {spec.name!r} is registered twice: import it as tritium.kernels, never as kernels")
    OPS[spec.name] = spec
    return spec
