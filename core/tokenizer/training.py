"""Train a SentencePiece BPE, as Yi's was (arXiv 2403.04652, section 2.1)."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from tritium.core.config import UserError
from tritium.core.tokenizer.files import read_parts
from tritium.core.tokenizer.tokenizer import END_THINK, IM_END, IM_START, THINK, Tokenizer, checked

SPECIAL = (IM_START, IM_END, THINK, END_THINK)

DEFAULT_SIZE, SPARE = 8192, 64
_MAX_SENTENCE = 1 << 16  # characters; longer lines are cut for training, as SentencePiece would skip them


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int | None,
    folder: str | os.PathLike,
    special: Sequence[str] = SPECIAL,
    threads: int = 2,
) -> Tokenizer:
    """Train a byte-pair encoding on `texts`, save it in `folder` and return it; the same input, the same pieces.

    Digits and newlines stand alone, every byte has a token, nothing is normalised. Of `special`, those
    written <|…|> become control tokens and the rest ordinary pieces that are never split. At most half of the
    vocabulary goes to single characters; rarer ones are spelled in bytes. A `vocab_size` of None is DEFAULT_SIZE, or
    less for a text of less than SPARE characters for each token: rare tokens are not learned.

    Raises: UserError if there is no text, or if it supports only a smaller, or needs a larger, vocabulary.
    """
    lines = [part for text in texts for part in _training_lines(text)]
    if not lines:
        raise UserError("a tokenizer cannot be trained on no text at all")
    least, spare = -(-(320 + len(special)) // 64) * 64, sum(map(len, lines)) // SPARE // 64 * 64
    size = vocab_size or max(least, min(DEFAULT_SIZE, spare))  # a multiple of 64: matmuls and meshes want one
    while True:
        try:
            model = _trained(lines, size, special, threads)
            break
        except RuntimeError as error:
            found = re.search(r"Vocabulary size too high.*<= (\d+)", str(error))
            largest = int(found[1]) if found else 0
            if vocab_size is not None or not largest:
                raise _training_error(str(error), size, largest) from error
            size = largest - largest % 64 if largest >= 512 else largest
    Tokenizer(read_parts("tokenizer.model", {"tokenizer.model": model})).save(folder)
    return Tokenizer.load(folder)


def _trained(lines: Sequence[str], size: int, special: Sequence[str], threads: int) -> bytes:
    """The serialized model. Raises: RuntimeError, as SentencePiece; UserError for a size that can't be."""
    control = [piece for piece in special if re.fullmatch(r"<\|.*\|>", piece)]
    fixed = 4 + len(special) + 256  # <unk> <s> </s> <pad>, the special pieces, the bytes
    if size <= fixed:
        raise UserError(f"a vocabulary of {size} is too small: bytes and special tokens alone are {fixed}")
    lossless = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    lossless |= {"character_coverage": 1.0, "byte_fallback": True}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=_without_rare_characters(lines, limit=max(1, (size - fixed) // 2)),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        split_digits=True,
        allow_whitespace_only_pieces=True,  # runs of spaces, for code
        max_sentence_length=4 * _MAX_SENTENCE,
        control_symbols=control,
        user_defined_symbols=[piece for piece in special if piece not in control],
        num_threads=threads,
        minloglevel=2,
        **lossless,
        **ids,
    )
    return model.getvalue()


def _training_lines(text: str) -> Iterator[str]:
    """The lines that hold something, cut where they are longer than SentencePiece takes.

    Without their ends, so that a newline stays a token of its own (its byte): no piece crosses a line, and a chat's
    header never merges with its content.
    """
    checked(text)
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


def _training_error(message: str, vocab_size: int, largest: int) -> UserError:
    """SentencePiece's complaint as a sentence."""
    if largest:
        return UserError(
            f"the text is too small for a vocabulary of {vocab_size}: the largest possible is {largest}; "
            f"give more text, or a smaller vocabulary: --vocab_size={largest}"
        )
    return UserError(f"SentencePiece cannot train a vocabulary of {vocab_size} on this text: {message}")
