"""Sums over the spans of a packed stream:  sum_s = Σ_{cu[s] ≤ t < cu[s+1]} values_t.

values [T], cu_seqlens [S+1] → [S]; T FLOPs, T + S elements moved. Deterministic: one loop per segment, no atomics.
What lies outside the spans is never read into a sum (no difference of running sums, which would leak NaN).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.registry import OpSpec, register


def segment_sum_reference(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    values, ends = values.to(torch.promote_types(values.dtype, torch.float32)), cu_seqlens.tolist()
    sums = [values[start:end].sum() for start, end in zip(ends, ends[1:], strict=False)]
    return torch.stack(sums) if sums else values.new_zeros(0)


def segment_of(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(segment of each of T tokens, whether it lies in one), both [T]; no host sync."""
    t = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens.contiguous(), t, right=True) - 1
    inside = (t >= cu_seqlens[0]) & (t < cu_seqlens[-1])
    return segment.clamp(0, max(0, len(cu_seqlens) - 2)), inside


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, cu_seqlens):
        ctx.save_for_backward(cu_seqlens)
        ctx.shape, ctx.dtype = values.shape, values.dtype
        values = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
        return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), axis=0, initial=0, unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (cu_seqlens,) = ctx.saved_tensors
        segment, inside = segment_of(cu_seqlens, ctx.shape[0])
        return torch.where(inside, grad[segment], 0.0).to(ctx.dtype), None


def check_segments(values: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless values is [T] and cu_seqlens an integer vector within it (values read on a CPU only)."""
    if values.dim() != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point():
        shapes = f"{tuple(values.shape)} and {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"values must be [T] and cu_seqlens [S+1] integers, got {shapes}")
    if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] < 0 or ends[-1] > len(values) or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must not decrease, in 0…{len(values)}: {ends}")


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of values [T] over each span of cu_seqlens [S+1]; [S], fp32 (fp64 for fp64). Empty spans give 0.

    Differentiable in values. Raises ValueError on shapes that don't fit and (on a CPU) spans outside the values.
    """
    check_segments(values, cu_seqlens)
    if len(cu_seqlens) == 1:  # no segments
        return values.new_zeros(0, dtype=torch.promote_types(values.dtype, torch.float32))
    return _SegmentSum.apply(values, cu_seqlens)


def _example(shape, dtype, device):
    T, S = shape["T"], shape["S"]
    inner = torch.randint(0, T + 1, (S - 1,), device=device).sort().values
    cu_seqlens = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)]).int()
    return (torch.randn(T, dtype=dtype, device=device, requires_grad=True), cu_seqlens), {}


register(
    OpSpec(
        name="segment_sum",
        function=segment_sum,
        reference=segment_sum_reference,
        example=_example,
        shapes=({"T": 1, "S": 1}, {"T": 50, "S": 60}, {"T": 0, "S": 2}, {"T": 1 << 15, "S": 100}),
        flops=lambda s: s["T"],
        bytes=lambda s, size: s["T"] * size + 4 * s["S"],
    )
)
