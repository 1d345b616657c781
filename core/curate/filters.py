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

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ENDS = (".", "!", "?", '"', "'", "”", "’", ")", "。", "！", "？", "」", "…", ":", "`")
PLACEHOLDERS = ("lorem ipsum", "javascript is disabled", "enable javascript", "use cookies", "terms of service")
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
SPECIAL = re.compile(r"[^\w\s]|_")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Rule(NamedTuple):
    """`min_…` or `max_…`: what is measured, and the limit that the set's paper gives."""

    set: str
    measure: str
    limit: float


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
    **{f"max_top_{n}gram": Rule("gopher", f"top_{n}gram", limit) for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{
        f"max_repeated_{n}grams": Rule("gopher", f"repeated_{n}grams", limit)
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
    def active(self) -> list[tuple[str, str, float]]:
        """(rule, measure, limit) of those that are used."""
        used = ((name, rule) for name, rule in RULES.items() if rule.set in self.rules or name in self.limits)
        return [(name, rule.measure, self.limits.get(name, rule.limit)) for name, rule in used]

    @cached_property
    def lists(self) -> list[Words]:
        return [Words(file) for file in self.words]

    def one(self, document: Document) -> Outcome:
        text = text_of(document)
        measured = Measures(text)
        document["scores"]["words"] = measured.words
        for name, measure, limit in self.active:
            value = getattr(measured, measure)
            if value is not None and (value < limit if name.startswith("min") else value > limit):
                return Drop(name, f"{measure} {value:.4g}, limit {limit:g}")
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
    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.all_words), np.int64, self.words)

    @cached_property
    def ids(self) -> np.ndarray:
        """A number for each word, the same for the same word; [words] uint64."""
        seen: dict[str, int] = {}
        numbers = (seen.setdefault(word, len(seen)) for word in self.all_words)
        return np.fromiter(numbers, np.uint64, self.words) * MULTIPLIER

    mean_word = cached_property(lambda self: self.lengths.mean() if self.spaced and self.words else None)
    symbol_words = cached_property(
        lambda self: (self.text.count("#") + self.text.count("...") + self.text.count("…")) / max(self.words, 1)
    )
    bullet_lines = cached_property(lambda self: share(self.lines, lambda line: line[0] in "•-*‣●"))
    ellipsis_lines = cached_property(lambda self: share(self.lines, lambda line: line.endswith(("...", "…"))))
    alphabetic_words = cached_property(lambda self: share(self.all_words, lambda w: w.isalpha() or has_letter(w)))
    stop_words = cached_property(lambda self: len(STOP_WORDS & set(self.text.lower().split())) if self.spaced else None)
    sentences = cached_property(lambda self: sum(1 for _ in SENTENCE_END.finditer(self.text)))
    braces = cached_property(lambda self: self.text.count("{"))
    special_characters = cached_property(lambda self: len(SPECIAL.findall(self.text)) / max(self.characters, 1))
    incomplete_lines = cached_property(lambda self: share(self.lines, lambda line: not line.endswith(ENDS)))
    short_lines = cached_property(lambda self: share(self.lines, lambda line: len(line) < 30))
    repeated_lines = cached_property(lambda self: repeats(self.lines)[0])
    repeated_line_characters = cached_property(lambda self: repeats(self.lines)[1])
    repeated_paragraphs = cached_property(lambda self: repeats(self.paragraphs)[0])
    repeated_paragraph_characters = cached_property(lambda self: repeats(self.paragraphs)[1])

    @cached_property
    def placeholders(self) -> int:
        lower = self.text.lower()
        return sum(phrase in lower for phrase in PLACEHOLDERS)

    @cached_property
    def paragraphs(self) -> list[str]:
        return [p for raw in self.text.split("\n\n") if (p := raw.strip())]

    def __getattr__(self, name: str) -> float:
        """`top_Ngram` and `repeated_Ngrams`."""
        if found := re.fullmatch(r"top_(\d+)gram|repeated_(\d+)grams", name):
            return self.top(int(found[1])) if found[1] else self.repeated(int(found[2]))
        raise AttributeError(name)

    def grams(self, n: int) -> np.ndarray:
        """A hash of each n words in a row, [words − n + 1] uint64."""
        hashes = self.ids[: max(self.words - n + 1, 0)].copy()
        for i in range(1, n):
            hashes = hashes * MULTIPLIER + self.ids[i : i + len(hashes)]
        return hashes

    def top(self, n: int) -> float:
        """The share of the words' characters that the most frequent n-gram makes up."""
        found, first, counts = np.unique(self.grams(n), return_index=True, return_counts=True)
        if not len(found) or counts.max() < 2:
            return 0.0
        at = first[counts.argmax()]
        return float(counts.max() * self.lengths[at : at + n].sum() / self.lengths.sum())

    def repeated(self, n: int) -> float:
        """The share of the words' characters that are in an n-gram which comes more than once, each counted once."""
        if n > 5 and not self.repeated(n - 1):
            return 0.0
        if (known := self.__dict__.get(f"repeated_{n}grams")) is not None:
            return known
        grams, value = self.grams(n), 0.0
        found, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
        if len(found) < len(grams):
            again, edges = counts[inverse] > 1, np.zeros(self.words + 1, np.int64)
            edges[: len(again)] += again
            edges[n : n + len(again)] -= again
            value = float(self.lengths[edges.cumsum()[:-1] > 0].sum() / self.lengths.sum())
        self.__dict__[f"repeated_{n}grams"] = value
        return value


def has_letter(word: str) -> bool:
    return any(c.isalpha() for c in word)


def share(items: Sequence[str], holds) -> float:
    return sum(map(bool, map(holds, items))) / len(items) if items else 0.0


def repeats(items: Sequence[str]) -> tuple[float, float]:
    """Of the items that came before: their share, and their characters' share."""
    seen: set[str] = set()
    again = [item for item in items if item in seen or seen.add(item)]
    return len(again) / max(len(items), 1), sum(map(len, again)) / max(sum(map(len, items)), 1)
