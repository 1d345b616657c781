"""One step of decoding, by itself or as CUDA graphs.

A step of a small batch is hundreds of short kernels, and launching them takes longer than running them. A graph is
captured for each batch size and page-table width, over inputs that stay where they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.model.cache import Decode, PagedCache
from tritium.model.transformer import Transformer


def advance(
    model: Transformer,
    pages: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    linear: Callable[..., Tensor] = F.linear,
    head: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """Logits [B, V] after one token of each sequence: tokens, positions, slots [B]; table [B, N] int32.

    `linear` and `head` are what weights are multiplied with: see model/packed.py.
    """
    view = Decode(pages, slots, table, (positions + 1).int(), linear)
    return model.project(model.hidden(tokens, positions=positions, cache=view), head)


class DecodeGraphs:
    """`graphs(tokens, positions, slots, table)` are the logits [B, V] that `advance` gives, overwritten by the next."""

    def __init__(self, model: Transformer, cache: PagedCache):
        self.model, self.pages = model, cache.pages
        # One pool of memory for all: none runs beside another, and their outputs stay taken.
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.pages.device)  # one: cuBLAS keeps 32 MB for each
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @staticmethod
    def possible(model: Transformer) -> bool:
        """On a GPU, without collectives."""
        return model.mesh.device.type == "cuda" and model.mesh.tp == 1

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor) -> Tensor:
        width = 1 << (table.shape[1] - 1).bit_length()  # powers of two: few graphs
        given = tokens, positions, slots, F.pad(table, (0, width - table.shape[1]))
        if (len(tokens), width) not in self.captured:
            self.captured[len(tokens), width] = self.capture(given)
        graph, inputs, logits = self.captured[len(tokens), width]
        for static, value in zip(inputs, given, strict=True):
            static.copy_(value, non_blocking=True)
        graph.replay()
        return logits

    def capture(self, given: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """Warmed up on the stream it is captured on, as capturing wants it: kernels are compiled there."""
        inputs = [x.to(self.pages.device, copy=True) for x in given]
        with torch.cuda.device(self.pages.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                advance(self.model, self.pages, *inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                logits = advance(self.model, self.pages, *inputs)
        return graph, inputs, logits
