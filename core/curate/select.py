"""Select: by thresholds on scores, then a sample, then a mixture of sources."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tritium.core.config import ConfigError, opt
from tritium.core.curate.runner import priority, write_array
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, note, read_shard, text_of
from tritium.core.select import balanced


@dataclass
class Select(Step):
    """Keep what is wanted, and as much of it as is wanted.

    Thresholds come first; then `count` documents, by `by`; then each source `mixture` is taken so often that it has its
    share of the characters: more than once where it is small, in part where it is large, the total being what it was.
    """

    low: dict[str, float] = opt({}, "least value of a score; documents without the score are dropped")
    high: dict[str, float] = opt({}, "largest value of a score")
    languages: list[str] = opt([], "only these")
    sources: list[str] = opt([], "only these")
    categories: list[str] = opt([], "only these")
    count: int = opt(0, "documents to keep (0: all)")
    by: str = opt("random", "which: any, or the tags of `tag` in turn", choices=("random", "tag"))
    tag: str = opt("source", "by=tag: the documents' key that is to be balanced")
    mixture: dict[str, float] = opt({}, "shares of the sources, in characters")

    GLOBAL: ClassVar[bool] = True

    def check(self) -> None:
        if self.count < 0 or any(share < 0 for share in self.mixture.values()):
            raise ConfigError(f"count={self.count} and the shares of mixture must not be negative")

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
        times, sizes, sources = np.full(firsts[-1], -1, np.int64), np.zeros(firsts[-1], np.int64), []
        tags, orders = [], np.zeros(firsts[-1], np.int64)
        documents = (d for shard in shards for d in read_shard(shard.path))
        for i, document in enumerate(documents):
            taken = not self.takes(document) or self.fits(document) is None
            times[i], sizes[i] = taken - 1 + taken, len(text_of(document))
            sources.append(document["source"])
            tags.append(str(document.get(self.tag)))
            orders[i] = priority(document["id"], context.seed)
        left = np.flatnonzero(times > 0)
        left = left[np.argsort(orders[left], kind="stable")]
        if self.count:
            chosen = left[: self.count] if self.by == "random" else left[self.balanced([tags[i] for i in left])]
            times[left], times[chosen] = 0, 1
            left = chosen
        if self.mixture:
            times[left] = mixed(self.mixture, [sources[i] for i in left], sizes[left])
        for i, shard in enumerate(shards):
            write_array(context.scratch / f"{shard.name}.plan.npy", times[firsts[i] : firsts[i + 1]])

    def balanced(self, tags: list[str]) -> list[int]:
        return balanced(tags, lambda tag: tag, self.count)

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        for document, times in zip(documents, np.load(job.plan).tolist(), strict=True):
            if times < 0:
                yield document, self.fits(document)
            elif times == 0:
                yield document, Drop("not in the sample")
            else:
                yield document, [copied(document, i) for i in range(times)]


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
    whole = sum(share for source, share in mixture.items() if have[source])
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
