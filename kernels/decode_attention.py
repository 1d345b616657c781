"""Attention of one new token per sequence on a paged cache of keys and values.

    o_b = Σ_j p_bj v_j,   p = softmax over the sequence's keys j < lengths[b] of softcap(scale · q_b·k_j)

    q [B, H, D]; pages [P, page, G, D]; page_table [B, N] int32: the pages of a sequence in order; lengths [B] int32.
    The query is the last token: its key is in the cache already, at lengths - 1. Must move every visible key and
    value once (2·G·D elements a token) and spend 4·H·D FLOPs a token: memory decides.

One sequence and key head do not fill a GPU, so the visible keys are divided into S equal shares (flash-decoding): a
program attends from the H/G query heads of a group, the rows of its matmuls, to one share, and leaves a normalised o_s
and its lse_s; then o = Σ_s w_s o_s / Σ_s w_s with w_s = exp(lse_s). S follows from shapes alone. Besides the keys and
values it moves the number of the page of each key (4·G bytes a token) and, if S > 1, o_s in fp32 out and in.

The torch path gathers the pages of a few sequences at a time, and gives them to torch's fused attention, the H/G heads
of a group as its queries (measured on a CPU with 32 sequences of 104 tokens in bf16: 0.5 ms, against 1.6 with matmuls
on fp32 copies).
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tritium.kernels.attention import attention_reference
from tritium.kernels.backend import Target, operator, target_of, tl, triton, use_triton, without_autocast
from tritium.kernels.blocks import require_heads, require_integer, tanh, unit_stride
from tritium.kernels.registry import Launch, Shape, launch_of, register


def decode_attention_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, window: int | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    o, page = torch.zeros_like(q), k_pages.shape[1]
    for b, n in enumerate(lengths.tolist()):
        pages = page_table[b, : -(-n // page)].long()
        keys, values = (x[pages].flatten(0, 1)[:n] for x in (k_pages, v_pages))  # [n, G, D]
        o[b] = attention_reference(q[b : b + 1], keys, values, window=window, softcap=softcap, scale=scale)[0]
    return o


# Triton ---------------------------------------------------------------------------------------------------------------
#
# R = H / G query heads of a group, in tiles of BLOCK_R >= 16 rows as tl.dot wants them: one, but for very large groups.

PROGRAMS = 264  # two for each multiprocessor of an H100
MIN_SHARE, MAX_SHARES = 128, 128  # keys that are worth a program; parts that one program merges
QUERY_BYTES = 32 << 10  # of a tile of queries: with three stages of keys and values it fits every GPU
MERGE_TILE = 4096  # elements of partial outputs that a program of 4 warps merges at a time


@triton.jit
def _decode(
    p_q, p_k, p_v, p_table, p_lengths, p_o, p_lse, stride_qb, stride_qh, stride_kp, stride_kj, stride_kg,
    stride_vp, stride_vj, stride_vg, stride_table, page, capacity, window, scale, softcap,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o [B, H, S, D] and lse [B, H, S] of one share of the keys. Grid: (B · G · cdiv(R, BLOCK_R), S)."""
    TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    i_group = tl.program_id(0) // TILES
    i_b, i_g = (i_group // G).to(tl.int64), i_group % G
    i_r, i_d = tl.program_id(0) % TILES * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    i_h = i_g * R + i_r  # [BLOCK_R]
    m_o = (i_r < R)[:, None] & (i_d < D)[None, :]  # [BLOCK_R, BLOCK_D]
    i_q = i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    b_q = tl.load(p_q + i_q[:, None] + i_d[None, :], mask=m_o, other=0.0)  # [BLOCK_R, BLOCK_D]

    n = tl.minimum(tl.load(p_lengths + i_b).to(tl.int32), capacity)  # never outside the page table
    first = tl.maximum(n - window, 0)
    share = tl.cdiv(tl.cdiv(n - first, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    start = first + tl.program_id(1) * share
    end = tl.minimum(start + share, n)  # <= start: nothing left for this program

    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_start in range(start, end, BLOCK_N):
        i_n = i_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_n = i_n < end
        i_page = tl.load(p_table + i_b * stride_table + i_n // page, mask=m_n, other=0).to(tl.int64)
        i_slot = (i_n % page).to(tl.int64)
        i_k = i_page * stride_kp + i_slot * stride_kj + i_g.to(tl.int64) * stride_kg
        i_v = i_page * stride_vp + i_slot * stride_vj + i_g.to(tl.int64) * stride_vg
        m_kv = m_n[:, None] & (i_d < D)[None, :]  # what unused slots hold, perhaps NaN, is not read
        b_k = tl.load(p_k + i_k[:, None] + i_d[None, :], mask=m_kv, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_v + i_v[:, None] + i_d[None, :], mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_R, BLOCK_N]
        if SOFTCAP:
            b_s = softcap * tanh(b_s / softcap)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # finite: the block has a key
        b_p = tl.exp(b_s - b_new[:, None])  # log2(e) times the small difference: exp2 of scaled logits rounds more
        b_shrink = tl.exp(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
        b_max = b_new

    b_sum = tl.where(b_sum > 0.0, b_sum, 1.0)  # no key: o = 0, lse = -inf
    i_o = (i_b * (G * R) + i_h) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_o + i_o[:, None] * D + i_d[None, :], (b_o / b_sum[:, None]).to(p_o.dtype.element_ty), mask=m_o)
    tl.store(p_lse + i_o, b_max + tl.log(b_sum), mask=i_r < R)


@triton.jit
def _merge(p_parts, p_lse, p_o, S, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """o [B·H, D] from parts [B·H, S, D] and lse [B·H, S]. Grid: (B · H, cdiv(D, BLOCK_D))."""
    i_row = tl.program_id(0).to(tl.int64)
    i_s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_lse = tl.load(p_lse + i_row * S + i_s, mask=i_s < S, other=float("-inf"))
    b_max = tl.max(b_lse, 0)
    b_w = tl.exp(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))  # [BLOCK_S]; all 0 for a sequence of no keys
    m = (b_w > 0.0)[:, None] & (i_d < D)[None, :]
    b_parts = tl.load(p_parts + (i_row * S + i_s)[:, None] * D + i_d[None, :], mask=m, other=0.0)
    b_sum = tl.sum(b_w, 0)
    b_o = tl.sum(b_w[:, None] * b_parts, 0) / tl.where(b_sum > 0.0, b_sum, 1.0)  # [BLOCK_D]
    tl.store(p_o + i_row * D + i_d, b_o.to(p_o.dtype.element_ty), mask=i_d < D)


def _config(R: int, D: int, itemsize: int, has_cap: bool, target: Target) -> dict:
    """Launch parameters for R query heads in a group: 8 or 16 KB of keys at a time, and as much of values."""
    block_d = max(16, triton.next_power_of_2(D))
    block_r = max(16, min(64, QUERY_BYTES // (block_d * itemsize), triton.next_power_of_2(R)))
    key_bytes = (8 if has_cap and itemsize == 2 else 16) << 10  # a tanh takes registers
    block_n = max(16, min(128 if block_r == 16 else 64, key_bytes // (block_d * itemsize)))
    large = itemsize == 4 or block_r * max(block_d, 128) >= 64 * 128
    warps, stages = (8 if large else 4, 3) if target.backend == "cuda" else (4, 2)  # as registers allow
    blocks = {"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return {"R": R, "D": D, "num_warps": warps, "num_stages": stages} | blocks


def _merge_config(S: int, D: int) -> dict:
    block_s = triton.next_power_of_2(S)
    block_d = min(triton.next_power_of_2(D), MERGE_TILE // block_s)
    return {"D": D, "BLOCK_S": block_s, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}


def _shares(programs: int, keys: int) -> int:
    """Into how many shares to divide at most `keys` keys, where one share makes `programs` programs."""
    return max(1, min(-(-PROGRAMS // programs), -(-keys // MIN_SHARE), MAX_SHARES))


def _attend_output(q, k_pages, v_pages, page_table, lengths, window, softcap, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@operator("decode_attention", _attend_output)
def _attend_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, window: int | None,
    softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    """o [B, H, D]; the window is no larger than what the page table can hold."""
    o = _attend_output(q, k_pages, v_pages, page_table, lengths, window, softcap, scale)
    (B, H, D), (_, page, G, _) = q.shape, k_pages.shape
    capacity = page_table.shape[1] * page
    if not o.numel():
        return o
    window = capacity if window is None else window
    q, k_pages, v_pages, page_table = (unit_stride(x) for x in (q, k_pages, v_pages, page_table))
    config = _config(H // G, D, q.element_size(), softcap is not None, target_of(q.device))
    programs = B * G * triton.cdiv(H // G, config["BLOCK_R"])
    S = _shares(programs, window)
    parts = o if S == 1 else torch.empty(B, H, S, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    _decode[(programs, S)](
        q, k_pages, v_pages, page_table, lengths.contiguous(), parts, lse,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        page, capacity, window, scale, softcap or 0.0, G=G, SOFTCAP=softcap is not None, **config,
    )  # fmt: skip
    if S > 1:
        config = _merge_config(S, D)
        _merge[(B * H, triton.cdiv(D, config["BLOCK_D"]))](parts, lse, o, S, **config)
    return o


# Torch ----------------------------------------------------------------------------------------------------------------


COPY_BYTES = 2 << 20  # of fp32 keys at a time: they should stay in the cache, and a long cache not be held twice


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None, scale: float) -> Tensor:
    """q [B, G, H/G, D] on those keys and values [B, G, n, D] that are seen, [B, 1, 1, n]."""
    if softcap is None:
        return scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.matmul(q.to(dtype), keys.to(dtype).transpose(2, 3)).mul_(scale)  # [B, G, H/G, n]
    s = s.div_(softcap).tanh_().mul_(softcap).masked_fill_(~seen, torch.finfo(dtype).min)
    return torch.matmul(s.softmax(-1), values.to(dtype))


def _slots(page_table: Tensor, lengths: Tensor, page: int, keys: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Where in the cache each query's keys are, [B, keys], and which of these it sees, [B, 1, 1, keys]."""
    lengths = lengths[:, None].long()  # [B, 1]
    first = 0 if window is None else (lengths - window).clamp_min_(0)
    at = torch.arange(keys, device=lengths.device) + first  # [B, keys]
    seen = at < lengths
    at = torch.where(seen, at, (lengths - 1).clamp_min_(0))  # what lies at the others may be anything, NaN too
    return page_table.gather(1, at // page).long() * page + at % page, seen[:, None, None]


@lru_cache(maxsize=4)
def _parts_of_step(
    table: bytes, lengths: bytes, kinds: tuple[np.dtype, np.dtype], page: int, window: int | None, most: int
) -> list[tuple[slice | Tensor, Tensor, Tensor]]:
    """Parts of a batch, of about `most` keys each: their rows, of about the same length, and the `_slots` of these.

    Every layer of a model asks for the same: so it is kept, by the bytes of the page table and the lengths.
    """
    rows = torch.from_numpy(np.frombuffer(bytearray(lengths), kinds[1])).long()
    page_table = torch.from_numpy(np.frombuffer(bytearray(table), kinds[0])).long().view(len(rows), -1)
    seen = rows if window is None else rows.clamp_max(window)
    (seen, order), parts, start = seen.sort(descending=True, stable=True), [], 0
    in_order = bool((order.diff() > 0).all())
    while start < len(order):
        keys = max(1, int(seen[start]))
        alike = int((seen[start:] >= keys - max(page, keys // 4)).sum())  # worth padding to the longest
        stop = start + max(1, min(alike, most // keys))
        part = slice(start, stop) if in_order else order[start:stop]
        parts.append((part, *_slots(page_table[part], rows[part], page, keys, window)))
        start = stop
    return parts


@without_autocast
def _attend_torch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor,
    longest: int, window: int | None, softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    (B, H, D), (_, page, G, _) = q.shape, k_pages.shape
    if not longest or not B:
        return torch.zeros_like(q)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        tables = page_table.numpy(), lengths.numpy()
        key = *(x.tobytes() for x in tables), tuple(x.dtype for x in tables)
        parts = _parts_of_step(*key, page, window, COPY_BYTES // (G * D * 4))
    else:
        parts = [(slice(None), *_slots(page_table, lengths, page, longest, window))]
    q = q.reshape(B, G, H // G, D)
    keys, values = k_pages.flatten(0, 1), v_pages.flatten(0, 1)  # [P · page, G, D]
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, slots, seen in parts:
        at = slots.flatten()
        here = [x.index_select(0, at).unflatten(0, slots.shape).transpose(1, 2) for x in (keys, values)]
        o[rows] = _attend(q[rows], *here, seen, softcap, scale).to(q.dtype)
    return torch.where(lengths[:, None, None] > 0, o.view(B, H, D), 0.0)


# Public ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, window: int | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """o [B, H, D] of q [B, H, D] on cached pages [P, page, G, D]; see the module's docstring for the layout.

    page_table [B, N] int32 (entries past a sequence's pages are not used, but must be valid pages), lengths [B] int32
    with the query's own token counted; length 0 gives 0. window w: the last w keys. D is 8 to 256, by 8. Not
    differentiable. Raises ValueError on shapes and dtypes that don't fit and (on a CPU) lengths that the page table
    cannot hold; on a GPU these are taken for what it can hold.
    """
    require_heads("decode_attention", "P, page", q, k_pages, v_pages, window, softcap, scale)
    require_integer("decode_attention", page_table=page_table, lengths=lengths)
    if page_table.dim() != 2 or page_table.shape[0] != len(q) or lengths.shape != (len(q),):
        shapes = f"{tuple(page_table.shape)}, {tuple(lengths.shape)}"
        raise ValueError(f"page_table and lengths must be [{len(q)}, N] and [{len(q)}], got {shapes}")
    on_triton = use_triton(q, k_pages, v_pages, page_table, lengths)
    capacity = page_table.shape[1] * k_pages.shape[1]
    unread = lengths.device.type != "cpu" or torch.compiler.is_compiling() or not len(lengths)
    longest = capacity if unread else int(lengths.max())
    if longest > capacity:
        raise ValueError(f"a length of {longest} is over the {capacity} tokens of {page_table.shape[1]} pages")
    window = None if window is None else min(window, capacity)  # in the range of an int32
    scale = q.shape[2] ** -0.5 if scale is None else scale
    tensors = q, k_pages, v_pages, page_table, lengths
    if on_triton:
        return _attend_triton(*tensors, window, softcap, scale)
    return _attend_torch(*tensors, longest, window, softcap, scale)


# The registry's entry -------------------------------------------------------------------------------------------------
def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Lengths are random, or with "full" all that the pages hold; "window" and "softcap" as given."""
    B, N, page, H, G, D = (shape[x] for x in ("B", "N", "page", "H", "G", "D"))
    q = torch.randn(B, H, D, dtype=dtype, device=device)
    k_pages, v_pages = (torch.randn(B * N + 1, page, G, D, dtype=dtype, device=device) for _ in range(2))
    page_table = torch.randperm(B * N + 1, device=device)[: B * N].view(B, N).int()
    lengths = torch.randint(N * page if shape.get("full") else 0, N * page + 1, (B,), device=device).int()
    return (q, k_pages, v_pages, page_table, lengths), {x: shape[x] for x in ("window", "softcap") if x in shape}


def _bytes(shape: Shape, itemsize: int) -> int:
    """Of full pages: queries and outputs, keys and values."""
    keys = min(shape["N"] * shape["page"], shape.get("window", shape["N"] * shape["page"]))
    return 2 * shape["B"] * shape["D"] * itemsize * (keys * shape["G"] + shape["H"])


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(kernel, name, dtype, config):
        types = {"p_table": "*i32", "p_lengths": "*i32", "p_lse": "*fp32", "p_parts": "*fp32"}
        return launch_of(kernel, f"{name} {dtype}", config, types, ("window", "S"), f"*{dtype}")

    def decode(R, D, softcap=False, dtype=torch.bfloat16):
        constexprs = _config(R, D, dtype.itemsize, softcap, target) | {"G": 8, "SOFTCAP": softcap}
        name = f"R={R} D={D}{' softcap' * softcap}"
        return launch(_decode, name, "fp32" if dtype == torch.float32 else "bf16", constexprs)

    return (
        *(decode(4, D) for D in (64, 80, 128, 256)),
        decode(32, 256),
        decode(2, 256, softcap=True),
        *(decode(128, D, softcap=True) for D in (64, 128, 256)),  # two tiles of queries
        *(decode(64, D) for D in (64, 128, 256)),
        *(decode(R, D, dtype=torch.float32) for R, D in ((4, 128), (32, 256), (64, 128))),
        *(launch(_merge, f"S={S} D={D}", "bf16", _merge_config(S, D)) for S, D in ((4, 128), (128, 256))),
    )


register(
    name="decode_attention",
    function=decode_attention,
    reference=decode_attention_reference,
    example=_example,
    shape={"B": 64, "N": 256, "page": 16, "H": 32, "G": 8, "D": 128, "full": 1},
    flops=lambda s: 4 * s["B"] * s["N"] * s["page"] * s["H"] * s["D"],
    bytes=_bytes,
    launches=_launches,
    differentiable=False,
)
