"""Text to token ids and back, whatever file the vocabulary comes in (core/tokenizer/files.py).

Encoding is the libraries' (SentencePiece, tiktoken); decoding is ours: a token is a string of bytes, and text is the
UTF-8 of all of them, so `decode`, the streaming decoder and bytes that are no valid UTF-8 follow one rule (each broken
sequence shows as U+FFFD).

Ordinary text never becomes a control token: neither the special ones, nor markers written <|…|>, which some
vocabularies do not call special. Other added tokens, such as <think>, are ordinary text.

What SentencePiece cannot keep: U+2581 (▁), its own sign for the space, comes back as a space. A model that
normalises (T5's NFKC, Qwen's NFC) or has no byte fallback loses more; the tokenizers trained here lose nothing else.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tritium.core.config import UserError
from tritium.core.tokenizer.files import NAMES, Parts, read
from tritium.core.tokenizer.pieces import Pieces

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"

# ChatML for Hugging Face's apply_chat_template; core/chat renders the same text.
CHAT_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{{{ {begin}'<|im_start|>' + message['role'] + '\n' + message['content'] }}}}"
    "{{{{ ({end} if message['role'] == 'assistant' else '<|im_end|>') + '\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


class Tokenizer:
    """A vocabulary with its rules, and the special tokens placed by id or asked for."""

    def __init__(self, parts: Parts):
        self._parts, self._engine = parts, parts.engine
        special = [token for token in parts.added.values() if token.control]
        self._ordinary = _finder([token for token in parts.added.values() if not token.control])
        self._every = _finder(parts.added.values())
        self._control = {token.id for token in special}
        self.template = parts.config.get("tritium_template", "")
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = map(parts.names.get, NAMES)  # None where there is none
        self.rows = 0  # of its model, which may have more than there are tokens, and draw one: it has no text

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer's folder or file, of any kind that `core/tokenizer/files.py` lists.

        Raises: UserError if there is none, or it is of a kind that is not read.
        """
        return cls(read(Path(path)))

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer's own files, byte for byte; for a bare SentencePiece model, transformers' two as well.

        A chat template that was named for it (`with_template`) is noted in tokenizer_config.json; ChatML, where there
        is no other, also as transformers' Jinja text.
        """
        target, files = Path(folder), dict(self._parts.files)
        target.mkdir(parents=True, exist_ok=True)
        if isinstance(self._engine, Pieces) and "tokenizer_config.json" not in files:
            files |= self._llama_files()
        if self.template != self._parts.config.get("tritium_template", ""):
            config = json.loads(files.get("tokenizer_config.json", b"{}")) | {"tritium_template": self.template}
            own = {} if self.chat_template or self.template != "chatml" else {"chat_template": self._chatml()}
            files["tokenizer_config.json"] = _json(config | own)
        for name, content in files.items():
            (target / name).write_bytes(content)

    def with_template(self, name: str) -> "Tokenizer":
        """The same with another chat template, by its name in `core/chat`."""
        other = Tokenizer(replace(self._parts))
        other.template = name
        return other

    def encode(self, text: str, bos: bool = False, eos: bool = False, *, special: bool = False, first: bool = True):
        """Token ids of `text`, after the BOS id if `bos` and before the EOS id if `eos`.

        With `special`, the text of control tokens becomes them. `first=False` says that the text follows other
        tokens, so that SentencePiece puts no space before it.

        Raises: UserError for a lone surrogate; ValueError if the tokenizer lacks the BOS or EOS that is asked for.
        """
        ids = [self._needed("BOS", self.bos_id)] if bos else []
        for part in self.split(checked(text), special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._engine.encode(part, first)
            first = isinstance(part, int) and self._engine.restarts
        if eos:
            ids.append(self._needed("EOS", self.eos_id))
        return ids

    def begins_after(self, id: int, text: str) -> bool:
        """Whether text after this token begins anew, with SentencePiece's own space: after BOS and EOS, as in the code
        of Llama 2 and Mistral, and after each added token where Hugging Face's tokenizer.json says so."""
        added = self._engine.restarts and any(token.id == id for token in self._parts.added.values())
        return added or id == self.bos_id or (id == self.eos_id and not text[:1].isspace())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores that the process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self._ordinary and any(self._ordinary.search(text) for text in texts):
            return [self.encode(text) for text in texts]
        return self._engine.encode_batch([checked(text) for text in texts], cores)

    def split(self, text: str, special: bool = True) -> Iterator[str | int]:
        """The text, with the ids of added tokens where they stand: the control ones only if `special`."""
        finder = self._every if special else self._ordinary
        end = 0
        for match in finder.finditer(text) if finder else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self._parts.added[match[0] if match[0] in self._parts.added else match[0].strip()].id
            end = match.end()
        if end < len(text):
            yield text[end:]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of `ids`, without control tokens unless `keep_special`.

        Raises: ValueError for an id outside the vocabulary.
        """
        decoder = self.incremental(keep_special)
        return "".join([decoder.push(i) for i in ids]) + decoder.finish()

    def incremental(self, keep_special: bool = False, first: bool = True) -> "StreamDecoder":
        """A decoder that takes one id at a time; what it emits, joined, is what `decode` gives.

        `first=False` says that the ids go on with other text, so that a space that they begin with is the text's.
        """
        shown = self._shown_bytes if keep_special else self._bytes
        return StreamDecoder(shown, strip=first and self._engine.adds_space)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides the ids: the vocabulary's file, added tokens, and those that text never becomes."""
        ordinary = sorted((token.content, token.id) for token in self._parts.added.values() if not token.control)
        digest = hashlib.sha256(repr(ordinary + sorted(self._engine.guarded)).encode())
        for name, content in sorted(self._parts.files.items()):
            if "config" not in name and "template" not in name and "special" not in name:
                digest.update(content)
        return digest.hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(max(self._engine.surface), *(token.id for token in self._parts.added.values()), 0)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's configuration asks for a BOS before every text."""
        return bool(self._parts.config.get("add_bos_token")) and self.bos_id is not None

    @property
    def chat_template(self) -> str:
        """The Jinja text of the model's own chat template; empty where the files hold none."""
        return self._parts.chat_template

    def special_id(self, piece: str) -> int | None:
        """The id of a piece such as <|im_end|>, None where the vocabulary has no such piece."""
        added = self._parts.added.get(piece)
        return added.id if added else self._engine.piece_id(piece)

    def piece(self, id: int) -> str:
        """The piece as the vocabulary writes it: for SentencePiece, ▁ for a space and <0x0A> for a byte."""
        if isinstance(self._engine, Pieces) and 0 <= id < len(self._engine.pieces):
            return self._engine.pieces[id]
        return self.token_bytes(id).decode("utf-8", "backslashreplace")

    def token_bytes(self, id: int) -> bytes:
        """What the token is in a text; of a control token, its name. Raises: ValueError, as `decode`."""
        if not 0 <= id < len(self._shown_bytes):
            raise ValueError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._shown_bytes[id]

    @cached_property
    def _shown_bytes(self) -> list[bytes]:  # [V]
        added = {token.id: token.content.encode() for token in self._parts.added.values()}
        return [added.get(i, self._engine.surface.get(i, b"")) for i in range(max(self.vocab_size, self.rows))]

    @cached_property
    def _bytes(self) -> list[bytes]:  # [V]
        return [b"" if i in self._control else shown for i, shown in enumerate(self._shown_bytes)]

    def _needed(self, name: str, id: int | None) -> int:
        if id is None:
            raise ValueError(f"this tokenizer has no {name} token")
        return id

    def _chatml(self) -> str:
        """As core/chat renders it: without a token for the end of a turn, EOS stands in, and BOS comes first."""
        stand_in = self.special_id(IM_END) is None and self.eos_id is not None
        end = self.piece(self.eos_id) if stand_in else IM_END
        begin = self.piece(self.bos_id) if self.bos_id is not None and (stand_in or self.adds_bos) else ""
        return CHAT_TEMPLATE.format(begin=f"({begin!r} if loop.first else '') + " if begin else "", end=repr(end))

    def _llama_files(self) -> dict[str, bytes]:
        """The JSON files with which transformers' LlamaTokenizer reads a SentencePiece model."""
        named = {f"{name}_token": self.piece(i) for name in NAMES if (i := self._parts.names.get(name)) is not None}
        ends = [piece for piece in (IM_START, IM_END) if self.special_id(piece) is not None]
        named |= {"additional_special_tokens": ends}
        off = ["legacy", "add_bos_token", "add_eos_token", "spaces_between_special_tokens"]
        off.append("clean_up_tokenization_spaces")
        config = {"tokenizer_class": "LlamaTokenizer", **dict.fromkeys(off, False), **named}
        config |= {"add_prefix_space": self._engine.adds_space, "added_tokens_decoder": self._added_tokens()}
        if ends:
            config["chat_template"] = self._chatml()
        return {"tokenizer_config.json": _json(config), "special_tokens_map.json": _json(named)}

    def _added_tokens(self) -> dict[str, dict]:
        """What transformers must never split: control tokens (special), and the tags of reasoning (ordinary text)."""
        tags = {self.special_id(THINK), self.special_id(END_THINK)}
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        return {
            str(i): {"content": self.piece(i), **flags, "special": i not in tags}
            for i in range(self.vocab_size)
            if i in tags or i in self._control or i == self.unk_id
        }


class StreamDecoder:
    """Turns ids into text one by one, holding back a character until all of its bytes are there."""

    def __init__(self, surface: list[bytes], strip: bool):
        self._surface, self._strip = surface, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, perhaps none. Raises: ValueError for an id outside the vocabulary."""
        if not 0 <= id < len(self._surface):
            raise ValueError(f"token id {id} is outside the vocabulary of {len(self._surface)}")
        return self._without_first_space(self._utf8.decode(self._surface[id]))

    def finish(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._without_first_space(self._utf8.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


def checked(text: str) -> str:
    """The text, if it is valid Unicode. Raises: UserError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; read the file as UTF-8, or drop that character"
        ) from None
    return text


def _finder(tokens: Iterable) -> re.Pattern | None:
    """Finds added tokens, of two that begin at a place the longer one."""
    patterns = [token.pattern for token in sorted(tokens, key=lambda token: -len(token.content))]
    return re.compile("|".join(patterns)) if patterns else None


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
