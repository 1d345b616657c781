"""The KV cache of generation, in pages of a fixed number of tokens (PagedAttention, arXiv 2309.06180).

    pages [L, 2, P, page, G, D]     all memory of the cache, allocated once
    a sequence's list of pages      holds its tokens 0 … page-1, page … 2·page-1, … in order

Pages are reference-counted, since the samples of a prompt share its pages; the last to release a page frees it. Page 0
belongs to no sequence: the padding rows of a batch write there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritium.kernels import attention, decode_attention
from tritium.model.transformer import Transformer

PAGE = 16  # tokens


class PagedCache:
    """`count` pages for `model`, including page 0, with the list of free pages and each page's reference count."""

    def __init__(self, model: Transformer, count: int, page: int = PAGE):
        if count < 2:
            raise ValueError(f"a cache of {count} pages holds no sequence: at least 2 are needed")
        config = model.config
        shape = (config.num_layers, 2, count, page, model.layers[0].attention.kv_heads, config.head_dim)
        self.pages = torch.zeros(shape, dtype=model.dtype, device=model.mesh.device)
        self.page, self.usable = page, count - 1
        self.free = list(range(1, count))[::-1]
        self.uses = [0] * count

    @staticmethod
    def page_bytes(model: Transformer, page: int = PAGE) -> int:
        """Bytes of one page over all layers, on this rank."""
        per_token = 2 * model.config.num_layers * model.layers[0].attention.kv_heads * model.config.head_dim
        return page * per_token * model.dtype.itemsize

    def needed(self, tokens: int) -> int:
        """The number of pages that this many tokens take."""
        return -(-tokens // self.page)

    def take(self, count: int) -> list[int]:
        """Take `count` free pages; the caller has checked that there are as many."""
        taken = [self.free.pop() for _ in range(count)]
        for i in taken:
            self.uses[i] = 1
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """Count one more user of these pages; returns them."""
        for i in pages:
            self.uses[i] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        for i in pages:
            self.uses[i] -= 1
            if not self.uses[i]:
                self.free.append(i)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the contents of the pages `sources` to the pages `targets`."""
        if sources:
            to, of = torch.tensor([targets, sources], device=self.pages.device)
            self.pages[:, :, to] = self.pages[:, :, of]


def cache_pages(sequences: int, tokens: int) -> int:
    """The number of pages, of PAGE tokens each, of a cache for this many sequences of this many tokens."""
    return sequences * -(-tokens // PAGE) + 1


def write(pages: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k and v [T, G, D] into one layer's pages [2, P, page, G, D] at their slots: page number · page + offset."""
    pages[0].flatten(0, 1).index_copy_(0, slots, k)
    pages[1].flatten(0, 1).index_copy_(0, slots, v)


@dataclass
class Prefill:
    """The cache as the layers see it during prefill, when prompts or parts of them are one packed stream.

    If some sequence already has tokens in the cache, `key_slots` [Tk] are the slots of all keys, the stream's own
    included, and `cu_seqlens_k` their bounds; otherwise the stream's own keys are all there are.
    """

    pages: Tensor  # [L, 2, P, page, G, D]
    slots: Tensor  # [T]
    linear: Callable[..., Tensor]
    key_slots: Tensor | None = None  # [Tk]
    cu_seqlens_k: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options) -> Tensor:
        write(self.pages[layer], self.slots, k, v)
        if self.key_slots is not None:
            k, v = (x.flatten(0, 1).index_select(0, self.key_slots) for x in self.pages[layer])
        return attention(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=self.cu_seqlens_k, **options)


@dataclass
class Decode:
    """The cache as the layers see it during decoding, when each sequence adds one token."""

    pages: Tensor  # [L, 2, P, page, G, D]
    slots: Tensor  # [B]
    table: Tensor  # [B, N] int32
    lengths: Tensor  # [B] int32, including the new token
    linear: Callable[..., Tensor]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: None, **options) -> Tensor:
        write(self.pages[layer], self.slots, k, v)
        keys, values = self.pages[layer]
        return decode_attention(q, keys, values, self.table, self.lengths, **options)
