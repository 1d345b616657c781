"""Files of text and of records, read as they come; what can't be used is counted, and shown with its place."""

import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tritium.core.code import repository
from tritium.core.config import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: JSON can spell it, UTF-8 can't
RECORDS = (".jsonl", ".json", ".parquet")
NEWLINE, TOKEN = "\n", 16  # characters of a literal, a number's end or an escape, which a chunk may cut
CHUNK = 1 << 20  # characters of a JSON list that are read at a time
SEPARATORS = re.compile(r"[\s,]*")
REPOSITORY_KEYS = ("repo", "repo_name", "repository", "repository_name", "max_stars_repo_name")


class DataError(UserError):
    """A file that can't be used: missing, empty, not text."""


@dataclass
class Skipped:
    """Counts what was left out, by reason, with the first place of each. `on_error="raise"` stops at the first."""

    on_error: str = "skip"
    reasons: Counter = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Raises: DataError where nothing may be skipped."""
        if self.on_error == "raise":
            raise DataError(f"{place}: {reason}")
        self.reasons[reason] += 1
        self.places.setdefault(reason, place)

    def summary(self) -> str:
        """One line per reason; empty when nothing was skipped."""
        return "\n".join(f"skipped {n} × {reason} (first: {self.places[reason]})" for reason, n in self.reasons.items())

    def tell(self) -> None:
        """The summary on standard error: standard output is for results."""
        if self.reasons:
            print(self.summary(), file=sys.stderr)


def open_text(path: Path):
    """As UTF-8, with or without the mark that Windows puts at the beginning."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def holds_records(path: str) -> bool:
    """Whether a file is one of records, by its name."""
    return Path(path.removesuffix(".gz")).suffix.lower() in RECORDS


def read_text(path: str) -> str:
    """The text of a file. Raises: DataError where it is missing, empty or not UTF-8."""
    return "".join(line for _, line in text_lines(path))


def read_records(path: str, skipped: Skipped) -> Iterator[tuple[str, dict]]:
    """(place, record) for each record of a .jsonl, .json (perhaps .gz) or .parquet file; malformed lines are skipped.

    Raises: DataError where the file can't be read, or holds no record at all.
    """
    found = False
    if path.endswith(".parquet"):
        numbered = table_rows(path)
    else:
        numbered = json_list(path) if is_json_list(path) else json_lines(path, skipped)
    for place, row in numbered:
        if isinstance(row, dict):
            inside = [] if found else row.get("data")  # {"version": …, "data": [records]}, as SQuAD has it
            found = True
            listed = isinstance(inside, list) and inside and all(isinstance(item, dict) for item in inside)
            yield from ((place, item) for item in (inside if listed else [row]))
        else:
            skipped.add("a record that is not a JSON object", place)
    if not found:
        wanted = f"{path} holds no record: give a .jsonl file, a JSON object on each line, or a .json list of them"
        raise DataError("\n".join(filter(None, (wanted, skipped.summary()))))


def is_json_list(path: str) -> bool:
    """Whether JSON is not a record a line: a list, or an object over several lines. A record that is cut off may look
    like the beginning of one, but no other line goes on with it."""
    try:
        with opened(path) as file:
            line = next((part for part in iter(lambda: file.readline(CHUNK), "") if part.strip()), "\n")
        first, spread = line.strip()[:1], line.endswith("\n") and line.strip()[-1:] in ("[", "{", ",", ":")
        if first == "[" and Path(path.removesuffix(".gz")).suffix == ".json" or line.strip() in ("[", "{"):
            return True
        return spread and first in "[{" and next(json_list(path), None) is not None
    except DataError:  # not UTF-8, or damaged: read as lines, which say so
        return False


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """A text file to read. Raises: DataError where it is missing, damaged or not UTF-8."""
    try:
        with open_text(Path(path)) as file:
            yield file
    except (OSError, EOFError, ValueError, zlib.error) as error:  # the last two: of a damaged .gz file
        raise unreadable(path, error) from None


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, one at a time. Raises: DataError, as `opened`, and where it is empty."""
    empty = True
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            empty = empty and not line.strip()
            yield number, line
    if empty:
        raise DataError(f"{path} is empty")


def unreadable(path: str, error: Exception) -> DataError:
    """What is wrong with a file, in a sentence."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist")
    if path.endswith(".npy"):
        return DataError(f"{path} is no text: of curate's pack, pretrain takes FILE.tokens.npy, with its --tokenizer")
    if isinstance(error, UnicodeDecodeError):
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        return DataError(f"{path} is not UTF-8 text ({where}); convert it (iconv, say), or unpack it (zstd -d)")
    return DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")


def json_list(path: str) -> Iterator[tuple[str, Any]]:
    """The items of a file's JSON list, or its objects one after another (one, as people read it, say), read as they
    come, on however many lines. Raises: DataError, with the line of a mistake."""
    decoder, buffer, at, line, count, state, more = json.JSONDecoder(), "", 0, 1, 0, "before", True

    def malformed(what: object, place: int) -> DataError:
        return DataError(f"{path}:{line + buffer.count(NEWLINE, 0, place)}: malformed JSON: {what}")

    with opened(path) as file:
        while more:
            more = file.read(max(CHUNK, len(buffer) - at))  # twice what is there of an item: each is read few times
            line += buffer.count(NEWLINE, 0, at)
            buffer, at = buffer[at:] + more, 0
            while (at := SEPARATORS.match(buffer, at).end()) < len(buffer):
                if state == "before" and buffer[at] not in "[{":
                    raise DataError(f"{path} must hold a list of records")
                if state == "after":
                    raise malformed("more than one list", at)
                if state == "before":
                    at, state = (at + 1, "within") if buffer[at] == "[" else (at, "bare")
                    continue
                if state == "within" and buffer[at] == "]":
                    at, state = at + 1, "after"
                    continue
                try:
                    item, at = decoder.raw_decode(buffer, at)
                except json.JSONDecodeError as error:
                    if more and (error.pos > len(buffer) - TOKEN or "Unterminated" in error.msg):
                        break  # not all of it is there yet
                    raise malformed(error.msg, error.pos) from None
                except (ValueError, RecursionError) as error:  # of numbers and lists without end
                    raise malformed(error, at) from None
                yield f"{path}: record {count}", item
                count += 1
        if state in ("before", "within"):
            raise malformed("the list does not end", at) if state == "within" else DataError(f"{path} is empty")


def table_rows(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of a .parquet file, without what is null in them. Raises: DataError where it can't be read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        lines = f"pandas.read_parquet({path!r}).to_json('data.jsonl', orient='records', lines=True)"
        raise DataError(f'{path}: pip install "tritium[data]" to read parquet; or make lines of it: {lines}') from None
    count = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(256):
                for row in batch.to_pylist():
                    yield f"{path}: row {count}", {key: value for key, value in row.items() if value is not None}
                    count += 1
    except (OSError, ArrowException) as error:
        raise unreadable(path, error) from None


def json_lines(path: str, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    for number, line in text_lines(path):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError):  # of numbers and lists without end
                skipped.add("malformed JSON", f"{path}:{number}")


def read_documents(path: str, skipped: Skipped, repositories: bool = False) -> Iterator[str]:
    """Raw texts: the "text" (or "content") of each record of a file of records; any other file is one document.

    With `repositories`, the records of one repository ("repo", "path", "text") make one document, in the order of
    their first record.
    """
    if not holds_records(path):
        yield read_text(path)
        return
    files: dict[str, dict[str, str]] = {}
    for place, record in read_records(path, skipped):
        text = record.get("text", record.get("content"))
        if not isinstance(text, str) or not text:
            skipped.add('a record without a "text"', place)
        elif LONE_SURROGATE.search(text):
            skipped.add("a text that is not valid Unicode", place)
        elif repositories and (name := next((str(record[k]) for k in REPOSITORY_KEYS if record.get(k)), None)):
            inside = files.setdefault(name, {})
            inside[str(record.get("path", record.get("file_path", f"file {len(inside)}")))] = text
        else:
            yield text
    yield from map(repository, files.values())
