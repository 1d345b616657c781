"""Which keys each query of `attention` sees: documents, causality, windows and different lengths in one description.

    keys      e f g h i j      the last query is aligned with the last key. Causal: a sees e f g, d sees all
    queries       a b c d      with a window of 2, a sees f g; not causal, f g h

The keys that a query sees are an interval [start, end) of the stream, and so are the queries that see a key. The torch
path asks `Options` for the keys of a block of rows. The kernels load intervals that `intervals` has computed on the
device, by a binary search in cu_seqlens for each token, so that the host need not know the documents' lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritium.kernels.backend import device_assert, tl, triton


@dataclass(frozen=True)
class Options:
    """What decides which keys a query sees and how scores are computed; hashable, for the caches of the torch path."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float

    def keys_of(self, rows: slice, n: int, m: int) -> slice:
        """The keys that some query in `rows` sees, where n queries are aligned with the end of m keys."""
        offset = m - n
        stop, start = m, 0
        if self.causal:
            stop = min(m, rows.stop + offset)
        elif self.window:
            stop = min(m, rows.stop + offset + self.window - 1)
        if self.window:
            start = max(0, rows.start + offset - self.window + 1)
        return slice(start, stop)

    def first_query(self, n: int, m: int) -> int:
        """The first query that sees a key (all later ones do, too); n if there are no keys."""
        if m == 0:
            return n
        if self.causal:
            return max(0, n - m)
        return max(0, n - m - self.window + 1) if self.window else 0


def visible(rows: slice, keys: slice, offset: int, options: Options, device: torch.device) -> Tensor:
    """[rows, keys] bool: whether query i sees key j."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    seen = torch.ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.bool, device=device)
    if options.causal:
        seen &= j <= i
    if options.window:
        seen &= (j > i - options.window) & ((j < i + options.window) | options.causal)
    return seen


def documents(
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, T: int, Tk: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The checked bounds of the documents of T queries and Tk keys, on the host (a device sync on a GPU).

    Raises: ValueError for bounds that decrease, or don't run from 0 to the number of tokens.
    """
    return _ends(cu_seqlens, T, "cu_seqlens"), _ends(cu_seqlens_k, Tk, "cu_seqlens_k")


def _ends(cu_seqlens: Tensor | None, tokens: int, name: str) -> tuple[int, ...]:
    ends = (0, tokens) if cu_seqlens is None else tuple(cu_seqlens.tolist())
    if ends[0] != 0 or ends[-1] != tokens:
        raise ValueError(f"{name} runs from {ends[0]} to {ends[-1]}, but must run from 0 to {tokens} tokens")
    if any(a > b for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(f"{name} must not decrease: {list(ends)}")
    return ends


# Triton ---------------------------------------------------------------------------------------------------------------

NO_LIMIT = 2**31 - 1  # the window where there is none, and the start of an empty interval
BLOCK = 256


@triton.jit
def _store_intervals(p_cu, p_cu_other, p_out, N, N_other, S, STEPS, left, right, BLOCK: tl.constexpr):
    """out [2, N]: for each token, start and end of the interval that it sees in the other stream.

    The last tokens of a document's two sides are aligned; relative to its aligned position a token sees `left` tokens
    back and `right` ahead. A token that sees nothing gets (2^31 - 1, 0), which changes neither the smallest start nor
    the largest end of its block. Intervals stay within the other stream even if cu is invalid.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = i < N
    b_doc, b_next = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + S
    for _ in range(STEPS):  # binary search for the last document that does not start after i
        b_middle = (b_doc + b_next) // 2
        m_right = tl.load(p_cu + b_middle, mask=m, other=0) <= i
        b_doc, b_next = tl.where(m_right, b_middle, b_doc), tl.where(m_right, b_next, b_middle)
    b_first = tl.load(p_cu + b_doc, mask=m, other=0).to(tl.int64)
    b_last = tl.load(p_cu + b_doc + 1, mask=m, other=0).to(tl.int64)
    b_start = tl.load(p_cu_other + b_doc, mask=m, other=0).to(tl.int64)
    b_end = tl.load(p_cu_other + b_doc + 1, mask=m, other=0).to(tl.int64)
    b_same = i + b_end - b_last  # i's aligned position in the other stream
    b_start = tl.maximum(tl.maximum(b_start, b_same - left), 0)
    b_end = tl.minimum(tl.minimum(b_end, b_same + right + 1), N_other)
    m_sees = (b_first <= i) & (i < b_last) & (b_start < b_end)
    tl.store(p_out + i, tl.where(m_sees, b_start, 2147483647).to(tl.int32), mask=m)
    tl.store(p_out + N + i, tl.where(m_sees, b_end, 0).to(tl.int32), mask=m)


@triton.jit
def _attention_intervals(
    p_cu, p_cu_k, p_keys, p_queries, T, Tk, S, STEPS, left, right, BLOCK: tl.constexpr
):  # fmt: skip
    """keys [2, T]: the interval of keys that each query sees; with 2 on grid axis 1, also queries [2, Tk] of each key.

    Grid: (cdiv(max(T, Tk), BLOCK), 1 or 2). STEPS: those of a binary search in S documents.
    """
    if tl.program_id(1) == 0:
        _store_intervals(p_cu, p_cu_k, p_keys, T, Tk, S, STEPS, left, right, BLOCK)
    else:
        _store_intervals(p_cu_k, p_cu, p_queries, Tk, T, S, STEPS, right, left, BLOCK)


@triton.jit
def interval_of(p_interval, i_row, N):
    """start and end of a block's rows; rows past the end repeat the last one, so that they change no bound."""
    i_row = tl.minimum(i_row, N - 1).to(tl.int64)
    return tl.load(p_interval + i_row), tl.load(p_interval + N + i_row)


@triton.jit
def bounds_of(b_start, b_end):
    """(lo, hi, full_lo, full_hi): no row sees a key outside [lo, hi); every row sees all of [full_lo, full_hi)."""
    hi = tl.max(b_end, 0)
    return tl.minimum(tl.min(b_start, 0), hi), hi, tl.max(b_start, 0), tl.min(b_end, 0)


def intervals(
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor,
    causal: bool, window: int | None, both: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[2, T] int32: the keys of each query; with `both`, also [2, Tk] int32: the queries of each key.

    Raises: ValueError for invalid cu_seqlens on a CPU; on a GPU they are checked under TRITIUM_DEBUG=1.
    """
    T, Tk = len(q), len(k)
    if q.device.type == "cpu":
        documents(cu_seqlens, cu_seqlens_k, T, Tk)
    for cu, n in ((cu_seqlens, T), (cu_seqlens_k, Tk)):
        if cu is not None and q.device.type != "cpu":
            holds = lambda cu=cu, n=n: (cu[0] == 0) & (cu[-1] == n) & (cu.diff() >= 0).all()  # noqa: E731
            device_assert(holds, f"cu_seqlens must rise from 0 to the {n} tokens")

    def made(cu: Tensor | None, n: int) -> Tensor:  # computed on the device: no copy from the host
        return torch.arange(2, dtype=torch.int32, device=q.device) * n if cu is None else cu.contiguous()

    cu = made(cu_seqlens, T)
    cu_k = cu if cu_seqlens is cu_seqlens_k and Tk == T else made(cu_seqlens_k, Tk)
    keys, queries = (torch.empty(2, n, dtype=torch.int32, device=q.device) for n in (T, Tk if both else 0))
    reach = NO_LIMIT if window is None else min(window - 1, NO_LIMIT)
    longest = max(T, Tk) if both else T
    if longest:
        _attention_intervals[(triton.cdiv(longest, BLOCK), 2 if both else 1)](
            cu, cu_k, keys, queries, T, Tk, len(cu) - 1, (len(cu) - 1).bit_length(), reach,
            0 if causal else reach, BLOCK=BLOCK,
        )  # fmt: skip
    return keys, queries
