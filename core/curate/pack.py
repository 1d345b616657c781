"""Pack: documents as token shards that `pretrain` reads as they are, and what is in them.

OUT/pack/gsm8k.tokens.npy   a source's tokens, [bos] + text + [eos] after one another; uint16 or uint32
         gsm8k.starts.npy   where its documents start
         gsm8k.json         the tokenizer's fingerprint, counts

tritium pretrain --tokenizer=… --data.sources=OUT/pack/gsm8k.tokens.npy,OUT/pack/web.tokens.npy@0.5
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tritium.core.config import REQUIRED, opt
from tritium.core.curate.runner import outputs, write_atomically
from tritium.core.curate.step import Context, Document, Job, Outcome, Piece, Step, best_answer, read_shard, scored
from tritium.core.data import DataConfig, encode_documents
from tritium.core.output import whole_file, write_array
from tritium.core.tokenizer import Tokenizer


@dataclass
class Pack(Step):
    """Tokenise; a prompt goes with its first answer that is not wrong."""

    tokenizer: str = opt(REQUIRED, "tokenizer folder or file")

    BATCH: ClassVar[int] = 512
    PATHS: ClassVar[tuple[str, ...]] = ("tokenizer",)

    @cached_property
    def loaded(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer)

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        made = encode_documents([whole_text(d) for d in documents], self.loaded, DataConfig())
        for document, ids in zip(documents, made, strict=True):
            scored(document, "tokens", len(ids))
        self.parts += made
        return documents

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        self.parts: list[np.ndarray] = [np.zeros(0, np.uint16)]  # its dtype gives way
        yield from super().run(documents, job)
        write_array(tokens_of(job.out), np.concatenate(self.parts))

    def finish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        """Join the shards' tokens by source. Facts: tokens by source, bytes per token by language."""
        tokens, size, by_source, numbers, packed = Counter(), Counter(), Counter(), {}, []
        for shard in shards:
            rows = []
            for document in filter(self.takes, read_shard(shard.path)):
                source, count = slug(document["source"]), document["provenance"][-1]["tokens"]
                rows.append((numbers.setdefault(source, len(numbers)), count))
                by_source[source] += count
                tokens[document["language"] or "?"] += count
                size[document["language"] or "?"] += len(whole_text(document).encode())
            packed.append(np.array(rows, np.int64).reshape(-1, 2))  # [documents, (source, tokens)]
        for source, number in numbers.items():
            self.join(context.out / "pack" / source, [(p[:, 0] == number, p[:, 1]) for p in packed], shards)
        facts = {f"tokens of {source}": n for source, n in by_source.items()}
        return facts | {f"bytes per token, {language}": size[language] / n for language, n in tokens.items()}

    def join(self, base: Path, packed: list[tuple[np.ndarray, np.ndarray]], shards: list[Piece]) -> None:
        """Write one source's files. `packed`: for each shard, which documents are the source's, and all lengths."""
        files = [tokens_of(shard.path) for shard in shards]
        # An empty one has the small one.
        dtype = np.result_type(*(np.load(file, mmap_mode="r").dtype for file in files))
        lengths = np.concatenate([counts[mine] for mine, counts in packed])
        header = {"descr": dtype.str, "fortran_order": False, "shape": (int(lengths.sum()),)}
        with whole_file(base.with_name(base.name + ".tokens.npy")) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part, (mine, counts) in zip(files, packed, strict=True):
                file.write(np.load(part, mmap_mode="r")[np.repeat(mine, counts)].astype(dtype).tobytes())
        write_array(base.with_name(base.name + ".starts.npy"), np.cumsum(np.append(0, lengths))[:-1])
        facts = {"tokenizer": self.loaded.fingerprint, "tokens": int(lengths.sum()), "documents": len(lengths)}
        write_atomically(base.with_name(base.name + ".json"), json.dumps(facts, indent=2) + "\n")


def slug(source: str) -> str:
    """A source's name, as a file may have it."""
    return re.sub(r"[^\w-]+", "-", source)


def tokens_of(shard: str | Path) -> Path:
    return outputs(Path(shard))[3]


def whole_text(document: Document) -> str:
    """A text; or a conversation's turns and the first answer that is not wrong, between empty lines."""
    if document["kind"] == "text":
        return document["text"]
    return "\n\n".join(filter(None, (*(m["content"] for m in document["messages"]), best_answer(document))))
