"""Filter: rules on the form of a text, named after the papers that gave them; every threshold is an option.

    gopher   Rae et al., arXiv 2112.11446, appendix A.1.1: length, symbols, bullets, stop words, repetition (table A1)
    c4       Raffel et al., arXiv 1910.10683, section 2.2: sentences, braces, placeholder texts
    yi       Young et al., arXiv 2403.04652, section 2.1: special characters, incomplete lines, short lines

    rules = ["gopher"]                      all rules of a set, with the paper's limits
    limits = { min_words = 10 }             another limit for a rule, or a rule of a set that is not used

Words are what white space parts; in scripts without spaces, characters, and rules on the length of words say nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tritium.core.config import ConfigError, nearest, opt
from tritium.core.curate.step import Document, Drop, Outcome, Step, note, text_of
from tritium.core.rewards.text import UNSPACED, WORD, Words

STOP_WORDS = {form: word for word in ("the", "be", "to", "of", "and", "that", "have", "with")
              for form in (word, word.title(), word.upper())}  # fmt: skip
ENDS = (".", "!", "?", '"', "'", "”", "’", ")", "。", "！", "？", "」", "…", ":", "`")
PLACEHOLDERS = ("lorem ipsum", "javascript is disabled", "enable javascript", "use cookies", "terms of service")
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
SPECIAL = re.compile(r"[^\w\s]|_")
PLAIN_ASCII = bytes(c for c in range(128) if chr(c).isalnum() or chr(c).isspace())
LONGEST_GRAM = 10
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Rule(NamedTuple):
    """`min_…` or `max_…`: what is measured (of `n` words in a row), and the limit that the set's paper gives."""

    set: str
    measure: str
    limit: float
    n: int = 0

    def value(self, measured: "Measures") -> float | None:
        value = getattr(measured, self.measure)
        return value(self.n) if self.n else value


RULES = {
    "min_words": Rule("gopher", "words", 50),
    "max_words": Rule("gopher", "words", 100_000),
    "min_mean_word": Rule("gopher", "mean_word", 3),
    "max_mean_word": Rule("gopher", "mean_word", 10),
    "max_symbol_words": Rule("gopher", "symbol_words", 0.1),
    "max_bullet_lines": Rule("gopher", "bullet_lines", 0.9),
    "max_ellipsis_lines": Rule("gopher", "ellipsis_lines", 0.3),
    "min_alphabetic_words": Rule("gopher", "alphabetic_words", 0.8),
    "min_stop_words": Rule("gopher", "stop_words", 2),
    "max_repeated_lines": Rule("gopher", "repeated_lines", 0.3),
    "max_repeated_line_characters": Rule("gopher", "repeated_line_characters", 0.2),
    "max_repeated_paragraphs": Rule("gopher", "repeated_paragraphs", 0.3),
    "max_repeated_paragraph_characters": Rule("gopher", "repeated_paragraph_characters", 0.2),
    **{f"max_top_{n}gram": Rule("gopher", "top", limit, n) for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{
        f"max_repeated_{n}grams": Rule("gopher", "repeated", limit, n)
        for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
    "min_sentences": Rule("c4", "sentences", 3),
    "max_braces": Rule("c4", "braces", 0),
    "max_placeholders": Rule("c4", "placeholders", 0),
    "max_special_characters": Rule("yi", "special_characters", 0.25),
    "max_incomplete_lines": Rule("yi", "incomplete_lines", 0.5),
    "max_short_lines": Rule("yi", "short_lines", 0.67),
    "min_characters": Rule("yi", "characters", 100),
    "max_characters": Rule("none", "characters", 1e6),
}  # in this order: the cheap ones first


@dataclass
class Filter(Step):
    """Documents whose text breaks a rule are dropped, with the first rule that they break."""

    rules: list[str] = opt(["gopher"], "sets of rules", choices=("gopher", "c4", "yi"))
    limits: dict[str, float] = opt({}, "limits by rule, over the sets' own")
    words: list[str] = opt([], "files of words and phrases that must not occur, one a line")

    def check(self) -> None:
        super().check()
        for name in self.limits:
            if name not in RULES:
                guess = nearest(name, list(RULES))
                raise ConfigError(f"limits: no rule {name!r}; " + (f"did you mean {guess}? " if guess else "")
                                  + f"they are {', '.join(RULES)}")  # fmt: skip

    def files(self) -> list[str]:
        return self.words

    def measures(self) -> Sequence[str]:
        return ("words",)

    @cached_property
    def active(self) -> list[tuple[str, Rule, float, bool]]:
        """(name, rule, limit, whether it is the least) of the rules that are used."""
        used = [(name, rule) for name, rule in RULES.items() if rule.set in self.rules or name in self.limits]
        return [(name, r, self.limits.get(name, r.limit), name.startswith("min")) for name, r in used]

    @cached_property
    def lists(self) -> list[Words]:
        return [Words(file) for file in self.words]

    def one(self, document: Document) -> Outcome:
        text = text_of(document)
        measured = Measures(text)
        document["scores"]["words"] = measured.words
        for name, rule, limit, least in self.active:
            value = rule.value(measured)
            if value is not None and (value < limit if least else value > limit):
                return Drop(name, f"{value:.4g}, limit {limit:g}")
        for words in self.lists:
            if (score := words((), text)).value < 1:
                return Drop(f"a word of {words.file.rpartition('/')[2]}", score.reason)
        note(document, words=measured.words)
        return document


class Measures:
    """What the rules measure of a text, each when it is first asked for. None: the rule says nothing of this text."""

    def __init__(self, text: str):
        self.text, self.characters = text, len(text)
        self.spaced = text.isascii() or not UNSPACED_CHARACTER.search(text)
        self.all_words = text.split() if self.spaced else WORD.findall(text)
        self.words = len(self.all_words)

    @cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def line_repeats(self) -> tuple[float, float]:
        return repeats(self.lines)

    @cached_property
    def paragraph_repeats(self) -> tuple[float, float]:
        return repeats([p for raw in self.text.split("\n\n") if (p := raw.strip())])

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.all_words), np.int64, self.words)

    @cached_property
    def grams(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """n → (a hash of each n words in a row, [words − n + 1] uint64; these in order), for each n of which one comes
        twice: where none does, none of more words does."""
        ids = np.fromiter(map(hash, self.all_words), np.int64, self.words).view(np.uint64) * MULTIPLIER
        found, hashes = {}, ids
        for n in range(2, min(LONGEST_GRAM, self.words) + 1):
            hashes = hashes[:-1] * MULTIPLIER + ids[n - 1 :]
            ordered = np.sort(hashes)
            if not (ordered[1:] == ordered[:-1]).any():
                break
            found[n] = hashes, ordered
        return found

    mean_word = property(lambda self: self.lengths.mean() if self.spaced and self.words else None)
    symbol_words = property(lambda self: max(self.text.count("#"), self.ellipses) / max(self.words, 1))
    ellipses = property(lambda self: self.text.count("...") + self.text.count("…"))
    bullet_lines = property(lambda self: share([line[0] in "•-*‣●" for line in self.lines]))
    ellipsis_lines = property(lambda self: share([line.endswith(("...", "…")) for line in self.lines]))
    incomplete_lines = property(lambda self: share([not line.endswith(ENDS) for line in self.lines]))
    short_lines = property(lambda self: share([len(line) < 30 for line in self.lines]))
    alphabetic_words = property(lambda self: 1 - letterless(self.all_words) / max(self.words, 1))
    stop_words = property(lambda self: len(self.found_stop_words()) if self.spaced else None)
    sentences = property(lambda self: len(SENTENCE_END.findall(self.text)))
    braces = property(lambda self: self.text.count("{"))
    placeholders = property(lambda self: sum(map(self.text.lower().count, PLACEHOLDERS)))
    repeated_lines = property(lambda self: self.line_repeats[0])
    repeated_line_characters = property(lambda self: self.line_repeats[1])
    repeated_paragraphs = property(lambda self: self.paragraph_repeats[0])
    repeated_paragraph_characters = property(lambda self: self.paragraph_repeats[1])

    @property
    def special_characters(self) -> float:
        ascii_only = self.text.isascii()
        special = self.text.encode().translate(None, PLAIN_ASCII) if ascii_only else SPECIAL.findall(self.text)
        return len(special) / max(self.characters, 1)

    def found_stop_words(self) -> set[str]:
        return {STOP_WORDS[word] for word in STOP_WORDS.keys() & self.all_words}

    def top(self, n: int) -> float:
        """The share of the words' characters that the most frequent n-gram makes up; of several, the text's first."""
        if n not in self.grams:
            return 0.0
        hashes, ordered = self.grams[n]
        edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        counts = edges[1:] - edges[:-1]
        best = counts.max()
        at = np.isin(hashes, ordered[edges[:-1][counts == best]]).argmax()  # not by the hashes: a process has its own
        return float(best * self.lengths[at : at + n].sum() / self.lengths.sum())

    def repeated(self, n: int) -> float:
        """The share of the words' characters that are in an n-gram which comes more than once, each counted once."""
        if n not in self.grams:
            return 0.0
        hashes, ordered = self.grams[n]
        again = np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])
        edges = np.zeros(self.words + 1, np.int64)
        edges[: len(again)] += again
        edges[n : n + len(again)] -= again
        return float(self.lengths[edges.cumsum()[:-1] > 0].sum() / self.lengths.sum())


def letterless(words: Sequence[str]) -> int:
    """How many words have no letter; most have a small one, which is told at once."""
    others = [word for word in words if not word.islower()]
    return sum(not (word[0].isalpha() or any(map(str.isalpha, word))) for word in others)


def share(facts: Sequence[bool]) -> float:
    return sum(facts) / len(facts) if facts else 0.0


def repeats(items: Sequence[str]) -> tuple[float, float]:
    """Of the items that came before: their share, and their characters' share."""
    seen: set[str] = set()
    again = [item for item in items if item in seen or seen.add(item)]
    return len(again) / max(len(items), 1), sum(map(len, again)) / max(sum(map(len, items)), 1)
