"""Muon: momentum of a matrix, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    m ← β m + (1-β) g;   u = (1-β) g + β m                            Nesterov's look-ahead
    W ← W - lr · (0.2 √max(rows, columns) · NewtonSchulz₅(u) + weight_decay · W)

The factor gives updates the size of AdamW's, so that both take one learning rate (Moonlight, arXiv 2502.16982, section
2.2). A fused matrix, [q; k; v] or [gate; up], is several matrices, as in a checkpoint.

ZeRO cuts u anywhere. Ranks therefore deal the matrices of as many layers as there are ranks out among themselves, send
each its pieces, orthogonalise what they have, and send the pieces back: two all-to-alls of u per window, in which a
rank has about one layer whole. Matrices that are also cut over tp are joined and cut again (`unshard`, `shard`).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import Sharding, shard, unshard
from tritium.parallel.zero import Flat

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic whose iterates bring singular values near 1
STEPS = 5


def orthogonalize(x: Tensor) -> Tensor:
    """x [rows, columns] with all its singular values brought near 1, by Newton-Schulz iterations; in x's dtype."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if tall else x


def whole_direction(x: Tensor, sections: tuple[int, ...] | None) -> Tensor:
    """0.2 √max(rows, columns) · NewtonSchulz(x), for each of the matrices that lie in x. bf16 inside on a GPU."""
    narrow = x.bfloat16() if x.is_cuda and x.dtype == torch.float32 else x
    pieces = narrow.split(list(sections)) if sections else (narrow,)
    return torch.cat([0.2 * max(piece.shape) ** 0.5 * orthogonalize(piece).to(x.dtype) for piece in pieces])


def direction(x: Tensor, sharding: Sharding | None, mesh: Mesh) -> Tensor:
    """The same for this rank's shard of a matrix: that of the whole one, cut again. A collective over tp."""
    return shard(whole_direction(unshard(x, sharding, mesh), sharding and sharding.sections), sharding, mesh)


def matrices(flats: Sequence[Flat]) -> list[tuple[Tensor, list[int]]]:
    """The matrices of the flat buffers, at whose starts they lie, each with its elements in every part."""
    found = []
    for flat in flats:
        members = [p for _, p in flat.members if p.dim() >= 2]
        found += zip(members, pieces([p.numel() for p in members], flat.size, flat.parts), strict=True)
    return found


def pieces(sizes: Sequence[int], part: int, parts: int) -> list[list[int]]:
    """How many elements of each of the tensors that lie one after the other are in each part of `part` elements."""
    spans = list(zip(accumulate(sizes, initial=0), accumulate(sizes), strict=False))
    edges = [(r * part, (r + 1) * part) for r in range(parts)]
    return [[max(0, min(stop, end) - max(start, begin)) for begin, end in edges] for start, stop in spans]


def owners(sizes: Sequence[int], parts: int) -> list[int]:
    """Which rank has each matrix: the largest first, to the rank that has the least."""
    load, owner = [0] * parts, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = min(range(parts), key=load.__getitem__)
        load[owner[i]] += sizes[i]
    return owner


def directions(flats: Sequence[Flat], parts: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """Of a window of flat buffers: what to subtract from the matrices' elements in this rank's parts, given their u.

    `parts` [matrix elements of this rank's part of each flat]; the result is like it. A collective.
    """
    ranks, me, group = flats[0].parts, flats[0].rank, flats[0].group
    found = matrices(flats)
    owner = owners([p.numel() for p, _ in found], ranks)
    order = sorted(range(len(found)), key=owner.__getitem__)  # stable: each owner's in the order of the network
    own = [i for i in order if owner[i] == me]
    mine = list(torch.cat(list(parts)).split([lengths[me] for _, lengths in found]))
    sent = [sum(found[i][1][me] for i in order if owner[i] == r) for r in range(ranks)]
    received = [sum(found[i][1][r] for i in own) for r in range(ranks)]
    joined = exchange(torch.cat([mine[i] for i in order]), received, sent, group if ranks > 1 else None)
    by_rank = [x.split([found[i][1][r] for i in own]) for r, x in enumerate(joined.split(received))]
    results = []
    for place, i in enumerate(own):
        p, lengths = found[i]
        whole = torch.cat([split[place] for split in by_rank]).view(p.shape)
        results.append(direction(whole, p.sharding, mesh).flatten().split(lengths))
    back = [result[r] for r in range(ranks) for result in results]
    back = exchange(torch.cat(back) if back else joined, sent, received, group if ranks > 1 else None)
    for i, piece in zip(order, back.split([found[i][1][me] for i in order]), strict=True):
        mine[i] = piece
    return list(torch.cat(mine).split([len(part) for part in parts]))


def exchange(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send the first sent[0] elements to rank 0 and so on; what the ranks sent here, one after the other."""
    if group is None:
        return x
    y = x.new_empty(sum(received))
    dist.all_to_all_single(y, x, received, sent, group=group)
    return y
