"""SentencePiece as an engine of `Tokenizer`: the library encodes; a piece's bytes are ours."""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import sentencepiece

from tritium.core.config import UserError

_SPACE = "\u2581"
# Fields of a serialized ModelProto that stand later win: normalizer_spec (3) { add_dummy_prefix (3): false }.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class Pieces:
    """SentencePiece BPE or unigram. Raises: UserError if `model` is not a serialized SentencePiece model."""

    def __init__(self, model: bytes):
        self.model = model
        self._sp = _load(model)
        self.guarded: set[str] = set()
        self.restarts = False  # whether what follows an added token has the model's own space, as the first text has

    @cached_property
    def _continued(self) -> sentencepiece.SentencePieceProcessor:
        """The same, without a space before the text: for what follows other tokens."""
        return _load(self.model + _NO_PREFIX) if self.adds_space else self._sp

    def guard(self, piece: str) -> None:
        """From now on, ordinary text that holds this piece, which the model would never split, is cut within it: so it
        is spelled. (Gemma's <start_of_turn>: what its configuration calls special, its model takes for text.)"""
        self.guarded.add(piece)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of ordinary text, which the model's own space precedes where it comes `first`."""
        places = [re.finditer(re.escape(piece), text) for piece in self.guarded if piece in text]
        cuts = sorted({found.start() + 1 for matches in places for found in matches})
        ids = []
        for start, end in pairwise([0, *cuts, len(text)]):
            ids += (self._sp if first and not start else self._continued).EncodeAsIds(text[start:end])
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        if any(piece in text for piece in self.guarded for text in texts):
            return [self.encode(text) for text in texts]
        return self._sp.Encode(list(texts), out_type=int, num_threads=threads)

    def piece_id(self, piece: str) -> int | None:
        i = self._sp.piece_to_id(piece)
        return i if self._sp.id_to_piece(i) == piece else None

    @cached_property
    def adds_space(self) -> bool:
        """Whether the model puts a space before the text, which decoding takes away again."""
        return self._sp.EncodeAsPieces("a")[0].startswith(_SPACE)

    @cached_property
    def pieces(self) -> list[str]:  # [V]
        return self._sp.id_to_piece(list(range(self._sp.vocab_size())))

    @cached_property
    def scores(self) -> list[float]:  # [V]: of two merges, the one with the higher comes first
        return [self._sp.get_score(i) for i in range(len(self.pieces))]

    def matches(self, id: int) -> bool:
        """Whether ordinary text becomes this piece: no control or unknown token, and no byte."""
        return not (self._sp.is_control(id) or self._sp.is_unknown(id) or self._sp.is_byte(id))

    def fixed(self, id: int) -> bool:
        """Whether it is no ordinary piece: a control or unknown token, a byte, or one that is never split."""
        return not self.matches(id) or self.scores[id] == 0.0

    @cached_property
    def surface(self) -> dict[int, bytes]:  # [V]
        surface = {i: piece.replace(_SPACE, " ").encode() for i, piece in enumerate(self.pieces)}
        for i, piece in enumerate(self.pieces):
            if self._sp.is_byte(i):
                surface[i] = bytes([int(piece[1:-1], 16)])
            elif self._sp.is_unknown(i):
                surface[i] = " \u2047 ".encode()  # as SentencePiece shows it
        return surface

    @cached_property
    def controls(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces) if self._sp.is_control(i)}

    @cached_property
    def names(self) -> dict[str, int | None]:
        sp = self._sp
        ids = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id(), "unk": sp.unk_id()}
        return {name: i if i >= 0 else None for name, i in ids.items()}  # −1: the model lacks it


def _load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise UserError("this is not a SentencePiece model") from None
    return processor
