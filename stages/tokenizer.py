"""Train a tokenizer: SentencePiece BPE with byte fallback and split digits.

tritium tokenizer --sources=book.txt,articles.jsonl --vocab_size=8192 --out=runs/tokenizer
"""

import sys
from dataclasses import dataclass

from tritium.core.config import check_ranges, opt
from tritium.core.data import parse_sources
from tritium.core.files import Skipped, read_documents
from tritium.core.output import make_folder
from tritium.core.run import Result
from tritium.core.tokenizer import DEFAULT_SIZE, SPECIAL, train_tokenizer

DEFAULT = f"(default: {DEFAULT_SIZE}, or fewer for little text)"
ONE_PROCESS = True  # others would write the same file


@dataclass
class Config:
    sources: list[str] = opt([], 'text files, or .jsonl with a "text" in each record')
    vocab_size: int | None = opt(None, f"vocabulary size, with special tokens and 256 bytes {DEFAULT}", least=300)
    max_megabytes: float = opt(20.0, "read at most this much text from each file")
    special: list[str] = opt([], "further tokens: <|…|> are control tokens, others are text that is never split")
    out: str = opt("runs/tokenizer", "output folder")

    def __post_init__(self):
        check_ranges(self)


def train(config: Config) -> Result:
    """Train on `config.sources`; the result's `bytes_per_token` is measured on the same text."""
    skipped, texts, sources = Skipped(), [], parse_sources(config.sources, "sources")
    make_folder(config.out, "out")
    for path, _ in sources:
        room = config.max_megabytes * 1e6
        for text in read_documents(path, skipped):
            texts.append(text[: max(int(room), 0)])
            room -= len(text)
            if room <= 0:
                break
    skipped.tell()
    tokenizer = train_tokenizer(texts, config.vocab_size, config.out, (*SPECIAL, *config.special))
    if config.vocab_size is None and tokenizer.vocab_size < DEFAULT_SIZE:
        print(f"a vocabulary of {tokenizer.vocab_size}: there is little text for {DEFAULT_SIZE}", file=sys.stderr)
    sample = texts[:: max(1, len(texts) // 200)]
    size = sum(len(text.encode()) for text in sample)
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    return Result(config.out, {"bytes_per_token": size / max(tokens, 1), "vocab_size": float(tokenizer.vocab_size)})


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("tokenizer"))
