"""A linear layer with a low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685), on a dense or an NF4 base.

    y = x Wᵀ + bias + scale · u bᵀ,   u = dropout(x) aᵀ           x [T, in], W [out, in], a [r, in], b [out, r]

Backward, with v = scale · dy b [T, r] and keep the mask of the dropout p:

    dx = dy W + (v a) ∘ keep / (1 − p)    da = vᵀ dropout(x)    db = scale · dyᵀ u    dW = dyᵀ x    dbias = Σ_T dy

y and dx share one kernel: a tile starts with the adapter's product plus the bias, and the base's product is accumulated
in the same registers, so that nothing of size [T, out] or [T, in] is written twice. NF4 weights are dequantised tile by
tile in its loop (beforehand for fp32, and for sizes with in % 64 or out % 16); they get no gradient. The dropout mask
is never stored: kernels that need it redraw it from one seed. Small products without a mask, and dW, are torch's.

2·T·(in·out + r·(in + out)) FLOPs forward, twice that backward. A tile [BM, BN] of the matmul reads BM rows of x and u
and BN of W and b: (in + r)·(T·⌈out/BN⌉ + out·⌈T/BM⌉) + T·out elements forward, and dx with in and out exchanged. Tiles
are ordered so that most reads hit the L2, and DRAM is read about once. An NF4 weight is 0.52 bytes.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tritium.kernels.backend import Target, apply, operator, target_of, tl, triton, use_triton, without_autocast
from tritium.kernels.blocks import Function, require_float, unit_stride
from tritium.kernels.nf4 import (
    BLOCK,
    CODES,
    NF4Tensor,
    dequantize_nf4_reference,
    dequantize_parts,
    nf4_table,
    nf4_tile,
    quantize_nf4,
)
from tritium.kernels.registry import Launch, Shape, launch_of, register
from tritium.kernels.wide import matmul, matmul_rows

MAX_RANK = 256


def lora_linear_reference(
    x: Tensor, weight: Tensor | NF4Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    packed = isinstance(weight, NF4Tensor)
    dense = dequantize_nf4_reference(replace(weight, dtype=x.dtype)) if packed else weight
    adapted = torch.nn.functional.dropout(x, dropout) @ a.t() @ b.t()
    y = x @ dense.t() + scale * adapted
    return y if bias is None else y + bias


# Triton ---------------------------------------------------------------------------------------------------------------
@triton.jit
def _keep(seed, dropout, i_t, i_quad, K):
    """The dropout mask [M, 4·Q] of x [T, K] at rows i_t [M] and columns 4·i_quad + 0…3 (i_quad [Q], consecutive).

    One call of Philox decides four neighbours by their position in x, so that any tiling draws the same mask. int64.
    """
    M: tl.constexpr = i_t.shape[0]
    Q: tl.constexpr = i_quad.shape[0]
    i = i_t.to(tl.int64)[:, None] * tl.cdiv(K, 4) + i_quad[None, :]  # [M, Q]
    b_0, b_1, b_2, b_3 = tl.rand4x(seed, i)
    return tl.reshape(tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3)), [M, 4 * Q]) >= dropout


@triton.jit
def _tile(T, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile: down GROUP rows of tiles before going right, for the L2."""
    i = tl.program_id(0)
    rows, columns = tl.cdiv(T, BM), tl.cdiv(N, BN)
    first = i // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    i = i % (GROUP * columns)
    return first + i % height, i // height


@triton.jit
def _lora_matmul(
    p_x, p_w, p_absmax, p_absmax_scale, p_absmax_mean, p_inner, p_b, p_bias, p_seed, p_y,
    stride_x, stride_wn, stride_wk, stride_inner, stride_bn, stride_br, T, N, K, scale, dropout,
    R: tl.constexpr, NF4: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, CODES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] Wᵀ + scale · (inner [T, R] bᵀ) ∘ keep + bias [N], b [N, R]. Grid: (tiles of y,).

    W is p_w [N, K] by its strides, or NF4: a weight [N, K] ("rows") or [K, N] ("columns") whose rows are whole NF4
    blocks. keep is a mask of y, not of x: it is used for dx.
    """
    i_m, i_n = _tile(T, N, BM, BN, GROUP)
    i_t = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    i_n = i_n.to(tl.int64) * BN
    i_out = i_n + tl.arange(0, BN)  # [BN]
    m_t, m_out = (i_t < T)[:, None], (i_out < N)[None, :]

    b_y = tl.zeros([BM, BN], tl.float32)
    for i_start in tl.range(0, R, BR, num_stages=1):  # a single iteration for most ranks
        i_r = i_start + tl.arange(0, BR)  # [BR]
        m_r = i_r < R
        b_inner = tl.load(p_inner + (i_t * stride_inner)[:, None] + i_r[None, :], mask=m_t & m_r[None, :], other=0.0)
        i_b = (i_out * stride_bn)[None, :] + (i_r.to(tl.int64) * stride_br)[:, None]  # [BR, BN]
        b_b = tl.load(p_b + i_b, mask=m_out & m_r[:, None], other=0.0)
        b_y = tl.dot(b_inner, b_b, b_y, input_precision="ieee")
    b_y *= scale
    if DROPOUT:
        b_y = tl.where(_keep(tl.load(p_seed), dropout, i_t, i_n // 4 + tl.arange(0, BN // 4), N), b_y, 0.0)
    if HAS_BIAS:
        b_y += tl.load(p_bias + i_out, mask=i_out < N, other=0.0).to(tl.float32)[None, :]

    if NF4 is not None:
        b_table, absmax_mean = nf4_table(CODES), tl.load(p_absmax_mean)
    for i_start in range(0, K, BK):
        i_k = i_start + tl.arange(0, BK)  # [BK]
        m_k = i_k < K
        b_x = tl.load(p_x + (i_t * stride_x)[:, None] + i_k[None, :], mask=m_t & m_k[None, :], other=0.0)  # [BM, BK]
        if NF4 == "rows":
            i_column = i_start // 64 + tl.arange(0, BK // 64)
            i_block = (i_out * (K // 64))[:, None] + i_column[None, :]  # [BN, BK / 64]
            m_block = (i_out < N)[:, None] & (i_column < K // 64)[None, :]
            b_w = nf4_tile(p_w, p_absmax, p_absmax_scale, absmax_mean, b_table, i_block, m_block)
            b_w = tl.trans(b_w.to(b_x.dtype))  # masked values are finite, and are multiplied by zeros of x
        elif NF4 == "columns":
            i_column = i_n // 64 + tl.arange(0, BN // 64)
            i_block = (i_k.to(tl.int64) * (N // 64))[:, None] + i_column[None, :]  # [BK, BN / 64]
            m_block = m_k[:, None] & (i_column < N // 64)[None, :]
            b_w = nf4_tile(p_w, p_absmax, p_absmax_scale, absmax_mean, b_table, i_block, m_block).to(b_x.dtype)
        else:
            i_w = (i_out * stride_wn)[None, :] + (i_k.to(tl.int64) * stride_wk)[:, None]  # [BK, BN]
            b_w = tl.load(p_w + i_w, mask=m_out & m_k[:, None], other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    tl.store(p_y + (i_t * N)[:, None] + i_out[None, :], b_y.to(p_y.dtype.element_ty), mask=m_t & m_out)


@triton.jit
def _lora_dropped(
    p_x, p_f, p_seed, p_out, stride_x, stride_f, stride_fr, stride_split, stride_out, stride_or, T, K, length, dropout,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dropout(x) f with x [T, K], f [K, R]; or, if TRANSPOSED, dropout(x)ᵀ f with f [T, R]. Grid: (tiles, splits).

    Each split sums over `length` of the inner dimension, into its own out [rows, R] (by strides).
    """
    ROWS: tl.constexpr = BK if TRANSPOSED else BT
    STEP: tl.constexpr = BT if TRANSPOSED else BK
    rows, inner = (K, T) if TRANSPOSED else (T, K)
    i_first = tl.program_id(0).to(tl.int64) * ROWS
    i_row = i_first + tl.arange(0, ROWS)  # [ROWS]
    i_r = tl.arange(0, BR)
    m_r = (i_r < R)[None, :]
    seed = tl.load(p_seed)

    b_out = tl.zeros([ROWS, BR], tl.float32)
    i_begin = tl.program_id(1).to(tl.int64) * length
    for i_start in range(i_begin, tl.minimum(i_begin + length, inner), STEP):
        i_step = i_start + tl.arange(0, STEP).to(tl.int64)  # [STEP]
        i_t, i_k = (i_step, i_row) if TRANSPOSED else (i_row, i_step)
        i_quad = (i_first if TRANSPOSED else i_start) // 4 + tl.arange(0, BK // 4)
        m = (i_t < T)[:, None] & (i_k < K)[None, :]  # [BT, BK]
        b_x = tl.load(p_x + (i_t * stride_x)[:, None] + i_k[None, :], mask=m, other=0.0)
        b_x = tl.where(_keep(seed, dropout, i_t, i_quad, K), b_x, 0.0).to(b_x.dtype)
        i_f = (i_step * stride_f)[:, None] + (i_r.to(tl.int64) * stride_fr)[None, :]  # [STEP, BR]
        b_f = tl.load(p_f + i_f, mask=(i_step < inner)[:, None] & m_r, other=0.0)
        b_out = tl.dot(tl.trans(b_x) if TRANSPOSED else b_x, b_f, b_out, input_precision="ieee")
    b_out *= 1.0 / (1.0 - dropout)
    i_out = tl.program_id(1).to(tl.int64) * stride_split + (i_row * stride_out)[:, None]
    i_out += (i_r.to(tl.int64) * stride_or)[None, :]  # [ROWS, BR]
    tl.store(p_out + i_out, b_out.to(p_out.dtype.element_ty), mask=(i_row < rows)[:, None] & m_r)


def _config(T: int, R: int, dtype: torch.dtype, nf4: bool, dropout: bool, odd: bool, target: Target) -> dict:
    """Tiles of the matmul: as large as registers and shared memory allow, but no taller than T needs.

    odd: rows of x or W are not multiples of 16 bytes, so that elements are loaded one by one.
    """
    large = target.shared_bytes > 200 * 1024  # the GPUs whose tensor cores read it directly
    large &= not (dropout and (nf4 or R > 64))  # the mask takes registers
    if dtype == torch.float32 or odd:  # without tensor cores, or waiting for addresses
        BM, BN, BK = 64, 64, 32
    elif T <= 64:
        BM, BN, BK = max(16, triton.next_power_of_2(T)), 64, 128
    elif nf4:  # the taller a tile, the fewer times a weight is dequantised
        BM, BN, BK = 256 if large else 128, 64 if dropout and R > 128 else 128, 64
    else:
        BM, BN, BK = (128, 256, 64) if large else (128, 128, 32)
    BR = min(BK, max(16, triton.next_power_of_2(R)))
    line = (BM if nf4 else BM + BN) * dtype.itemsize  # bytes of shared memory for one k; a stage has BK of them
    stages = 2 if target.backend == "hip" else min(4, (target.shared_bytes - line * BR) // (line * BK))
    warps = 8 if BM >= 128 else 4
    sizes = {"R": R, "BM": BM, "BN": BN, "BK": BK, "BR": BR, "GROUP": 8}
    return sizes | {"CODES": CODES, "num_warps": warps, "num_stages": stages}


def _dropped_config(R: int, dtype: torch.dtype) -> dict:
    warps, stages = (8, 2) if R > 64 else (4, 4)
    blocks = {"BT": 32, "BK": 32 if dtype == torch.float32 else 64, "BR": max(16, triton.next_power_of_2(R))}
    return blocks | {"num_warps": warps, "num_stages": stages}


def _matmul_output(x, weight, inner, b, bias, seed, scale, dropout, transposed):
    return x.new_empty(x.shape[0], b.shape[0])


@operator("lora_matmul", _matmul_output)
def _matmul(
    x: Tensor, weight: list[Tensor], inner: Tensor, b: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float,
    dropout: float, transposed: bool,
) -> Tensor:  # fmt: skip
    """x Wᵀ + scale · (inner bᵀ) ∘ keep + bias [T, N]; weight is [W], or the parts of an NF4Tensor; transposed: Wᵀ."""
    (T, K), (N, R) = x.shape, b.shape
    y = x.new_empty(T, N)
    if not y.numel():
        return y
    shape = (K, N) if transposed else (N, K)
    x, inner, bias = unit_stride(x), unit_stride(inner), None if bias is None else bias.contiguous()
    odd = any(n % 16 for n in (K, N, x.stride(0), x.data_ptr()))
    if len(weight) > 1 and (shape[1] % BLOCK or odd or x.dtype == torch.float32):  # tiles too small for blocks
        weight = [dequantize_parts(weight, shape, x.dtype)]
    nf4 = len(weight) > 1
    if nf4:
        p_w, absmax, absmax_scale, absmax_mean = (part.contiguous() for part in weight)
        strides = 0, 0
    else:
        p_w = absmax = absmax_scale = absmax_mean = weight[0]
        strides = p_w.stride()[::-1] if transposed else p_w.stride()
    odd = odd or min(strides) > 1 or any(n % 16 for n in (max(strides), p_w.data_ptr()))
    config = _config(T, R, x.dtype, nf4, seed is not None, odd, target_of(x.device))
    _lora_matmul[(triton.cdiv(T, config["BM"]) * triton.cdiv(N, config["BN"]),)](
        x, p_w, absmax, absmax_scale, absmax_mean, inner, b, bias, seed, y,
        x.stride(0), *strides, inner.stride(0), *b.stride(), T, N, K, scale, dropout,
        NF4=("columns" if transposed else "rows") if nf4 else None,
        HAS_BIAS=bias is not None, DROPOUT=seed is not None, **config,
    )  # fmt: skip
    return y


def _dropped_output(x, f, seed, dropout, transposed):
    (T, K), R = x.shape, f.shape[1]
    return x.new_empty((R, K) if transposed else (T, R))


@operator("lora_dropped", _dropped_output)
def _dropped(x: Tensor, f: Tensor, seed: Tensor, dropout: float, transposed: bool) -> Tensor:
    """dropout(x) f [T, R] of x [T, K], f [K, R]; transposed: fᵀ dropout(x) [R, K], f [T, R]."""
    (T, K), R = x.shape, f.shape[1]
    config = _dropped_config(R, x.dtype)
    rows, inner, tile, step = (K, T, "BK", "BT") if transposed else (T, K, "BT", "BK")
    tiles = triton.cdiv(rows, config[tile])
    # 256 programs fill a GPU; each should have at least 512 of the inner dimension to sum over
    splits = max(1, min(256 // max(1, tiles), inner // 512))
    length = config[step] * triton.cdiv(max(1, inner), splits * config[step])
    shape = (splits, R, K) if transposed else (splits, T, R)
    out = x.new_empty(shape, dtype=x.dtype if splits == 1 else torch.float32)
    if out.numel():
        x = unit_stride(x)
        strides = out.stride()[:0:-1] if transposed else out.stride()[1:]
        _lora_dropped[(tiles, splits)](
            x, f, seed, out, x.stride(0), *f.stride(), out.stride(0), *strides, T, K, length, dropout,
            R=R, TRANSPOSED=transposed, **config,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


# Autograd, for both paths ---------------------------------------------------------------------------------------------
def _dense(weight: tuple[Tensor, ...], x: Tensor, shape: tuple[int, int]) -> Tensor:
    return weight[0] if len(weight) == 1 else dequantize_parts(weight, shape, x.dtype)


class _LoraLinear(Function):
    """`weight` is (W,) or the parts of an NF4Tensor. With dropout, `keep` is the mask (torch) or its seed (Triton)."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, a, b, bias, scale, dropout, kernels, *weight):
        keep = None
        if kernels:
            if dropout:  # from the device's generator: no sync, and activation checkpointing redraws the same
                keep = torch.randint(2**63 - 1, (1,), device=x.device)
            inner = _dropped(x, a.t(), keep, dropout, False) if dropout else x @ a.t()  # [T, r]
            y = _matmul(x, list(weight), inner, b, bias, None, scale, 0.0, False)
        else:
            dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
            inner = dropped @ a.t()
            y = matmul(x, _dense(weight, x, (len(b), a.shape[1])).t(), bias)
            y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(x, a, b, inner, keep, *weight)
        ctx.scale, ctx.dropout, ctx.kernels = scale, dropout, kernels
        return y

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        x, a, b, inner, keep, *weight = ctx.saved_tensors  # read only once: activation checkpointing requires it
        needs_x, needs_a, needs_b, needs_bias, *_, needs_weight = ctx.needs_input_grad[:8]
        dinner = (dy @ b).mul_(ctx.scale)  # [T, r]
        by_x, by_a = (_kernel_dx, _kernel_da) if ctx.kernels else (_torch_dx, _torch_da)
        dx = by_x(dy, weight, dinner, a, keep, ctx.dropout) if needs_x else None
        da = by_a(x, dinner, keep, ctx.dropout) if needs_a else None
        db = (dy.t() @ inner).mul_(ctx.scale) if needs_b else None
        dbias = dy.sum(0) if needs_bias else None
        dweight = matmul_rows(dy, x) if needs_weight else None
        return dx, da, db, dbias, None, None, None, dweight, *(None for _ in weight[1:])


def _kernel_dx(dy, weight, dinner, a, seed, dropout):
    return _matmul(dy, weight, dinner, a.t(), None, seed, 1 / (1 - dropout), dropout, True)


def _kernel_da(x, dinner, seed, dropout):
    return dinner.t() @ x if seed is None else _dropped(x, dinner, seed, dropout, True)


def _torch_dx(dy, weight, dinner, a, keep, dropout):
    dx = matmul(dy, _dense(weight, dy, (dy.shape[1], a.shape[1])))
    return dx.addmm_(dinner, a) if keep is None else dx.addcmul_(dinner @ a, keep, value=1 / (1 - dropout))


def _torch_da(x, dinner, keep, dropout):
    return dinner.t() @ (x if keep is None else x * keep / (1 - dropout))


# Public ---------------------------------------------------------------------------------------------------------------
def _check(x, weight, a, b, bias, dropout) -> None:
    given = {"x": x, "weight": weight, "a": a, "b": b, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    fits = len(weight.shape) == a.ndim == 2 and a.shape[1] > 0
    if fits:
        (F, E), R = weight.shape, len(a)
        wanted = {"x": (*x.shape[:-1], E), "weight": (F, E), "a": (R, E), "b": (F, R), "bias": (F,)}
        fits = all(tensor.shape == wanted[name] for name, tensor in given.items())
    if not fits:
        seen = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        wanted = "x [..., in], weight [out, in], a [r, in], b [out, r], bias [out], in ≥ 1"
        raise ValueError(f"lora_linear: {seen}; wanted {wanted}")
    if not 1 <= R <= MAX_RANK:
        raise ValueError(f"lora_linear: a has shape {tuple(a.shape)}, wanted a rank of 1 to {MAX_RANK}")
    require_float("lora_linear", x=x)
    dtypes = {name: tensor.dtype for name, tensor in given.items() if not isinstance(tensor, NF4Tensor)}
    if len(set(dtypes.values())) > 1:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"lora_linear: {seen}; wanted one floating dtype: cast them to that of x")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout is {dropout}, wanted 0 <= dropout < 1")


def lora_linear(
    x: Tensor, weight: Tensor | NF4Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """y [..., out] = x (W + scale · b a)ᵀ + bias; x [..., in], W [out, in] dense or NF4, a [r, in], b [out, r].

    All in one dtype, except that an NF4 weight is dequantised to x's. Differentiable in x, a, b, bias and a dense
    weight; any strides. r is 1 to 256. dropout acts on the adapter's input whenever it is > 0 (pass 0 in evaluation);
    the mask comes from the generator of x's device, of which it takes one number on a GPU.
    Raises: ValueError for shapes or dtypes that don't fit, and for a dropout outside [0, 1).
    """
    _check(x, weight, a, b, bias, dropout)
    parts = weight.parts if isinstance(weight, NF4Tensor) else (weight,)
    kernels = use_triton(x, a, b, bias, *parts)
    y = apply(_LoraLinear, x.reshape(-1, x.shape[-1]), a, b, bias, scale, dropout, kernels, *parts)
    return y.view(*x.shape[:-1], weight.shape[0])


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    T, E, F, R = (shape[x] for x in "TEFR")
    sizes = ((T, E), (F, E), (R, E), (F, R))
    x, weight, a, b = (torch.randn(m, n, device=device).div_(n**0.5).to(dtype).requires_grad_() for m, n in sizes)
    return (x, quantize_nf4(weight) if shape.get("nf4") else weight, a, b, 0.5), {}


def _flops(s: Shape) -> int:
    return 2 * s["T"] * (s["E"] * s["F"] + s["R"] * (s["E"] + s["F"]))


def _bytes(s: Shape, itemsize: int) -> int:
    return itemsize * (s["T"] * (s["E"] + s["F"]) + s["E"] * s["F"] + s["R"] * (s["E"] + s["F"]))


def _backward_bytes(s: Shape, itemsize: int) -> int:
    """Reads dy, u and what the forward read; writes a gradient for each of its inputs."""
    return 2 * _bytes(s, itemsize) + itemsize * s["T"] * s["R"]


def _matmul_launch(target, name, dtype, T, R, nf4=False, backward=False, dropout=False, odd=()) -> Launch:
    types = {"p_seed": "*i64"}
    if nf4:
        types |= {"p_w": "*u8", "p_absmax": "*i8", "p_absmax_scale": "*fp32", "p_absmax_mean": "*fp32"}
    config = _config(T, R, dtype, nf4, dropout, bool(odd), target)
    config |= {
        "NF4": ("columns" if backward else "rows") if nf4 else None,
        "HAS_BIAS": not backward,
        "DROPOUT": dropout,
    }
    config |= ({"p_bias": None} if backward else {}) | ({} if dropout else {"p_seed": None})
    config |= dict.fromkeys(("stride_wn", "stride_bn") if backward else ("stride_wk", "stride_br"), 1)
    return launch_of(_lora_matmul, name, config, types, odd, "*fp32" if dtype == torch.float32 else "*bf16")


def _dropped_launch(name, dtype, R, transposed) -> Launch:
    config = _dropped_config(R, dtype) | {"R": R, "TRANSPOSED": transposed}
    config |= dict.fromkeys(("stride_out", "stride_fr") if transposed else ("stride_or", "stride_f"), 1)
    types = dict.fromkeys(("p_x", "p_f"), "*fp32" if dtype == torch.float32 else "*bf16") | {"p_seed": "*i64"}
    return launch_of(_lora_dropped, name, config, types)


def _launches(target: Target) -> tuple[Launch, ...]:
    bf16, fp32, matmul = torch.bfloat16, torch.float32, partial(_matmul_launch, target)
    return (
        matmul("forward R=16 bf16", bf16, 8192, 16),
        matmul("forward R=256 bf16", bf16, 8192, 256),
        matmul("forward odd R=16 bf16", bf16, 8192, 16, odd=("T", "N", "K", "stride_x", "stride_wn")),
        matmul("forward T=16 nf4 R=16 bf16", bf16, 16, 16, nf4=True),
        matmul("forward nf4 R=16 bf16", bf16, 8192, 16, nf4=True),
        matmul("dx R=16 bf16", bf16, 8192, 16, backward=True),
        matmul("dx odd R=16 bf16", bf16, 8192, 16, backward=True, odd=("T", "N", "K", "stride_x", "stride_wk")),
        matmul("dx nf4 R=16 bf16", bf16, 8192, 16, nf4=True, backward=True),
        matmul("dx dropout R=16 bf16", bf16, 8192, 16, backward=True, dropout=True),
        matmul("dx dropout R=256 bf16", bf16, 8192, 256, backward=True, dropout=True),
        matmul("dx nf4 dropout R=16 bf16", bf16, 8192, 16, nf4=True, backward=True, dropout=True),
        matmul("dx nf4 dropout R=256 bf16", bf16, 8192, 256, nf4=True, backward=True, dropout=True),
        matmul("dx dropout R=256 fp32", fp32, 8192, 256, backward=True, dropout=True),
        _dropped_launch("forward R=16 bf16", bf16, 16, False),
        _dropped_launch("forward R=256 fp32", fp32, 256, False),
        _dropped_launch("da R=16 bf16", bf16, 16, True),
        _dropped_launch("da R=256 bf16", bf16, 256, True),
    )


register(
    name="lora_linear",
    function=lora_linear,
    reference=lora_linear_reference,
    example=_example,
    shape={"T": 8192, "E": 4096, "F": 4096, "R": 16},
    flops=_flops,
    bytes=_bytes,
    backward_flops=lambda s: 2 * _flops(s),
    backward_bytes=_backward_bytes,
    launches=_launches,
)
