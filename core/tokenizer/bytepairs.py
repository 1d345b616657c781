"""Byte-level BPE: text → normaliser → pieces by regular expressions → the bytes of each piece, merged by rank.

The merges are tiktoken's Rust core. Where one expression splits the text (GPT-2, Llama 3, Qwen, tekken), tiktoken does
that too; a chain of them, as Hugging Face's `tokenizer.json` may hold (DeepSeek, Falcon, StarCoder), is walked here.
"""

import tomllib
import unicodedata
from collections.abc import Callable, Container, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import regex
import tiktoken

from tritium.core.config import UserError

KNOWN = tomllib.loads(Path(__file__).with_name("known.toml").read_text("utf-8"))
# Blanks in a row that are cut: of a million tiktoken's regular expressions make a Rust panic. Looked for from a run's
# first blank only: from each of them takes time that grows with the square.
RUN, ENDLESS = 131072, regex.compile(r"(?<!\s)(\s{131072,}+)")
Split = Callable[[str], list[str]]


def pattern(name: str) -> str:
    """One of the well-known pre-tokenisers."""
    return "|".join(KNOWN["patterns"][name])


GPT2 = pattern("gpt2")


def _cut(text: str) -> list[str]:
    """The text in parts: what is between endless runs of blanks, and these, RUN at a time."""
    parts = enumerate(ENDLESS.split(text))
    return [part[j : j + RUN] for i, part in parts for j in range(0, len(part), RUN if i % 2 else len(part) or 1)]


class BytePairs:
    """An engine of `Tokenizer`: ordinary text to ids.

    `ranks` are tokens in the order of their merges (single bytes first), each with its id; tokens whose id is None are
    dropped from the result, as Hugging Face drops bytes that a vocabulary lacks.
    """

    adds_space = restarts = False
    guarded: frozenset[str] = frozenset()

    def __init__(
        self,
        ranks: dict[bytes, int | None],
        splits: Sequence["str | Split"],
        normalise: Sequence[Callable[[str], str]] = (),
    ):
        ids = list(ranks.values())
        known = [i for i in ids if i is not None]
        self._ids = None if len(known) == len(ids) and known == sorted(known) else ids  # None: rank = id
        order = ranks if self._ids is None else {token: rank for rank, token in enumerate(ranks)}
        single = splits[0] if len(splits) == 1 and isinstance(splits[0], str) else None
        self._bpe = tiktoken.Encoding("pieces", pat_str=single or r"\S+|\s+", mergeable_ranks=order, special_tokens={})
        self._whole, self._normalise, self._cache = single is not None, normalise, {}
        self._splits = [isolated(split) if isinstance(split, str) else split for split in splits]
        self.surface = {i: token for token, i in ranks.items() if i is not None}

    def piece_id(self, piece: str) -> int | None:
        """The id of the token that is this text. Only added tokens are looked up by name otherwise."""
        return self._by_bytes.get(piece.encode())

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {token: i for i, token in self.surface.items()}

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of ordinary text. `first` makes no difference to a byte-level vocabulary."""
        text = reduce(lambda value, step: step(value), self._normalise, text)
        encode = self._bpe.encode_ordinary if self._whole else self._encode_chain
        ids = [i for part in _cut(text) for i in encode(part)] if len(text) > RUN else encode(text)
        return ids if self._ids is None else [i for i in map(self._ids.__getitem__, ids) if i is not None]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        endless = any(len(text) > RUN and ENDLESS.search(text) for text in texts)
        if not self._whole or self._normalise or self._ids is not None or endless:
            return [self.encode(text) for text in texts]
        return self._bpe.encode_ordinary_batch(list(texts), num_threads=threads)

    def _encode_chain(self, text: str) -> list[int]:
        pieces, ids, cache = [text], [], self._cache
        for split in self._splits:
            pieces = [part for piece in pieces for part in split(piece)]
        if len(cache) > 1 << 18:
            cache.clear()
        for piece in pieces:
            found = cache.get(piece)
            if found is None:
                found = cache[piece] = self._bpe._encode_single_piece(piece)
            ids += found
        return ids


def isolated(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Split:
    """A pre-tokeniser that cuts at each match of `pattern`: Hugging Face's Split, with its five behaviours."""
    compiled = regex.compile(pattern)
    if (behavior, invert, compiled.groups) == ("Isolated", False, 0):
        cut = regex.compile(f"({pattern})").split
        return lambda text: list(filter(None, cut(text)))

    def split(text: str) -> list[str]:
        spans, end = [], 0  # (start, end, whether it is a delimiter)
        for match in compiled.finditer(text):
            spans += [(end, match.start(), invert), (match.start(), match.end(), not invert)]
            end = match.end()
        spans = [span for span in [*spans, (end, len(text), invert)] if span[0] < span[1]]
        if behavior == "Isolated":
            return [text[a:b] for a, b, _ in spans]
        if behavior == "Removed":
            return [text[a:b] for a, b, delimiter in spans if not delimiter]
        return [text[a:b] for a, b in _merged(spans, behavior)]

    return split


def _merged(spans: list[tuple[int, int, bool]], behavior: str) -> list[tuple[int, int]]:
    """Delimiters joined to each other (Contiguous), or to the span before or after them."""
    merged, previous = [], None
    for start, end, delimiter in spans:
        joins = {
            "Contiguous": previous == delimiter,
            "MergedWithPrevious": delimiter and previous is False,
            "MergedWithNext": not delimiter and previous is True,
        }
        if behavior not in joins:
            raise UserError(f"tokenizer.json: a Split with the unknown behavior {behavior!r}")
        if joins[behavior]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
        previous = delimiter
    return merged


def pre_tokenizers(spec: dict | None) -> list["str | Split"]:
    """The splits of a tokenizer.json's `pre_tokenizer`. Raises: UserError for a kind that is not known here."""
    match spec or {}:
        case {"type": "Sequence", "pretokenizers": parts}:
            return [split for part in parts for split in pre_tokenizers(part)]
        case {"type": "Split", "pattern": pattern, "behavior": behavior}:
            expression = pattern.get("Regex") or regex.escape(pattern["String"])
            plain = behavior == "Isolated" and not spec.get("invert")
            return [expression if plain else isolated(expression, behavior, bool(spec.get("invert")))]
        case {"type": "ByteLevel"}:
            prefix = [lambda text: [text if text.startswith(" ") else f" {text}"]] if spec["add_prefix_space"] else []
            return prefix + ([GPT2] if spec.get("use_regex", True) else [])
        case {"type": "Digits"}:
            return [r"\p{N}" if spec["individual_digits"] else r"\p{N}+"]
        case {"type": "Punctuation"}:
            return [isolated(r"\p{P}|[$+<=>^`|~]", spec.get("behavior", "Isolated"))]
        case other:
            raise UserError(f"tokenizer.json: the pre-tokenizer {other.get('type')!r} is not supported")


def normalisers(spec: dict | None) -> list[Callable[[str], str]]:
    """The steps of a tokenizer.json's `normalizer`. Raises: UserError for a kind that is not known here."""
    match spec:
        case None:
            return []
        case {"type": "Sequence", "normalizers": parts}:
            return [step for part in parts for step in normalisers(part)]
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return [lambda text: unicodedata.normalize(form, text)]
        case {"type": "Lowercase"}:
            return [str.lower]
        case {"type": "StripAccents"}:
            return [lambda text: "".join(c for c in text if not unicodedata.category(c).startswith("M"))]
        case {"type": "Prepend", "prepend": prefix}:
            return [lambda text: prefix + text if text else text]
        case {"type": "Replace", "pattern": pattern, "content": content}:
            compiled = regex.compile(pattern.get("Regex") or regex.escape(pattern["String"]))
            return [lambda text: compiled.sub(lambda _: content, text)]
        case {"type": "Strip"}:
            left, right = spec.get("strip_left"), spec.get("strip_right")
            left, right = (str.lstrip if left else str), (str.rstrip if right else str)
            return [lambda text: right(left(text))]
        case other:
            raise UserError(f"tokenizer.json: the normalizer {other.get('type')!r} is not supported")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character → byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def id_ranks(vocab: dict[str, int], added: Container[str]) -> dict[bytes, int | None]:
    """Tokens but the added ones in the order of their ids: where `ignore_merges` says that a whole piece is a token
    whatever the merges, as in files that were made of tiktoken's ranks (Llama 3, Mistral Nemo)."""
    alphabet = byte_alphabet()
    tokens = sorted((i, token) for token, i in vocab.items() if token not in added)
    ranks: dict[bytes, int | None] = {bytes(map(alphabet.__getitem__, token)): i for i, token in tokens}
    return ranks | {bytes([byte]): None for byte in range(256) if bytes([byte]) not in ranks}


def merge_ranks(vocab: dict[str, int], merges: Sequence[Any]) -> dict[bytes, int | None]:
    """Tokens in the order of the merges, with their ids: what `BytePairs` takes. Merges are "a b" or ["a", "b"].

    tiktoken joins whatever pair makes a token, Hugging Face only the pairs that are listed: for a vocabulary that was
    trained, the same, since no other pair of its tokens comes to lie side by side.
    """
    alphabet, ranks = byte_alphabet(), {}
    for character, byte in sorted(alphabet.items(), key=lambda item: vocab.get(item[0], 1 << 40)):
        ranks[bytes([byte])] = vocab.get(character)
    for merge in merges:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(bytes(map(alphabet.__getitem__, token)), vocab[token])
    return ranks


def hugging_face(content: dict, added: Container[str]) -> BytePairs:
    """The engine of a tokenizer.json. Raises: UserError for a kind of step that is not known here."""
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    ranks = id_ranks(vocab, added) if content["model"].get("ignore_merges") else merge_ranks(vocab, merges)
    return BytePairs(ranks, pre_tokenizers(content["pre_tokenizer"]), normalisers(content["normalizer"]))
