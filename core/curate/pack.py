"""Pack: documents as token shards that `pretrain` reads as they are, and what is in them.

OUT/pack/gsm8k.tokens.npy   a source's tokens, [bos] + text + [eos] after one another; uint16 or uint32
         gsm8k.starts.npy   where its documents start
         gsm8k.json         the tokenizer's fingerprint, counts

tritium pretrain --tokenizer=… --data.sources=OUT/pack/gsm8k.tokens.npy,OUT/pack/web.tokens.npy@0.5
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tritium.core.config import REQUIRED, opt
from tritium.core.curate.runner import write_atomically
from tritium.core.curate.step import Context, Document, Job, Outcome, Piece, Step, note, read_shard
from tritium.core.data import DataConfig, encode_documents
from tritium.core.output import whole_file, write_array
from tritium.core.tokenizer import Tokenizer


@dataclass
class Pack(Step):
    """Tokenise; a prompt goes with its first answer that is not wrong."""

    tokenizer: str = opt(REQUIRED, "folder or file of the tokenizer")

    BATCH: ClassVar[int] = 512

    def files(self) -> list[str]:
        return [self.tokenizer]

    def measures(self) -> Sequence[str]:
        return ("tokens",)

    @cached_property
    def loaded(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer)

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        made = encode_documents([whole_text(d) for d in documents], self.loaded, DataConfig())
        for document, ids in zip(documents, made, strict=True):
            document["scores"]["tokens"] = len(ids)
            note(document, tokens=len(ids))
        self.parts += made
        return documents

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        self.parts: list[np.ndarray] = [np.zeros(0, np.uint16)]  # its dtype gives way
        yield from super().run(documents, job)
        write_array(tokens_of(job.context, job.piece), np.concatenate(self.parts))

    def finish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        """Join the shards' tokens by source. Facts: tokens by source, bytes per token by language."""
        lengths: dict[str, list[int]] = {}
        tokens, size = Counter(), Counter()
        for document in (d for shard in shards for d in read_shard(shard.path) if self.takes(d)):
            count = document["provenance"][-1]["tokens"]
            lengths.setdefault(document["source"], []).append(count)
            tokens[document["language"] or "?"] += count
            size[document["language"] or "?"] += len(whole_text(document).encode())
        folder = context.out / "pack"
        folder.mkdir(exist_ok=True)
        for source, counts in lengths.items():
            self.join(folder / re.sub(r"[^\w-]+", "-", source), source, np.array(counts), context, shards)
        facts = {f"tokens of {source}": sum(counts) for source, counts in lengths.items()}
        return facts | {f"bytes per token, {language}": size[language] / n for language, n in tokens.items()}

    def join(self, base: Path, source: str, lengths: np.ndarray, context: Context, shards: list[Piece]) -> None:
        parts = [np.load(tokens_of(context, shard), mmap_mode="r") for shard in shards]
        header = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": (int(lengths.sum()),)}
        with whole_file(base.with_name(base.name + ".tokens.npy")) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for shard, part in zip(shards, parts, strict=True):
                rows = [(d["provenance"][-1]["tokens"], d["source"] == source)
                        for d in read_shard(shard.path) if self.takes(d)]  # fmt: skip
                counts, mine = np.array(rows, np.int64).reshape(-1, 2).T
                file.write(part[np.repeat(mine == 1, counts)].tobytes())
        write_array(base.with_name(base.name + ".starts.npy"), np.cumsum(np.append(0, lengths))[:-1])
        facts = {"tokenizer": self.loaded.fingerprint, "tokens": int(lengths.sum()), "documents": len(lengths)}
        write_atomically(base.with_name(base.name + ".json"), json.dumps(facts, indent=2) + "\n")


def tokens_of(context: Context, piece: Piece) -> Path:
    return context.scratch / f"{piece.name}.tokens.npy"


def whole_text(document: Document) -> str:
    """A text; or a conversation's turns and the first answer that is not wrong, between empty lines."""
    if document["kind"] == "text":
        return document["text"]
    answer = next((a["text"] for a in document["answers"] if a.get("right", True) and "rejected" not in a), "")
    return "\n\n".join(filter(None, (*(m["content"] for m in document["messages"]), answer)))
