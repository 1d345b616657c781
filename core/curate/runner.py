"""Steps over shards: parallel over processes, resumable after any kill, the same bytes whatever the number of either.

    OUT/steps/02-filter/gsm8k-0000.jsonl        the documents that a step let through, a shard
                        gsm8k-0000.dropped      id and reason of those that it did not
                        gsm8k-0000.meta.json    the manifest, written last: key, SHA-256 of the shard, counts, samples

A job is one step on one shard. Its key is a hash of the step's settings, of the files it reads, and of its input (of
all shards, where a document's fate depends on them: deduplication, selection). A job whose manifest has its key is
done; anything else is made anew, under a temporary name that is renamed when it is whole.
"""

import bisect
import hashlib
import heapq
import json
import multiprocessing
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritium.core.config import UserError
from tritium.core.curate.kept import digest
from tritium.core.curate.step import Context, Document, Drop, Job, Piece, Step, text_of
from tritium.core.output import whole_file

SAMPLES = 4  # of each reason, and of what is kept
VALUES = 1000  # of each score, for a histogram
SHOWN = 1200  # characters of a sample


class Pool:
    """As many processes as asked for; started at the first call that has work for two."""

    def __init__(self, workers: int):
        self.workers, self.executor = workers, None

    def map(self, function: Callable, items: Sequence) -> list:
        """Raises: UserError where the system ended a process."""
        if self.workers < 2 or len(items) < 2:
            return [function(item) for item in items]
        if self.executor is None:  # spawned: a fork would inherit torch's threads in an unknown state
            spawn = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(self.workers, spawn, initializer=end_with_parent)
        try:
            return list(self.executor.map(function, items))
        except BrokenProcessPool:
            raise UserError("a process was ended from outside, which is how the system saves memory: take fewer "
                            "--workers or smaller --shard_mb, and start this again: it goes on") from None  # fmt: skip

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_steps(
    steps: Mapping[str, Step], context: Context, workers: int, shards: Sequence[Piece] = ()
) -> Iterator[dict[str, Any]]:
    """Take the steps in their order over `shards`; yields a summary of each: counts, samples, values, facts."""
    pool, shards = Pool(workers), list(shards)
    try:
        for number, (name, step) in enumerate(steps.items()):
            folder = context.out / "steps" / f"{number:02d}-{name}"
            scratch = context.out / "scratch" / folder.name
            here = replace(context, scratch=scratch, map=(Pool(1) if step.LOCAL else pool).map)
            for path in (folder, scratch):
                path.mkdir(parents=True, exist_ok=True)
            metas, shards = run_step(step, name, here, shards, folder)
            summary = summarise(name, type(step).__name__.lower(), metas)
            summary |= {key: sum(getattr(shard, key) for shard in shards) for key in ("rows", "characters")}
            facts = step.finish(here, shards)
            for each in steps.values() if number == len(steps) - 1 else ():
                facts |= each.publish(context, shards)
            yield summary | {"facts": facts, "twins": twin_texts(summary, shards)}
    finally:
        pool.close()


def run_step(
    step: Step, name: str, context: Context, shards: list[Piece], folder: Path
) -> tuple[list[dict], list[Piece]]:
    """One step over all shards: (manifests, the shards that it made, with those that it leaves as they are)."""
    key = step.key(shards)
    pieces = step.pieces(context, shards)
    light = replace(context, map=None)
    keys = [digest(name, key, context.seed, piece.key) for piece in pieces]
    jobs = [Job(step, name, p, folder / f"{p.name}.jsonl", k, light) for p, k in zip(pieces, keys, strict=True)]
    expected = {file for job in jobs for file in outputs(job.out)}
    for stale in set(folder.iterdir()) - expected:
        stale.unlink()
    if todo := [job for job in jobs if manifest(job) is None]:
        print(f"{name}: {len(todo)} of {len(jobs)} shards to do", file=sys.stderr, flush=True)
        step.prepare(context, shards)
        context.map(work, todo)
    metas, made = [manifest(job) for job in jobs], [] if pieces is shards else list(shards)
    for job, meta in zip(jobs, metas, strict=True):
        counts = {key: meta[key] for key in ("rows", "characters")}
        made.append(Piece(str(job.out), meta["sha256"], job.piece.name, end=meta["bytes"], **counts))
    return metas, made


def outputs(shard: Path) -> tuple[Path, ...]:
    """Shard, what it lost, manifest; tokens, where the step packs."""
    return tuple(shard.with_suffix(end) for end in (".jsonl", ".dropped", ".meta.json", ".tokens.npy"))


def manifest(job: Job) -> dict | None:
    """The manifest of a job that is done: with its key, and a shard of the size that it names."""
    try:
        meta = json.loads(outputs(job.out)[2].read_text(encoding="utf-8"))
        return meta if meta["key"] == job.key and job.out.stat().st_size == meta["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def work(job: Job) -> None:
    """Do a job and leave its files. Runs in any process."""
    shard, dropped, meta, _ = outputs(job.out)
    meta.unlink(missing_ok=True)  # of another key: it must not vouch for what is written now
    ledger, hashed, size = Ledger(job), hashlib.sha256(), 0
    with whole_file(shard) as out, whole_file(dropped) as reasons:
        for document, outcome in job.step.run(entering(job, ledger), job):
            items = outcome if isinstance(outcome, list) else [outcome]
            gone = all(isinstance(item, Drop) for item in items)
            for i, item in enumerate(items):
                if isinstance(item, Drop):
                    ledger.drop(document, item, alone=gone and i == 0)
                    row = {"id": document["id"], "reason": item.reason} | ({"twin": item.twin} if item.twin else {})
                    reasons.write(json.dumps(row).encode() + b"\n")
                    continue
                ledger.keep(item)
                line = json.dumps(item, ensure_ascii=False).encode() + b"\n"
                hashed.update(line)
                size += len(line)
                out.write(line)
    write_atomically(meta, json.dumps(ledger.meta() | {"key": job.key, "sha256": hashed.hexdigest(), "bytes": size}))


def entering(job: Job, ledger: "Ledger") -> Iterator[Document]:
    """The documents of a job's piece, each with a line in its provenance for this step."""
    for document in job.step.read(job.piece, job):
        ledger.read += 1
        if isinstance(document, tuple):  # (place, why it could not be read)
            ledger.drop({"id": document[0], "kind": "text", "text": document[1].detail}, document[1])
            continue
        document["provenance"].append({"step": job.name})
        yield document


class Ledger:
    """What happened to the documents of a job. Samples are those whose ids have the smallest hashes: no order, and no
    number of processes, changes them, and those of many shards merge into those of all."""

    def __init__(self, job: Job):
        self.job, self.read, self.rows, self.characters = job, 0, 0, 0
        self.dropped, self.samples, self.values = Counter(), {}, {}

    def keep(self, document: Document) -> None:
        self.rows += 1
        self.characters += len(text_of(document))
        self.sample("", document, Drop(""))

    def drop(self, document: Document, drop: Drop, alone: bool = True) -> None:
        """`alone`: it is why the document ends here; else something that was to be made of it failed."""
        (self.dropped if alone else self.job.notes)[drop.reason] += 1
        self.sample(drop.reason, document, drop)

    def sample(self, reason: str, document: Document, drop: Drop) -> None:
        order = priority(document["id"], self.job.context.seed)
        last = document.get("provenance", [])[-1:]
        for name, value in last[0].items() if last else ():
            if name in document["scores"]:
                insert(self.values.setdefault(name, []), [order, value], VALUES)
        shown = self.samples.setdefault(reason, [])
        if len(shown) < SAMPLES or order < shown[-1][0]:
            row = {"id": document["id"], "text": text_of(document)[:SHOWN], "detail": drop.detail, "twin": drop.twin}
            insert(shown, [order, row | {"provenance": last}], SAMPLES)

    def meta(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "job"} | {"notes": self.job.notes}


def priority(id: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {id}".encode("utf-8", "replace"), digest_size=6).digest())


def insert(rows: list, row: list, limit: int) -> None:
    """Keep the `limit` rows of the smallest first elements, in order."""
    if len(rows) < limit or row[0] < rows[-1][0]:
        bisect.insort(rows, row, key=lambda r: r[0])
        del rows[limit:]


def summarise(name: str, kind: str, metas: Sequence[dict]) -> dict[str, Any]:
    """The manifests of a step's jobs as one."""
    merged: dict[str, Any] = {"name": name, "do": kind, "read": sum(meta["read"] for meta in metas)}
    for key in ("dropped", "notes"):
        merged[key] = dict(sum((Counter(meta[key]) for meta in metas), Counter()).most_common())
    for key, limit in (("samples", SAMPLES), ("values", VALUES)):
        names = dict.fromkeys(n for meta in metas for n in meta[key])
        rows = {n: heapq.merge(*(meta[key].get(n, []) for meta in metas), key=lambda r: r[0]) for n in names}
        merged[key] = {n: [row for _, row in list(found)[:limit]] for n, found in rows.items()}
    return merged


def twin_texts(summary: dict, shards: Sequence[Piece]) -> dict[str, str]:
    """The texts of the documents that the shown duplicates resemble."""
    wanted = {row["twin"] for rows in summary["samples"].values() for row in rows if row["twin"]}
    found: dict[str, str] = {}
    for shard in shards if wanted else ():
        with open(shard.path, encoding="utf-8") as lines:
            rows = (json.loads(line) for line in lines if any(id in line for id in wanted))
            found |= {d["id"]: text_of(d)[:SHOWN] for d in rows if d["id"] in wanted}
    return found


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_atomically(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # what is shown of records need not be valid Unicode
