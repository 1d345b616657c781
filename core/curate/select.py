"""Select: by thresholds on scores, then a sample, then a mixture of sources.

Embeddings, where a sample needs them, are in a file; of each document some 60 bytes are in memory.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tritium.core.config import ConfigError, opt
from tritium.core.curate.mixture import mixture_of
from tritium.core.curate.runner import priority
from tritium.core.curate.semantic import BATCH, ROWS, Embedder
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, note, read_shard, text_of
from tritium.core.output import write_array
from tritium.core.select import balanced, spread_out

CHARACTERS = 2000  # of a text are embedded


@dataclass
class Select(Step):
    """Keep what is wanted, and as much of it as is wanted.

    Thresholds come first; then `count` documents, by `by`; then each source `mixture` is taken so often that it has its
    share of the characters: more than once where it is small, in part where it is large, the total being what it was.
    """

    low: dict[str, float] = opt({}, "minimum value per score; documents without the score are dropped")
    high: dict[str, float] = opt({}, "maximum value per score")
    languages: list[str] = opt([], "languages to keep (empty: all)")
    sources: list[str] = opt([], "sources to keep (empty: all)")
    categories: list[str] = opt([], "categories to keep (empty: all)")
    count: int = opt(0, "documents to keep (0: all)", least=0)
    by: str = opt("random", "selection: random, balanced by `tag`, balanced by embedding cluster, or far apart",
                  choices=("random", "tag", "cluster", "diverse"))  # fmt: skip
    tag: str = opt("source", "by=tag: the documents' key to balance")
    model: str = opt("", "by=cluster, diverse: folder of the embedding model")
    clusters: int = opt(100, "by=cluster: number of clusters", least=1)
    mixture: dict[str, float] = opt({}, "shares of the sources, in characters")
    mixture_from: str = opt("", "file of small runs: the mixture that a fit of their losses finds best, or the replay "
                                "ratio (core/curate/mixture.py)")  # fmt: skip
    tokens: float = opt(0.0, "replay: tokens of the planned run (0: as the longest of the small runs)", least=0)
    weight: float = opt(1.0, "replay: weight of the general loss relative to the domain's", least=0)

    GLOBAL: ClassVar[bool] = True
    PATHS: ClassVar[tuple[str, ...]] = ("model", "mixture_from")

    def check(self) -> None:
        super().check()
        shares = self.wanted.values()  # a mistake in the file of small runs is told now
        if min(shares, default=0) < 0 or (shares and not any(shares)):
            raise ConfigError("mixture: shares must not be negative, and not all 0")
        if (self.by in ("cluster", "diverse")) != bool(self.model):
            raise ConfigError(f"by={self.by}, model={self.model!r}: cluster and diverse need a model, others take none")

    @property
    def wanted(self) -> dict[str, float]:
        """The mixture, given or fitted."""
        return mixture_of(self.mixture_from, self.tokens, self.weight) if self.mixture_from else self.mixture

    def fits(self, document: Document) -> Drop | None:
        scores = document["scores"]
        for name, limit in self.low.items():
            if scores.get(name, -np.inf) < limit:
                return Drop(f"{name} < {limit:g}", f"{name} {scores.get(name, 'unknown')}")
        for name, limit in self.high.items():
            if scores.get(name, np.inf) > limit:
                return Drop(f"{name} > {limit:g}", f"{name} {scores.get(name, 'unknown')}")
        for key, wanted in (("language", self.languages), ("source", self.sources), ("category", self.categories)):
            if wanted and document.get(key) not in wanted:
                return Drop(f"{key} {document.get(key, 'unknown')!r}")
        return None

    def prepare(self, context: Context, shards: list[Piece]) -> None:
        """The plan: how often each document is taken, −1 where a threshold leaves it out."""
        firsts = np.cumsum([0, *(shard.rows for shard in shards)])
        times, sizes, orders = (np.zeros(firsts[-1], np.int64) for _ in range(3))
        taken, sources, tags = np.zeros(firsts[-1], bool), [], []
        file = context.scratch / "vectors"

        def embeddable() -> Iterator[str]:
            for i, document in enumerate(d for shard in shards for d in read_shard(shard.path)):
                said = text_of(document)
                taken[i], sizes[i] = self.takes(document), len(said)
                times[i] = 1 if not taken[i] or self.fits(document) is None else -1
                orders[i] = priority(document["id"], context.seed)
                sources.append(sys.intern(document["source"]))
                tags.append(sys.intern(str(document.get(self.tag))))
                if self.model and taken[i] and times[i] > 0:
                    yield said[:CHARACTERS]

        vectors = embedded(embeddable(), self.model, file)
        left = np.flatnonzero((times > 0) & taken)
        order = np.argsort(orders[left], kind="stable")
        if self.count:
            times[left] = 0
            order = self.chosen(order, [tags[i] for i in left], vectors)
        file.unlink()
        left = left[order]
        times[left] = 1
        mixture = self.wanted
        if unknown := self.mixture.keys() - set(sources):
            raise ConfigError(f"mixture: no document is of {', '.join(sorted(unknown))}; "
                              f"the sources are {', '.join(sorted(set(sources)))}")  # fmt: skip
        if mixture:
            times[left] = mixed(mixture, [sources[i] for i in left], sizes[left])
        for i, shard in enumerate(shards):
            write_array(context.scratch / f"{shard.name}.plan.npy", times[firsts[i] : firsts[i + 1]])

    def chosen(self, order: np.ndarray, tags: list[str], vectors: np.ndarray) -> np.ndarray:
        """Which `count` of the documents, of which `order` is one by chance."""
        if self.by == "random":
            return order[: self.count]
        if self.by == "diverse":
            return np.array(spread_out(vectors, self.count), np.int64)
        piles = tags if self.by == "tag" else clusters(vectors, self.clusters)
        return order[balanced([piles[i] for i in order], str, self.count)]

    def finish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        """Facts: the mixture, where it was fitted."""
        fitted = self.wanted.items() if self.mixture_from else ()
        return {f"share of {source}, by the small runs": share for source, share in fitted}

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        for document, times in zip(documents, np.load(job.plan).tolist(), strict=True):
            copies = [copied(document, i) for i in range(times)]
            yield document, self.fits(document) if times < 0 else copies or Drop("not in the sample")


def copied(document: Document, i: int) -> Document:
    if not i:
        return document
    twin = document | {"id": f"{document['id']}+{i}", "provenance": [dict(p) for p in document["provenance"]]}
    note(twin, copy=i)
    return twin


def mixed(mixture: dict[str, float], sources: list[str], sizes: np.ndarray) -> np.ndarray:
    """How often each document is taken, so that sources have their shares of the characters; [n]. Whole rounds first,
    then the first documents of another, in their order. Sources without a share are left out."""
    have = Counter()
    for source, size in zip(sources, sizes.tolist(), strict=True):
        have[source] += size
    whole = sum(share for source, share in mixture.items() if have[source]) or 1.0
    budget = sum(have[source] for source in mixture)
    wanted = {s: budget * share / whole for s, share in mixture.items() if have[s]}
    rounds = {s: wanted[s] / have[s] for s in wanted}
    used, times = Counter(), np.zeros(len(sources), np.int64)
    for i, (source, size) in enumerate(zip(sources, sizes.tolist(), strict=True)):
        if source in rounds:
            part = (rounds[source] % 1) * have[source]
            times[i] = int(rounds[source]) + (used[source] + size / 2 <= part)
            used[source] += size
    return times


def embedded(texts: Iterator[str], model: str, file: Path) -> np.ndarray:
    """Embeddings of texts, which are read all where there is none to embed, [n, E]; mapped from `file`."""
    width = 1
    with file.open("wb") as out:
        while batch := list(islice(texts, BATCH)):
            rows = Embedder(model)(batch)
            width = rows.shape[1]
            rows.tofile(out)
    return np.memmap(file, np.float32, "r").reshape(-1, width) if file.stat().st_size else np.zeros((0, 1), np.float32)


def clusters(vectors: np.ndarray, count: int, rounds: int = 10) -> list[int]:
    """k-means (Lloyd 1982) of rows [n, E] of length 1, from far apart ones on: the cluster of each row."""
    centres, nearest = np.array(vectors[spread_out(vectors, count)]), np.zeros(len(vectors), np.int64)
    for _ in range(rounds):
        sums = np.zeros_like(centres)
        for part in (slice(at, at + ROWS) for at in range(0, len(vectors), ROWS)):
            nearest[part] = (vectors[part] @ centres.T).argmax(1)
            np.add.at(sums, nearest[part], vectors[part])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return nearest.tolist()
