"""The vocabulary head without its logits: what `linear_logprob`, `linear_cross_entropy` and `linear_kl` share.

    z = softcap(hidden @ weight.T) / temperature          [T, V], never held whole

The matrix is walked in tiles of (a block of tokens) × (a chunk of the vocabulary); each tile yields per-token
statistics that merge exactly (an online log-sum-exp), and the backward makes the tile again. A shard of the
vocabulary on another rank is just one more chunk to merge.

               chunk 0    chunk 1    …
    rows 0   [ tile ] → [ tile ] → merge: lse, expected z, Σz, max      forward   2·T·V·E FLOPs
    rows 1   [ tile ] → [ tile ] → …                                    backward  6·T·V·E (one third makes the tiles)

Two details decide the precision in bf16. A target's gradient, p - 1, is formed in fp32 and then rounded: bf16(p) is 1
from p = 0.998 on, and the gradient would be lost. And dhidden and dweight are accumulated in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# A tile in fp32: on a CPU it should stay in the cache (allocations over 32 MB also go back to the system each time,
# and the page faults then cost more than the matmul); a GPU wants large matmuls.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
TILE_ROWS = 1024
EXCLUDED = -1e30  # instead of -inf: a chunk that holds nothing else still has a finite softmax


class HeadStatistics(NamedTuple):
    """Per-token statistics of the logits, fp32 (fp64 for fp64 inputs). Differentiable but for `top`."""

    lse: Tensor  # [T] log Σ_v exp z_v
    picked: Tensor  # [T, K] the logits of the targets; 0 where a target is outside the vocabulary
    expected: Tensor | None  # [T] Σ_v p_v z_v, so that entropy = lse - expected
    total: Tensor | None  # [T] Σ_v z_v
    top: Tensor  # [T] max_v z_v


@dataclass(frozen=True)
class HeadOptions:
    temperature: float = 1.0
    softcap: float | None = None
    expected: bool = False  # whether to compute Σ p z
    total: bool = False  # whether to compute Σ z
    exclude: bool = False  # leave the targets out of every statistic but `picked`


def check_head(hidden: Tensor, weight: Tensor, names: tuple[str, str] = ("hidden", "weight")) -> None:
    """Raise ValueError unless hidden is [T, E] and weight is [V, E], of one dtype."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{names[0]} and {names[1]} must be [T, E] and [V, E], got {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{names[0]} is {hidden.dtype} but {names[1]} is {weight.dtype}: cast one of them")


def check_targets(targets: Tensor, tokens: int, vocab: int, ignore_index: int | None) -> None:
    """Raise ValueError unless targets is [tokens] and in range; values are read on a CPU only: no host sync."""
    if targets.shape != (tokens,):
        raise ValueError(f"targets must have one id for each of {tokens} tokens, got shape {tuple(targets.shape)}")
    if targets.is_cuda or torch.compiler.is_compiling() or not tokens:
        return
    ids = targets if ignore_index is None else targets.masked_fill(targets == ignore_index, 0)
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"targets hold {low if low < 0 else high}: ids must be in [0, {vocab}) or {ignore_index}")


def _tile_shape(tokens: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    rows = max(1, min(tokens, TILE_ROWS))
    return rows, min(vocab, max(1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * rows)))


def tiles(tokens: int, vocab: int, device: torch.device) -> Iterator[tuple[int, slice, slice]]:
    """(chunk number, columns, rows) of every tile: the vocabulary outside, so that a chunk of the weight stays hot."""
    rows, columns = _tile_shape(tokens, vocab, device)
    for chunk, column in enumerate(range(0, vocab, columns)):
        for row in range(0, tokens, rows):
            yield chunk, slice(column, min(vocab, column + columns)), slice(row, min(tokens, row + rows))


def logits_tile(hidden: Tensor, weight: Tensor, options: HeadOptions) -> Tensor:
    """z of one tile, in fp32 at least: the matmul in the inputs' dtype, everything after it in fp32."""
    z = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))  # [rows, columns]
    if options.softcap is not None:
        z = z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z if options.temperature == 1.0 else z.div_(options.temperature)


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a chunk, and their column in it (0 for the others)."""
    here = (targets >= columns.start) & (targets < columns.stop)
    return here, torch.where(here, targets - columns.start, 0)


def _tile_logits(hidden: Tensor, weight: Tensor, targets: Tensor, columns: slice, options: HeadOptions):
    """(z, the targets' z): z [rows, columns] without the excluded targets, picked [rows, K]."""
    z = logits_tile(hidden, weight, options)
    here, local = _within(targets, columns)
    picked = z.gather(1, local).mul_(here)  # [rows, K]
    if options.exclude:
        z.scatter_add_(1, local, here.to(z.dtype) * EXCLUDED)
    return z, picked


class _Head(torch.autograd.Function):
    """HeadStatistics of a whole vocabulary or of one shard of it; targets outside [0, V) pick 0."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, options):
        (T, _), V = hidden.shape, weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        lse, top = (hidden.new_full((T,), -torch.inf, dtype=dtype) for _ in range(2))
        picked = hidden.new_zeros(targets.shape, dtype=dtype)
        expected, total = (hidden.new_zeros(T, dtype=dtype) if x else None for x in (options.expected, options.total))
        chunk_lse = hidden.new_empty(-(-V // _tile_shape(T, V, hidden.device)[1]), T, dtype=dtype)
        for chunk, columns, rows in tiles(T, V, hidden.device):
            z, picked_here = _tile_logits(hidden[rows], weight[columns], targets[rows], columns, options)
            picked[rows] += picked_here
            p, top_here = z.softmax(-1), z.amax(-1)
            lse_here = top_here - p.amax(-1).log()  # log Σ exp, from the softmax: 3 × faster than torch.logsumexp
            merged = torch.logaddexp(lse[rows], lse_here)
            if options.expected:
                kept = expected[rows] * (lse[rows] - merged).exp()
                expected[rows] = kept + p.mul_(z).sum(-1) * (lse_here - merged).exp()
            if options.total:
                total[rows] += z.sum(-1)
            lse[rows], chunk_lse[chunk, rows] = merged, lse_here
            top[rows] = torch.maximum(top[rows], top_here)
        ctx.save_for_backward(hidden, weight, targets, lse, chunk_lse, expected)
        ctx.options = options
        ctx.mark_non_differentiable(top)
        ctx.set_materialize_grads(False)
        return lse, picked, expected, total, top

    @staticmethod
    @once_differentiable
    def backward(ctx, g_lse, g_picked, g_expected, g_total, _):
        hidden, weight, targets, lse, chunk_lse, expected = ctx.saved_tensors
        options, (T, _), V = ctx.options, hidden.shape, weight.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
        if g_expected is not None:  # d expected / dz_v = p_v (1 + z_v - expected)
            g_lse = g_lse + g_expected * (1 - expected)
        for chunk, columns, rows in tiles(T, V, hidden.device):
            z, _ = _tile_logits(hidden[rows], weight[columns], targets[rows], columns, options)
            share = (chunk_lse[chunk, rows] - lse[rows]).exp()  # of the chunk in the whole softmax
            dz = z.softmax(-1).mul_((share * g_lse[rows])[:, None])
            if g_expected is not None:
                dz += z.softmax(-1).mul_((share * g_expected[rows])[:, None]).mul_(z)
            if g_total is not None:
                dz += g_total[rows, None]
            if g_picked is not None:
                here, local = _within(targets[rows], columns)
                dz.scatter_add_(1, local, g_picked[rows] * here)
            dz = _to_raw_logits(dz, z, options).to(hidden.dtype)
            if needs_hidden:
                dhidden[rows] += dz @ weight[columns]
            if needs_weight:
                dweight[columns] += dz.t() @ hidden[rows]
        dhidden = dhidden.to(hidden.dtype) if needs_hidden else None
        return dhidden, dweight.to(weight.dtype) if needs_weight else None, None, None


def _to_raw_logits(dz: Tensor, z: Tensor, options: HeadOptions) -> Tensor:
    """The gradient of hidden @ weight.T from the gradient of z, in place: d tanh(x) = 1 - tanh(x)²."""
    if options.softcap is not None:
        dz *= 1 - (z * (options.temperature / options.softcap)).square_()
    return dz if options.temperature == 1.0 else dz.div_(options.temperature)


class _AllReduceSum(torch.autograd.Function):
    """Sum over a group whose ranks go on with the same value: the gradient of each share is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _merge_shards(s: HeadStatistics, group: dist.ProcessGroup) -> HeadStatistics:
    """The statistics of the whole vocabulary from those of its shards: one max and one sum over the group."""
    bounds = torch.stack([s.lse.detach(), s.top])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, top = bounds
    share = (s.lse - high).exp()
    parts = [share[:, None], s.picked]
    parts += [] if s.expected is None else [(share * s.expected)[:, None]]
    parts += [] if s.total is None else [s.total[:, None]]
    widths = [part.shape[1] for part in parts]
    merged = list(_AllReduceSum.apply(torch.cat(parts, 1), group).split(widths, 1))
    share, picked = merged.pop(0)[:, 0], merged.pop(0)
    expected = None if s.expected is None else merged.pop(0)[:, 0] / share
    total = None if s.total is None else merged.pop(0)[:, 0]
    return HeadStatistics(high + share.log(), picked, expected, total, top)


def head_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions, group: dist.ProcessGroup | None = None
) -> HeadStatistics:
    """HeadStatistics of z = softcap(hidden @ weight.T) / temperature.

    hidden [T, E] and weight [V, E] of one dtype, targets [T, K] int64 global ids (anything outside the vocabulary
    picks nothing). With a group, weight holds the rank's V / world_size rows; dhidden then is this shard's part.
    """
    if group is None:
        return HeadStatistics(*_Head.apply(hidden, weight, targets, options))
    local = targets - dist.get_rank(group) * weight.shape[0]
    return _merge_shards(HeadStatistics(*_Head.apply(hidden, weight, local, options)), group)


def vocab_size(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Of the whole head, of which weight may be a shard."""
    return weight.shape[0] * (1 if group is None else dist.get_world_size(group))
