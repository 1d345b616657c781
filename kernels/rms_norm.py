"""RMSNorm (arXiv 1910.07467), fused with the residual addition before it, with an offset on the weight (Gemma: 1).

    s = x + residual              rounded to x's dtype; returned, and the input of the norm
    y = s · rstd · (weight + offset),   rstd = 1 / sqrt(mean(s²) + eps)

Backward, with g = dy · (weight + offset) and n = s · rstd, row by row, where ds is the gradient of the returned sum:

    dx = dresidual = rstd · (g − n · mean(g · n)) + ds        dweight = Σ_rows dy · n

x, residual, y, s [M, E]; weight [E]; rstd [M] fp32. Everything between a load and a store is fp32.

Minimum traffic: forward reads x (and residual) and writes y (and s); backward reads dy and s (and ds) and writes dx.
From 2048 rows on, the weight and the partial sums of dweight add less than 5 %, and torch's sum of these reads them
again from the L2 (3 %). Rows wider than a block are read twice, the second time from the L2. About 4 FLOPs per element
forward, 8 backward.
"""

import math

import torch
from torch import Tensor

from tritium.kernels.backend import Target, apply, operator, tl, triton, use_triton, without_autocast
from tritium.kernels.blocks import Function, as_rows, require_float
from tritium.kernels.registry import Launch, Shape, launch_of, register


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    summed = x if residual is None else x + residual
    wide = summed.to(_compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(wide.dtype) + offset)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), summed)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Triton ---------------------------------------------------------------------------------------------------------------
#
# Rows are [M, E] with unit column stride. A program takes every num_programs-th tile [ROWS, BLOCK] and keeps the weight
# in registers. A tile is several rows if they are short (the heads of a query-key norm), else one. E is a constexpr, so
# that for E <= BLOCK the forward's loops over columns have one iteration, and the tile stays in registers.

FORWARD_BLOCK, BACKWARD_BLOCK = 16384, 8192  # widest row that fits into the registers of 16 warps
FORWARD_WIDE, BACKWARD_WIDE = 8192, 2048  # columns at a time for wider rows
MIN_TILE = 2048  # elements that keep 4 warps busy
# Number of programs: at most what an H100 runs at once (132 multiprocessors with 32 warps each forward, 16 backward, at
# 128 registers per thread). With many rows, each program has at least *_ROWS of them, so that loading the weight and,
# backward, storing partial sums is negligible; with few rows, at least *_LEAST programs keep the GPU busy.
FORWARD_WARPS, FORWARD_ROWS, FORWARD_LEAST = 32 * 132, 12, 168
BACKWARD_WARPS, BACKWARD_ROWS, BACKWARD_LEAST = 16 * 132, 24, 84


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(p_x, p_residual, i, i_residual, m, HAS_RESIDUAL: tl.constexpr):
    b_s = _load(p_x + i, m)  # [ROWS, BLOCK]
    if HAS_RESIDUAL:  # rounded like the stored sum, which is what the backward reads
        b_s = (b_s + _load(p_residual + i_residual, m)).to(p_x.dtype.element_ty).to(tl.float32)
    return b_s


@triton.jit
def _rms_norm_forward(
    p_x, p_residual, p_weight, p_y, p_sum, p_rstd,
    stride_x, stride_residual, stride_y, stride_sum, M, eps, offset,
    E: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, sum [M, E] and rstd [M] from x, residual [M, E] and weight [E]. Grid: any number of programs."""
    i_block = tl.arange(0, BLOCK)  # [BLOCK]
    b_weight = _load(p_weight + i_block, i_block < E)[None, :] + offset  # [1, BLOCK]
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        i_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
        m_row = i_row < M
        i_x, i_residual = (i_row * stride_x)[:, None], (i_row * stride_residual)[:, None]  # [ROWS, 1]

        b_s = tl.zeros([ROWS, BLOCK], tl.float32)
        b_square = tl.zeros([ROWS], tl.float32)
        for i_start in range(0, E, BLOCK):
            i_col = (i_start + i_block)[None, :]  # [1, BLOCK]
            m = m_row[:, None] & (i_col < E)  # [ROWS, BLOCK]
            b_s = _load_sum(p_x, p_residual, i_x + i_col, i_residual + i_col, m, HAS_RESIDUAL)
            b_square += tl.sum(b_s * b_s, 1)
        b_rstd = 1.0 / tl.sqrt(b_square / E + eps)  # [ROWS]
        tl.store(p_rstd + i_row, b_rstd, mask=m_row)

        for i_start in range(0, E, BLOCK):
            i_col = (i_start + i_block)[None, :]
            m = m_row[:, None] & (i_col < E)
            if E > BLOCK:
                b_s = _load_sum(p_x, p_residual, i_x + i_col, i_residual + i_col, m, HAS_RESIDUAL)
                b_weight = _load(p_weight + i_col, i_col < E) + offset
            b_y = b_s * b_rstd[:, None] * b_weight  # [ROWS, BLOCK]
            tl.store(p_y + (i_row * stride_y)[:, None] + i_col, b_y.to(p_y.dtype.element_ty), mask=m)
            if HAS_RESIDUAL:
                tl.store(p_sum + (i_row * stride_sum)[:, None] + i_col, b_s.to(p_sum.dtype.element_ty), mask=m)


@triton.jit
def _rms_norm_mean(
    p_dy, p_s, p_weight, p_rstd, p_mean, stride_dy, stride_s, offset, E: tl.constexpr, BLOCK: tl.constexpr
):
    """mean [M] of g · n over each row, which the blocks of a row wider than one block share. Grid: (M,)."""
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_start in range(0, E, BLOCK):
        i_col = i_start + tl.arange(0, BLOCK)  # [BLOCK]
        m = i_col < E
        b_g = _load(p_dy + i_row * stride_dy + i_col, m) * (_load(p_weight + i_col, m) + offset)
        b_sum += b_g * _load(p_s + i_row * stride_s + i_col, m)
    tl.store(p_mean + i_row, tl.sum(b_sum, 0) * tl.load(p_rstd + i_row) / E)


@triton.jit
def _rms_norm_backward(
    p_dy, p_ds, p_s, p_weight, p_rstd, p_mean, p_dx, p_partial,
    stride_dy, stride_ds, stride_s, stride_dx, stride_partial, M, offset,
    E: tl.constexpr, HAS_DS: tl.constexpr, HAS_DWEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [M, E] from dy, ds, s [M, E], and this program's part of dweight as a row of partial [programs, E].

    Grid: (any number of programs, cdiv(E, BLOCK)). mean [M] is read only if a row is wider than a block.
    """
    i_col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    b_weight = _load(p_weight + i_col, i_col < E) + offset
    b_dweight = tl.zeros([ROWS, BLOCK], tl.float32)  # reduced over its rows after the loop
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        i_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]  # [ROWS, 1]
        m_row = i_row < M
        m = m_row & (i_col < E)  # [ROWS, BLOCK]
        b_rstd = _load(p_rstd + i_row, m_row)  # [ROWS, 1]
        b_dy = _load(p_dy + i_row * stride_dy + i_col, m)  # [ROWS, BLOCK]
        b_n = _load(p_s + i_row * stride_s + i_col, m) * b_rstd
        b_g = b_dy * b_weight
        if E <= BLOCK:
            b_mean = tl.sum(b_g * b_n, 1)[:, None] / E  # [ROWS, 1]
        else:
            b_mean = _load(p_mean + i_row, m_row)
        b_dx = b_rstd * (b_g - b_n * b_mean)
        if HAS_DS:
            b_dx += _load(p_ds + i_row * stride_ds + i_col, m)
        tl.store(p_dx + i_row * stride_dx + i_col, b_dx.to(p_dx.dtype.element_ty), mask=m)
        b_dweight += b_dy * b_n
    if HAS_DWEIGHT:  # else the sum is unused, and the compiler removes it
        i_partial = tl.program_id(0).to(tl.int64) * stride_partial + i_col
        tl.store(p_partial + i_partial, tl.sum(b_dweight, 0)[None, :], mask=i_col < E)


def _config(E: int, block: int) -> dict:
    """Launch parameters for rows of E elements, in blocks of at most `block`."""
    block = min(triton.next_power_of_2(E), block)
    rows = max(1, MIN_TILE // block)
    return {"E": E, "ROWS": rows, "BLOCK": block, "num_warps": min(16, rows * block // 512)}


def _forward_config(E: int) -> dict:
    return _config(E, FORWARD_BLOCK if E <= FORWARD_BLOCK else FORWARD_WIDE)


def _backward_config(E: int) -> dict:
    return _config(E, BACKWARD_BLOCK if E <= BACKWARD_BLOCK else BACKWARD_WIDE)


def _forward_outputs(x, weight, residual, eps, offset):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    return y, summed, torch.empty(math.prod(x.shape[:-1]), dtype=torch.float32, device=x.device)


@operator("rms_norm", _forward_outputs)
def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., E], s [..., E] (empty without a residual) and rstd [M] fp32."""
    y, summed, rstd = _forward_outputs(x, weight, residual, eps, offset)
    rows, weight = as_rows(x), weight.contiguous()
    rows_residual = rows if residual is None else as_rows(residual)
    M, E = rows.shape
    config = _forward_config(E)
    wanted = min(max(M // FORWARD_ROWS, FORWARD_LEAST), FORWARD_WARPS // config["num_warps"])
    programs = min(triton.cdiv(M, config["ROWS"]), wanted)
    if M:
        _rms_norm_forward[(programs,)](
            rows, rows_residual, weight, y, summed, rstd,
            rows.stride(0), rows_residual.stride(0), E, E, M, eps, offset, HAS_RESIDUAL=residual is not None, **config,
        )  # fmt: skip
    return y, summed, rstd


def _backward_outputs(dy, ds, s, weight, rstd, offset, needs_weight):
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    return dx, weight.new_empty(weight.shape if needs_weight else 0)


@operator("rms_norm_backward", _backward_outputs)
def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, offset: float, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx [..., E] in s's dtype and dweight [E] in weight's; [0] where not needed."""
    dx, dweight = _backward_outputs(dy, ds, s, weight, rstd, offset, needs_weight)
    rows_dy, rows_s, weight = as_rows(dy), as_rows(s), weight.contiguous()
    rows_ds = rows_dy if ds is None else as_rows(ds)
    M, E = rows_s.shape
    config = _backward_config(E)
    strides, mean = (rows_dy.stride(0), rows_ds.stride(0), rows_s.stride(0), E, E), rstd
    if M and config["BLOCK"] < E:
        mean = torch.empty_like(rstd)
        wide = _config(E, BACKWARD_BLOCK)
        _rms_norm_mean[(M,)](
            rows_dy, rows_s, weight, rstd, mean, strides[0], strides[2], offset,
            E=E, BLOCK=wide["BLOCK"], num_warps=wide["num_warps"],
        )  # fmt: skip
    wanted = min(max(M // BACKWARD_ROWS, BACKWARD_LEAST), BACKWARD_WARPS // config["num_warps"])
    programs = min(triton.cdiv(M, config["ROWS"]), wanted)
    partial = torch.empty(programs if needs_weight else 0, E, dtype=torch.float32, device=s.device)
    if M:
        _rms_norm_backward[(programs, triton.cdiv(E, config["BLOCK"]))](
            rows_dy, rows_ds, rows_s, weight, rstd, mean, dx, partial, *strides, M, offset,
            HAS_DS=ds is not None, HAS_DWEIGHT=needs_weight, **config,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if needs_weight else dweight


# Torch ----------------------------------------------------------------------------------------------------------------
#
# As few passes over memory as torch's ops allow: F.rms_norm takes twice as long, its backward six times.


@without_autocast
def _torch_forward(x, weight, residual, eps, offset):
    """y [..., E], s [..., E] and rstd [..., 1]."""
    s = x if residual is None else x + residual
    compute = _compute_dtype(x)
    wide = s.to(compute).contiguous()  # a norm over a strided dimension would not be vectorised
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # one pass; square().mean() takes two
    rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
    normed = wide * rstd if s.dtype == compute else wide.mul_(rstd)  # if `wide` is a copy, reuse it
    return normed.mul_(weight.to(compute) + offset).to(x.dtype), s, rstd


def _torch_backward(dy, ds, s, weight, rstd, offset, needs_weight):
    """dx and dweight."""
    E, compute = s.shape[-1], rstd.dtype
    wide_weight = weight.to(compute) + offset
    wide_dy, wide_s, rstd = dy.to(compute).reshape(-1, E), s.to(compute).reshape(-1, E), rstd.reshape(-1)
    product = wide_dy * wide_s  # [M, E]; both reductions are matrix-vector products with it
    dweight = (rstd @ product).to(weight.dtype) if needs_weight else None
    mean = (product @ wide_weight) * rstd * rstd / E  # [M]: rstd · mean(g · n); rstd³ may overflow
    dx = (wide_dy * wide_weight).addcmul_(wide_s, mean[:, None], value=-1).mul_(rstd[:, None])
    if ds is not None:
        dx.add_(ds.reshape(-1, E))
    return dx.to(s.dtype).view(s.shape), dweight


# Autograd and the public function -------------------------------------------------------------------------------------
class _RMSNorm(Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, residual, eps, offset, kernels):
        y, summed, rstd = (_forward if kernels else _torch_forward)(x, weight, residual, eps, offset)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else summed, weight, rstd)
        ctx.offset, ctx.has_residual, ctx.kernels = offset, residual is not None, kernels
        return y, summed if ctx.has_residual else None

    @staticmethod
    @without_autocast
    def backward(ctx, dy, ds):
        if dy is None:  # only the sum was used
            return ds, None, ds, None, None, None
        needs_weight, by = ctx.needs_input_grad[1], _backward if ctx.kernels else _torch_backward
        dx, dweight = by(dy, ds, *ctx.saved_tensors, ctx.offset, needs_weight)
        return dx, dweight if needs_weight else None, dx if ctx.has_residual else None, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x (plus the residual) to root mean square 1, then scale it by `weight + offset`.

    x [..., E]; weight [E], of any float dtype; residual like x. Returns y in x's shape and dtype, or, with a residual,
    (y, x + residual). Differentiable in x, weight, residual and in both outputs; any strides.
    Raises: ValueError for shapes or dtypes that don't fit. Source: arXiv 1910.07467.
    """
    require_float("rms_norm", x=x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:] or not x.shape[-1]:
        seen, wanted = tuple(weight.shape), f"(E,) for x {tuple(x.shape)} = (…, E), E ≥ 1"
        raise ValueError(f"rms_norm: weight has shape {seen}, wanted {wanted}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        seen, wanted = (tuple(residual.shape), residual.dtype), (tuple(x.shape), x.dtype)
        raise ValueError(f"rms_norm: residual is {seen}, wanted x's {wanted}")
    kernels = use_triton(x, weight, residual)
    if not kernels and not torch.is_grad_enabled():  # saves autograd.Function's 7 µs
        y, summed, _ = _torch_forward(x, weight, residual, eps, offset)
    else:
        y, summed = apply(_RMSNorm, x, weight, residual, eps, offset, kernels)
    return y if residual is None else (y, summed)


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    x = torch.randn(shape["T"], shape["E"], dtype=dtype, device=device)
    weight = torch.randn(shape["E"], dtype=dtype, device=device)
    return (x.requires_grad_(), weight.requires_grad_()), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(kernel, E, config, dtype="bf16", **flags):
        types = dict.fromkeys(("p_rstd", "p_mean", "p_partial"), "*fp32")
        frozen = " frozen weight" * (not flags.get("HAS_DWEIGHT", True))
        name = f"{kernel.__name__.split('_')[-1]} E={E} {dtype}{frozen}"
        return launch_of(kernel, name, config | flags, types, data=f"*{dtype}")

    trained = {"HAS_DS": True, "HAS_DWEIGHT": True}
    return (
        *(launch(_rms_norm_forward, E, _forward_config(E), HAS_RESIDUAL=True) for E in (128, 4096, 16384, 65536)),
        *(launch(_rms_norm_backward, E, _backward_config(E), **trained) for E in (128, 4096, 8192, 65536)),
        launch(_rms_norm_forward, 65536, _forward_config(65536), "fp32", HAS_RESIDUAL=True),
        launch(_rms_norm_backward, 8192, _backward_config(8192), "fp32", **trained),
        launch(_rms_norm_backward, 4096, _backward_config(4096), **trained | {"HAS_DWEIGHT": False}),
        launch(_rms_norm_mean, 65536, _config(65536, BACKWARD_BLOCK)),
    )


register(
    name="rms_norm",
    function=rms_norm,
    reference=rms_norm_reference,
    example=_example,
    shape={"T": 8192, "E": 4096},
    flops=lambda shape: 4 * shape["T"] * shape["E"],
    bytes=lambda shape, itemsize: (2 * shape["T"] + 1) * shape["E"] * itemsize,
    backward_flops=lambda shape: 8 * shape["T"] * shape["E"],
    backward_bytes=lambda shape, itemsize: (3 * shape["T"] + 2) * shape["E"] * itemsize,
    launches=_launches,
)
