"""What data-parallel ranks must agree on: the counts that losses are divided by, the run's settings, the parameters.

Losses are sums over the global batch divided by denominators known beforehand, so that two replicas give what one
process gives on the same batch. (Gradients: parallel/zero.py.)
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.parallel.mesh import Mesh


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
        f"{here!r} on rank 0, {there!r} on rank {others[0]}; start all with the same command and code"
    )


def _first_difference(a: str, b: str) -> tuple[str, str]:
    return next(((x, y) for x, y in zip_longest(a.splitlines(), b.splitlines(), fillvalue="") if x != y), (a, b))


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """The sum of the tensors' bit patterns: a flipped bit changes it, the order of adding does not. A host sync."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(int(t.detach().view(kinds[t.element_size()]).sum(dtype=torch.int64)) for t in tensors)


def diverged(mesh: Mesh, own: int, common: int = 0) -> list[int]:
    """The ranks whose `own` value is not that of most ranks with the same shard (at ZeRO-3: of the same part), or whose
    `common` one is not that of most ranks. Of two, the first is believed."""
    values = mesh.gather_objects((own, common))
    stride = mesh.tp * (mesh.parts if mesh.zero == 3 else 1)
    alike = [[values[i][0] for i in range(start, mesh.world_size, stride)] for start in range(stride)]
    usual = [Counter(group).most_common(1)[0][0] for group in alike]
    everywhere = Counter(value for _, value in values).most_common(1)[0][0]
    return [rank for rank, pair in enumerate(values) if pair != (usual[rank % stride], everywhere)]
