"""The files that tokenizers come in, read into an engine, added tokens and names.

    tokenizer.model    SentencePiece, or tiktoken's ranks under Llama 3's name
    *.tiktoken         ranks in base64 (Qwen, cl100k, o200k): the pattern and special tokens are known by their number
    tekken.json        Mistral's
    tokenizer.json     Hugging Face's, byte-level BPE (SentencePiece-like ones are read from their tokenizer.model)
    vocab.json, merges.txt    GPT-2's

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` beside them add tokens and name BOS and EOS.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritium.core.config import UserError
from tritium.core.tokenizer.bytepairs import GPT2, KNOWN, BytePairs, hugging_face, merge_ranks, pattern
from tritium.core.tokenizer.pieces import Pieces

KEPT = ("tokenizer.model", "tokenizer.json", "tekken.json", "vocab.json", "merges.txt", "tokenizer_config.json")
KEPT += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
MAIN = ("tekken.json", "tokenizer.model", "tokenizer.json", "vocab.json")
# Of a tokenizer.json beside a SentencePiece model: each text between added tokens begins with the model's own space.
RESTARTS = rb'"type":\s*"Prepend"|"prepend_scheme":\s*"always"'
MARKER = re.compile(r"<[|｜].*[|｜]>")
NAMES, FLAGS = ("bos", "eos", "pad", "unk"), ("special", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class Added:
    """A token beside the engine's: `special` ones come from no ordinary text; the flags are Hugging Face's."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def __post_init__(self):
        if not isinstance(self.content, str) or not self.content:
            raise ValueError(f"an added token that is {self.content!r}")
        if not isinstance(self.id, int) or not 0 <= self.id < 1 << 24:
            raise ValueError(f"the added token {self.content!r} with the id {self.id!r}")

    @property
    def control(self) -> bool:
        """Markers in bars count as special whatever their flag: else a user's text could forge a turn (DeepSeek)."""
        return self.special or bool(MARKER.fullmatch(self.content))

    @property
    def pattern(self) -> str:
        edge = r"(?<!\w){}(?!\w)" if self.single_word else "{}"
        space = r"\s*" if self.lstrip else "", r"\s*" if self.rstrip else ""
        return space[0] + edge.format(re.escape(self.content)) + space[1]


@dataclass
class Parts:
    """What `Tokenizer` is made of."""

    engine: "BytePairs | Pieces"
    added: dict[str, Added] = field(default_factory=dict)
    names: dict[str, int | None] = field(default_factory=dict)  # "bos", "eos", "pad", "unk"
    files: dict[str, bytes] = field(default_factory=dict)  # as they are saved
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    chat_template: str = ""  # Jinja


def read(path: Path) -> Parts:
    """A tokenizer's folder or file. Raises: UserError if there is none, or it is of a kind that is not read."""
    try:
        if not path.is_dir():
            name = path.name if path.suffix in (".json", ".tiktoken", ".txt") else "tokenizer.model"
            found = {name: path.read_bytes()}
            if path.name in ("vocab.json", "merges.txt"):
                found = {other: (path.parent / other).read_bytes() for other in ("vocab.json", "merges.txt")}
        else:
            kept = [f for f in sorted(path.iterdir()) if f.name in KEPT or f.suffix in (".tiktoken", ".model")]
            found = {file.name: file.read_bytes() for file in kept}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read the tokenizer ({error.strerror})") from None
    main = main_file(found)
    if main is None:
        listed = ", ".join(sorted(item.name for item in path.iterdir())) if path.is_dir() else path.name
        wanted = "tokenizer.model, tokenizer.json, tekken.json, *.tiktoken or vocab.json with merges.txt"
        raise UserError(f"{path}: no tokenizer here ({wanted}); found {listed or 'nothing'}")
    try:
        return read_parts(main, found)
    except UserError as error:
        raise UserError(f"{path / main if path.is_dir() else path}: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        place = path / main if path.is_dir() else path
        raise UserError(f"{place}: not a tokenizer that can be read ({type(error).__name__}: {error})") from None


def main_file(found: dict[str, bytes]) -> str | None:
    """The file that holds the vocabulary. A byte-level tokenizer.json says more than tiktoken's ranks beside it."""
    if "tokenizer.json" in found and b'"ByteLevel"' in found["tokenizer.json"]:
        return "tokenizer.json"
    ranks = [name for name in found if name.endswith(".tiktoken")]
    models = [name for name in found if name.endswith(".model")]
    return next((name for name in (*MAIN, *ranks, *models) if name in found), None)


def read_parts(main: str, found: dict[str, bytes]) -> Parts:
    if main.endswith(".model") and not is_tiktoken(found[main]):
        parts = Parts(Pieces(found[main]))
        marks = {p: i for i, p in enumerate(parts.engine.pieces) if MARKER.fullmatch(p) and parts.engine.matches(i)}
        parts.added = {p: Added(p, i) for p, i in (parts.engine.controls | marks).items()}
        parts.engine.restarts = re.search(RESTARTS, found.get("tokenizer.json", b"")) is not None
        for piece in marks:  # of Yi's model, say, without its configuration
            parts.engine.guard(piece)
        parts.names = dict(parts.engine.names)
    elif main.endswith((".tiktoken", ".model")):
        parts = read_tiktoken(found[main])
    else:
        content = json.loads(found[main])
        reader = {"tekken.json": read_tekken, "tokenizer.json": read_hugging_face, "vocab.json": read_gpt2}[main]
        parts = reader(content, found)
    parts.files = found
    parts.config = json.loads(found.get("tokenizer_config.json", b"{}"))
    extend(parts, found)
    template = parts.config.get("chat_template") or ""
    if isinstance(template, list):  # several by name: the first is the default
        template = template[0]["template"] if template else ""
    parts.chat_template = found.get("chat_template.jinja", str(template).encode()).decode()
    return parts


def extend(parts: Parts, found: dict[str, bytes]) -> None:
    """Add the tokens and names that the configuration files beside the vocabulary give."""
    for content, i in json.loads(found.get("added_tokens.json", b"{}")).items():
        parts.added.setdefault(content, Added(content, i))
    for i, token in parts.config.get("added_tokens_decoder", {}).items():
        made = Added(token["content"], int(i), **{name: bool(token.get(name)) for name in FLAGS})
        if isinstance(parts.engine, Pieces) and made.id < len(parts.engine.pieces):
            if not (made.control and parts.engine.matches(made.id)):
                continue  # SentencePiece knows its own
            parts.engine.guard(made.content)
        parts.added[made.content] = made
    named = json.loads(found.get("special_tokens_map.json", b"{}")) | parts.config
    for name in NAMES:
        if f"{name}_token" in named:
            token = named[f"{name}_token"]
            token = token["content"] if isinstance(token, dict) else token
            known = parts.added.get(token)
            parts.names[name] = known.id if known else parts.engine.piece_id(token) if token else None


def is_tiktoken(content: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content) is not None


def read_tiktoken(content: bytes) -> Parts:
    lines = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    found = KNOWN["tiktoken"].get(str(len(ranks)))
    if found is None:
        known = ", ".join(KNOWN["tiktoken"])
        raise UserError(f"a tiktoken file of {len(ranks)} ranks, whose pattern is unknown (known: {known}); "
                        "convert it to a tokenizer.json")  # fmt: skip
    ids = {token: found["first"] + i for i, token in enumerate(counted(found["special"]))} | found.get("more", {})
    added = {content: Added(content, i) for content, i in ids.items()}
    names = {"bos": ids.get(found.get("bos")), "eos": ids[found.get("eos", "<|endoftext|>")]}
    return Parts(BytePairs(ranks, [pattern(found["pattern"])]), added, names)


def counted(names: list[str]) -> Iterator[str]:
    """<{0..2}> → <0>, <1>, <2>."""
    for name in names:
        if found := re.search(r"\{(\d+)\.\.(\d+)\}", name):
            yield from (name.replace(found[0], str(i)) for i in range(int(found[1]), int(found[2]) + 1))
        else:
            yield name


def read_tekken(content: dict, found: dict[str, bytes]) -> Parts:
    """Mistral's: the special tokens come first, and the file holds more ranks than are used."""
    config = content["config"]
    offset = config["default_num_special_tokens"]
    used = content["vocab"][: config["default_vocab_size"] - offset]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + offset for entry in used}
    tokens = {token: i for i, token in enumerate(KNOWN["tekken"]["special"])}
    if content.get("special_tokens"):
        tokens = {token["token_str"]: token["rank"] for token in content["special_tokens"]}
    used_ids = set(tokens.values())
    tokens |= {f"<SPECIAL_{i}>": i for i in range(offset) if i not in used_ids}
    names = {name: tokens.get(token) for name, token in zip(NAMES, ("<s>", "</s>", "<pad>", "<unk>"), strict=True)}
    return Parts(BytePairs(ranks, [config["pattern"]]), {t: Added(t, i) for t, i in tokens.items()}, names)


def read_hugging_face(content: dict, found: dict[str, bytes]) -> Parts:
    model = content["model"]
    steps = json.dumps([content["pre_tokenizer"], content["decoder"]])
    if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in steps:
        raise UserError(
            "this tokenizer.json is no byte-level BPE, the kind that is read; put the model's SentencePiece file, "
            "tokenizer.model, beside it"
        )
    tokens = content.get("added_tokens") or []
    added = {t["content"]: Added(t["content"], t["id"], **{name: t[name] for name in FLAGS}) for t in tokens}
    ends = "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>"
    starts = "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<s>"
    named = {"eos": ends, "bos": starts}  # until a configuration says otherwise
    names = {name: next((added[t].id for t in known if t in added), None) for name, known in named.items()}
    return Parts(hugging_face(content, added), added, names)


def read_gpt2(vocab: dict, found: dict[str, bytes]) -> Parts:
    if "merges.txt" not in found:
        raise UserError("vocab.json needs merges.txt beside it")
    lines = found["merges.txt"].decode().split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    end = "<|endoftext|>"
    added = {end: Added(end, vocab[end])} if end in vocab else {}
    i = vocab.get(end)
    return Parts(BytePairs(merge_ranks(vocab, merges), [GPT2]), added, {"bos": i, "eos": i, "unk": i})
