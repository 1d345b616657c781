"""Matrix products of bf16 tensors on a CPU that multiplies fp32 faster: `backend.fp32_is_faster`. Else torch's own.

    matmul(a, b)        a b         a block of rows at a time: widen, multiply in fp32, round into the result
    matmul_rows(a, b)   aᵀ b        the same over blocks of what is summed, in one fp32 accumulator
    linear(x, w, bias)  x wᵀ + bias with its gradients, of these

The blocks are small enough to stay in the cache, and their memory is used again: new pages would cost as much as a
fifth of the product. A product of two bf16 numbers is exact in fp32, so this is not less precise than bf16's matmul.
(Measured on two cores with avx512_bf16 and without AMX, [4096, 384] x [384, 2048]: 47 ms against 79 on one of them.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.kernels.backend import fp32_is_faster, without_autocast
from tritium.kernels.blocks import Function

ROWS = 512  # of a block
FEW = 64  # rows or columns under which widening the other operand costs more than it saves


def is_wide(x: Tensor) -> bool:
    """Whether what x is multiplied with should be multiplied in fp32, though x is in bf16.

    Not under torch.compile, which can't trace what asks the CPU."""
    able = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return able and fp32_is_faster(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x, in fp32 where that is what it should be multiplied in."""
    return x.float() if is_wide(x) else x


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] + bias [N] in their dtype."""
    if not is_wide(a) or min(len(a), b.shape[1]) < FEW:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    y, b = a.new_empty(len(a), b.shape[1]), b.float()
    bias, block = None if bias is None else bias.float(), b.new_empty(ROWS, b.shape[1])
    for rows, y_rows in zip(a.split(ROWS), y.split(ROWS), strict=True):
        out = torch.mm(rows.float(), b, out=block[: len(rows)])
        y_rows.copy_(out if bias is None else out.add_(bias))
    return y


def matmul_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ @ b of a [K, M] and b [K, N] in their dtype: [M, N]."""
    if not is_wide(a) or min(a.shape[1], b.shape[1]) < FEW:
        return a.t() @ b
    y = torch.zeros(a.shape[1], b.shape[1], device=a.device)
    for a_rows, b_rows in zip(a.split(ROWS), b.split(ROWS), strict=True):
        torch.addmm(y, a_rows.float().t(), b_rows.float(), out=y)  # addmm_ is not counted by FlopCounterMode
    return y.to(a.dtype)


class _Linear(Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        dx = matmul(dy, weight) if needs_x else None
        return dx, matmul_rows(dy, x) if needs_weight else None, dy.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x [T, in], weight [out, in] and bias [out]."""
    if not is_wide(x) or x.dim() != 2 or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
