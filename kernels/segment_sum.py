"""Sums over the spans of a packed stream:  sum_s = Σ_{cu[s] ≤ t < cu[s+1]} values_t.

values [T], cu_seqlens [S+1] → [S]. Must move T + S elements and S offsets, forward and backward; T FLOPs forward.
Deterministic: one program per span, no atomics. What lies outside the spans is never read into a sum (no difference of
running sums, which would leak NaN), and its gradient is 0.
"""

import torch
from torch import Tensor

from tritium.kernels.backend import Target, device_assert, operator, require_one_device, tl, triton, use_triton
from tritium.kernels.blocks import Function, require_float, require_integer
from tritium.kernels.registry import Launch, Shape, launch_of, register


def segment_sum_reference(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    values, ends = values.to(torch.promote_types(values.dtype, torch.float32)), cu_seqlens.tolist()
    sums = [values[start:end].sum() for start, end in zip(ends, ends[1:], strict=False)]
    return torch.stack(sums) if sums else values.new_zeros(0)


# Triton ---------------------------------------------------------------------------------------------------------------

CONFIG = {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def load_span(p_cu, i, S, T):
    """Span i of the S + 2 that cover 0…T: 0 before the first segment, segments from 1 on, S + 1 after the last one.

    Clamped, so that no offsets that are wrong lead outside the stream.
    """
    start = tl.load(p_cu + i - 1, mask=i > 0, other=0).to(tl.int64)
    end = tl.load(p_cu + i, mask=i <= S, other=T).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), T)
    return start, tl.minimum(tl.maximum(end, start), T)


@triton.jit
def _segment_sum(p_values, p_cu, p_sum, stride_values, S, T, BLOCK: tl.constexpr):
    """sum [S] from values [T] and cu [S+1]. Grid: (S,)."""
    i_segment = tl.program_id(0)
    start, end = load_span(p_cu, i_segment + 1, S, T)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_start in range(start, end, BLOCK):
        i = i_start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        b_sum += tl.load(p_values + i * stride_values, mask=i < end, other=0.0).to(tl.float32)
    tl.store(p_sum + i_segment, tl.sum(b_sum, 0))


@triton.jit
def _segment_fill(p_dsum, p_cu, p_dvalues, stride_dsum, S, T, BLOCK: tl.constexpr):
    """dvalues [T] from dsum [S] and cu [S+1]. Grid: (S + 2,): the spans, and what lies before and after them."""
    i_span = tl.program_id(0)
    start, end = load_span(p_cu, i_span, S, T)
    is_segment = (i_span > 0) & (i_span <= S)
    b = tl.load(p_dsum + (i_span - 1).to(tl.int64) * stride_dsum, mask=is_segment, other=0.0)  # []
    b_fill = tl.zeros([BLOCK], tl.float32) + b.to(tl.float32)
    for i_start in range(start, end, BLOCK):
        i = i_start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        tl.store(p_dvalues + i, b_fill.to(p_dvalues.dtype.element_ty), mask=i < end)


def _forward_outputs(values, cu_seqlens):
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


@operator("segment_sum", _forward_outputs)
def _forward(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    sums = _forward_outputs(values, cu_seqlens)
    S = len(sums)
    if S:
        _segment_sum[(S,)](values, cu_seqlens.contiguous(), sums, values.stride(0), S, len(values), **CONFIG)
    return sums


def _backward_outputs(dsums, cu_seqlens, T, dtype):
    return dsums.new_empty(T, dtype=dtype)


@operator("segment_sum_backward", _backward_outputs)
def _backward(dsums: Tensor, cu_seqlens: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """dvalues [T]."""
    dvalues = _backward_outputs(dsums, cu_seqlens, T, dtype)
    S = len(dsums)
    _segment_fill[(S + 2,)](dsums, cu_seqlens.contiguous(), dvalues, dsums.stride(0), S, T, **CONFIG)
    return dvalues


# Torch ----------------------------------------------------------------------------------------------------------------
def segment_of(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(segment of each of T tokens, whether it lies in one), both [T]; no host sync."""
    t = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens.contiguous(), t, right=True) - 1
    inside = (t >= cu_seqlens[0]) & (t < cu_seqlens[-1])
    return segment.clamp(0, max(0, len(cu_seqlens) - 2)), inside


def _torch_forward(values, cu_seqlens):
    dtype = torch.promote_types(values.dtype, torch.float32)
    if len(cu_seqlens) == 1:  # no segments
        return values.new_zeros(0, dtype=dtype)
    # On a CPU the terms are added one after another: in fp32 thousands of them lose two digits.
    wide = values.to(torch.float64 if values.device.type == "cpu" else dtype).contiguous()
    return torch.segment_reduce(wide, "sum", offsets=cu_seqlens.long(), axis=0, initial=0, unsafe=True).to(dtype)


def _torch_backward(dsums, cu_seqlens, T, dtype):
    if len(dsums) == 0:
        return dsums.new_zeros(T, dtype=dtype)
    segment, inside = segment_of(cu_seqlens, T)
    return torch.where(inside, dsums[segment], 0.0).to(dtype)


# Autograd and the public function -------------------------------------------------------------------------------------
class _SegmentSum(Function):
    @staticmethod
    def forward(ctx, values, cu_seqlens, kernels):
        ctx.save_for_backward(cu_seqlens)
        ctx.shape, ctx.dtype, ctx.kernels = values.shape, values.dtype, kernels
        return (_forward if kernels else _torch_forward)(values, cu_seqlens)

    @staticmethod
    def backward(ctx, dsums):
        by = _backward if ctx.kernels else _torch_backward
        return by(dsums, *ctx.saved_tensors, ctx.shape[0], ctx.dtype), None, None


def check_segments(values: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless values is [T], of floats, and cu_seqlens an integer vector within it.

    The offsets are read on a CPU only; on a GPU a device assertion checks them, with TRITIUM_DEBUG=1.
    """
    require_float("a packed stream", values=values)
    require_integer("a packed stream", cu_seqlens=cu_seqlens)
    if values.dim() != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        shapes = f"{tuple(values.shape)} and {tuple(cu_seqlens.shape)}"
        raise ValueError(f"values must be [T] and cu_seqlens [S+1], got {shapes}")
    require_one_device(values, cu_seqlens)
    if torch.compiler.is_compiling():
        return
    if not cu_seqlens.is_cuda:
        ends = cu_seqlens.tolist()
        if ends[0] < 0 or ends[-1] > len(values) or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must not decrease, in 0…{len(values)}: {ends}")
        return
    holds = lambda: (cu_seqlens[0] >= 0) & (cu_seqlens[-1] <= len(values)) & (cu_seqlens.diff() >= 0).all()  # noqa: E731
    device_assert(holds, f"cu_seqlens must not decrease, in 0…{len(values)}")


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of values [T] over each span of cu_seqlens [S+1]; [S], fp32 (fp64 for fp64). Empty spans give 0.

    Differentiable in values; any strides. Raises ValueError on shapes that don't fit and (on a CPU) spans outside the
    values.
    """
    check_segments(values, cu_seqlens)
    return _SegmentSum.apply(values, cu_seqlens, use_triton(values, cu_seqlens))


def example_segments(shape: Shape, device: str) -> Tensor:
    """cu_seqlens [S+1] int32: S segments of random lengths, some empty; `outside` tokens lie before and after them."""
    T, S, outside = shape["T"], shape["S"], shape.get("outside", 0)
    inner = torch.randint(outside, T - outside + 1, (S - 1,), device=device).sort().values
    return torch.cat([inner.new_full((1,), outside), inner, inner.new_full((1,), T - outside)]).int()


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    cu_seqlens = example_segments(shape, device)
    return (torch.randn(shape["T"], dtype=dtype, device=device, requires_grad=True), cu_seqlens), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(kernel, half, stride, dtype):
        return launch_of(kernel, dtype, CONFIG | {stride: 1}, {half: f"*{dtype}", "p_cu": "*i32"}, ("S",))

    ends = (_segment_sum, "p_values", "stride_values"), (_segment_fill, "p_dvalues", "stride_dsum")
    return tuple(launch(*end, dtype) for end in ends for dtype in ("bf16", "fp32"))


register(
    name="segment_sum",
    function=segment_sum,
    reference=segment_sum_reference,
    example=_example,
    shape={"T": 1 << 20, "S": 1000},
    flops=lambda s: s["T"],
    bytes=lambda s, size: s["T"] * size + 8 * s["S"],
    backward_flops=lambda s: s["T"],
    backward_bytes=lambda s, size: s["T"] * size + 8 * s["S"],
    launches=_launches,
)
