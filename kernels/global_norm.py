"""The Euclidean norm of many tensors together: √ Σ x², accumulated in fp32 (fp64 for fp64).

Two launches: the first writes a partial sum for each 65,536 elements of a tensor, the second adds them up in one
program. Both sum in an order that follows from the list (sizes, dtypes, and whether addresses are multiples of 16, as
new tensors' are): the same tensors give the same bits. Must move every element once; 2 FLOPs an element.
A scalar tensor: reading it is the caller's choice (no host sync).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.kernels.backend import Target, operator, tl, triton, use_triton
from tritium.kernels.blocks import require_float
from tritium.kernels.multi_tensor import find_block, groups, in_memory_order, load_pointer
from tritium.kernels.registry import Launch, Shape, launch_of, register


def global_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    flat = [x.to(torch.promote_types(x.dtype, torch.float32)).flatten() for x in tensors]
    return torch.cat(flat).norm() if flat else torch.zeros(())


# Triton ---------------------------------------------------------------------------------------------------------------

SPAN = 1 << 16  # elements of a program: one search in the table for them
BLOCK = 4096  # at a time, in 8 warps


@triton.jit
def _square_sums(
    p_table, p_partial, N, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    """partial [programs] from N tensors. Grid: (programs,)."""
    i_tensor, i_span = find_block(p_table, N)
    i_start = i_span * SPAN
    n = tl.minimum(tl.load(p_table + N + i_tensor) - i_start, SPAN).to(tl.int32)  # elements of this program
    p_x = load_pointer(p_table, i_tensor, N, 0, DTYPE, ALIGNED) + i_start
    i_block = tl.arange(0, BLOCK)  # [BLOCK]
    b_sum = tl.zeros([BLOCK], tl.float32)
    i_tail = n // BLOCK * BLOCK
    for i in range(0, i_tail, BLOCK):  # without a mask, whose end may lie anywhere, loads are 16 bytes wide
        b_x = tl.load(p_x + i + i_block).to(tl.float32)
        b_sum += b_x * b_x
    b_x = tl.load(p_x + i_tail + i_block, mask=i_tail + i_block < n, other=0.0).to(tl.float32)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sum + b_x * b_x, 0))


@triton.jit
def _norm(p_partial, p_norm, P, BLOCK: tl.constexpr):
    """norm [] from partial [P]. Grid: (1,)."""
    i_block = tl.arange(0, BLOCK)  # [BLOCK]
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, P, BLOCK):
        b_sum += tl.load(p_partial + i + i_block, mask=i + i_block < P, other=0.0)
    tl.store(p_norm, tl.sqrt(tl.sum(b_sum, 0)))


def _outputs(tensors):
    return torch.empty((), dtype=torch.float32, device=tensors[0].device)


@operator("global_norm", _outputs)
def _launch(tensors: list[Tensor]) -> Tensor:
    """norm [] fp32 of one tensor or more."""
    launches = groups({"tensors": [in_memory_order([x])[0].contiguous() for x in tensors]}, SPAN)
    partial = torch.empty(sum(group.programs for group in launches), dtype=torch.float32, device=tensors[0].device)
    parts = partial.split([group.programs for group in launches])
    for group, part in zip(launches, parts, strict=True):
        N, DTYPE = group.table.shape[1], group.dtypes["tensors"]
        _square_sums[(group.programs,)](group.table, part, N, DTYPE, group.aligned, SPAN, BLOCK, num_warps=8)
    norm = _outputs(tensors)
    _norm[(1,)](partial, norm, len(partial), BLOCK, num_warps=8)
    return norm


# Torch ----------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 18  # elements: a cast or copied chunk stays in the cache


def _square_sum(x: Tensor) -> Tensor:
    """Σ x² of a tensor in a vector dot product per chunk: 3 × faster than vector_norm on a CPU."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dtype=dtype).square()
    parts = (part.to(dtype) for part in x.reshape(-1).contiguous().split(CHUNK))  # strided, dot is slow and inexact
    return torch.stack([torch.dot(part, part) for part in parts]).sum()


# Public ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """√ Σ x² over all elements of all tensors; a scalar, fp32 (fp64 for fp64). No tensors: 0. Not differentiable.

    Raises: ValueError for a tensor that is not of a floating-point dtype, or on another device.
    """
    require_float("global_norm", **{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    if not tensors:
        return torch.zeros(())
    if use_triton(*tensors):
        return _launch(list(tensors))
    sums = [_square_sum(x) for x in tensors if x.numel()]
    return torch.stack(sums).sum().sqrt() if sums else torch.zeros((), device=tensors[0].device)


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    matrix = torch.randn(3, 5, dtype=dtype, device=device).t()  # not contiguous
    return ([torch.randn(shape["N"], dtype=dtype, device=device), matrix],), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    config = {"ALIGNED": True, "SPAN": SPAN, "BLOCK": BLOCK, "num_warps": 8}

    def launch(dtype):
        return launch_of(_square_sums, f"{dtype}", config | {"DTYPE": dtype}, {"p_table": "*i64"}, ("N",))

    return launch(tl.bfloat16), launch(tl.float32), launch_of(_norm, "fp32", config, {}, ("P",))


register(
    name="global_norm",
    function=global_norm,
    reference=global_norm_reference,
    example=_example,
    shape={"N": 1 << 28},
    flops=lambda s: 2 * s["N"],
    bytes=lambda s, size: s["N"] * size,
    launches=_launches,
    differentiable=False,
)
