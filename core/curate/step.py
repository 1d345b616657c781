"""What every step of the data factory is: a dataclass of settings, and a function of documents."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import tritium
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.curate.kept import digest, state

KINDS = ("text", "problem", "chat")
LIBRARIES = ("faiss", "math_verify", "py3langid")  # of the extra, where an option names them

Document = dict[str, Any]


@dataclass(frozen=True)
class Drop:
    """Why a document ends here: the `reason` is counted, the `detail` and the document it resembles are shown."""

    reason: str
    detail: str = ""
    twin: str = ""


Outcome = Document | Drop | list[Document | Drop]  # kept, dropped, or replaced by others; what failed among them


@dataclass(frozen=True)
class Piece:
    """The part of a file that one job reads: the lines that begin in [start, end). `key` stands for its content."""

    path: str
    key: str
    name: str  # of the shard that is made of it
    start: int = 0
    end: int = 0
    rows: int = 0  # documents, where it is a shard
    characters: int = 0  # of these
    damage: str = ""  # what of the file could not be read


@dataclass
class Context:
    """Where a step works. `map` runs a function of one argument over many, on all processes, in order."""

    out: Path
    scratch: Path
    seed: int
    shard_bytes: int
    memory: int  # bytes that a step may use for what grows with the data
    map: Callable[[Callable, Sequence], list] | None
    cache: Path  # of what teachers and judges said


@dataclass
class Job:
    """One step on one piece."""

    step: "Step"
    name: str
    piece: Piece
    out: Path
    key: str
    context: Context  # without `map`: it travels to another process
    notes: Counter = field(default_factory=Counter)  # what was mended, by kind
    seen: set[str] = field(default_factory=set)  # ids that the sources give

    @property
    def plan(self) -> Path:
        """What `prepare` decided for this piece, a row for each document."""
        return self.context.scratch / f"{self.piece.name}.plan.npy"


@dataclass
class Step:
    """A step. Most define `one`; those that ask models `several`; those that plan for all shards `prepare`, `run`."""

    kinds: list[str] = opt([], "kinds of documents to process; others pass (default: all)", choices=KINDS)

    BATCH: ClassVar[int] = 64  # documents that `several` gets
    LOCAL: ClassVar[bool] = False  # runs in the main process: it holds a model
    GLOBAL: ClassVar[bool] = False  # what becomes of a document depends on all shards
    PATHS: ClassVar[tuple[str, ...]] = ()  # options that name files and folders

    def __post_init__(self):
        check_ranges(self)

    def check(self) -> None:
        """Find what can be known to be wrong before anything runs. Raises: ConfigError."""
        for name, value in vars(self).items():
            if value in LIBRARIES:
                need(value, f"{name}={value!r}")
        for file in self.files():
            if not Path(file).exists():
                raise ConfigError(f"{file} does not exist")

    def files(self) -> list[str]:
        """Files and folders that the step reads besides its documents."""
        given = [getattr(self, name) for name in self.PATHS]
        return [file for value in given for file in ([value] if isinstance(value, str) else value) if file]

    def pieces(self, context: Context, shards: list[Piece]) -> list[Piece]:
        """The work to do, a job each."""
        return shards

    def read(self, piece: Piece, job: Job) -> Iterator[Document]:
        """The documents of a piece."""
        yield from read_shard(piece.path)

    def prepare(self, context: Context, shards: list[Piece]) -> None:
        """What must be known of all shards before the first job. Must be fit to run again after a kill."""

    def takes(self, document: Document) -> bool:
        return not self.kinds or document["kind"] in self.kinds

    def one(self, document: Document) -> Outcome:
        """What becomes of a document. It may be changed in place."""
        return document

    def several(self, documents: list[Document], job: Job) -> Sequence[Outcome]:
        """What becomes of some documents, for steps that are better off with many at once."""
        return [self.one(document) for document in documents]

    def run(self, documents: Iterable[Document], job: Job) -> Iterator[tuple[Document, Outcome]]:
        documents = iter(documents)
        while batch := list(islice(documents, self.BATCH)):
            asked = [d for d in batch if self.takes(d)]
            outcomes = dict(zip(map(id, asked), self.several(asked, job) if asked else (), strict=True))
            yield from ((d, outcomes.get(id(d), d)) for d in batch)

    def finish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        """After the last job, from the shards that it made. Returns facts for the report."""
        return {}

    def publish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        """After the last step: write what the pipeline is for, from what is left. Returns facts for the report."""
        return {}

    def key(self, shards: Sequence[Piece]) -> str:
        """Of everything, besides a job's own piece, that its output depends on."""
        files, everywhere = [state(f) for f in self.files()], [shard.key for shard in shards] if self.GLOBAL else []
        return digest(tritium.__version__, type(self).__name__, asdict(self), files, everywhere)


def read_shard(path: str | Path) -> Iterator[Document]:
    """The documents of a shard, one at a time. A shard that does not exist holds none."""
    if Path(path).exists():
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def note(document: Document, **facts: Any) -> None:
    """Add to what the document's provenance says of the present step."""
    document["provenance"][-1].update(facts)


def scored(document: Document, name: str, value: float) -> None:
    """Give a document a score, which the report shows a histogram of."""
    document["scores"][name] = value
    note(document, **{name: value})


def text_of(document: Document, calls: bool = False) -> str:
    """All that is said in a document; and, with `calls`, what tools are called with: no rule on prose is for that."""
    if document["kind"] == "text":
        return document["text"]
    said = [m["content"] for m in document["messages"]] + [a["text"] for a in document["answers"]]
    called = [json.dumps(m["tool_calls"]) for m in document["messages"] if calls and "tool_calls" in m]
    return "\n".join(said + called)


def prompt_text(document: Document) -> str:
    """What is asked: the last message; of a text, its beginning."""
    return document["text"] if document["kind"] == "text" else document["messages"][-1]["content"]


def best_answer(document: Document) -> str:
    """The first answer of which nothing speaks against it; "" where there is none."""
    good = (a for a in document["answers"] if a.get("right", True) and not {"rejected", "unjudged"} & a.keys())
    return next(good, {"text": ""})["text"]


def map_texts(document: Document, change: Callable[[str], str]) -> None:
    """Change every text of a document in place."""
    if document["kind"] == "text":
        document["text"] = change(document["text"])
        return
    for message in document["messages"]:
        for key in ("content", "reasoning_content"):
            if key in message:
                message[key] = change(message[key])
        for call in message.get("tool_calls", ()):
            call["arguments"] = changed(call["arguments"], change)
    for answer in document["answers"]:
        answer["text"] = change(answer["text"])


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Lists and objects of JSON with every text in them changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    return {key: changed(item, change) for key, item in value.items()} if isinstance(value, dict) else value


def need(library: str, option: str) -> None:
    """Raises: ConfigError where a library of the extra is not there."""
    if not find_spec(library):
        raise ConfigError(f'{option} needs {library}: pip install "tritium[data]"')
