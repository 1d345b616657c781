"""Measure how fast text becomes tokens, on one core and on all: MB/s of UTF-8.

    python -m tritium.bench data --tokenizers=runs/tokenizer --texts=book.txt

Each text is cut into documents of about 4,000 characters, as records are; `encode` takes them one by one on one core,
`encode_batch` all at once on every core. The best of three rounds, by the thread's own time on its core for the first
(other programs don't count), by the clock for the second. The bar is 1 MB/s on one core.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tritium.core.config import UserError, load, opt
from tritium.core.formats import read_text
from tritium.core.tokenizer import Tokenizer
from tritium.stages.plan import aligned

BAR = 1.0  # MB/s of one core


@dataclass
class Config:
    tokenizers: list[str] = opt([], "folders or files of tokenizers")
    texts: list[str] = opt([], "text files")
    characters: int = opt(4000, "of a document")


def main(argv: list[str]) -> int:
    """Print a table; exit code 1 where a rate is under the bar."""
    config = load(Config, argv, "python -m tritium.bench data", __doc__)
    if not config.tokenizers or not config.texts:
        raise UserError("name --tokenizers and --texts")
    rows, slow = [("tokenizer", "text", "bytes/token", "encode MB/s", "encode_batch MB/s")], False
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
            rows.append((Path(folder).name, Path(path).name, f"{size / tokens:.2f}", *rates))
    print("\n".join(aligned(rows, left=(0, 1))))
    print(f"{os.cpu_count()} cores; the bar is {BAR:g} MB/s of one{': missed' if slow else ''}")
    return int(slow)


def best_of_three(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    seconds = []
    for _ in range(3):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)
