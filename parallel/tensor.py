"""Tensor parallelism with sequence parallelism (Megatron-LM, arXiv 1909.08053 and 2205.05198), and how weights are cut.

Between the blocks each of n ranks has T/n tokens of the stream; within one, all tokens and 1/n of the features:

               [T/n, E] ──gather_tokens──▶ [T, E] ─▶ W by rows ─▶ … ─▶ W by columns ──scatter_tokens──▶ [T/n, E]
    forward                all-gather                                                 reduce-scatter
    backward             reduce-scatter                                                 all-gather

They are conjugates: what one does forward, the other does backward. A decoder layer is two blocks: 2 all-gathers and
2 reduce-scatters forward, as many backward, in each of which a rank sends and receives (n-1)/n · T·E elements. These
8 (n-1)/n · T·E are what the four all-reduces of plain tensor parallelism move, but norms and the residual stream cost
1/n of the time and memory.

Everything that all ranks hold (norms, which see a rank's tokens; K and V rows of shared heads) has only a part of its
gradient on each: the optimizer adds the parts, once a step.

A group of None is a mesh without tensor parallelism: every function here then returns its input, or does the plain
thing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tritium.parallel.mesh import Mesh, all_gather_single, reduce_scatter_single

# ---------------------------------------------------------------------------------------------- tokens


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' x [N, …], one after the other: [n·N, …]. Without a gradient."""
    y = x.new_empty(len(x) * dist.get_world_size(group), *x.shape[1:])
    all_gather_single(y, x.contiguous(), group=group)
    return y


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's n-th of the sum of the ranks' x [N, …]: [N/n, …]. Without a gradient."""
    y = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    reduce_scatter_single(y, x.contiguous(), group=group)
    return y


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def linear_map(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """there(x), a linear map over the ranks, with the gradient that its transpose makes: back(grad)."""
    return _Map.apply(x, there, back)


def gather_tokens(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The ranks' tokens [T/n, …] → all of them, [T, …]. What each rank does with them gives a part of the gradient."""
    return x if group is None else linear_map(x, partial(all_gather, group=group), partial(reduce_scatter, group=group))


def scatter_tokens(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The ranks' partial results [T, …] → their sum at this rank's tokens, [T/n, …]."""
    return x if group is None else linear_map(x, partial(reduce_scatter, group=group), partial(all_gather, group=group))


def part_of_gradient(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Around what all ranks compute alike: each counts 1/n of the gradient, so that their sum is the gradient."""
    return x if group is None else linear_map(x, lambda x: x.view_as(x), lambda grad: grad / dist.get_world_size(group))


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' x, in place and without a gradient: generation's way out of a block."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def embedding_part(tokens: Tensor, weight_shard: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part of an embedding, of which rank r holds rows [r·V/n, (r+1)·V/n).

    tokens [T] (global ids), shard [V/n, E] → [T, E], zero where a row is elsewhere: the sum over the ranks is exact in
    any dtype. An id outside the vocabulary gives zeros where an unsharded lookup would fail.
    """
    if group is None:
        return F.embedding(tokens, weight_shard)
    rows = len(weight_shard)
    local = tokens - dist.get_rank(group) * rows  # [T]
    elsewhere = (local < 0) | (local >= rows)  # [T]
    x = F.embedding(local.masked_fill(elsewhere, 0), weight_shard)  # [T, E]
    # Filled, not multiplied by zero: neither row 0 nor its gradient may see a NaN of a token that lives elsewhere.
    return x.masked_fill(elsewhere[:, None], 0)


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Sharding:
    """How a parameter is cut over the tensor-parallel ranks: along `dim`, each of `sections` (whole sizes) by itself.

    A fused matrix, such as [gate; up] with sections (F, F) or [q; k; v], is cut section by section: a rank gets its
    gate rows and its up rows, as it would of two matrices. A section that is `replicated` every rank has whole.
    """

    dim: int
    sections: tuple[int, ...] | None = None
    replicated: tuple[bool, ...] | None = None

    def plan(self, whole: int, tp: int) -> list[tuple[int, int]]:
        """(whole size, size on one of `tp` ranks) of each section of a dimension of `whole`.

        Raises: ValueError where the sections don't add up to it, or tp does not divide one of them.
        """
        sections = self.sections or (whole,)
        replicated = self.replicated or (False,) * len(sections)
        if sum(sections) != whole:
            raise ValueError(f"sections {sections} add up to {sum(sections)}, the dimension is {whole}")
        if any(n % tp for n, common in zip(sections, replicated, strict=True) if not common):
            raise ValueError(f"tp={tp} does not divide {' + '.join(map(str, sections))}: choose multiples of it")
        return [(n, n if common else n // tp) for n, common in zip(sections, replicated, strict=True)]

    def whole_size(self, local: int, tp: int) -> int:
        """The whole dimension of which a rank has `local`."""
        return local * tp if self.sections is None else sum(self.sections)

    def runs(self, p: Tensor) -> list[tuple[int, bool, bool]]:
        """A shard's elements in order: (how many, whether cut over tp, whether only a part of the gradient is here)."""
        if not any(self.replicated or ()):
            return [(p.numel(), True, False)]
        common = sum(n for n, whole in zip(self.sections, self.replicated, strict=True) if whole)
        tp = (sum(self.sections) - common) // (p.shape[0] - common)
        row = p.shape[1:].numel()  # replicated sections are of rows: dim is 0
        sizes = [n for _, n in self.plan(sum(self.sections), tp)]
        return [(n * row, not whole, whole) for n, whole in zip(sizes, self.replicated, strict=True)]


def shard(tensor: Tensor, sharding: Sharding | None, mesh: Mesh) -> Tensor:
    """This rank's part of `tensor`, as a tensor of its own; `tensor` itself where it is not cut.

    Raises: ValueError as `Sharding.plan` does.
    """
    if mesh.tp == 1 or sharding is None:
        return tensor
    sizes = sharding.plan(tensor.shape[sharding.dim], mesh.tp)
    sections = tensor.split([whole for whole, _ in sizes], sharding.dim)
    own = [
        section if local == whole else section.narrow(sharding.dim, mesh.tp_rank * local, local)
        for section, (whole, local) in zip(sections, sizes, strict=True)
    ]
    return torch.cat(own, sharding.dim)  # copies, so that the whole tensor can be freed


@torch.no_grad()
def unshard(tensor: Tensor, sharding: Sharding | None, mesh: Mesh) -> Tensor:
    """The inverse of `shard`: the whole tensor, on every rank of the tp group.

    For checkpoints and small uses: not differentiable. Raises: ValueError as `Sharding.plan` does.
    """
    if mesh.tp == 1 or sharding is None:
        return tensor
    dim = sharding.dim
    sizes = sharding.plan(sharding.whole_size(tensor.shape[dim], mesh.tp), mesh.tp)
    shards = all_gather(tensor[None], mesh.tp_group)  # [n, …]
    by_section = zip(*(s.split([local for _, local in sizes], dim) for s in shards), strict=True)
    whole = []
    for (size, local), parts in zip(sizes, by_section, strict=True):
        whole += parts[:1] if local == size else parts
    return torch.cat(whole, dim)
