"""Data parallelism: sums over the replicas, once per step, and the one clip norm.

Losses are sums over the global batch divided by denominators known beforehand, so gradients are *added* over dp (and
cp, whose ranks see parts of a batch), never averaged: two replicas give what one process gives on the same batch.
"""

import math
from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels import global_norm
from tritium.parallel.mesh import Mesh

BUCKET_BYTES = 64 << 20  # large enough for full bandwidth; what a backend copies in passing stays bounded by it


def all_reduce_counts(counts: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """Each named count summed over dp, in fp64 and to the last bit the same on every rank, whatever their order.

    A rank whose batch is empty may leave names out, or all of them: it gets the union, with every rank's names.
    Names come in the order of the first rank that has them. One exchange for all names; every rank must call it.
    """
    ranks: list[dict[str, float]] = [counts]
    if mesh.dp > 1:
        ranks = [{}] * mesh.dp
        dist.all_gather_object(ranks, counts, group=mesh.dp_group)
    names = dict.fromkeys(name for counts in ranks for name in counts)
    return {name: math.fsum(counts.get(name, 0.0) for counts in ranks) for name in names}


def reduce_gradients(flat_buffers: Iterable[Tensor], mesh: Mesh) -> None:
    """Sum the flat main-gradient buffers, each [N] fp32 or fp64, over dp and cp: in place, once per step.

    Buckets are in flight together and waited for at the end.
    Raises: ValueError for a buffer of another dtype (a sum in bf16 loses small gradients) or with another layout.
    """
    if mesh.data_group is None:
        return
    works = []
    for buffer in flat_buffers:
        if buffer.dtype not in (torch.float32, torch.float64) or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(f"gradients are flat fp32 or fp64 buffers, not {buffer.dtype} {tuple(buffer.shape)}")
        for bucket in buffer.split(BUCKET_BYTES // buffer.element_size()):
            works.append(dist.all_reduce(bucket, group=mesh.data_group, async_op=True))
    for work in works:
        work.wait()


def global_grad_norm(shards: Iterable[tuple[Tensor, bool]], mesh: Mesh) -> Tensor:
    """The L2 norm of the whole gradient, the same 0-d tensor on every rank, without a host sync.

    `shards` are (gradient, whether it is cut over tp) pairs: what is cut is summed over tp, what is replicated is
    counted once. Gradients must have been reduced over dp and cp before. fp64 where a gradient is fp64, else fp32.
    """
    cut, whole = [], []
    for gradient, is_sharded in shards:
        (cut if is_sharded else whole).append(gradient)
    cut_norm, whole_norm = (_norm(tensors, mesh.device) for tensors in (cut, whole))
    cut_square = cut_norm.square()
    if mesh.tp > 1:
        dist.all_reduce(cut_square, group=mesh.tp_group)
    return (cut_square + whole_norm.square()).sqrt()


def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    return global_norm(tensors) if tensors else torch.zeros((), device=device)


def check_same(mesh: Mesh, value: str, what: str) -> None:
    """Refuse to start where ranks differ in `value`: their config, their data, their version.

    Raises: ValueError on every rank, naming the ranks that differ from rank 0 and the first line where they do.
    """
    values = mesh.gather_objects(value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if not others:
        return
    here, there = _first_difference(values[0], values[others[0]])
    ranks = f"rank {others[0]} differs" if len(others) == 1 else f"ranks {', '.join(map(str, others))} differ"
    raise ValueError(
        f"all ranks must have the same {what}, but {ranks} from rank 0: "
        f"{here!r} on rank 0, {there!r} on rank {others[0]}; start every process with the same command"
    )


def _first_difference(a: str, b: str) -> tuple[str, str]:
    lines = zip_longest(a.splitlines(), b.splitlines(), fillvalue="")
    return next(((x, y) for x, y in lines if x != y), (a, b))
