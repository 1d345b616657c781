"""Attention of one new token per sequence on a paged cache of keys and values.

    o_b = Σ_j p_bj v_j,   p = softmax over the sequence's keys j < lengths[b] of softcap(scale · q_b·k_j)

    q [B, H, D]; pages [P, page, G, D]; page_table [B, N] int32: the pages of a sequence in order; lengths [B] int32.
    The query is the last token: its key is in the cache already, at lengths - 1. Must move every visible key and
    value once (2·G·D elements a token) and spend 4·H·D FLOPs a token: memory decides.

The torch path copies what it needs of the cache to fp32, [B·G, n, D], a few sequences at a time: matmuls with one or
two rows are slow on strided or bf16 operands (measured on a CPU: 0.45 ms against 0.8, and more precise).
"""

import torch
from torch import Tensor

from tritium.kernels.registry import OpSpec, register

COPY_BYTES = 4 << 20  # of fp32 keys at a time: they should stay in the cache, and a long cache not be held twice


def decode_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    (_, H, D), (_, page, G, _) = q.shape, k_pages.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros_like(q)
    for b, n in enumerate(lengths.tolist()):
        first = max(0, n - window) if window else 0
        pages = page_table[b, : -(-n // page)].long()
        keys, values = (x[pages].flatten(0, 1)[first:n].to(dtype) for x in (k_pages, v_pages))  # [n, G, D]
        keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
        s = torch.einsum("hd,jhd->hj", q[b].to(dtype), keys) * (D**-0.5 if scale is None else scale)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        if n:
            o[b] = torch.einsum("hj,jhd->hd", s.softmax(-1), values).to(q.dtype)
    return o


def _gather(pages: Tensor, page_table: Tensor, longest: int) -> Tensor:
    """[B, longest, G, D]: a copy of the first keys (or values) of each sequence."""
    B, needed = page_table.shape[0], -(-longest // pages.shape[1])
    if needed == 1:
        return pages[:, :longest].index_select(0, page_table[:, 0])
    return pages.index_select(0, page_table[:, :needed].reshape(-1)).view(B, -1, *pages.shape[2:])[:, :longest]


def _by_head(x: Tensor) -> Tensor:
    """[B, n, G, D] to [B·G, n, D], contiguous, in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).reshape(-1, x.shape[1], x.shape[3])


def _attend(q: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, softcap: float | None, scale: float) -> Tensor:
    """q [B, H, D] on keys and values [B, n, G, D] but for `unseen` [B, n], which may hold anything; fp32 [B, H, D]."""
    G = keys.shape[2]
    values.masked_fill_(unseen[:, :, None, None], 0.0)
    query = q.to(torch.promote_types(q.dtype, torch.float32)).reshape(-1, q.shape[1] // G, q.shape[2])  # [B·G, H/G, D]
    s = torch.bmm(query, _by_head(keys).transpose(1, 2)).mul_(scale)  # [B·G, H/G, n]
    if softcap is not None:
        s = s.div_(softcap).tanh_().mul_(softcap)
    s.masked_fill_(unseen.repeat_interleave(G, 0)[:, None], torch.finfo(s.dtype).min)
    return torch.bmm(s.softmax(-1), _by_head(values)).view(q.shape)


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """o [B, H, D] of q [B, H, D] on cached pages [P, page, G, D]; see the module's docstring for the layout.

    page_table [B, N] int32 (entries past a sequence's pages are not used, but must be valid pages), lengths [B] int32
    with the query's own token counted; length 0 gives 0. window w: the last w keys. Not differentiable.
    Raises ValueError on shapes that don't fit and (on a CPU) lengths that the page table cannot hold.
    """
    if q.dim() != 3 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape or q.shape[2] != k_pages.shape[3]:
        shapes = f"{tuple(q.shape)}, {tuple(k_pages.shape)}, {tuple(v_pages.shape)}"
        raise ValueError(f"q and pages must be [B, H, D] and twice [P, page, G, D], got {shapes}")
    (B, H, D), (_, page, G, _) = q.shape, k_pages.shape
    if H % G:
        raise ValueError(f"{H} query heads do not divide into {G} key heads")
    if page_table.dim() != 2 or page_table.shape[0] != B or lengths.shape != (B,):
        shapes = f"{tuple(page_table.shape)}, {tuple(lengths.shape)}"
        raise ValueError(f"page_table and lengths must be [{B}, N] and [{B}], got {shapes}")
    capacity = page_table.shape[1] * page
    unread = lengths.is_cuda or torch.compiler.is_compiling() or not B
    longest = capacity if unread else int(lengths.max())
    if longest > capacity:
        raise ValueError(f"a length of {longest} is over the {capacity} tokens of {page_table.shape[1]} pages")
    if not longest:
        return torch.zeros_like(q)
    scale = D**-0.5 if scale is None else scale
    at, n = torch.arange(longest, device=q.device), lengths[:, None]
    unseen = (at >= n) if window is None else (at >= n) | (at < n - window)  # [B, longest]
    o = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    step = max(1, COPY_BYTES // (longest * G * D * 4))
    for rows in (slice(start, min(B, start + step)) for start in range(0, B, step)):
        keys, values = (_gather(x, page_table[rows], longest) for x in (k_pages, v_pages))
        o[rows] = _attend(q[rows], keys, values, unseen[rows], softcap, scale)
    return torch.where(lengths[:, None, None] > 0, o, 0.0)


def _example(shape, dtype, device):
    B, N, page, H, G, D = (shape[x] for x in ("B", "N", "page", "H", "G", "D"))
    q = torch.randn(B, H, D, dtype=dtype, device=device)
    k_pages, v_pages = (torch.randn(B * N + 1, page, G, D, dtype=dtype, device=device) for _ in range(2))
    page_table = torch.randperm(B * N + 1, device=device)[: B * N].view(B, N).int()
    lengths = torch.randint(0, N * page + 1, (B,), device=device).int()
    return (q, k_pages, v_pages, page_table, lengths), {}


register(
    OpSpec(
        name="decode_attention",
        function=decode_attention,
        reference=decode_attention_reference,
        example=_example,
        shapes=(
            {"B": 1, "N": 1, "page": 1, "H": 1, "G": 1, "D": 8},
            {"B": 5, "N": 3, "page": 4, "H": 4, "G": 2, "D": 16},
            {"B": 0, "N": 1, "page": 8, "H": 2, "G": 1, "D": 8},
            {"B": 128, "N": 1, "page": 128, "H": 4, "G": 2, "D": 64},
        ),
        flops=lambda s: 4 * s["B"] * s["N"] * s["page"] * s["H"] * s["D"],
        bytes=lambda s, size: 2 * s["B"] * s["D"] * size * (s["N"] * s["page"] * s["G"] + s["H"]),
        differentiable=False,
    )
)
