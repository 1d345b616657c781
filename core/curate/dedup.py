"""Deduplicate: exact, near (MinHash-LSH) and repeated passages. The first of several stays, in the order of the shards.

exact      texts equal up to case and white space, by 64-bit hashes: n documents, a false one with probability n² / 2⁶⁵
near       Jaccard similarity of word n-grams ≥ `threshold`: candidates share a band of their MinHash signatures, and
           are a pair where the signatures agree in that share; pairs are joined to groups, so that a chain is one
passages   a passage of `passage` words or more that came before is cut out of the later document. Fingerprints of k
           words, of which each window of passage − k + 1 in a row keeps its smallest (winnowing, Schleimer et al.
           2003): every such passage is found, none of fewer than k words is cut; its ends may keep passage − k words

Memory: `memory_mb` for sorting, some 32 bytes a document, and as many for each pair; the rest is on the disk.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tritium.core.config import opt
from tritium.core.curate import minhash
from tritium.core.curate.kept import digest
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, note, read_shard, text_of
from tritium.core.output import write_array


@dataclass(frozen=True)
class Features:
    """A shard → a file of what its documents are compared by; work for another process. Made once."""

    step: "Compared"
    scratch: Path

    def __call__(self, piece: Piece) -> Path:
        path = self.scratch / f"{piece.name}-{digest(self.step.key(()), piece.key)[:16]}.npy"
        if not path.exists():
            texts = (text_of(d, calls=True).encode() if self.step.takes(d) else b"" for d in read_shard(piece.path))
            rows, first = [], 0
            for block in minhash.blocks(texts):
                rows.append(self.step.features(block, first))
                first += len(block)
            write_array(path, np.concatenate(rows or [self.step.features([], 0)]))
        return path


@dataclass
class Compared(Step):
    """A step that compares documents with those of all shards."""

    GLOBAL: ClassVar[bool] = True

    def features(self, texts: list[bytes], first: int) -> np.ndarray:
        """What some documents, the first of which has this number in its shard, are compared by; rows."""
        raise NotImplementedError

    def files_of(self, context: Context, shards: list[Piece]) -> list[Path]:
        """The features of each shard."""
        return context.map(Features(self, context.scratch), shards)


@dataclass
class Twins(Compared):
    """A step that drops documents because of others: the plan of a shard holds for each row the id of the
    document that it repeats, or nothing."""

    REASON: ClassVar[str] = ""

    def pairs(self, files: list[Path], firsts: np.ndarray, context: Context) -> Iterator[np.ndarray]:
        """[m, 2] numbers of documents that are one."""
        raise NotImplementedError

    def prepare(self, context: Context, shards: list[Piece]) -> None:
        files = self.files_of(context, shards)
        firsts = np.cumsum([0, *(shard.rows for shard in shards)])
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self.pairs(files, firsts, context)])
        twin = minhash.leaders(pairs, int(firsts[-1]))
        twin[twin == np.arange(len(twin))] = -1
        ids = ids_of(twin[twin >= 0], shards, firsts) | {-1: ""}
        for i, shard in enumerate(shards):
            part = [ids[number] for number in twin[firsts[i] : firsts[i + 1]].tolist()]
            write_array(context.scratch / f"{shard.name}.plan.npy", np.array(part, dtype=np.str_))

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        plan = np.load(job.plan)
        for document, twin in zip(documents, plan, strict=True):
            yield document, Drop(self.REASON, twin=str(twin)) if twin else document


def ids_of(numbers: np.ndarray, shards: list[Piece], firsts: np.ndarray) -> dict[int, str]:
    """The ids of documents by their numbers among all shards; only the shards that have some are read."""
    wanted, ids = np.unique(numbers), {}
    for i, shard in enumerate(shards):
        mine = set(wanted[slice(*np.searchsorted(wanted, [firsts[i], firsts[i + 1]]))].tolist())
        rows = enumerate(read_shard(shard.path), start=int(firsts[i])) if mine else ()
        ids |= {number: document["id"] for number, document in rows if number in mine}
    return ids


@dataclass
class Exact(Twins):
    """Drop documents whose text came before."""

    REASON: ClassVar[str] = "an exact duplicate"

    def features(self, texts: list[bytes], first: int) -> np.ndarray:
        keys = [hashlib.blake2b(b" ".join(text.lower().split()), digest_size=8).digest() for text in texts]
        counts = np.array([bool(text) for text in texts], np.uint64)
        return np.stack([np.frombuffer(b"".join(keys), np.uint64), counts], 1)  # [D, 2]: key, whether it counts

    def pairs(self, files: list[Path], firsts: np.ndarray, context: Context) -> Iterator[np.ndarray]:
        spill = minhash.Spill(context.scratch / "spill", int(firsts[-1]), context.memory)
        for first, file in zip(firsts, files, strict=False):
            rows = np.load(file)
            counts = np.flatnonzero(rows[:, 1])
            spill.add(rows[counts, 0], first + counts)
        for values, run in spill.repeated():
            yield neighbours(values, run, first=True)


def neighbours(values: np.ndarray, run: np.ndarray, first: bool = False) -> np.ndarray:
    """Pairs [m, 2] within runs: each value with the one before it, or with the run's first."""
    later = np.flatnonzero(run[1:] == run[:-1]) + 1 if len(run) else np.zeros(0, np.int64)
    others = np.searchsorted(run, run[later]) if first else later - 1
    return np.stack([values[others], values[later]], 1)


@dataclass
class Near(Twins):
    """Drop documents that are nearly one that came before."""

    threshold: float = opt(0.7, "Jaccard similarity of n-grams that makes two documents duplicates", above=0, most=1)
    words: int = opt(5, "words per n-gram", least=1)
    permutations: int = opt(128, "MinHash permutations; standard error √(t(1−t) / permutations)", least=16)

    REASON: ClassVar[str] = "a near duplicate"

    def features(self, texts: list[bytes], first: int) -> np.ndarray:
        return minhash.signatures(texts, self.words, self.permutations)

    def pairs(self, files: list[Path], firsts: np.ndarray, context: Context) -> Iterator[np.ndarray]:
        bands, rows = minhash.banding(self.threshold, self.permutations)
        spill = minhash.Spill(context.scratch / "spill", int(firsts[-1]) * bands, context.memory)
        step = max(1, context.memory // (64 * bands))
        for first, file in zip(firsts, files, strict=False):
            signatures = np.load(file, mmap_mode="r")
            for at in range(0, len(signatures), step):
                part = signatures[at : at + step]
                full = np.flatnonzero((part != minhash.EMPTY).any(1))
                spill.add(minhash.band_keys(part[full], bands, rows).ravel(), np.repeat(first + at + full, bands))
        for values, run in spill.repeated():
            found = np.concatenate([neighbours(values, run, first=True), neighbours(values, run)])
            yield self.verified(np.unique(found, axis=0), files, firsts, context.memory // (32 * self.permutations))

    def verified(self, pairs: np.ndarray, files: list[Path], firsts: np.ndarray, step: int) -> np.ndarray:
        """Those pairs whose signatures agree in a share of at least the threshold; `step` at once."""
        kept = [np.zeros((0, 2), np.int64)]
        for at in range(0, len(pairs), max(step, 1)):
            part = pairs[at : at + max(step, 1)]
            a, b = (rows_at(files, firsts, column) for column in part.T)
            kept.append(part[(a == b).mean(1) >= self.threshold])
        return np.concatenate(kept)


def rows_at(files: list[Path], firsts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rows by their number among all files, copied: of a file that stays mapped, the pages would stay in memory."""
    shard = np.searchsorted(firsts, numbers, side="right") - 1
    parts = {i: np.load(files[i], mmap_mode="r")[numbers[shard == i] - firsts[i]] for i in np.unique(shard)}
    example = next(iter(parts.values()))
    result = np.empty((len(numbers), *example.shape[1:]), example.dtype)
    for i, rows in parts.items():
        result[shard == i] = rows
    return result


@dataclass
class Passages(Compared):
    """Cut out passages that came before."""

    passage: int = opt(50, "length in words of the repeated passages to find", least=4)

    @property
    def size(self) -> int:
        """Words of a fingerprint."""
        return self.passage // 2 + 1

    def takes(self, document: Document) -> bool:
        return document["kind"] == "text" and super().takes(document)

    def features(self, texts: list[bytes], first: int) -> np.ndarray:
        """Winnowed fingerprints, [m, 4] uint64: hash, document, first byte, byte after the last."""
        hashes, owners, starts, ends = minhash.word_hashes(texts)
        found, at = minhash.grams(hashes, owners, self.size)
        chosen = winnow(found, owners[at], self.passage - self.size + 1)
        at = at[chosen]
        columns = found[chosen], owners[at] + first, starts[at], ends[at + self.size - 1]
        return np.stack([column.astype(np.uint64) for column in columns], 1)

    def prepare(self, context: Context, shards: list[Piece]) -> None:
        files = self.files_of(context, shards)
        firsts = np.cumsum([0, *(len(np.load(file, mmap_mode="r")) for file in files)])
        spill = minhash.Spill(context.scratch / "spill", int(firsts[-1]), context.memory)
        for first, file in zip(firsts, files, strict=False):
            hashes = np.load(file, mmap_mode="r")[:, 0]
            spill.add(hashes, first + np.arange(len(hashes)))
        repeated = np.zeros(firsts[-1], bool)
        for values, run in spill.repeated():
            repeated[neighbours(values, run, first=True)[:, 1]] = True
        for shard, file, start, end in zip(shards, files, firsts, firsts[1:], strict=False):
            plan = np.load(file, mmap_mode="r")[repeated[start:end], 1:]
            write_array(context.scratch / f"{shard.name}.plan.npy", plan)

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        plan = np.load(job.plan)  # [m, 3]: document, first byte, byte after the last
        owners, begins = np.unique(plan[:, 0], return_index=True)
        spans = dict(zip(owners.tolist(), np.split(plan[:, 1:], begins[1:]), strict=False))
        for number, document in enumerate(documents):
            yield document, self.cut(document, spans[number]) if number in spans else document

    def cut(self, document: Document, spans: np.ndarray) -> Outcome:
        data, parts, at = document["text"].encode(), [], 0
        for start, end in spans.astype(np.int64).tolist():
            parts.append(data[at : max(start, at)])
            at = max(at, end)
        text = b"".join([*parts, data[at:]]).decode("utf-8", "ignore").strip()
        note(document, cut_bytes=len(data) - len(text.encode()))
        if not text:
            return Drop("nothing but passages that came before")
        document["text"] = text
        return document


def winnow(hashes: np.ndarray, owners: np.ndarray, window: int) -> np.ndarray:
    """The places of the smallest hash of every `window` in a row of one text; the rightmost of equals."""
    count = len(hashes) - window + 1
    if count < 1:
        return np.zeros(0, np.int64)
    views = np.lib.stride_tricks.sliding_window_view(hashes[::-1], window)  # reversed: argmin takes the first
    places = len(hashes) - 1 - (np.arange(count) + views.argmin(1))
    starts = count - 1 - np.arange(count)
    return np.unique(places[owners[starts] == owners[starts + window - 1]])
