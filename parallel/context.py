"""Context parallelism: one stream over the ranks of a group, exact for any documents in it.

    stream   │ 0 │ 1 │ 2 │ 3 │      2·cp equal chunks; rank r has r and 2·cp-1-r, so that each has as many (query, key)
    rank 0     0           3        pairs of a causal document (Llama 3, arXiv 2407.21783, section 3.3.2)
    rank 1         1   2

A stream is filled up to a multiple of 2·cp·tp tokens by a document at its end that has no weight. In each layer the
ranks gather keys and values, and attend from their own queries: chunk [a, b) to the keys before b, where documents
are what [a, b) and [0, b) have of them, aligned at their ends as `attention` does. A rank receives (cp-1)/cp · T·2·G·D
elements a layer for K and V, and as many backward for their gradients, which a reduce-scatter adds up. With
`mesh.ring`, keys and values go round instead (parallel/ring.py), except in layers with a window.

Outside the model nothing is cut: per-token results (log-probs, values) are gathered, so that every rank computes the
same loss of the whole batch, and takes its own tokens' part of the gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tritium.kernels import attention
from tritium.parallel.mesh import Mesh
from tritium.parallel.ring import ring_attention
from tritium.parallel.tensor import all_gather, linear_map, reduce_scatter


@dataclass(frozen=True)
class Split:
    """How a stream of `tokens` tokens lies on the mesh. Without cp it is one chunk, filled up to a multiple of tp."""

    tokens: int
    chunk: int  # tokens of a chunk
    chunks: tuple[int, ...] = (0,)  # this rank's, of 2·cp
    cp: int = 1
    group: ProcessGroup | None = None
    ring: bool = False  # whether keys and values go round (parallel/ring.py), and are not gathered

    @classmethod
    def of(cls, tokens: int, mesh: Mesh) -> "Split":
        count, r = (1 if mesh.cp == 1 else 2 * mesh.cp), mesh.cp_rank
        filled = tokens or mesh.cp - 1  # a chunk of nothing is not a chunk
        chunk = -(-filled // (count * mesh.tp)) * mesh.tp
        return cls(tokens, chunk, (0,) if count == 1 else (r, count - 1 - r), mesh.cp, mesh.cp_group, mesh.ring)

    @property
    def size(self) -> int:
        """T', the tokens of the filled stream."""
        return self.chunk * self.cp * len(self.chunks)

    @property
    def local(self) -> int:
        """T' / cp: the tokens of this rank."""
        return self.chunk * len(self.chunks)

    def fill(self, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
        """The documents' bounds [S+1] of the filled stream, [S+2]: the filler is the last one. None: one document."""
        if cu_seqlens is None and self.size == self.tokens and self.group is None:
            return None
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        return F.pad(cu_seqlens, (0, 1), value=self.size)

    def take(self, x: Tensor) -> Tensor:
        """This rank's part of x [T, …], [T'/cp, …]; the filler's are zeros."""
        if self.size > self.tokens:
            x = torch.cat([x, x.new_zeros(self.size - self.tokens, *x.shape[1:])])
        if self.group is None:
            return x
        return torch.cat([x.narrow(0, c * self.chunk, self.chunk) for c in self.chunks])

    def place(self, index: Tensor) -> Tensor:
        """Where this rank has the tokens `index` [N] of the stream: [N], -1 for those of other ranks."""
        chunk, within = index // self.chunk, index % self.chunk
        place = torch.full_like(index, -1)
        for i, c in enumerate(self.chunks):
            place = torch.where(chunk == c, i * self.chunk + within, place)
        return place


def _in_order(x: Tensor, split: Split) -> Tensor:
    """What the ranks have, one after the other, in the order of the stream: [T', …]."""
    first, second = x.unflatten(0, (split.cp, 2, split.chunk)).unbind(1)  # [cp, chunk, …] each
    return torch.cat([first, second.flip(0)]).flatten(0, 1)


def gather_parts(x: Tensor, split: Split) -> Tensor:
    """All ranks' x [T'/cp, …] in the order of the stream, [T', …]. Each rank's use gives a part of the gradient."""
    if split.group is None:
        return x

    def back(grad: Tensor) -> Tensor:
        first, second = grad.unflatten(0, (2, split.cp, split.chunk)).unbind()  # [cp, chunk, …] each
        return reduce_scatter(torch.stack([first, second.flip(0)], 1).flatten(0, 2), split.group)

    return linear_map(x, lambda x: _in_order(all_gather(x, split.group), split), back)


def gather_results(x: Tensor, split: Split) -> Tensor:
    """The same without the filler, [T, …], for what all ranks use alike: each keeps its own tokens' gradient."""
    if split.group is None:
        return x[: split.tokens]
    return linear_map(x, lambda x: _in_order(all_gather(x, split.group), split)[: split.tokens], split.take)


class ContextAttention:
    """Causal attention of this rank's queries to all ranks' keys, over the documents of one filled stream."""

    def __init__(self, split: Split, cu_seqlens: Tensor | None):
        self.split, self.cu_seqlens = split, cu_seqlens
        self.bounds: list[tuple[int, Tensor, Tensor]] = []  # per chunk [a, b): b, documents in [a, b), and in [0, b)
        if split.group is not None:
            for a, b in ((c * split.chunk, (c + 1) * split.chunk) for c in split.chunks):
                self.bounds.append((b, cu_seqlens.clamp(a, b) - a, cu_seqlens.clamp(max=b)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, **scores) -> Tensor:
        """q [T'/cp, H, D], k and v [T'/cp, G, D] → as q. `scores` are attention's softcap and scale. (`layer` is of
        use to a cache, which is called alike.)"""
        if self.split.group is None:
            return attention(q, k, v, cu_seqlens=self.cu_seqlens, window=window, **scores)
        if self.split.ring and window is None:
            return ring_attention(q, k, v, self.split, self.cu_seqlens, **scores)
        options = {"window": window} | scores
        k, v = gather_parts(torch.stack([k, v], 1), self.split).unbind(1)  # [T', G, D]
        chunks = zip(q.split(self.split.chunk), self.bounds, strict=True)
        return torch.cat(
            [attention(own, k[:b], v[:b], cu_seqlens=cu, cu_seqlens_k=cu_k, **options) for own, (b, cu, cu_k) in chunks]
        )
