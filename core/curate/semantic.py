"""Embeddings and what they are for: duplicates by meaning, variety, and evaluation sets that leaked into the data.

An embedding is the mean of a model's last hidden states over a text's first tokens, of length 1. Any language model
that we load will do; BERT's family comes through transformers (the extra `data`). Similarity is exact: blocks of dot
products and their k largest, in torch, or faiss's flat index. Those of all documents are in files, of which two blocks
are in memory at a time.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tritium.core.config import REQUIRED, ConfigError, UserError, opt
from tritium.core.curate.dedup import Twins, rows_at
from tritium.core.curate.layouts import parse
from tritium.core.curate.minhash import grams, word_hashes
from tritium.core.curate.sources import Collect
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, need, prompt_text, text_of
from tritium.core.files import Skipped, read_records

TOKENS = 256  # of a text are embedded
BATCH = 256  # texts that are embedded together
ITEMS = ("question", "prompt", "problem", "context", "text")  # of a record of an evaluation set
ANYWHERE = 8  # words of a short item that is looked for within texts; of fewer, only a whole turn is one
ROWS = 512  # of a block of dot products
ROUNDING = 1e-5  # of a dot product of rows of length 1: a text is as similar as 1 to itself


@dataclass
class Embedder:
    """Texts → [n, E] fp32 rows of length 1; texts without a token get zeros.

    Raises: ConfigError for a folder that needs a library which is not there.
    """

    folder: str

    def __post_init__(self):
        config = Path(self.folder) / "config.json"
        family = json.loads(config.read_text()).get("model_type", "") if config.is_file() else ""
        self.encoder = "bert" in family or family in ("electra", "mpnet", "ernie", "nomic_bert")
        if self.encoder:
            need("transformers", f"{self.folder}, of BERT's family ({family}),")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        with torch.no_grad():
            rows = self.transformers(texts) if self.encoder else self.ours(texts)
            return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()

    def ours(self, texts: Sequence[str]):
        import torch

        from tritium.core.batch import Document as Tokens
        from tritium.core.batch import pack, plan_bins
        from tritium.core.rewards.scorer import FolderModel

        folder = opened(FolderModel, self.folder)
        model, limit = folder.model, min(TOKENS, folder.model.config.max_positions)
        rows = [row[:limit] for row in folder.tokenizer.encode_batch([text[: 8 * limit] for text in texts])]
        result, some = torch.zeros(len(texts), model.config.hidden_size), [i for i, row in enumerate(rows) if row]
        for members in plan_bins([len(rows[i]) for i in some], 4096):
            mine = [some[j] for j in members]
            stream = [[Tokens(np.array(rows[i], np.int32), np.ones(len(rows[i]), np.float32))] for i in mine]
            batch = pack(stream, multiple_of=512).to(model.mesh.device)
            hidden = model.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions).float()  # [T, E]
            parts = hidden.tensor_split(batch.cu_seqlens[1 : len(mine) + 1].long().cpu())[: len(mine)]  # then filler
            result[mine] = torch.stack([part.sum(0) for part in parts]).cpu()
        return result

    def transformers(self, texts: Sequence[str]):
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = (opened(kind.from_pretrained, self.folder) for kind in (AutoTokenizer, AutoModel))
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=TOKENS)
        mask = batch["attention_mask"][..., None]
        return (model.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)


@cache
def opened(kind: Callable, folder: str):
    """A model or tokenizer, read once."""
    return kind(folder)


def most_similar(queries: np.ndarray, rows: np.ndarray, k: int, engine: str = "torch") -> tuple[np.ndarray, np.ndarray]:
    """For each of the queries [m, E] the k rows [n, E] of the largest dot products, the largest first: (products, their
    places), [m, min(k, n)]. Exact: every product is formed."""
    k = min(k, len(rows))
    if engine == "faiss":
        import faiss

        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(np.ascontiguousarray(rows, np.float32))
        return index.search(np.ascontiguousarray(queries, np.float32), k)
    import torch

    table = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).T  # [E, n]
    values, places = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for part in (slice(at, at + ROWS) for at in range(0, len(queries), ROWS)):
        block = torch.from_numpy(np.ascontiguousarray(queries[part], np.float32))
        best, where = (block @ table).topk(k, 1)
        values[part], places[part] = best.numpy(), where.numpy()
    return values, places


@dataclass
class Semantic(Twins):
    """Drop documents that mean what one before them does: whose most similar one before them is similar enough."""

    model: str = opt(REQUIRED, "folder of the embedding model")
    threshold: float = opt(0.95, "cosine similarity at which two documents are duplicates", above=0, most=1)
    engine: str = opt("torch", "search engine", choices=("torch", "faiss"))

    REASON: ClassVar[str] = "means what another does"
    LOCAL: ClassVar[bool] = True  # one model, in one process
    PATHS: ClassVar[tuple[str, ...]] = ("model",)

    def check(self) -> None:
        super().check()
        Embedder(self.model)

    def features(self, texts: list[bytes], first: int) -> np.ndarray:
        parts = [Embedder(self.model)([t.decode() for t in texts[i : i + BATCH]]) for i in range(0, len(texts), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)

    def pairs(self, files: list[Path], firsts: np.ndarray, context: Context) -> Iterator[np.ndarray]:
        count = int(firsts[-1])
        for start in range(0, count, ROWS):
            queries = rows_at(files, firsts, np.arange(start, min(start + ROWS, count)))
            own = np.tril(queries @ queries.T, -1)  # [m, m]: with those before it
            best, place = own.max(1), start + own.argmax(1)
            step = max(ROWS, context.memory // (4 * (queries.shape[1] + ROWS)))  # rows, and their products
            for first in range(0, start, step):
                rows = rows_at(files, firsts, np.arange(first, min(first + step, start)))
                values, places = (found[:, 0] for found in most_similar(queries, rows, 1, self.engine))
                closer = values > best
                best[closer], place[closer] = values[closer], first + places[closer]
            similar = np.flatnonzero(best >= self.threshold - ROUNDING)
            yield np.stack([place[similar], start + similar], 1)


@cache
def evaluation_texts(sources: tuple[str, ...]) -> tuple[list[str], int]:
    """(what is asked in evaluation files, how many records ask nothing that is known). Raises: UserError."""
    texts, silent, skipped = {}, 0, Skipped()
    for _, record in (r for path in Collect(sources=list(sources)).paths() for r in read_records(path, skipped)):
        found = [text for text in asked_in(record) if text.strip()]
        texts |= dict.fromkeys(found)
        silent += not found
    if not texts:
        raise UserError(f"against={list(sources)}: none of {', '.join(ITEMS)} in them")
    return list(texts), silent + skipped.reasons.total()


def asked_in(record: dict) -> list[str]:
    """The first of ITEMS that a record has, and the prompt that `collect` would make of it."""
    found = [record[key] for key in ITEMS if isinstance(record.get(key), str)][:1]
    with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):  # an evaluation set may lack answers
        found.append(prompt_text(parse(record)))
    return found


@dataclass
class Decontaminate(Step):
    """Drop documents that share a passage of `words` words with an evaluation set (Brown et al., arXiv 2005.14165,
    appendix C: 13), or, with a model, mean what one of its items does. Items of fewer words are met by their whole: of
    ANYWHERE or more anywhere in a text, of fewer where they are a turn by themselves."""

    against: list[str] = opt([], "files of evaluation sets")
    words: int = opt(13, "words per passage", least=2)
    model: str = opt("", "folder of an embedding model (empty: compare words only)")
    threshold: float = opt(0.95, "cosine similarity at which two prompts count as the same", above=0, most=1)

    def check(self) -> None:
        super().check()
        if not self.against:
            raise ConfigError("against is empty: name at least one file of an evaluation set")

    def files(self) -> list[str]:
        return [*Collect(sources=self.against).paths(), *([self.model] if self.model else [])]

    BATCH: ClassVar[int] = BATCH

    @property
    def LOCAL(self) -> bool:  # elsewhere of the class
        return bool(self.model)

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        outcomes = [self.by_words(d) or d for d in documents]
        if self.model:
            items = embedded(tuple(self.against), self.model)
            values, _ = most_similar(Embedder(self.model)([prompt_text(d) for d in documents]), items, 1)
            for i in np.flatnonzero(values[:, 0] >= self.threshold - ROUNDING):
                if not isinstance(outcomes[i], Drop):
                    said = f"similarity {values[i, 0]:.3f}"
                    outcomes[i] = Drop("means what an item of an evaluation set does", said)
        return outcomes

    def by_words(self, document: Document) -> Drop | None:
        known = evaluation_grams(tuple(self.against), self.words)
        turns = [m["content"] for m in document.get("messages", ())] or [document["text"]]
        anywhere = {size for size in known if size >= min(ANYWHERE, self.words)}
        for texts, sizes in (([text_of(document)], anywhere), (turns, known.keys() - anywhere)):
            hashes, owners, *_ = word_hashes([text.encode() for text in texts])
            counts = np.bincount(owners, minlength=len(texts))
            for size in sizes:
                found, first = grams(hashes, owners, size)
                place = np.searchsorted(known[size], found).clip(max=len(known[size]) - 1)
                whole = sizes is anywhere or counts[owners[first]] == size
                if ((known[size][place] == found) & whole).any():
                    return Drop("shares a passage with an evaluation set")
        return None

    def finish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        texts, silent = evaluation_texts(tuple(self.against))
        return {"items of evaluation sets": len(texts)} | ({"records that ask nothing": silent} if silent else {})


@cache
def evaluation_grams(sources: tuple[str, ...], n: int) -> dict[int, np.ndarray]:
    """Words → the sorted hashes of passages of so many: of n from anywhere in an item, and of all of a shorter one."""
    texts, _ = evaluation_texts(sources)
    hashes, owners, *_ = word_hashes([text.encode() for text in texts])
    counts, result = np.bincount(owners, minlength=len(texts)), {}
    for size in np.unique(np.minimum(counts[counts > 0], n)).tolist():
        found, first = grams(hashes, owners, size)
        count = counts[owners[first]]
        result[size] = np.unique(found[count >= n if size == n else count == size])
    return result


@cache
def embedded(sources: tuple[str, ...], folder: str) -> np.ndarray:
    return Embedder(folder)(evaluation_texts(sources)[0])
