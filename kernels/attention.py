"""Attention over a packed stream of documents (FlashAttention-2, arXiv 2307.08691), without a T × T matrix or mask.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = softcap(scale · q_i·k_j)   over the keys j visible to i

    q [T, H, D], k and v [Tk, G, D]; query head h reads key head h // (H / G); documents are the spans of cu_seqlens.

Backward, with p recomputed from lse, and t = tanh(scale · q·k / softcap), or t = 0 without a softcap:

    delta_i = do_i·o_i - dlse_i     ds_ij = p_ij (do_i·v_j - delta_i) (1 - t_ij²)
    dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dv_j = Σ_i p_ij do_i

For any combination of documents, causality and window, the keys visible to a query are one interval [start, end) of
the stream, and so are the queries that see a key; attention_mask.py computes both. Blocks therefore run along the
stream, and the three kernels below know only intervals:

    forward, dq    one program holds BLOCK_M queries of one head and loops over the keys in blocks of BLOCK_N
    dk, dv         one program holds BLOCK_N keys of one key head and loops over the queries of all its query heads,
                   summing in registers; if that gives too few programs to fill the GPU, the query heads are split over
                   several programs, and torch adds up the partial sums

        keys     lo   full_lo        full_hi   hi     lo is the smallest start of the block's rows, hi the largest end;
        rows  ┌──┬────┬──────┬──────┬─────┬────┬──┐   within [full_lo, full_hi) every row sees every key, so no mask is
              │  │mask│      │      │     │mask│  │   needed (most blocks of a long document); outside [lo, hi) nothing
              └──┴────┴──────┴──────┴─────┴────┴──┘   is loaded

A block whose rows are in several documents also loops over the keys in between; for many one-token documents with long
keys use decode_attention. There are no atomics, so results are deterministic. (p = 0 does not stop a NaN in a matmul:
a NaN in one document can reach documents that share a block with it.)

Minimum work: 4·D·H FLOPs per visible pair forward, 10·D·H backward. The kernels spend 14·D·H backward, since two
kernels without atomics both recompute p and dp. Minimum traffic: q, k, v, o, lse, and backward their gradients too.
The kernels move once what a program holds, and once per program what it loops over (k and v per head and block of
queries; q, do, lse and delta per block of keys), mostly from the L2 (tests/traffic.py). With an odd number of heads
of size 8, 24, 40, …, consecutive tokens are not a multiple of 16 elements apart, the alignment that Triton
specialises on: such tensors are loaded 2 bytes at a time.
"""

import torch
from torch import Tensor

from tritium.kernels import attention_costs, attention_mask, attention_torch
from tritium.kernels.attention_mask import Options, bounds_of, interval_of, intervals, visible
from tritium.kernels.backend import Target, operator, target_of, tl, triton, use_triton
from tritium.kernels.blocks import require_heads, require_integer, tanh, unit_stride
from tritium.kernels.registry import Launch, Shape, launch_of, register


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    causal: bool = True, window: int | None = None, softcap: float | None = None, scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` in plain torch."""
    options = Options(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else scale)
    ends = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    ends_k = ends if cu_seqlens is not None and cu_seqlens_k is None else None
    ends_k = ends_k or ([0, k.shape[0]] if cu_seqlens_k is None else cu_seqlens_k.tolist())
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    outputs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=dtype)]
    for start, end, start_k, end_k in zip(ends, ends[1:], ends_k, ends_k[1:], strict=False):
        n, m = end - start, end_k - start_k
        keys, values = (x[start_k:end_k].repeat_interleave(group, 1).to(dtype) for x in (k, v))
        s = torch.einsum("ihd,jhd->hij", q[start:end].to(dtype), keys) * options.scale  # [H, n, m]
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        seen = visible(slice(0, n), slice(0, m), m - n, options, q.device)
        s = s.masked_fill(~seen, -torch.inf)
        lse = s.logsumexp(-1)  # [H, n]
        p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        outputs.append(torch.einsum("hij,jhd->ihd", p, values).to(q.dtype))
        lses.append(lse.t())
    o, lse = torch.cat(outputs), torch.cat(lses)
    return (o, lse) if return_lse else o


@triton.jit
def _last_first(T, H, BLOCK_M: tl.constexpr):
    """(block of queries, head) of a program.

    The last blocks of a causal document have the most work, so they start first. All heads of a block are neighbours:
    those that share a key head find its keys in the L2.
    """
    i = tl.program_id(0)
    return tl.cdiv(T, BLOCK_M) - 1 - i // H, (i % H).to(tl.int64)


# Triton: forward ------------------------------------------------------------------------------------------------------
#
# Online softmax: each row keeps the maximum over the keys seen so far, and Σ p and Σ p v relative to it; when the
# maximum rises, both sums shrink by 2^(old - new). Scores stay unscaled until the exp2, whose argument
# s · factor - max is one FMA: factor is scale · log2(e), or, for a score that is already a tanh, softcap · log2(e).


@triton.jit
def _load_tile(p, i_row, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i_row of one head [·, D] as [ROWS, BLOCK_D]; zeros from row `end` on and in columns beyond D."""
    i_col = tl.arange(0, BLOCK_D)[None, :]
    m = (i_row < end)[:, None]
    if D < BLOCK_D:
        m = m & (i_col < D)
    return tl.load(p + i_row.to(tl.int64)[:, None] * stride + i_col, mask=m, other=0.0)


@triton.jit
def _store_tile(p, b, i_row, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store b [ROWS, BLOCK_D]: the inverse of `_load_tile`."""
    i_col = tl.arange(0, BLOCK_D)[None, :]
    m = (i_row < end)[:, None]
    if D < BLOCK_D:
        m = m & (i_col < D)
    tl.store(p + i_row.to(tl.int64)[:, None] * stride + i_col, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _scores(b_a, b_b, inner, SOFTCAP: tl.constexpr):
    """a bᵀ, or tanh(a bᵀ · inner): [ROWS of a, ROWS of b] fp32."""
    b_s = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    if SOFTCAP:
        b_s = tanh(b_s * inner)
    return b_s


@triton.jit
def _factors(scale, softcap, SOFTCAP: tl.constexpr):
    """(factor, inner): what `_scores` and the exp2 after it multiply with."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    return (softcap if SOFTCAP else scale) * 1.4426950408889634, scale / softcap


@triton.jit
def _attention_forward(
    p_q, p_k, p_v, p_keys, p_o, p_lse,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, T, H, GROUP, scale, softcap,
    SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o [T, H, D] and lse [H, T] fp32. Grid: (cdiv(T, BLOCK_M) · H,). stride_x: tokens, stride_xh: heads of x."""
    i_block, i_h = _last_first(T, H, BLOCK_M)
    i_q = i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    p_k += i_h // GROUP * stride_kh
    p_v += i_h // GROUP * stride_vh
    factor, inner = _factors(scale, softcap, SOFTCAP)
    b_start, b_end = interval_of(p_keys, i_q, T)
    lo, hi, full_lo, full_hi = bounds_of(b_start, b_end)

    b_q = _load_tile(p_q + i_h * stride_qh, i_q, stride_q, T, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # Σ p v, with p relative to 2^max
    b_max = tl.full([BLOCK_M], -3.4e38, tl.float32)  # not -inf: for rows that see no key, max - max must be 0
    b_sum = tl.zeros([BLOCK_M], tl.float32)  # Σ p
    for start in range(lo, hi, BLOCK_N):
        i_k = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        b_k = _load_tile(p_k, i_k, stride_k, hi, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_s = _scores(b_q, b_k, inner, SOFTCAP)  # [BLOCK_M, BLOCK_N]
        if start < full_lo or start + BLOCK_N > full_hi:
            b_s = tl.where((b_start[:, None] <= i_k[None, :]) & (i_k[None, :] < b_end[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)  # [BLOCK_M]
        b_p = tl.exp2(b_s * factor - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_v = _load_tile(p_v, i_k, stride_v, hi, D, BLOCK_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
        b_max = b_new

    m_none = b_sum == 0
    b_sum = tl.where(m_none, 1.0, b_sum)
    b_lse = tl.where(m_none, float("-inf"), (b_max + tl.log2(b_sum)) * 0.6931471805599453)
    tl.store(p_lse + i_h * T + i_q, b_lse, mask=i_q < T)
    _store_tile(p_o + i_h * D, b_acc / b_sum[:, None], i_q, H * D, T, D, BLOCK_D)


# Triton: backward -----------------------------------------------------------------------------------------------------
@triton.jit
def _attention_dq(
    p_do, p_dlse, p_q, p_k, p_v, p_keys, p_o, p_lse, p_dq, p_delta,
    stride_do, stride_doh, stride_dlse, stride_dlseh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    stride_o, stride_oh, stride_lse, stride_lseh, T, H, GROUP, scale, softcap,
    HAS_DLSE: tl.constexpr, NEEDS_DQ: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D] if needed, and delta [H, T], which _attention_dkv reads. Grid: (cdiv(T, BLOCK_M) · H,)."""
    i_block, i_h = _last_first(T, H, BLOCK_M)
    i_q = i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i_row = i_q.to(tl.int64)
    p_k += i_h // GROUP * stride_kh
    p_v += i_h // GROUP * stride_vh
    factor, inner = _factors(scale, softcap, SOFTCAP)
    b_start, b_end = interval_of(p_keys, i_q, T)
    lo, hi, full_lo, full_hi = bounds_of(b_start, b_end)

    b_do = _load_tile(p_do + i_h * stride_doh, i_q, stride_do, T, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_o = _load_tile(p_o + i_h * stride_oh, i_q, stride_o, T, D, BLOCK_D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # [BLOCK_M]
    if HAS_DLSE:
        b_dlse = tl.load(p_dlse + i_h * stride_dlseh + i_row * stride_dlse, mask=i_q < T, other=0.0)
        b_delta -= tl.where(b_start < b_end, b_dlse, 0.0)  # where lse = -inf, dlse may be NaN
    tl.store(p_delta + i_h * T + i_row, b_delta, mask=i_q < T)
    if not NEEDS_DQ:
        return
    b_lse = tl.load(p_lse + i_h * stride_lseh + i_row * stride_lse, mask=i_q < T, other=0.0) * 1.4426950408889634

    b_q = _load_tile(p_q + i_h * stride_qh, i_q, stride_q, T, D, BLOCK_D)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        i_k = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        b_k = _load_tile(p_k, i_k, stride_k, hi, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = _load_tile(p_v, i_k, stride_v, hi, D, BLOCK_D)
        b_s = _scores(b_q, b_k, inner, SOFTCAP)  # [BLOCK_M, BLOCK_N]
        b_ds = tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None]  # fp32: the two may cancel
        b_ds *= tl.exp2(b_s * factor - b_lse[:, None])
        if SOFTCAP:
            b_ds *= 1.0 - b_s * b_s
        if start < full_lo or start + BLOCK_N > full_hi:  # p of an invisible key may be inf
            b_ds = tl.where((b_start[:, None] <= i_k[None, :]) & (i_k[None, :] < b_end[:, None]), b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    _store_tile(p_dq + i_h * D, b_dq * tl.cast(scale, tl.float32), i_q, H * D, T, D, BLOCK_D)


@triton.jit
def _attention_dkv(
    p_do, p_q, p_k, p_v, p_queries, p_lse, p_delta, p_dk, p_dv,
    stride_do, stride_doh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_lse, stride_lseh,
    T, Tk, H, GROUP, HEADS, scale, softcap,
    SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv [Tk, H / HEADS, D], each summed over HEADS query heads (GROUP, those of a key head, or a divisor).

    Grid: (cdiv(Tk, BLOCK_N) · H / HEADS,), the first blocks first: in a causal document they have the most work.
    """
    parts = H // HEADS
    i_part = (tl.program_id(0) % parts).to(tl.int64)
    i_g = i_part * HEADS // GROUP
    i_k = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    factor, inner = _factors(scale, softcap, SOFTCAP)
    b_start, b_end = interval_of(p_queries, i_k, Tk)
    lo, hi, full_lo, full_hi = bounds_of(b_start, b_end)

    b_k = _load_tile(p_k + i_g * stride_kh, i_k, stride_k, Tk, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = _load_tile(p_v + i_g * stride_vh, i_k, stride_v, Tk, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    n = tl.maximum(tl.cdiv(hi - lo, BLOCK_M), 1)  # blocks of queries per head; not 0, as it is divided by
    for i in range(n * HEADS):  # one loop over all heads' blocks, so that loads are pipelined across heads
        i_h = i_part * HEADS + i // n
        start = lo + i % n * BLOCK_M
        i_q = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        b_q = _load_tile(p_q + i_h * stride_qh, i_q, stride_q, hi, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_do = _load_tile(p_do + i_h * stride_doh, i_q, stride_do, hi, D, BLOCK_D)
        b_lse = tl.load(p_lse + i_h * stride_lseh + i_q.to(tl.int64) * stride_lse, mask=i_q < hi, other=0.0)
        b_delta = tl.load(p_delta + i_h * T + i_q, mask=i_q < hi, other=0.0)
        # Transposed, so that p and ds are left operands of the matmuls below without another transpose.
        b_s = _scores(b_k, b_q, inner, SOFTCAP)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s * factor - (b_lse * 1.4426950408889634)[None, :])
        if start < full_lo or start + BLOCK_M > full_hi:
            b_p = tl.where((b_start[:, None] <= i_q[None, :]) & (i_q[None, :] < b_end[:, None]), b_p, 0.0)
        b_ds = tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds *= b_p
        if SOFTCAP:
            b_ds *= 1.0 - b_s * b_s
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    _store_tile(p_dk + i_part * D, b_dk * tl.cast(scale, tl.float32), i_k, parts * D, Tk, D, BLOCK_D)
    _store_tile(p_dv + i_part * D, b_dv, i_k, parts * D, Tk, D, BLOCK_D)


# Launcher and autograd ------------------------------------------------------------------------------------------------

# (BLOCK_M, BLOCK_N, warps, stages) for D up to 64, 128 and 256. The limits are registers (for accumulators, and on
# ampere and cdna for whole operands) and, on the smallest Ampere GPUs, 99 KB of shared memory.
BLOCKS = {
    "hopper": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
        "dq": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "dkv": ((64, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 2)),
    },
    "ampere": {
        "forward": ((128, 64, 4, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
        "dkv": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
    },
    "cdna": {
        "forward": ((128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2)),
        "dq": ((128, 32, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
        "dkv": ((32, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 1)),
    },
}


def _config(kernel: str, D: int, dtype: torch.dtype, target: Target) -> dict:
    """Launch parameters of "forward", "dq" or "dkv"."""
    width = max(16, triton.next_power_of_2(D))
    family = "cdna" if target.backend == "hip" else "hopper" if 90 <= target.arch < 120 else "ampere"
    M, N, warps, stages = BLOCKS[family][kernel][0 if width <= 64 else 1 if width <= 128 else 2]
    if dtype == torch.float32:  # no tensor cores: operands are in registers
        M = N = 32 if width <= (64 if family == "cdna" else 128) else 16
        warps, stages = 4 if family == "cdna" else 8, 2
    return {"D": D, "BLOCK_D": width, "BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}


# Programs that fill a GPU: two per multiprocessor of an H100. If dk and dv have fewer, `_heads` splits the query heads.
PROGRAMS = 2 * 132


def _heads(Tk: int, H: int, G: int, block: int) -> int:
    """How many of a key head's query heads one program of dk and dv sums over."""
    group, programs = H // G, triton.cdiv(Tk, block) * G
    parts = (n for n in range(1, group + 1) if group % n == 0)
    return group // next((n for n in parts if programs * n >= PROGRAMS), group)


def _forward_outputs(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, scale):
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return o, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


@operator("attention", _forward_outputs)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, window: int | None, softcap: float | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, H, D] and lse [H, T] fp32."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    o, lse = _forward_outputs(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, scale)
    T, H, D = q.shape
    keys, _ = intervals(cu_seqlens, cu_seqlens_k, q, k, causal, window, False)
    if T:
        config = _config("forward", D, q.dtype, target_of(q.device))
        _attention_forward[(triton.cdiv(T, config["BLOCK_M"]) * H,)](
            q, k, v, keys, o, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            T, H, H // k.shape[1], scale, softcap or 1.0, SOFTCAP=softcap is not None, **config,
        )  # fmt: skip
    return o, lse


def _backward_outputs(do, dlse, q, k, v, *rest):
    needs_dq, needs_dkv = rest[-2:]
    shapes = q.shape if needs_dq else (0,), *(k.shape if needs_dkv else (0,),) * 2
    return tuple(torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)


@operator("attention_backward", _backward_outputs)
def _backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, needs_dq: bool, needs_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, H, D] and dk, dv [Tk, G, D], [0] where not needed, from do and o [T, H, D] and dlse and lse [H, T]."""
    do, q, k, v, o = (unit_stride(x) for x in (do, q, k, v, o))
    dq, dk, dv = _backward_outputs(do, dlse, q, k, v, needs_dq, needs_dkv)
    (T, H, D), (Tk, G, _), group = q.shape, k.shape, q.shape[1] // k.shape[1]
    keys, queries = intervals(cu_seqlens, cu_seqlens_k, q, k, causal, window, needs_dkv)
    delta = torch.empty(H, T, dtype=torch.float32, device=q.device)
    factors = scale, softcap or 1.0
    shared = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    some_dlse = lse if dlse is None else dlse
    if T:
        config = _config("dq", D, q.dtype, target_of(q.device))
        _attention_dq[(triton.cdiv(T, config["BLOCK_M"]) * H,)](
            do, some_dlse, q, k, v, keys, o, lse, dq, delta, *do.stride()[:2], *some_dlse.stride()[::-1], *shared,
            *o.stride()[:2], *lse.stride()[::-1], T, H, group, *factors,
            HAS_DLSE=dlse is not None, NEEDS_DQ=needs_dq, SOFTCAP=softcap is not None, **config,
        )  # fmt: skip
    if Tk and needs_dkv:
        config = _config("dkv", D, q.dtype, target_of(q.device))
        heads = _heads(Tk, H, G, config["BLOCK_N"])
        if heads < group:  # partial sums of each key head
            dk, dv = (torch.empty(Tk, H // heads, D, dtype=torch.float32, device=q.device) for _ in range(2))
        _attention_dkv[(triton.cdiv(Tk, config["BLOCK_N"]) * (H // heads),)](
            do, q, k, v, queries, lse, delta, dk, dv, *do.stride()[:2], *shared, *lse.stride()[::-1],
            T, Tk, H, group, heads, *factors, SOFTCAP=softcap is not None, **config,
        )  # fmt: skip
        if heads < group:
            dk, dv = (x.view(Tk, G, group // heads, D).sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)


def _triton_gradients(ctx, do, dlse):
    q, k, v, o, lse, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    do, needs = torch.zeros_like(o) if do is None else do, ctx.needs_input_grad[:3]
    rest = cu_seqlens, cu_seqlens_k, *ctx.options, needs[0], needs[1] or needs[2]
    gradients = _backward(do, dlse, q, k, v, o, lse, *rest)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *[None] * 6


# Not an autograd.Function: torch.compile traces one only if its tensors are distinct, but cu_seqlens is passed twice
# and q may be k.
_forward.register_autograd(_triton_gradients, setup_context=_save)


# Public ---------------------------------------------------------------------------------------------------------------
def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, window: int | None, softcap: float | None, scale: float | None,
) -> tuple[Tensor | None, Options]:  # fmt: skip
    """cu_seqlens of the keys, and the options. Raises: ValueError for shapes that don't fit; values are not read."""
    require_heads("attention", "Tk", q, k, v, window, softcap, scale)
    require_integer("attention", cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens is not None and cu_seqlens_k is None:
        if len(q) != len(k):
            raise ValueError(f"{len(q)} queries and {len(k)} keys: pass cu_seqlens_k if the lengths differ")
        cu_seqlens_k = cu_seqlens
    counts = []
    for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is not None and (cu.dim() != 1 or not len(cu)):
            raise ValueError(f"{name} must be a vector of S + 1 integers, got {tuple(cu.shape)}")
        counts.append(1 if cu is None else len(cu) - 1)
    if counts[0] != counts[1]:
        raise ValueError(f"cu_seqlens has {counts[0]} documents but cu_seqlens_k has {counts[1]}")
    if not counts[0] and (len(q) or len(k)):
        raise ValueError(f"cu_seqlens has no document, but there are {len(q)} queries and {len(k)} keys")
    return cu_seqlens_k, Options(causal, window, softcap, q.shape[2] ** -0.5 if scale is None else float(scale))


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    causal: bool = True, window: int | None = None, softcap: float | None = None, scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [T, H, D] to k and v [Tk, G, D] within documents: o [T, H, D], and lse [T, H] fp32 if asked for.

    D is a multiple of 8, at most 256. cu_seqlens [S+1] int32: the documents' bounds (None: one document); repeated
    bounds are empty documents. cu_seqlens_k: the same for the keys (None: as the queries). causal: if the lengths
    differ, the last query is aligned with the last key. window w: query i sees keys i-w < j ≤ i (|i-j| < w if not
    causal). scale defaults to D^-½. Queries that see no key give o = 0 and lse = -inf. Differentiable in o and lse;
    any strides. On a GPU the values in cu_seqlens are checked only under TRITIUM_DEBUG=1.
    Raises: ValueError for shapes, heads or cu_seqlens that don't fit. Source: arXiv 2307.08691.
    """
    cu_seqlens_k, options = _check(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, scale)
    if use_triton(q, k, v, cu_seqlens, cu_seqlens_k):
        o, lse = _forward(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, options.scale)
        lse = lse.t()
    else:
        o, lse = attention_torch.attention(q, k, v, cu_seqlens, cu_seqlens_k, options)
    return (o, lse) if return_lse else o


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, causal: bool = True, window: int | None = None, softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, from do [T, H, D] and the inputs and outputs of `attention(…, return_lse=True)`; same options.

    It may be called on part of the keys, with o and lse of *all* keys, as context parallelism does.
    Raises: ValueError as `attention` does, and for do, o or lse that don't fit q.
    """
    cu_seqlens_k, options = _check(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, scale)
    if do.shape != q.shape or o.shape != q.shape or lse.shape != q.shape[:2] or not do.dtype == o.dtype == q.dtype:
        seen = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (do, o, lse))
        wanted = f"{tuple(q.shape)} {q.dtype} twice and {tuple(q.shape[:2])}"
        raise ValueError(f"do, o, lse must be {wanted}, got {seen}")
    with torch.no_grad():
        if use_triton(q, k, v, do, o, lse, cu_seqlens, cu_seqlens_k):
            tensors = do, None, q, k, v, o, lse.t().float(), cu_seqlens, cu_seqlens_k
            return _backward(*tensors, causal, window, softcap, options.scale, True, True)
        return attention_torch.attention_backward(do, q, k, v, o, lse, cu_seqlens, cu_seqlens_k, options)


# Registry -------------------------------------------------------------------------------------------------------------
def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    ends, ends_k = attention_costs.ends_of(shape)
    sizes = [(ends[-1], shape["H"]), (ends_k[-1], shape["G"]), (ends_k[-1], shape["G"])]
    q, k, v = (torch.randn(*size, shape["D"], dtype=dtype, device=device, requires_grad=True) for size in sizes)
    cu, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, ends_k))
    options = {"causal": bool(shape.get("causal", 1)), "window": shape.get("window"), "softcap": shape.get("softcap")}
    return (q, k, v), {"cu_seqlens": cu, "cu_seqlens_k": cu_k if "M" in shape else None} | options


KERNELS = {"forward": _attention_forward, "dq": _attention_dq, "dkv": _attention_dkv}
DECLARED = [(64, "bf16", False), (128, "bf16", False), (256, "bf16", False), (256, "bf16", True), (128, "fp32", False)]


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(name: str, D: int, short: str, softcap: bool, variant: str = "") -> Launch:
        config = _config(name, D, torch.bfloat16 if short == "bf16" else torch.float32, target) | {"SOFTCAP": softcap}
        if name == "dq":
            config |= {"HAS_DLSE": True, "NEEDS_DQ": variant != "only delta"}
        types = {"p_keys": "*i32", "p_queries": "*i32"} | dict.fromkeys(("p_lse", "p_dlse", "p_delta"), "*fp32")
        types |= dict.fromkeys(("p_dk", "p_dv"), "*fp32") if variant == "partial" else {}
        title = " ".join(filter(None, (f"{name} D={D} {short}", "softcap" * softcap, variant)))
        return launch_of(KERNELS[name], title, config, types, ("H", "GROUP", "HEADS"), f"*{short}")

    sizes, config = ("T", "Tk", "S", "STEPS", "left", "right"), {"BLOCK": attention_mask.BLOCK, "num_warps": 4}
    first = launch_of(attention_mask._attention_intervals, "intervals", config, {}, sizes, "*i32")
    variants = launch("dq", 128, "bf16", False, "only delta"), launch("dkv", 128, "bf16", False, "partial")
    return first, *(launch(name, *case) for name in KERNELS for case in DECLARED), *variants


register(
    name="attention",
    function=attention,
    reference=attention_reference,
    example=_example,
    launches=_launches,
    **attention_costs.COSTS,
)
