"""Collect: the layouts in which people publish prompts, answers, tests and reasoning chains, and plain text and HTML.

Read line by line, at most `shard_mb` in a job, whatever a file's size; .gz files, .json lists and UTF-16 are first
unpacked to lines of UTF-8 on the disk. What can't be read is counted and shown, and takes nothing else with it: a
damaged .gz gives what comes before the damage, a line that is not UTF-8 is read in `encoding`.
"""

import codecs
import glob
import gzip
import html
import html.parser
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritium.core.config import ConfigError, opt
from tritium.core.curate.runner import temporary, write_atomically
from tritium.core.curate.step import Context, Document, Drop, Job, Piece, Step, digest, state
from tritium.core.formats import (
    LONE_SURROGATE,
    DataError,
    RecordError,
    conversation,
    is_json_list,
    json_list,
    number_text,
    problem,
    required_text,
    tests_of,
)
from tritium.core.rewards.maths import boxed

LONGEST_REFERENCE = 100  # characters: a longer "answer" without "####" is an explanation, which nothing compares with
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations
SKIPPED_TAGS = {"script", "style", "head", "nav", "footer", "noscript", "template", "svg", "form"}
BLOCKS = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "section", "article"}


@dataclass
class Collect(Step):
    """Documents from files."""

    sources: list[str] = opt([], "files, or patterns: .jsonl, .json, .txt, .html, each also with .gz")
    source: str = opt("", "what the documents call their source (default: the file's name)")
    licence: str = opt("unknown", "under which it was published")
    limit: int = opt(0, "use only the first records of each file (0: all)")
    characters: int = opt(20_000, "of a plain text: longer ones are cut between paragraphs")
    max_line_mb: float = opt(16.0, "longer lines are left out")
    encoding: str = opt("cp1252", "of lines that are not UTF-8")

    def check(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty: name at least one file")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ConfigError(f"encoding={self.encoding!r} is not one that Python knows") from None
        self.paths()

    def paths(self) -> list[str]:
        found = {pattern: sorted(glob.glob(pattern, recursive=True)) for pattern in self.sources}
        for pattern, files in found.items():
            if not files:
                raise DataError(f"sources: {pattern} does not exist")
        return list(dict.fromkeys(file for files in found.values() for file in files))

    def pieces(self, context: Context, shards: list[Piece]) -> list[Piece]:
        """The lines of each file in stretches of `shard_mb`; unpacks what is not lines yet."""
        paths = self.paths()
        made = context.map(Unpack(context.scratch), paths)
        taken, pieces = {shard.name.rpartition("-")[0] for shard in shards}, []
        for path, (plain, damage) in zip(paths, made, strict=True):
            base = name = re.sub(r"[^\w-]+", "-", stem(path))
            while name in taken:
                name = f"{base}-{len(taken)}"
            taken.add(name)
            size, lines = Path(plain).stat().st_size, kind_of(path) == "lines" and not self.limit
            edges = [*range(0, size, context.shard_bytes if lines else max(size, 1)), size] if size else [0, 0]
            for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
                key = digest(Path(path).name, state(path), start, end, damage)
                last = damage if end == size else ""
                pieces.append(Piece(plain, key, f"{name}-{i:04d}", start, end, damage=last))
        return pieces

    def read(self, piece: Piece, job: Job) -> Iterator[Document | tuple[str, Drop]]:
        name, count = piece.name.rpartition("-")[0], 0
        with open(piece.path, "rb") as file:
            for at, line in stretch(file, piece, int(self.max_line_mb * 1e6)) if is_lines(piece) else texts(self, file):
                place = f"{name}:{at}"
                if self.limit and count >= self.limit:
                    return
                found = (
                    Drop(f"a line longer than {self.max_line_mb:g} MB") if line is None else self.one_line(line, job)
                )
                if found is None:
                    continue
                count += 1
                yield (place, found) if isinstance(found, Drop) else self.labelled(found, place, name, job)
        if piece.damage:
            yield f"{name}: the rest", Drop("a damaged file: what follows is lost", piece.damage)

    def one_line(self, line: bytes | str, job: Job) -> Document | Drop | None:
        """A document from a line of JSON or a text; None where it is empty."""
        text = line if isinstance(line, str) else self.decoded(line, job)
        if not text.strip():
            return None
        if isinstance(line, str):
            return {"kind": "text", "text": text}
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Drop("malformed JSON", f"{error}: {text[:200]}")
        try:
            document = parse(record)
        except RecordError as error:
            return Drop(str(error), text[:400])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return Drop(f"a record that can't be used ({type(error).__name__})", f"{error}: {text[:400]}")
        return Drop("a text that is not valid Unicode") if LONE_SURROGATE.search(repr_of(document)) else document

    def decoded(self, line: bytes, job: Job) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError:
            job.notes[f"lines that are not UTF-8, read as {self.encoding}"] += 1
            return line.decode(self.encoding, "replace")

    def labelled(self, document: Document, place: str, name: str, job: Job) -> Document:
        """With its id, which is its place: unique, whatever ids the source gives; those that come twice are noted."""
        own = document.pop("own_id", None)
        if own is not None:
            seen = job.__dict__.setdefault("seen", set())
            job.notes["ids that come twice in a shard"] += own in seen
            seen.add(own)
        base = {"source": self.source or name, "licence": self.licence, "language": "", "scores": {}}
        return {"id": place} | base | document | {"provenance": []} | ({"own_id": own} if own is not None else {})


def repr_of(document: Document) -> str:
    return json.dumps(document, ensure_ascii=False)


def stem(path: str) -> str:
    return Path(path.removesuffix(".gz")).stem


def kind_of(path: str) -> str:
    """How a file is read: "lines" of JSON, "text", or "html"."""
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    return "html" if suffix in (".html", ".htm", ".xhtml") else "lines" if suffix in (".json", ".jsonl") else "text"


def is_lines(piece: Piece) -> bool:
    return kind_of(piece.path) == "lines"


@dataclass(frozen=True)
class Unpack:
    """A file → (one that `read` can seek in, what of it was lost)."""

    scratch: Path

    def __call__(self, path: str) -> tuple[str, str]:
        with open(path, "rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        listed = kind_of(path) == "lines" and not wide and starts_a_list(path)
        if not (wide or listed or path.endswith(".gz")):
            return path, ""
        suffix = {"lines": ".jsonl", "text": ".txt", "html": ".html"}[kind_of(path)]
        plain = self.scratch / f"{stem(path)}-{digest(path, state(path))[:12]}{suffix}"
        said = plain.with_suffix(".damage")
        if not said.exists():
            damage = ""
            with temporary(plain) as out:
                try:
                    for chunk in listed_lines(path) if listed else chunks(path, wide):
                        out.write(chunk)
                except (DataError, OSError, EOFError, zlib.error) as error:
                    damage = f"{Path(path).name}: {error}".replace(str(Path(path).parent), "…")
            write_atomically(said, damage)
        return str(plain), said.read_text("utf-8")


def starts_a_list(path: str) -> bool:
    try:
        return is_json_list(path)
    except DataError:  # not UTF-8, or damaged: read as lines, which can take it
        return False


def listed_lines(path: str) -> Iterator[bytes]:
    for _, item in json_list(path):
        yield json.dumps(item).encode() + b"\n"


def chunks(path: str, wide: bool) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
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


def texts(step: Collect, file) -> Iterator[tuple[int, str]]:
    """(place, text): an HTML page's text, or a plain text, in pieces that end between paragraphs."""
    if kind_of(file.name) == "html":
        yield 0, html_text(file.read().decode("utf-8-sig", "replace"))
        return
    at, parts, size = 0, [], 0
    for number, line in enumerate(file):
        text = line.decode("utf-8-sig", "replace")
        if parts and size + len(text) > step.characters and (not text.strip() or size > 2 * step.characters):
            yield at, "".join(parts).strip("\n")
            at, parts, size = number, [], 0
        parts.append(text)
        size += len(text)
    yield at, "".join(parts).strip("\n")


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TextOnly(html.parser.HTMLParser):
    """The text that a reader of the page would see, a line for each block; links and menus' markup taken away."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag in SKIPPED_TAGS:
            self.hidden.append(tag)
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            del self.hidden[self.hidden.index(tag) :]
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    parser = TextOnly()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(record: Any) -> Document:
    """A document without its labels. Raises: RecordError, and what a record of another shape may raise."""
    if not isinstance(record, dict):
        raise RecordError("a record that is not a JSON object")
    form = next((form for keys, form in LAYOUTS if keys <= record.keys()), other)
    document = form(record)
    id = next((record[k] for k in ("id", "uuid", "problem_id", "task_id", "name") if k in record), None)
    language = record.get("language", record.get("lang"))
    facts = {"own_id": str(id)} if isinstance(id, str | int) else {}
    facts |= {"language": language} if isinstance(language, str) else {}
    for key, names in {"licence": ("license", "licence"), "category": ("category", "problem_type", "type")}.items():
        if value := next((record[n] for n in names if isinstance(record.get(n), str)), None):
            facts[key] = value
    if isinstance(record.get("difficulty", record.get("level")), int | str):
        facts["level"] = str(record.get("difficulty", record.get("level")))
    return document | facts


def asked(prompt: Any, answers: list, reference: Any = "", system: Any = "", by: str = "gold") -> Document:
    """A problem, where there is a reference; else a chat. Empty answers are left out."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": required_text(prompt, "question")})
    given = [{"text": text, "by": by} for text in answers if isinstance(text, str) and text.strip()]
    reference = number_text(reference) if isinstance(reference, int | float) else (reference or "").strip()
    return {"kind": "problem" if reference else "chat", "messages": messages, "answers": given, "reference": reference}


def cases(inputs: list, outputs: list) -> str:
    """The reference of a program that reads and prints."""
    pairs = [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=False)]
    return json.dumps({"cases": pairs}) if pairs else ""


def apps(record: dict) -> Document:
    tests = json.loads(record["input_output"] or "{}")
    if name := tests.get("fn_name"):
        wanted = [[out, out[0]] if isinstance(out, list) and len(out) == 1 else [out] for out in tests["outputs"]]
        calls = zip(tests["inputs"], wanted, strict=False)
        asserts = [f"assert {name}(*{given!r}) in {outs!r}" for given, outs in calls]
        reference = json.dumps({"tests": asserts, "entry_point": name})
    else:
        reference = cases(tests.get("inputs", []), tests.get("outputs", []))
    starter = f"\n\n{record['starter_code']}" if record.get("starter_code") else ""
    solutions = json.loads(record["solutions"]) if record.get("solutions") else []
    return asked(record["question"] + starter, [f"```python\n{s}\n```" for s in solutions[:1]], reference)


def code_contests(record: dict) -> Document:
    """Python 3 solutions only (language 3)."""
    tests = [record.get(f"{name}_tests") or {} for name in ("public", "private", "generated")]
    both = [[text for test in tests for text in test.get(key, [])] for key in ("input", "output")]
    known = record.get("solutions") or {}
    pairs = zip(known.get("language", []), known.get("solution", []), strict=False)
    python = [f"```python\n{text}\n```" for language, text in pairs if language in (3, "PYTHON3")]
    return asked(record["description"], python[:1], cases(*both))


def codeforces(record: dict) -> Document:
    parts = [
        record["description"],
        *(
            f"{name}\n{record[key]}"
            for name, key in (("Input", "input_format"), ("Output", "output_format"))
            if record.get(key)
        ),
    ]
    tests = [*(record.get("examples") or []), *(record.get("official_tests") or [])]
    different = {(t["input"], t["output"]): None for t in tests}
    prompt = "\n\n".join([*parts, *(f"Example input\n{t['input']}\nExample output\n{t['output']}" for t in tests[:2])])
    return asked(
        prompt,
        [record["editorial"]] if record.get("editorial") else [],
        cases(*map(list, zip(*different, strict=True))) if different else "",
    )


def openr1(record: dict) -> Document:
    """The generations are chains, each marked right or wrong; OpenR1-Math."""
    document = asked(
        record["problem"], [record.get("solution")], record.get("answer") or boxed(record.get("solution") or "")
    )
    marks = record.get("correctness_math_verify") or [None] * len(record["generations"])
    chains = [
        {"text": t, "by": "r1"} | ({} if m is None else {"right": m})
        for t, m in zip(record["generations"], marks, strict=False)
    ]
    return document | {"answers": document["answers"] + chains}


def solved(record: dict) -> Document:
    """NuminaMath and MATH: the answer is what the solution puts in a box."""
    return asked(record["problem"], [record["solution"]], record.get("answer") or boxed(record["solution"]))


def natural(record: dict) -> Document:
    document = asked(record["question"], [], record["reference_answer"])
    said = [{"text": r["response"], "by": r.get("response_model", "model")} for r in record.get("responses") or []]
    return document | {"answers": [answer for answer in said if answer["text"]]}


def plain(record: dict) -> Document:
    text = record["text"] if "text" in record else record["content"]
    return {"kind": "text", "text": required_text(text, "text")}


def other(record: dict) -> Document:
    """What core/formats.py reads: GSM8K, SVAMP, MBPP, HumanEval, problems with tests; alpaca, sharegpt, messages."""
    key = next((k for k in ("answer", "Answer", "ground_truth", "reference") if k in record), None)
    if tests_of(record) or key:
        messages, reference = problem(record)
        gold = record.get("code", record.get("canonical_solution")) if tests_of(record) else record[key]
        if tests_of(record) and gold:
            gold = f"```python\n{record.get('prompt', '') if 'canonical_solution' in record else ''}{gold}\n```"
        gold = CALCULATOR.sub("", gold) if isinstance(gold, str) else number_text(gold) if gold is not None else ""
        answers = [{"text": gold, "by": "gold"}] if gold.strip() else []
        answers += [
            {"text": v["solution"], "by": k, "right": v["is_correct"]}
            for k, v in record.items()
            if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()
        ]
        known = tests_of(record) or len(reference) <= LONGEST_REFERENCE
        return {
            "kind": "problem" if known else "chat",
            "messages": messages,
            "answers": answers,
            "reference": reference if known else "",
        }
    messages = conversation(record)
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    last = messages[-1]
    if last.get("tool_calls"):
        raise RecordError("a conversation that ends with a tool call")
    thought = f"<think>\n{last['reasoning_content']}\n</think>\n\n" if last.get("reasoning_content") else ""
    return {
        "kind": "chat",
        "messages": messages[:-1],
        "answers": [{"text": thought + last["content"], "by": "gold"}],
        "reference": "",
    }


LAYOUTS: list[tuple[set[str], Callable[[dict], Document]]] = [
    ({"question", "input_output"}, apps),
    ({"description", "public_tests"}, code_contests),
    ({"description", "input_format"}, codeforces),
    ({"problem", "generations"}, openr1),
    ({"problem", "solution"}, solved),
    ({"question", "reference_answer"}, natural),
    (
        {"system_prompt", "question", "response"},
        lambda r: asked(r["question"], [r["response"]], system=r["system_prompt"]),
    ),
    ({"html"}, lambda r: {"kind": "text", "text": required_text(html_text(r["html"]), "text")}),
    ({"text", "test_list"}, other),
    ({"text"}, plain),
    ({"content"}, plain),
]
