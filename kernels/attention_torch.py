"""The torch path of `attention`, for CPU tensors and fp64: the formulas are in attention.py.

Documents of similar length are batched. A causal document padded on the right needs no mask for its padding, since no
real query sees a later key; so lengths are rounded up a little, and each bucket of B documents becomes
[B·G, n·H/G, D]: the query heads of a key head are rows of one matmul, so keys are never repeated. Blocks of rows skip
the keys that none of them sees. On a CPU in bf16 this takes about half the time of scaled_dot_product_attention.

    packed stream ──index──► padded stream: bucket 0 | bucket 1 | …       (one index per token, for order and padding)
                             for rows of a bucket:  s = q kᵀ → p = softmax(s) → o = p v

Precision: a bf16 matmul returns bf16, which is too coarse for scores (an error of 2⁻⁹·|s| in the exponent). A second
matmul computes what the rounding lost, s_low = q kᵀ - s_high in fp32 accumulators, also rounded to bf16; the sum of the
two is accurate to 2⁻¹⁸·|s|. Two bf16 matmuls are still faster than one in fp32. On CPUs where they are not, everything
is computed in fp32 (kernels/wide.py) and only the kept probabilities are rounded. fp16 scores are computed in fp32:
above 65504, s_high would be inf and s_low inf - inf.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tritium.kernels.attention_mask import Options, documents, visible
from tritium.kernels.backend import graph_break, without_autocast
from tritium.kernels.blocks import Function
from tritium.kernels.wide import widened

SCORE_BYTES = 2 << 20  # fp32 scores of one block: they should stay in the cache
KEPT_BYTES = 32 << 20  # probabilities that a call may keep for its backward; if there are more, they are recomputed
ROWS = 64  # queries per block: enough for an efficient matmul, few enough to skip keys that none of them sees


# ---- which documents go together -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Bucket:
    """`count` documents of n queries and m keys each, starting at these places of the padded streams."""

    count: int
    n: int
    m: int
    start: int
    start_k: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.start + self.count * self.n)

    @property
    def keys(self) -> slice:
        return slice(self.start_k, self.start_k + self.count * self.m)


@dataclass(frozen=True)
class _Layout:
    """The padded stream of the queries (or keys): `source` [P] is the token in each slot (padding repeats a token),
    `slot` [T] the slot of each token. Both are None if the stream needs no padding or reordering."""

    source: Tensor | None
    slot: Tensor | None
    size: int

    def pad(self, x: Tensor) -> Tensor:
        return x if self.source is None else x.index_select(0, self.source)

    def pad_gradient(self, x: Tensor) -> Tensor:
        """Like `pad`, but with zeros in the padding, so that padding adds nothing to a gradient."""
        if self.slot is None:
            return x
        return x.new_zeros(self.size, *x.shape[1:]).index_copy_(0, self.slot, x)

    def unpad(self, x: Tensor) -> Tensor:
        return x if self.slot is None else x.index_select(0, self.slot)


def _rounded(n: int) -> int:
    """A length up to 25 % larger (multiples of 16 at least), so that documents share few shapes."""
    step = max(16, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def _layout(spans: list[tuple[int, int, int]], tokens: int, device: str) -> _Layout:
    """The layout of consecutive spans (first token, length, padded length)."""
    size = sum(padded for _, _, padded in spans)
    if size == tokens and all(
        start == at for (start, _, _), at in zip(spans, _starts([p for _, _, p in spans]), strict=True)
    ):
        return _Layout(None, None, size)
    first, length, padded = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3).unbind(1)
    within = torch.arange(size) - torch.repeat_interleave(padded.cumsum(0) - padded, padded)  # [P] place in the span
    real = within < torch.repeat_interleave(length, padded)
    last = torch.repeat_interleave(length, padded) - 1
    source = torch.repeat_interleave(first, padded) + torch.minimum(within, last)  # padding repeats the last token
    slot = torch.empty(tokens, dtype=torch.int64)
    slot[source[real]] = torch.arange(size)[real]
    return _Layout(source.to(device), slot.to(device), size)


def _starts(sizes: list[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]


@lru_cache(maxsize=16)
def _plan(
    ends: tuple[int, ...], ends_k: tuple[int, ...], pad: bool, device: str
) -> tuple[tuple[_Bucket, ...], _Layout, _Layout]:
    """Buckets of documents and the layouts of queries and keys; cached, since all layers of a model share one plan.

    `pad`: round lengths up, which is right only for causal self-attention; without it only documents of equal length
    share a bucket.
    """
    documents: dict[tuple[int, int], list[int]] = {}
    for i in range(len(ends) - 1):
        n, m = ends[i + 1] - ends[i], ends_k[i + 1] - ends_k[i]
        if n or m:
            documents.setdefault((_rounded(n), _rounded(m)) if pad else (n, m), []).append(i)
    buckets, spans, spans_k = [], [], []
    start = start_k = 0
    for (n, m), members in documents.items():
        buckets.append(_Bucket(len(members), n, m, start, start_k))
        spans += [(ends[i], ends[i + 1] - ends[i], n) for i in members]
        spans_k += [(ends_k[i], ends_k[i + 1] - ends_k[i], m) for i in members]
        start, start_k = start + len(members) * n, start_k + len(members) * m
    return tuple(buckets), _layout(spans, ends[-1], device), _layout(spans_k, ends_k[-1], device)


# ---- one block of scores ---------------------------------------------------------------------------------------------
@lru_cache(maxsize=16)
def _bias(rows: int, keys: int, offset: int, group: int, options: Options, dtype: torch.dtype, device: str) -> Tensor:
    """[rows · group, keys]: 0 for a visible key, else -inf. `offset`: the first query's position among the keys."""
    seen = visible(slice(0, rows), slice(0, keys), offset, options, torch.device(device))
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat_interleave(group, 0)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, scaled before the result is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _scores(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """softcap(scale · q kᵀ) in at least fp32, [B, rows, keys]; for bf16 by two matmuls (see the module's docstring)."""
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()
    kt = k.transpose(1, 2)
    s = _scaled_bmm(q, kt, options.scale)
    if q.dtype == torch.bfloat16:
        low = torch.baddbmm(s, q, kt, beta=-1, alpha=options.scale)
        s = s.float().add_(low)
    return s if options.softcap is None else s.div_(options.softcap).tanh_().mul_(options.softcap)


@dataclass(frozen=True)
class _Block:
    """A block of work: some (document, key head) pairs of a bucket, some of their queries, and the keys these see."""

    batch: slice
    rows: slice  # of queries
    keys: slice
    offset: int  # the first query's position among the keys: if causal, the last key that it sees
    group: int  # query heads per key head

    @property
    def at_queries(self) -> tuple[slice, slice]:
        return self.batch, slice(self.rows.start * self.group, self.rows.stop * self.group)

    @property
    def at_keys(self) -> tuple[slice, slice]:
        return self.batch, self.keys


def _mask_(s: Tensor, block: _Block, options: Options) -> Tensor:
    """Put -inf at the invisible keys of a block's scores, in place, touching only the columns that have some."""
    if not options.causal and not options.window:
        return s
    rows, width = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
    if options.causal and not options.window:
        width = min(width, rows)  # every row sees all keys before the diagonal block
    offset = block.offset - (block.keys.stop - width)
    s[..., s.shape[-1] - width :] += _bias(rows, width, offset, block.group, options, s.dtype, str(s.device))
    return s


def _blocks(bucket: _Bucket, key_heads: int, group: int, options: Options):
    """Blocks that cover a bucket's visible pairs, each with at most SCORE_BYTES of fp32 scores if possible."""
    n, m = bucket.n, bucket.m
    for start in range(options.first_query(n, m), n, ROWS):
        rows = slice(start, min(n, start + ROWS))
        keys = options.keys_of(rows, n, m)
        size = 4 * (rows.stop - rows.start) * group * (keys.stop - keys.start)
        step = max(1, SCORE_BYTES // size)
        for first in range(0, bucket.count * key_heads, step):
            batch = slice(first, min(bucket.count * key_heads, first + step))
            yield _Block(batch, rows, keys, start + m - n, group)


def _to_bucket(x: Tensor, count: int, length: int, key_heads: int, group: int) -> Tensor:
    """[count · length, G · group, D] → [count · G, length · group, D]: a key head's queries are rows of one matrix."""
    x = x.view(count, length, key_heads, group, x.shape[-1]).transpose(1, 2)  # [count, G, length, group, D]
    return x.reshape(count * key_heads, length * group, x.shape[-1])


def _from_bucket(x: Tensor, count: int, length: int, key_heads: int, group: int) -> Tensor:
    """The inverse of `_to_bucket`."""
    x = x.view(count, key_heads, length, group, x.shape[-1]).transpose(1, 2)  # [count, length, G, group, D]
    return x.reshape(count * length, key_heads * group, x.shape[-1])


# ---- forward and backward --------------------------------------------------------------------------------------------
def _block_forward(q: Tensor, k: Tensor, v: Tensor, block: _Block, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, rows, D], lse [B, rows, 1] and the probabilities [B, rows, keys] of a block."""
    s = _mask_(_scores(q, k, options), block, options)
    p = s.softmax(-1)
    lse = s.amax(-1, True) - p.amax(-1, True).log()  # 3 × faster than torch.logsumexp
    p = p.to(v.dtype)
    return p @ v, lse, p


def _extended(do: Tensor, delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """do and v with extra columns, so that their product is do·v - delta, with delta accurate to 2⁻¹⁸.

    If a query attends to a single key in effect, the two terms cancel: delta must not be rounded to bf16 by itself.
    """
    high = delta.to(do.dtype)
    low = (delta - high).to(do.dtype)
    ones, pad = torch.ones_like(v[..., :2]), do.new_zeros(())  # 8 columns in all: matmuls like multiples of 8
    do = torch.cat([do, -high, -low, pad.expand(*do.shape[:-1], 6)], -1)
    return do, torch.cat([v, ones, pad.expand(*v.shape[:-1], 6)], -1)


def _block_backward(q, k, v, do, lse, p: Tensor | None, block: _Block, options: Options):
    """dq, dk and dv of a block, from do and v of `_extended`; p is recomputed if it was not kept."""
    D = q.shape[-1]
    if p is None or options.softcap is not None:
        s = _scores(q, k, options)
    if p is None:
        p = _mask_(s if options.softcap is None else s.clone(), block, options).sub_(lse).exp_()
    p = p.to(q.dtype)
    ds = (do @ v.transpose(1, 2)).mul_(p)
    if options.softcap is not None:
        ds *= 1 - s.div_(options.softcap).square_()
    dq, dk = (_scaled_bmm(*x, options.scale) for x in ((ds, k), (ds.transpose(1, 2), q)))
    return dq, dk, p.transpose(1, 2) @ do[..., :D]


@without_autocast
def _forward(q, k, v, plan, options: Options, keep: bool):
    """o [T, H, D], lse [T, H] fp32, and the probabilities of all blocks (None if too large or not wanted)."""
    buckets, queries, keys = plan
    (_, H, D), G, group = q.shape, k.shape[1], q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty(queries.size, H, D, dtype=q.dtype, device=q.device)
    q, k, v = queries.pad(widened(q)), keys.pad(widened(k)), keys.pad(widened(v))
    lse = torch.empty(queries.size, H, dtype=dtype, device=q.device)
    size = sum(b.count * b.n * H * b.m for b in buckets) * o.element_size()
    kept = [] if keep and size <= KEPT_BYTES else None
    for b in buckets:
        shape, shape_k = (b.count, b.n, G, group), (b.count, b.m, G, 1)
        qb, kb, vb = _to_bucket(q[b.queries], *shape), *(_to_bucket(x[b.keys], *shape_k) for x in (k, v))
        ob, lb = torch.zeros_like(qb), qb.new_full((*qb.shape[:2], 1), -torch.inf, dtype=dtype)
        for block in _blocks(b, G, group, options):
            at, at_k = block.at_queries, block.at_keys
            ob[at], lb[at], p = _block_forward(qb[at], kb[at_k], vb[at_k], block, options)
            if kept is not None:
                kept.append(p.to(o.dtype))
        o[b.queries], lse[b.queries] = _from_bucket(ob, *shape), _from_bucket(lb, *shape)[..., 0]
    return queries.unpad(o), queries.unpad(lse), kept


@without_autocast
def _backward(do, q, k, v, o, lse, dlse, plan, options: Options, kept: list[Tensor] | None):
    """dq [T, H, D], dk and dv [Tk, G, D]; the formulas are in attention.py."""
    buckets, queries, keys = plan
    (_, H, D), G, group, dtype = q.shape, k.shape[1], q.shape[1] // k.shape[1], lse.dtype
    delta = (do.to(dtype) * o).sum(-1)  # [T, H]
    delta = delta if dlse is None else delta - dlse
    # padded queries have do = delta = 0, hence ds = 0: they add nothing to dk and dv
    do, delta = queries.pad_gradient(widened(do)), queries.pad_gradient(delta)
    dq = torch.empty(queries.size, H, D, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(keys.size, G, D, dtype=q.dtype, device=q.device) for _ in range(2))
    q, k, v, lse = queries.pad(widened(q)), keys.pad(widened(k)), keys.pad(widened(v)), queries.pad(lse)
    kept = None if kept is None else iter(kept)
    for b in buckets:
        shape, shape_k = (b.count, b.n, G, group), (b.count, b.m, G, 1)
        qb, dob, lb, db = (_to_bucket(x[b.queries], *shape) for x in (q, do, lse[..., None], delta[..., None]))
        kb, vb = (_to_bucket(x[b.keys], *shape_k) for x in (k, v))
        dqb, dkb, dvb = torch.zeros_like(qb), *(torch.zeros_like(kb, dtype=dtype) for _ in range(2))
        dob, vb = _extended(dob, db, vb)
        for block in _blocks(b, G, group, options):
            at, at_k = block.at_queries, block.at_keys
            p = None if kept is None else next(kept)
            dqq, dkk, dvv = _block_backward(qb[at], kb[at_k], vb[at_k], dob[at], lb[at], p, block, options)
            dqb[at] = dqq
            dkb[at_k] += dkk
            dvb[at_k] += dvv
        dq[b.queries] = _from_bucket(dqb, *shape)
        dk[b.keys], dv[b.keys] = _from_bucket(dkb, *shape_k), _from_bucket(dvb, *shape_k)
    return queries.unpad(dq), keys.unpad(dk), keys.unpad(dv)


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, options, keep):
        o, lse, kept = _forward(q, k, v, plan, options, keep)
        ctx.save_for_backward(q, k, v, o, lse, *(kept or ()))
        ctx.plan, ctx.options, ctx.kept = plan, options, kept is not None
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, *kept = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        kept = kept if ctx.kept else None
        return *_backward(do, q, k, v, o, lse, dlse, ctx.plan, ctx.options, kept), None, None, None


# ---- entries ---------------------------------------------------------------------------------------------------------
def _planned(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, options: Options):
    ends, ends_k = documents(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0])
    return _plan(ends, ends_k, options.causal and ends == ends_k, str(q.device))


@graph_break  # the work depends on the documents' lengths: it cannot be traced once for all batches
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """o [T, H, D] and lse [T, H], differentiable; the arguments as attention.py checked them."""
    plan = _planned(q, k, cu_seqlens, cu_seqlens_k, options)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _Attention.apply(q, k, v, plan, options, keep)


@graph_break
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    plan = _planned(q, k, cu_seqlens, cu_seqlens_k, options)
    with torch.no_grad():
        return _backward(do, q, k, v, o, lse, None, plan, options, None)
