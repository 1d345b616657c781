"""Text to token ids and back.

SentencePiece models are read and trained here. Encoding is the library's; decoding is ours: a token is a string of
bytes, and text is the UTF-8 of all of them, so `decode`, the streaming decoder and bytes that are no valid UTF-8
follow one rule (each broken sequence shows as U+FFFD).

What SentencePiece cannot keep: U+2581 (▁), its own sign for the space, comes back as a space. A model that
normalises (T5's NFKC) or has no byte fallback loses more; the tokenizers trained here lose nothing else.
"""

import codecs
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from tritium.core.config import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"

# ChatML for Hugging Face's apply_chat_template; core/chat.py renders the same text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SPACE = "\u2581"
_MAX_SENTENCE = 1 << 16  # characters; longer lines are cut for training, as SentencePiece would skip them


class Tokenizer:
    """A SentencePiece tokenizer. Text never becomes a control token: those have ids, and are placed by id."""

    def __init__(self, model: bytes):
        """Raises: UserError if `model` is not a serialized SentencePiece model."""
        self._model = model
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError("this is not a SentencePiece model") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a folder that holds `tokenizer.model`, or a SentencePiece .model file.

        Raises: UserError if there is none, or it is of a kind that is not read today.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.model"
            if not file.exists():
                found = ", ".join(sorted(item.name for item in Path(path).iterdir())) or "nothing"
                raise UserError(f"{path}: no tokenizer.model here (only SentencePiece is read today); found {found}")
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file}: cannot read the tokenizer ({error.strerror})") from None
        except UserError:
            raise UserError(f"{file}: not a SentencePiece model, the only tokenizer format read today") from None

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.model` and the two JSON files with which transformers' LlamaTokenizer reads it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.model").write_bytes(self._model)
        special = self._special_tokens_map()
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": self._adds_space,
            "clean_up_tokenization_spaces": False,
            "spaces_between_special_tokens": False,
            **special,
            "added_tokens_decoder": self._added_tokens(),
        }
        if self.special_id(IM_START) is not None:
            config["chat_template"] = CHAT_TEMPLATE
        _write_json(target / "tokenizer_config.json", config)
        _write_json(target / "special_tokens_map.json", special)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, after the BOS id if `bos` and before the EOS id if `eos`.

        Raises: UserError for a lone surrogate; ValueError if the tokenizer lacks the BOS or EOS that is asked for.
        """
        ids = self._sp.EncodeAsIds(_utf8(text))
        if bos:
            ids.insert(0, self._needed("BOS", self.bos_id))
        if eos:
            ids.append(self._needed("EOS", self.eos_id))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores that the process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self._sp.Encode([_utf8(text) for text in texts], out_type=int, num_threads=cores)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of `ids`, without control tokens unless `keep_special`.

        Raises: ValueError for an id outside the vocabulary.
        """
        decoder = self.incremental(keep_special)
        return "".join([decoder.push(i) for i in ids]) + decoder.finish()

    def incremental(self, keep_special: bool = False) -> "StreamDecoder":
        """A decoder that takes one id at a time; what it emits, joined, is what `decode` gives."""
        return StreamDecoder(self._shown_bytes if keep_special else self._bytes, strip=self._adds_space)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model: the same for the same pieces, scores and rules."""
        return hashlib.sha256(self._model).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self._sp.vocab_size()

    @property
    def bos_id(self) -> int | None:
        return _id_or_none(self._sp.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _id_or_none(self._sp.eos_id())

    @property
    def pad_id(self) -> int | None:
        return _id_or_none(self._sp.pad_id())

    @property
    def unk_id(self) -> int | None:
        return _id_or_none(self._sp.unk_id())

    def special_id(self, piece: str) -> int | None:
        """The id of a piece such as <|im_end|>, None where the vocabulary has no such piece."""
        i = self._sp.piece_to_id(piece)
        return i if self._sp.id_to_piece(i) == piece else None

    def piece(self, id: int) -> str:
        """The piece as the vocabulary writes it: ▁ for a space, <0x0A> for a byte."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._sp.id_to_piece(id)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the model puts a space before the text, which decoding takes away again."""
        return self._sp.EncodeAsPieces("a")[0].startswith(_SPACE)

    @cached_property
    def _bytes(self) -> list[bytes]:  # [V]
        return [b"" if self._sp.is_control(i) else shown for i, shown in enumerate(self._shown_bytes)]

    @cached_property
    def _shown_bytes(self) -> list[bytes]:  # [V]
        pieces = self._sp.id_to_piece(list(range(self.vocab_size)))
        surface = [piece.replace(_SPACE, " ").encode() for piece in pieces]
        for i, piece in enumerate(pieces):
            if self._sp.is_byte(i):
                surface[i] = bytes([int(piece[1:-1], 16)])
            elif self._sp.is_unknown(i):
                surface[i] = " \u2047 ".encode()  # as SentencePiece shows it
        return surface

    def _needed(self, name: str, id: int | None) -> int:
        if id is None:
            raise ValueError(f"this tokenizer has no {name} token")
        return id

    def _special_tokens_map(self) -> dict[str, str | list[str]]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        named = {name: self.piece(i) for name, i in ids.items() if i is not None}
        return named | {"additional_special_tokens": [p for p in (IM_START, IM_END) if self.special_id(p) is not None]}

    def _added_tokens(self) -> dict[str, dict]:
        """What transformers must never split: control tokens (special), and the tags of reasoning (ordinary text)."""
        tags = {self.special_id(THINK), self.special_id(END_THINK)}
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        return {
            str(i): {"content": self.piece(i), **flags, "special": i not in tags}
            for i in range(self.vocab_size)
            if i in tags or self._sp.is_control(i) or self._sp.is_unknown(i)
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


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | os.PathLike,
    special: Sequence[str] = (IM_START, IM_END, THINK, END_THINK),
    threads: int = 2,
) -> Tokenizer:
    """Train a byte-pair encoding on `texts`, save it in `folder` and return it; the same input, the same pieces.

    Digits and newlines stand alone, every byte has a token, nothing is normalised. Of `special`, those
    written <|…|> become control tokens and the rest ordinary pieces that are never split. At most half of the
    vocabulary goes to single characters; rarer ones are spelled in bytes.

    Raises: UserError if there is no text, or if it supports only a smaller, or needs a larger, vocabulary.
    """
    lines = [part for text in texts for part in _training_lines(text)]
    if not lines:
        raise UserError("a tokenizer cannot be trained on no text at all")
    control = [piece for piece in special if re.fullmatch(r"<\|.*\|>", piece)]
    ordinary = [piece for piece in special if piece not in control]
    fixed = 4 + len(special) + 256  # <unk> <s> </s> <pad>, the special pieces, the bytes
    if vocab_size <= fixed:
        raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone are {fixed}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_without_rare_characters(lines, limit=max(1, (vocab_size - fixed) // 2)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # runs of spaces, for code
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            max_sentence_length=4 * _MAX_SENTENCE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=control,
            user_defined_symbols=ordinary,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(folder)
    return tokenizer


def _training_lines(text: str) -> Iterator[str]:
    """The lines that hold something, cut where they are longer than SentencePiece takes.

    Without their ends, so that a newline stays a token of its own (its byte): no piece crosses a line, and a chat's
    header never merges with its content.
    """
    _utf8(text)
    for line in text.split("\n"):
        for start in range(0, len(line), _MAX_SENTENCE):
            yield line[start : start + _MAX_SENTENCE]


def _without_rare_characters(lines: Sequence[str], limit: int) -> Iterator[str]:
    """The lines, split at all characters but the most common ones that make up 99.95 % of the text, at most `limit`.

    SentencePiece's own character_coverage does the same, but refuses less than 98 %, which a small vocabulary needs
    for Chinese or Japanese.
    """
    counts = Counter()
    for line in lines:
        counts.update(line)
    kept, covered = set(), 0
    for character, count in counts.most_common(limit):
        if covered >= 0.9995 * counts.total():
            break
        kept.add(character)
        covered += count
    rare = "".join(counts.keys() - kept)
    at_rare = re.compile(f"[{re.escape(rare)}]+" if rare else "(?!)")  # (?!) is found nowhere
    return (part for line in lines for part in at_rare.split(line) if part)


def _training_error(message: str, vocab_size: int) -> UserError:
    """SentencePiece's complaint as a sentence."""
    if limit := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return UserError(
            f"the text is too small for a vocabulary of {vocab_size}: the largest possible is {limit[1]}; "
            "give more text or a smaller vocabulary"
        )
    return UserError(f"SentencePiece cannot train a vocabulary of {vocab_size} on this text: {message}")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; read the file as UTF-8, or drop that character"
        ) from None


def _id_or_none(id: int) -> int | None:
    return id if id >= 0 else None  # SentencePiece writes -1 for a token that the model lacks


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
