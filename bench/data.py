"""Measure the data factory and the tokenizers, on this machine: MB/s of UTF-8, recall, memory.

    python -m tritium.bench data                                  the factory, on text made of Python's own library
    python -m tritium.bench data --tokenizers=runs/tokenizer --texts=book.txt       how fast text becomes tokens

The factory's documents are lines drawn from real text, some of them planted near duplicates (some words replaced).
Rates are by the clock, reading and writing of the shards included:

    filter      all rules of Gopher, C4 and Yi, each measured of each document (limits that drop nothing): ≥ 10 MB/s
    near        MinHash signatures, bands, verified pairs, the shards written anew: ≥ 5 MB/s; by size, for the growth.
                Recall among the planted duplicates, and the share of the others that was dropped: ≥ 0.95, ≤ 0.01
    search      the 10 most similar of 20,000 × 256 for 2,000 queries, against faiss's flat index: ≤ 1.5 × its time

`encode` takes documents of about 4,000 characters one by one on one core, `encode_batch` all at once on every core. The
best of three rounds, by the thread's own time on its core for the first (other programs don't count), by the clock for
the second. The bar is 1 MB/s on one core.
"""

import json
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tritium.bench.growth import slope
from tritium.bench.kernels import rows_file, run_facts
from tritium.bench.rows import Row, full, heading, leave
from tritium.core.config import UserError, load, opt
from tritium.core.corpus import library_texts
from tritium.core.curate.dedup import Near
from tritium.core.curate.filters import RULES, Filter
from tritium.core.curate.runner import run_steps
from tritium.core.curate.semantic import most_similar
from tritium.core.curate.step import Context, Piece, Step
from tritium.core.files import read_text
from tritium.core.tokenizer import Tokenizer
from tritium.stages.plan import aligned

BAR = 1.0  # MB/s of one core
LINES = 40  # of a document
PLANTED = 0.02  # of the documents
REPLACED = 0.02  # of a planted one's words
LENIENT = {name: 0.0 if name.startswith("min") else math.inf for name in RULES}  # everything is measured, all passes


@dataclass
class Config:
    tokenizers: list[str] = opt([], "folders or files of tokenizers: measures these alone")
    texts: list[str] = opt([], "text files (default: Python's library)")
    characters: int = opt(4000, "of a document that is encoded")
    sizes: list[float] = opt([0.1, 0.3, 1.0], "GB of text that `near` is measured on; the first also for `filter`")
    workers: int = opt(2, "processes")
    memory_mb: float = opt(256.0, "as `curate`'s")
    folder: str = opt("", "where the shards are made (default: a temporary folder)")
    out: str = opt("bench/results", "folder for data.jsonl, or encoding.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of these")


def main(argv: list[str]) -> int:
    """Print a table; exit code 1 where a rate is under its bar."""
    config = load(Config, argv, "python -m tritium.bench data", __doc__)
    if config.tokenizers:
        return encoding(config)
    if config.folder:
        return factory(config, Path(config.folder))
    with tempfile.TemporaryDirectory() as folder:
        return factory(config, Path(folder))


# ── the factory ──────────────────────────────────────────────────────────────────────────────────────────────────


def factory(config: Config, folder: Path) -> int:
    text = "\n".join(read_text(p) for p in config.texts) if config.texts else "\n".join(library_texts(8_000_000, 0))
    pool = [line for line in dict.fromkeys(text.splitlines()) if len(line) > 20]
    made = [shards(pool, folder / f"{size:g}", int(size * 1e9)) for size in config.sizes]
    missed, rows = [], []
    print(f"{peak(resource.RUSAGE_SELF):.0f} MB before the first step")
    filter = Filter(rules=[], limits=LENIENT)
    steps = [(filter, made[0], config.sizes[0]), *((Near(), m, s) for m, s in zip(made, config.sizes, strict=True))]
    for step, sources, size in steps:
        name, bar = type(step).__name__.lower(), 10.0 if step is filter else 5.0
        seconds, summary, dropped = timed(step, sources, folder / "out", config)
        rate = size * 1e3 / seconds
        row = measured(name, {"GB": size, "documents": summary["read"]}, "tritium", seconds) | {"mb_per_second": rate}
        row |= {"peak_mb": peak(resource.RUSAGE_SELF), "worker_peak_mb": peak(resource.RUSAGE_CHILDREN)}
        row |= {"workers": config.workers, "memory_mb": config.memory_mb, "label": f"{rate:.1f} MB/s", "reason": ""}
        row["of_ceiling"] = rate / bar / 10  # the bar is a tenth of the chart
        if step is not filter:
            row["recall"], row["false"] = judged(dropped, summary["read"])
            row["reason"] = f"recall {row['recall']:.4f}, false {row['false']:.5f}"
            missed += ["recall"] * (row["recall"] < 0.95) + ["false positives"] * (row["false"] > 0.01)
        missed += [f"{name} at {size:g} GB"] * (rate < bar)
        rows.append(row)
    found, late = searched()
    said = [*table(rows), exponent(rows), *(f"search: {row['provider']} {row['ms']:.0f} ms" for row in found)]
    missed += late
    said.append(f"{os.cpu_count()} cores, {config.workers} processes, memory_mb={config.memory_mb:g}"
                + (f"; missed: {', '.join(missed)}" if missed else "; every bar is met"))  # fmt: skip
    print("\n".join(said))
    leave(rows_file(config, "cpu", "data"), rows + found, [*heading("The data factory", rows[0]), "```", *said, "```"])
    return int(bool(missed))


def measured(op: str, shape: dict[str, float], provider: str, seconds: float) -> Row:
    facts = run_facts("cpu") | {"op": op, "shape": shape, "provider": provider, "dtype": "utf-8", "pass": "forward"}
    return full(facts | {"ms": 1e3 * seconds})


def table(rows: Sequence[Row]) -> list[str]:
    cells = [("step", "GB", "documents", "seconds", "MB/s", "peak MB, main", "of a worker", "")]
    for row in rows:
        sizes = f"{row['shape']['GB']:g}", f"{row['shape']['documents']:,}"
        numbers = f"{row['ms'] / 1e3:.1f}", f"{row['mb_per_second']:.1f}"
        memory = f"{row['peak_mb']:.0f}", f"{row['worker_peak_mb']:.0f}"
        cells.append((row["op"], *sizes, *numbers, *memory, row["reason"]))
    return aligned(cells, left=(0, 7))


def peak(who: int) -> float:
    """MB."""
    return resource.getrusage(who).ru_maxrss / 1e3


def shards(pool: list[str], folder: Path, size: int) -> Path:
    """Files of documents, about 16 MB each; those already there are used again. Every 1 / PLANTED-th document is a near
    duplicate of one of the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, round(size / 16e6))
    for number in range(count):
        path = folder / f"part-{number:04d}.jsonl"
        if not path.exists():
            rng, rows, written = np.random.default_rng(number), [], 0
            while written < size / count:
                planted = len(rows) > 20 and len(rows) % round(1 / PLANTED) == 0
                text = changed(rows[rng.integers(len(rows))]["text"], rng) if planted else drawn(pool, rng)
                id = f"{number}-{len(rows)}{'-planted' if planted else ''}"
                rows.append({"id": id, "kind": "text", "text": text, "source": "drawn", "language": "en", "scores": {},
                             "licence": "", "provenance": []})  # fmt: skip
                written += len(text.encode())
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def drawn(pool: list[str], rng: np.random.Generator) -> str:
    return "\n".join(pool[i] for i in rng.integers(0, len(pool), LINES))


def changed(text: str, rng: np.random.Generator) -> str:
    """With some words replaced, in a text that keeps its lines."""
    words = text.split(" ")
    for i in rng.choice(len(words), max(1, int(REPLACED * len(text.split()))), replace=False):
        words[i] = f"changed{rng.integers(1 << 20)}"
    return " ".join(words)


def timed(step: Step, sources: Path, out: Path, config: Config) -> tuple[float, dict, list[str]]:
    """(seconds, summary, ids of what was dropped) of a step on shards."""
    files = [(f, sum(1 for _ in f.open("rb"))) for f in sorted(sources.glob("*.jsonl"))]
    given = [Piece(str(f), f"{f.name} {f.stat().st_size}", f.stem, rows=rows) for f, rows in files]
    shutil.rmtree(out, ignore_errors=True)
    context = Context(out, out / "scratch", 0, int(64e6), int(config.memory_mb * 1e6), None, out / "none")
    start = time.perf_counter()
    (summary,) = run_steps({"measured": step}, context, config.workers, given)
    seconds = time.perf_counter() - start
    files = (out / "steps").rglob("*.dropped")
    return seconds, summary, [json.loads(line)["id"] for file in files for line in file.open()]


def judged(dropped: list[str], documents: int) -> tuple[float, float]:
    """(share of the planted duplicates that were dropped, share of the others)."""
    planted = documents * PLANTED
    found = sum(id.endswith("-planted") for id in dropped)
    return min(found / planted, 1.0), (len(dropped) - found) / documents


def exponent(rows: Sequence[Row]) -> str:
    """The growth of `near`'s time, seconds ∝ documentsᵉ."""
    sizes, times = zip(*((row["shape"]["documents"], row["ms"]) for row in rows if row["op"] == "near"), strict=True)
    if len(sizes) < 2:
        return "near: give several --sizes for its growth"
    return f"near: seconds grow with the documents to the power {slope(sizes, times):.2f} (theory: 1)"


def searched() -> tuple[list[Row], list[str]]:
    """A similarity search beside faiss's; and what of it missed its bar."""
    rng = np.random.default_rng(0)
    rows, queries = (rng.normal(size=(n, 256)).astype(np.float32) for n in (20_000, 2_000))
    engines = ["torch", *(["faiss"] if find_spec("faiss") else [])]
    found = {engine: most_similar(queries, rows, 10, engine)[1] for engine in engines}
    seconds = {e: best_of_three(lambda e=e: most_similar(queries, rows, 10, e)) for e in engines}
    rows = [measured("search", {"N": 20_000, "Q": 2_000, "E": 256}, "tritium" if e == "torch" else e, s) for e, s in
            seconds.items()]  # fmt: skip
    rows = [row | {"dtype": "float32", "of_ceiling": 1e3 * min(seconds.values()) / row["ms"],
                   "label": f"{row['ms']:.0f} ms"} for row in rows]  # fmt: skip
    if "faiss" not in engines:
        print("faiss is not installed: nothing to compare with")
        return rows, []
    if not (found["torch"] == found["faiss"]).mean() > 0.999:
        return rows, ["search finds other rows than faiss"]
    return rows, ["search"] * (seconds["torch"] > 1.5 * seconds["faiss"])


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────


def encoding(config: Config) -> int:
    """Print the rates of tokenizers; 1 where one is under the bar."""
    if not config.texts:
        raise UserError("name the texts to encode: --texts=book.txt")
    cells, rows, slow = [("tokenizer", "text", "bytes/token", "encode MB/s", "encode_batch MB/s")], [], False
    for folder in config.tokenizers:
        tokenizer = Tokenizer.load(folder)
        for path in config.texts:
            text = read_text(path)
            parts = [text[i : i + config.characters] for i in range(0, len(text), config.characters)]
            size = len(text.encode())
            tokens = sum(map(len, tokenizer.encode_batch(parts)))
            one = size / best_of_three(
                lambda tokenizer=tokenizer, parts=parts: [tokenizer.encode(p) for p in parts], time.thread_time
            )
            many = size / best_of_three(lambda tokenizer=tokenizer, parts=parts: tokenizer.encode_batch(parts))
            slow = slow or one < BAR * 1e6
            rates = f"{one / 1e6:.1f}", f"{many / 1e6:.1f}"
            cells.append((Path(folder).name, Path(path).name, f"{size / tokens:.2f}", *rates))
            for op, rate in (("encode", one), ("encode_batch", many)):
                row = measured(op, {"MB": round(size / 1e6, 3)}, Path(folder).name, size / rate)
                row |= {"mb_per_second": rate / 1e6, "bytes_per_token": size / tokens, "pass": Path(path).name}
                rows.append(row | {"of_ceiling": rate / BAR / 1e7, "label": f"{rate / 1e6:.1f} MB/s"})
    said = [*aligned(cells, left=(0, 1)), f"{os.cpu_count()} cores; the bar is {BAR:g} MB/s of one"]
    said[-1] += ": missed" * slow
    print("\n".join(said))
    leave(rows_file(config, "cpu", "encoding"), rows, [*heading("Encoding", rows[0]), "```", *said, "```"])
    return int(slow)


def best_of_three(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    seconds = []
    for _ in range(3):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)
