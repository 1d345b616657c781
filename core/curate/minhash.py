"""Hashes of words, shingles and documents, vectorised over megabytes of text; groups of equal keys, on the disk.

    bytes ─ prefix sums of b_j·Bʲ mod 2⁶⁴ ─> a hash per word ─ n in a row ─> shingles ─ min of P permutations ─> [D, P]

A word's hash is (prefix[end] − prefix[start]) · B^(−start): two subtractions instead of a loop over its characters.
Words are runs of letters and digits (ASCII case folded); each character of a script without spaces is one, and each
sign of calculation, so that x + 1 and x - 1 are two.
MinHash: Broder 1997. Permutations of 32-bit shingles are a·x + b mod 2³² with odd a (multiply-shift, Dietzfelbinger et
al. 1997), of which a minimum sees the high bits, those that all bits of x reach.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

BASE = 0x9E3779B97F4A7C15 | 1
MIX = np.uint64(0xFF51AFD7ED558CCD)
BLOCK = 1 << 20  # bytes of text that are hashed at once
SIGNS = np.frombuffer(b"+-*/=<>^%", np.uint8)
LATIN = np.array([0xA0, 0xA1, 0xAB, 0xAD, 0xB7, 0xBB, 0xBF], np.uint8)  # no-break space, ¡ « soft hyphen · » ¿
EMPTY = np.uint32(0xFFFFFFFF)  # in the signature of a document without words


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """[256] each: the byte that counts for a byte (0: parts words), and whether it begins a word by itself."""
    value, alone = np.arange(256, dtype=np.uint8), np.zeros(256, bool)
    value[:128] = [ord(chr(byte).lower()) if chr(byte).isalnum() else 0 for byte in range(128)]
    alone[0xE3:0xEE] = alone[0xF0:0xF5] = True  # lead bytes of U+3000 … U+DFFF and of what is beyond U+FFFF
    return value, alone


@cache
def powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """B⁰ … B^(size−1) mod 2⁶⁴, and their inverses."""
    result = []
    for base in (BASE, pow(BASE, -1, 2**64)):
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        result.append(np.cumprod(factors, dtype=np.uint64))
    return tuple(result)


def mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of x (MurmurHash3's finaliser, without its last round)."""
    x = (x ^ (x >> np.uint64(33))) * MIX
    return x ^ (x >> np.uint64(29))


def word_hashes(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hash uint64 [W], text of each word [W], first byte in its text [W], byte after its last [W])."""
    value, alone = tables()
    data = np.frombuffer(b"\0".join([*texts, b""]), np.uint8)
    offsets = np.cumsum([0, *(len(t) + 1 for t in texts)])
    letters = value[data]
    letters[marks(data)] = 0
    signs = calculations(data)
    letters[signs] = data[signs]
    inside = letters > 0
    single = alone[data] & inside
    before = np.concatenate([[False], inside[:-1]])
    begins = inside & ~before
    if single.any():  # what stands alone begins a word, and so does what follows it
        leads = np.flatnonzero(inside & ((data & 0xC0) != 0x80))
        begins[leads] |= single[leads] | np.concatenate([[False], single[leads[:-1]]])
    begins[signs] = True
    begins[signs + 1] |= inside[signs + 1]
    starts = np.flatnonzero(begins)
    stops = np.flatnonzero(inside & ~np.concatenate([inside[1:], [False]])) + 1  # of runs
    run_end = stops[np.searchsorted(stops, starts, side="right")] if len(starts) else starts
    ends = np.minimum(np.append(starts[1:], len(data))[: len(starts)], run_end)
    up, down = powers(1 << max(len(data) - 1, 1).bit_length())
    prefix = np.zeros(len(data) + 1, np.uint64)  # not concatenate: beside an int64, uint64 becomes float64
    np.cumsum(letters * up[: len(data)], out=prefix[1:])
    hashes = mixed((prefix[ends] - prefix[starts]) * down[starts])
    owners = np.searchsorted(offsets, starts, side="right") - 1
    return hashes, owners, starts - offsets[owners], ends - offsets[owners]


def marks(data: np.ndarray) -> np.ndarray:
    """The places of the bytes of punctuation outside ASCII, which parts words as ASCII's does: quotes, dashes and
    spaces of print (U+2000 … U+203F), of Latin-1, and of Chinese and Japanese (U+3000 … U+303F)."""
    if data.max(initial=0) < 0x80:
        return np.zeros(0, np.int64)
    latin = np.flatnonzero((data[:-1] == 0xC2) & np.isin(data[1:], LATIN))
    wide = np.flatnonzero(((data[:-1] == 0xE2) | (data[:-1] == 0xE3)) & (data[1:] == 0x80))
    return np.concatenate([latin, latin + 1, wide, wide + 1, wide + 2])


def calculations(data: np.ndarray) -> np.ndarray:
    """The places of signs that calculate, and are no hyphen, bullet or emphasis: before a digit, or between spaces."""
    places = np.flatnonzero(np.isin(data, SIGNS))
    before, after, then = (data[np.clip(places + i, 0, len(data) - 1)] for i in (-1, 1, 2))
    digit, space = (after >= 48) & (after < 58), after == 32
    return places[digit | space & ((then >= 48) & (then < 58) | (before == 32))]


def grams(hashes: np.ndarray, owners: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash uint64, its first word) of each n words in a row of one text."""
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * np.uint64(BASE) + hashes[i : i + count]
    whole = np.flatnonzero(owners[:count] == owners[n - 1 :]) if count else np.zeros(0, np.int64)
    return mixed(total[whole]), whole


def shingles(texts: Sequence[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash uint64, text) of the n-grams of words of each text; one of fewer words is one shingle, of all of them."""
    hashes, owners, _, _ = word_hashes(texts)
    found, first = grams(hashes, owners, n)
    counts = np.bincount(owners, minlength=len(texts))
    short = np.flatnonzero((counts > 0) & (counts < n))
    begin = np.cumsum(counts) - counts
    wholes = [grams(hashes[begin[i] : begin[i] + counts[i]], owners[: counts[i]] * 0, counts[i])[0] for i in short]
    found, at = np.concatenate([found, *wholes]), np.concatenate([owners[first], short])
    order = np.argsort(at, kind="stable")
    return found[order], at[order]


def signatures(texts: Sequence[bytes], n: int, permutations: int) -> np.ndarray:
    """MinHash signatures of word n-grams, [D, P] uint32: the share of equal entries estimates Jaccard similarity."""
    found, at = shingles(texts, n)
    result = np.full((len(texts), permutations), EMPTY, np.uint32)
    if not len(found):
        return result
    x = (found >> np.uint64(32)).astype(np.uint32)
    edges = np.flatnonzero(np.diff(at, prepend=-1))
    rng = np.random.default_rng([1997, 0])
    factors = rng.integers(0, 1 << 31, permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    shifts = rng.integers(0, 1 << 32, permutations, np.uint32)
    columns, buffer = np.empty((permutations, len(edges)), np.uint32), np.empty_like(x)
    for k in range(permutations):
        np.multiply(x, factors[k], out=buffer)
        np.add(buffer, shifts[k], out=buffer)
        np.minimum.reduceat(buffer, edges, out=columns[k])
    result[at[edges]] = columns.T
    return result


def banding(threshold: float, permutations: int, recall: float = 0.97) -> tuple[int, int]:
    """(bands, rows of each): the most selective ones by which a pair of this similarity still shares a band with
    probability `recall`: 1 − (1 − tʳ)ᵇ (Leskovec et al., Mining of Massive Datasets, section 3.4)."""
    fitting = [
        (rows, permutations // rows)
        for rows in range(1, permutations + 1)
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= recall
    ]
    rows, bands = max(fitting, default=(1, permutations))
    return bands, rows


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """A key for each band of each signature, [D, bands] uint64; different bands don't meet."""
    parts = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    keys = np.arange(bands, dtype=np.uint64)[None].repeat(len(signature), 0)
    for i in range(rows):
        keys = mixed(keys * np.uint64(BASE) + parts[:, :, i])
    return keys


class Spill:
    """(key, value) pairs in files by the key's high bits, so that only one file has to be in memory at a time.

    `expected` pairs in all; a file's part of them takes about `memory` bytes when it is sorted.
    """

    def __init__(self, folder: Path, expected: int, memory: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.bits = max(0, min(8, (expected * 48 // max(memory, 1)).bit_length()))
        self.files = [open(folder / f"{i:03d}.spill", "w+b") for i in range(1 << self.bits)]  # noqa: SIM115

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        pairs = np.stack([keys.astype(np.uint64), values.astype(np.uint64)], 1)  # [m, 2]
        if not self.bits:
            pairs.tofile(self.files[0])
            return
        place = (pairs[:, 0] >> np.uint64(64 - self.bits)).astype(np.int64)
        pairs = pairs[np.argsort(place, kind="stable")]
        for i, part in enumerate(np.split(pairs, np.cumsum(np.bincount(place, minlength=len(self.files)))[:-1])):
            part.tofile(self.files[i])

    def repeated(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For a file at a time (values, run): the values of keys that come more than once, sorted by key and value;
        `run` numbers the keys. Deletes the files."""
        for file in self.files:
            file.seek(0)
            pairs = np.fromfile(file, np.uint64).reshape(-1, 2)
            file.close()
            Path(file.name).unlink()
            pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
            new = np.concatenate([[True], pairs[1:, 0] != pairs[:-1, 0]]) if len(pairs) else np.zeros(0, bool)
            run = np.cumsum(new) - 1
            many = np.bincount(run, minlength=1)[run] > 1 if len(run) else new
            yield pairs[many, 1].astype(np.int64), run[many]


def blocks(texts: Iterator[bytes], size: int = BLOCK) -> Iterator[list[bytes]]:
    """Texts in lists of about `size` bytes."""
    held, total = [], 0
    for text in texts:
        held.append(text)
        total += len(text)
        if total >= size:
            yield held
            held, total = [], 0
    if held:
        yield held


def leaders(pairs: np.ndarray, count: int) -> np.ndarray:
    """[count]: the smallest number of the group that pairs [m, 2] join each of `count` to, or its own."""
    leader = np.arange(count)
    while True:
        ends = np.sort(leader[pairs], axis=1)
        if (ends[:, 0] == ends[:, 1]).all():
            return leader
        np.minimum.at(leader, ends[:, 1], ends[:, 0])
        while (leader[leader] != leader).any():
            leader = leader[leader]
