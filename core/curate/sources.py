"""Collect: documents from people's files, in the layouts of layouts.py.

Read line by line, at most `shard_mb` in a job, whatever a file's size; .gz files, UTF-16, and JSON over several lines
are first unpacked to lines of UTF-8 on the disk. What can't be read is counted and shown, and takes nothing else with
it: a damaged .gz gives what comes before the damage, a line that is not UTF-8 is read in `encoding`.
"""

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

from tritium.core.config import ConfigError, opt
from tritium.core.curate.kept import digest, state
from tritium.core.curate.layouts import html_text, parse
from tritium.core.curate.runner import write_atomically
from tritium.core.curate.step import Context, Document, Drop, Job, Piece, Step
from tritium.core.files import LONE_SURROGATE, DataError, holds_records, is_json_list, json_list, table_rows
from tritium.core.formats import RecordError
from tritium.core.output import whole_file, write_lines

WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CONTROLS = bytes([*range(9), *range(14, 27), *range(28, 32)])  # which compressed files and images are full of
MANY, SMALL = 100, 65536  # so many texts of fewer bytes go together
LONGEST_NAME = 50  # characters of a source's file name in those of its shards: a file system takes 255 bytes


@dataclass
class Collect(Step):
    """Documents from files."""

    sources: list[str] = opt([], "files, or patterns: .jsonl, .json, .txt, .html (also with .gz), .parquet")
    source: str = opt("", "source name of the documents (default: the file's name)")
    licence: str = opt("unknown", "licence of the source")
    limit: int = opt(0, "records to read from each file (0: all)", least=0)
    characters: int = opt(20_000, "longest plain-text document; longer ones are split between paragraphs", least=1)
    max_line_mb: float = opt(16.0, "longest line in MB; longer ones are skipped", above=0)
    encoding: str = opt("cp1252", "encoding of lines that are not UTF-8")

    def check(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty: name at least one file")
        try:
            b"\0".decode(self.encoding, "replace")
        except LookupError:  # also of one that Python knows, but not as an encoding of text
            raise ConfigError(f"encoding={self.encoding!r} is not a text encoding that Python knows") from None
        for path in self.paths():
            readable(path)

    def paths(self) -> list[str]:
        found = {}
        for pattern in self.sources:
            files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not files:
                raise DataError(f"sources: {pattern} does not exist, or is no file (for a folder's files: FOLDER/*)")
            found |= dict.fromkeys(files)
        return list(found)

    def pieces(self, context: Context, shards: list[Piece]) -> list[Piece]:
        """The lines of each file in stretches of `shard_mb`; unpacks what is not lines yet."""
        paths = self.bundled(self.paths(), context)
        made = context.map(Unpack(context.scratch), paths)
        taken, pieces = {shard.name.rpartition("-")[0] for shard in shards}, []
        for path, (plain, damage) in zip(paths, made, strict=True):
            base = re.sub(r"[^\w-]+", "-", stem(path))[:LONGEST_NAME]
            name = next(name for name in chain([base], (f"{base}-{i}" for i in count(2))) if name not in taken)
            taken.add(name)
            size, whole = Path(plain).stat().st_size, kind_of(path) == "html" or self.limit
            edges = [*range(0, size, max(size, 1) if whole else context.shard_bytes), size] if size else [0, 0]
            for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
                key = digest(Path(path).name, state(path), start, end, damage)
                last = damage if end == size else ""
                pieces.append(Piece(plain, key, f"{name}-{i:04d}", start, end, damage=last))
        return pieces

    def bundled(self, paths: list[str], context: Context) -> list[str]:
        """Many small texts as one file of records, named after the first one's folder: a shard for each takes long."""
        small = {p for p in paths if kind_of(p) != "lines" and os.path.getsize(p) <= min(self.characters, SMALL)}
        small = sorted(p for p in small if not p.endswith(".gz") and beginning(p)[:2] not in WIDE)
        if len(small) < MANY or self.limit:
            return paths
        folder = context.scratch / digest(self.encoding, [[path, state(path)] for path in small])[:12]
        bundle = folder / f"{Path(small[0]).absolute().parent.name}.jsonl"
        if not bundle.exists():
            write_lines(bundle, ({"id": p, kind_of(p): self.decoded(Path(p).read_bytes())} for p in small))
        return [*sorted({*paths} - {*small}), str(bundle)]

    def read(self, piece: Piece, job: Job) -> Iterator[Document | tuple[str, Drop]]:
        name, taken = piece.name.rpartition("-")[0], 0
        with open(piece.path, "rb") as file:
            lines = stretch(file, piece, int(self.max_line_mb * 1e6))
            for at, line in lines if kind_of(piece.path) == "lines" else self.texts(lines, piece, job):
                place = f"{name}:{at}"
                if self.limit and taken >= self.limit:
                    return
                found = self.one_line(line, job)
                if found is None:
                    continue
                taken += 1
                yield (place, found) if isinstance(found, Drop) else self.labelled(found, place, name, job)
        if piece.damage:
            yield f"{name}: the rest", Drop("a damaged file: what follows is lost", piece.damage)

    def one_line(self, line: bytes | str | None, job: Job) -> Document | Drop | None:
        """A document from a line of JSON or a text; None where it is empty."""
        if line is None:
            return Drop(f"a line longer than {self.max_line_mb:g} MB")
        text = line if isinstance(line, str) else self.decoded(line, job)
        if not text.strip() or isinstance(line, str):
            return {"kind": "text", "text": text} if text.strip() else None
        try:
            document = parse(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            return Drop("malformed JSON", f"{error}: {text[:200]}")
        except RecordError as error:
            return Drop(str(error), text[:400])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            return Drop(f"a record that can't be used ({type(error).__name__})", f"{error}: {text[:400]}")
        if "\\u" in text and LONE_SURROGATE.search(json.dumps(document, ensure_ascii=False)):
            return Drop("a text that is not valid Unicode")
        return document

    def decoded(self, line: bytes, job: Job | None = None) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError:
            if job:
                job.notes[f"lines that are not UTF-8, read as {self.encoding}"] += 1
            return line.decode(self.encoding, "replace")

    def texts(self, lines: Iterator, piece: Piece, job: Job) -> Iterator[tuple[int, str | None]]:
        """(place, text): an HTML page's text, or a plain text, in pieces that end between paragraphs."""
        page, first, parts, size = kind_of(piece.path) == "html", piece.start, [], 0
        for at, line in lines:
            if line is None:
                yield at, None
                continue
            text = self.decoded(line, job)
            long = parts and size + len(text) > self.characters and (not text.strip() or size > 2 * self.characters)
            if long and not page:
                yield first, "".join(parts).strip("\n")
                first, parts, size = at, [], 0
            parts.append(text)
            size += len(text)
        yield first, html_text("".join(parts)) if page else "".join(parts).strip("\n")

    def labelled(self, document: Document, place: str, name: str, job: Job) -> Document:
        """With its id, which is its place: unique, whatever ids the source gives; those that come twice are noted."""
        own = document.pop("own_id", None)
        if own is not None:
            job.notes["ids that come twice in a shard"] += own in job.seen
            job.seen.add(own)
            document["own_id"] = own
        base = {"source": self.source or name, "licence": self.licence, "language": "", "scores": {}}
        return {"id": place} | base | document | {"provenance": []}


def stem(path: str) -> str:
    return Path(path.removesuffix(".gz")).stem


def kind_of(path: str) -> str:
    """How a file is read: "lines" of JSON, "text", or "html"."""
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    return "html" if suffix in (".html", ".htm", ".xhtml") else "lines" if holds_records(path) else "text"


@dataclass(frozen=True)
class Unpack:
    """A file → (one that `read` can seek in, what of it was lost)."""

    scratch: Path

    def __call__(self, path: str) -> tuple[str, str]:
        wide, lines, table = beginning(path)[:2] in WIDE, kind_of(path) == "lines", path.endswith(".parquet")
        listed = lines and not wide and not table and is_json_list(path)
        if not (wide or listed or table or path.endswith(".gz")):
            return path, ""
        suffix = ".jsonl" if table else Path(path.removesuffix(".gz")).suffix
        plain = self.scratch / f"{stem(path)[:LONGEST_NAME]}-{digest(path, state(path))[:12]}{suffix}"
        said = plain.with_suffix(".damage")
        if not said.exists():
            damage = ""
            with whole_file(plain) as out:
                try:
                    rows = table_rows(path) if table else json_list(path)
                    for chunk in json_rows(rows) if listed or table else chunks(path, wide):
                        out.write(chunk)
                except (DataError, OSError, EOFError, zlib.error) as error:
                    damage = f"{Path(path).name}: {error}".replace(str(Path(path).parent), "…")
            write_atomically(said, damage)
        plain, rest = self(str(plain)) if wide and lines else (str(plain), "")  # it may be a list of UTF-8 now
        return plain, said.read_text("utf-8") or rest


def unzipped(path: str) -> BinaryIO:
    return (gzip.open if path.endswith(".gz") else open)(path, "rb")


def beginning(path: str) -> bytes:
    with suppress(OSError, EOFError, zlib.error), unzipped(path) as file:
        return file.read(4096)
    return b""  # damaged: `chunks` will tell


def readable(path: str) -> None:
    """Raises: DataError for a file that is neither text nor a table, and would be read as rubbish."""
    if path.endswith(".parquet"):
        next(table_rows(path), None)
    elif (head := beginning(path))[:2] not in WIDE and len(head.translate(None, CONTROLS)) < 0.98 * len(head):
        raise DataError(f"sources: {path} is not text: leave it out, or unpack it (a gzip file must end in .gz)")


def json_rows(rows: Iterator[tuple[str, Any]]) -> Iterator[bytes]:
    for _, row in rows:
        yield json.dumps(row, default=str).encode() + b"\n"  # of a table's dates, what they are called


def chunks(path: str, wide: bool) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    with unzipped(path) as file:
        while chunk := file.read1(1 << 16):  # not read: at a torn end it would give nothing of its last chunk
            yield decoder.decode(chunk).encode("utf-8", "replace") if wide else chunk


def stretch(file, piece: Piece, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """(place, line) of the lines that begin in a piece; None for one that is too long, which is not held in memory."""
    file.seek(max(piece.start - 1, 0))
    while piece.start and (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass
    while (at := file.tell()) < piece.end:
        line = file.readline(longest + 1)
        if len(line) <= longest or line.endswith(b"\n"):
            yield at, line
            continue
        while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
            pass
        yield at, None
