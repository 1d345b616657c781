"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): two operators around each block, and how weights are cut.

                 x, whole ──copy_to_tp──▶ W by rows ──▶ … ──▶ W by columns ──reduce_from_tp──▶ y, whole
    forward                  identity                                          all-reduce
    backward                all-reduce                                          identity

They are conjugates: what one does forward, the other does backward. A group of None is a mesh without tensor
parallelism: every function here then returns its input, or does the plain thing.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tritium.parallel.mesh import Mesh


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    # A copy: the input belongs to the caller, may be saved for another backward, and may be expanded (stride 0).
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tp(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Let a replicated `x` (any shape) into a sharded block: the ranks' partial gradients are summed backward."""
    return x if group is None else _CopyToTP.apply(x, group)


def reduce_from_tp(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum the ranks' partial results `x` (same shape on each); the gradient of the sum is each part's own."""
    return x if group is None else _ReduceFromTP.apply(x, group)


def vocab_parallel_embedding(tokens: Tensor, weight_shard: Tensor, group: ProcessGroup | None) -> Tensor:
    """Rows of an embedding of which rank r holds [r·V/n, (r+1)·V/n): tokens [T] (global ids), shard [V/n, E] → [T, E].

    Each row comes from one rank and zeros from the rest, so the result is exact in any dtype; the gradient goes to
    the rank that holds the row. An id outside the vocabulary gives zeros where an unsharded lookup would fail.
    """
    if group is None:
        return F.embedding(tokens, weight_shard)
    rows = len(weight_shard)
    local = tokens - dist.get_rank(group) * rows  # [T]
    elsewhere = (local < 0) | (local >= rows)  # [T]
    x = F.embedding(local.masked_fill(elsewhere, 0), weight_shard)  # [T, E]
    # Filled, not multiplied by zero: neither row 0 nor its gradient may see a NaN of a token that lives elsewhere.
    return reduce_from_tp(x.masked_fill(elsewhere[:, None], 0), group)


def shard(tensor: Tensor, dim: int, mesh: Mesh, sections: Sequence[int] | None = None) -> Tensor:
    """This rank's contiguous part of `tensor` along `dim`, as a tensor of its own.

    A fused matrix, such as [gate; up] with sections (F, F) or [q; k; v], is cut section by section: a rank gets its
    gate rows and its up rows, as it would of two matrices.
    Raises: ValueError where the sections don't add up to the dimension, or tp does not divide one of them.
    """
    if mesh.tp == 1:
        return tensor
    sizes = _local_sizes(tensor.shape[dim], 1, mesh.tp, sections)
    parts = tensor.split([n * mesh.tp for n in sizes], dim)
    own = [part.narrow(dim, mesh.tp_rank * n, n) for part, n in zip(parts, sizes, strict=True)]
    return torch.cat(own, dim)  # copies, so that the whole tensor can be freed


@torch.no_grad()
def unshard(tensor: Tensor, dim: int, mesh: Mesh, sections: Sequence[int] | None = None) -> Tensor:
    """The inverse of `shard`: the whole tensor, on every rank of the tp group. `sections` are the whole sizes.

    For checkpoints and small uses: not differentiable. Raises: ValueError as `shard` does.
    """
    if mesh.tp == 1:
        return tensor
    sizes = _local_sizes(tensor.shape[dim], mesh.tp, mesh.tp, sections)
    tensor = tensor.contiguous()  # NCCL takes no other
    shards = [torch.empty_like(tensor) for _ in range(mesh.tp)]
    dist.all_gather(shards, tensor, group=mesh.tp_group)
    by_section = zip(*(s.split(sizes, dim) for s in shards), strict=True)  # per section, each rank's part
    return torch.cat([part for parts in by_section for part in parts], dim)


def _local_sizes(length: int, copies: int, tp: int, sections: Sequence[int] | None) -> list[int]:
    """Each section's size on one of `tp` ranks; `length` × `copies` is the whole dimension."""
    whole = length * copies
    sections = (whole,) if sections is None else tuple(sections)
    if sum(sections) != whole:
        raise ValueError(f"sections {sections} add up to {sum(sections)}, the dimension is {whole}")
    if any(n % tp for n in sections):
        raise ValueError(f"tp={tp} does not divide {' + '.join(map(str, sections))}: choose sizes that are multiples")
    return [n // tp for n in sections]
