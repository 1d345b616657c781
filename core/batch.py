"""One batch: the packed stream. Padding does not exist.

    documents   [a b c]   [d e]   [f g h i]
    tokens       a b c     d e     f g h i        [T]
    targets      b c ·     e ·     g h i ·        the next token of the same document; · is IGNORE
    weights      1 1 0     1 0     0 1 1 0        of predicting targets[t]; 0 at the last token of a document
    positions    0 1 2     0 1     0 1 2 3
    cu_seqlens   0         3       5          9   [S+1] int32

`counts` holds the denominators of every loss ("tokens" is the sum of the weights). They are known when the batch is
built, so that a step's loss can be divided by the global count before the first backward. "stream" counts all tokens,
whatever their weight, for the throughput.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tritium.model.transformer import IGNORE

FILLER = 64  # tokens of a filler document

Group = Sequence["Document"]  # documents that must share a batch: a pair, a ranking, the samples of a prompt
Convert = Callable[[dict], Group]  # what a record of data becomes


@dataclass
class Document:
    """Token ids, each with its loss weight (`weights[0]` is unused: nothing predicts the first token).

    `fields`: further inputs of the objective; a number (per sequence), or an array as long as `ids` (per token, where
    entry i belongs to the prediction of ids[i]).
    """

    ids: np.ndarray  # [n] int32
    weights: np.ndarray  # [n] fp32
    fields: dict[str, float | np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, length: int) -> "Document":
        """The document's first `length` tokens, with their weights and fields."""
        fields = {k: v[:length] if isinstance(v, np.ndarray) else v for k, v in self.fields.items()}
        return Document(self.ids[:length], self.weights[:length], fields)


@dataclass
class PackedBatch:
    """See the module's docstring. `fields` tensors are [T] (aligned with targets) or [S]."""

    tokens: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    weights: Tensor  # [T] fp32
    positions: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S+1] int32
    doc_start: Tensor  # [T] int32: where the token's document begins in the stream
    doc_end: Tensor  # [T] int32: where it ends, exclusive
    supervised: Tensor  # [N] int64: the tokens with a weight; the head is computed for these alone
    fields: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    sequences: int = 0  # S; `cu_seqlens` may hold fillers after them
    lengths: tuple[int, ...] = ()  # [S], on the host

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Without waiting: a GPU copies from pinned memory alone while the host goes on."""

        def move(x: Tensor) -> Tensor:
            pinned = x.pin_memory() if x.device.type != torch.device(device).type == "cuda" else x
            return pinned.to(device, non_blocking=True)

        moved = {k: move(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, fields={k: move(v) for k, v in self.fields.items()})


def pack(groups: Iterable[Group], counts: dict[str, float] | None = None, multiple_of: int = 1) -> PackedBatch:
    """Lay the documents of `groups` end to end.

    `counts` adds denominators to those computed here (tokens, stream, sequences, groups). With `multiple_of`, filler
    documents of weight 0 pad the stream to a multiple of that many tokens, since torch.compile, CUDA graphs and oneDNN
    (which builds a matmul kernel per shape: 20 ms, 7 MB) need few shapes. Fillers are at the end of `cu_seqlens`, but
    not among the sequences: [S] fields, `sequences` and `counts` leave them out.
    """
    groups = [list(group) for group in groups]
    real = [document for group in groups for document in group]
    size = sum(map(len, real))
    documents = real + fillers(-size % multiple_of)
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    cu = np.concatenate([[0], lengths.cumsum()])  # [S+1]
    starts, ends = cu[:-1].repeat(lengths), cu[1:].repeat(lengths)  # [T]
    tokens = concatenate([d.ids for d in documents], np.int64)
    positions = np.arange(len(tokens)) - starts
    positions[size:] = 0  # fillers fit in any context
    last = np.arange(len(tokens)) == ends - 1
    weights = np.where(last, 0.0, np.roll(concatenate([d.weights for d in documents], np.float32), -1))
    names = real[0].fields if real else ()
    known = {"tokens": float(weights.sum(dtype=np.float64)), "stream": float(size)}
    known |= {"sequences": float(len(real)), "groups": float(len(groups))}
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(np.where(last, IGNORE, np.roll(tokens, -1))),
        weights=torch.from_numpy(weights.astype(np.float32)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
        doc_start=torch.from_numpy(starts.astype(np.int32)),
        doc_end=torch.from_numpy(ends.astype(np.int32)),
        supervised=torch.from_numpy(np.flatnonzero(weights)),
        fields={name: pack_field([d.fields[name] for d in real], last) for name in names},
        counts=known | (counts or {}),
        sequences=len(real),
        lengths=tuple(map(len, real)),
    )


def fillers(tokens: int) -> list[Document]:
    """Padding documents without weight; short ones, since attention's work is quadratic in the length."""
    sizes = [FILLER] * (tokens // FILLER) + ([tokens % FILLER] if tokens % FILLER else [])
    return [Document(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in sizes]


def pack_field(values: list, last: np.ndarray) -> Tensor:
    """Per-sequence numbers → [S] fp32; per-token arrays → [T] fp32, moved to where their token is the target."""
    if not isinstance(values[0], np.ndarray):
        return torch.tensor(values, dtype=torch.float32)
    spread = np.zeros(len(last), np.float32)
    spread[: sum(map(len, values))] = np.concatenate(values)
    return torch.from_numpy(np.where(last, np.float32(0), np.roll(spread, -1)))


def concatenate(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def plan_bins(lengths: Sequence[int], capacity: int, window: int = 256) -> list[list[int]]:
    """Pack items of these lengths into bins of at most `capacity` tokens: best fit among `window` open bins.

    Items are placed in order, so that a curriculum stays one. If a new bin is needed and `window` are open, the fullest
    is closed. An item longer than `capacity` gets a bin of its own. Deterministic; bins are in the order of their first
    items.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, index of the bin)
    for item, length in enumerate(lengths):
        fitting = [(room, i) for room, i in open_bins if room >= length]
        if fitting:
            room, i = min(fitting)
            open_bins.remove((room, i))
        else:
            room, i = capacity, len(bins)
            bins.append([])
            if len(open_bins) >= window:
                open_bins.remove(min(open_bins))
        bins[i].append(item)
        if room > length:
            open_bins.append((room - length, i))
    return bins


def counts_of(batches: Sequence[PackedBatch]) -> dict[str, float]:
    """The batches' denominators, added up."""
    total: Counter[str] = Counter()
    for batch in batches:
        total.update(batch.counts)
    return dict(total)
