"""Ring attention (Liu et al. 2023, arXiv 2310.01889) on the zigzag chunks of parallel/context.py: no rank has all keys.

    step s of cp: rank r has the keys and values of rank r - s, and passes them on to r + 1 while it attends to them

A query chunk sees an earlier key chunk whole, its own causally, a later one not at all; within a pair of chunks the
documents are what both have of them. Partial outputs merge by their log-sum-exps. Backward, keys and values go round
again, and their gradients with them, one step behind, until they are home. A rank sends (cp-1)/cp · T·2·G·D elements a
layer forward, as the gather does, and backward as many again and T·2·G·D wide ones of gradients, but keeps 1/cp of the
keys and values; what is sent hides behind the attention.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from tritium.kernels import attention, attention_backward

if TYPE_CHECKING:
    from tritium.parallel.context import Split


def start_passing(x: Tensor, group: ProcessGroup) -> tuple[list[Work], Tensor, Tensor]:
    """Begin to send x to the next rank of the ring, and to receive what the one before sends: see `passed`."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    following, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    y = torch.empty_like(x)
    send, receive = dist.P2POp(dist.isend, x, following, group), dist.P2POp(dist.irecv, y, before, group)
    return dist.batch_isend_irecv([send, receive]), y, x  # x must live until it is sent


def passed(passing: tuple[list[Work], Tensor, Tensor]) -> Tensor:
    for work in passing[0]:
        work.wait()
    return passing[1]


def pairs(split: "Split", step: int, cu_seqlens: Tensor) -> Iterator[tuple[slice, slice, dict]]:
    """The query chunks of this rank, the key chunks that it has at a step that they see, and `attention`'s options."""
    holder = (dist.get_rank(split.group) - step) % split.cp
    local = [slice(i * split.chunk, (i + 1) * split.chunk) for i in range(2)]
    bounds = lambda c: cu_seqlens.clamp(c * split.chunk, (c + 1) * split.chunk) - c * split.chunk  # noqa: E731
    for own, queries in zip(split.chunks, local, strict=True):
        for other, keys in zip((holder, 2 * split.cp - 1 - holder), local, strict=True):
            if other <= own:
                documents = {"cu_seqlens": bounds(own), "cu_seqlens_k": bounds(other)}
                yield queries, keys, documents | {"causal": own == other}


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, split: "Split", cu_seqlens: Tensor, scores: dict) -> Tensor:
        ctx.split, ctx.scores, held = split, scores, kv
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros(q.shape, dtype=wide, device=q.device)  # [T'/cp, H, D]
        lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
        for step in range(split.cp):
            passing = start_passing(held, split.group) if step + 1 < split.cp else None
            for queries, keys, options in pairs(split, step, cu_seqlens):
                part = attention(q[queries], *held[keys].unbind(1), **options, **scores, return_lse=True)
                merge(o[queries], lse[queries], *part)
            held = passed(passing) if passing else held
        o = o.to(q.dtype)
        ctx.save_for_backward(q, kv, o, lse, cu_seqlens)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, kv, o, lse, cu_seqlens = ctx.saved_tensors
        split, held, dq = ctx.split, kv, torch.zeros_like(q, dtype=lse.dtype)
        homeward = None
        for step in range(split.cp):
            passing = start_passing(held, split.group) if step + 1 < split.cp else None
            dkv = torch.zeros_like(held, dtype=lse.dtype)
            for at, keys, options in pairs(split, step, cu_seqlens):
                options |= ctx.scores
                parts = attention_backward(do[at], q[at], *held[keys].unbind(1), o[at], lse[at], **options)
                dq[at] += parts[0]
                dkv[keys] += torch.stack(parts[1:], 1)
            if homeward:
                dkv += passed(homeward)  # what the ranks before have added for these keys
            homeward = start_passing(dkv, split.group)
            held = passed(passing) if passing else held
        return dq.to(q.dtype), passed(homeward).to(kv.dtype), None, None, None


def merge(o: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Into o [·, H, D] and lse [·, H], in place: attention to further keys."""
    total = torch.logaddexp(lse, more_lse)
    base = total.masked_fill(total == -torch.inf, 0.0)  # of a query that has seen no key yet
    o.mul_((lse - base).exp()[..., None]).add_(more * (more_lse - base).exp()[..., None])
    lse.copy_(total)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, split: "Split", cu_seqlens: Tensor, **scores) -> Tensor:
    """Causal attention of this rank's q [T'/cp, H, D] to all ranks' k and v [T'/cp, G, D], over documents; as q.

    `scores` are attention's softcap and scale. (A window is not: its keys are few, and are gathered.)
    """
    return _RingAttention.apply(q, torch.stack([k, v], 1), split, cu_seqlens, scores)
