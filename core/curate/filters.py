"""Filter: rules on the form of a text, named after the papers that gave them; every threshold is an option.

    gopher   Rae et al., arXiv 2112.11446, appendix A.1.1: length, symbols, bullets, stop words, repetition (table A1)
    c4       Raffel et al., arXiv 1910.10683, section 2.2: sentences, braces, placeholder texts
    yi       Young et al., arXiv 2403.04652, section 2.1: special characters, incomplete lines, short lines

    rules = ["gopher"]                      all rules of a set, with the paper's limits
    limits = { min_words = 10 }             another limit for a rule, or a rule of a set that is not used

Words are what white space parts; in scripts without spaces, characters, and rules on the length of words say nothing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from tritium.core.config import ConfigError, listed, opt
from tritium.core.curate.step import KINDS, Document, Drop, Outcome, Step, scored, text_of
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
    """`min_…` or `max_…`: the set, the limit that its paper gives, what is measured (None: the rule says nothing)."""

    set: str
    limit: float
    value: Callable[["Measures"], float | None]


RULES = {
    "min_words": Rule("gopher", 50, lambda m: m.words),
    "max_words": Rule("gopher", 100_000, lambda m: m.words),
    "min_mean_word": Rule("gopher", 3, lambda m: m.mean_word),
    "max_mean_word": Rule("gopher", 10, lambda m: m.mean_word),
    "max_symbol_words": Rule("gopher", 0.1, lambda m: max(m.text.count("#"), m.ellipses) / max(m.words, 1)),
    "max_bullet_lines": Rule("gopher", 0.9, lambda m: share([line[0] in "•-*‣●" for line in m.lines])),
    "max_ellipsis_lines": Rule("gopher", 0.3, lambda m: share([line.endswith(("...", "…")) for line in m.lines])),
    "min_alphabetic_words": Rule("gopher", 0.8, lambda m: 1 - letterless(m.all_words) / max(m.words, 1)),
    "min_stop_words": Rule("gopher", 2, lambda m: len(m.stop_words) if m.spaced else None),
    "max_repeated_lines": Rule("gopher", 0.3, lambda m: m.line_repeats[0]),
    "max_repeated_line_characters": Rule("gopher", 0.2, lambda m: m.line_repeats[1]),
    "max_repeated_paragraphs": Rule("gopher", 0.3, lambda m: m.paragraph_repeats[0]),
    "max_repeated_paragraph_characters": Rule("gopher", 0.2, lambda m: m.paragraph_repeats[1]),
    **{
        f"max_top_{n}gram": Rule("gopher", limit, lambda m, n=n: m.top(n))
        for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))
    },
    **{
        f"max_repeated_{n}grams": Rule("gopher", limit, lambda m, n=n: m.repeated(n))
        for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
    "min_sentences": Rule("c4", 3, lambda m: len(SENTENCE_END.findall(m.text))),
    "max_braces": Rule("c4", 0, lambda m: m.text.count("{")),
    "max_placeholders": Rule("c4", 0, lambda m: sum(map(m.text.lower().count, PLACEHOLDERS))),
    "max_special_characters": Rule("yi", 0.25, lambda m: m.special / max(m.characters, 1)),
    "max_incomplete_lines": Rule("yi", 0.5, lambda m: share([not line.endswith(ENDS) for line in m.lines])),
    "max_short_lines": Rule("yi", 0.67, lambda m: share([len(line) < 30 for line in m.lines])),
    "min_characters": Rule("yi", 100, lambda m: m.characters),
    "max_characters": Rule("none", 1e6, lambda m: m.characters),
}  # in this order: the cheap ones first


@dataclass
class Filter(Step):
    """Documents whose text breaks a rule are dropped, with the first rule that they break.

    The papers' rules are for pages of the web: of right solutions in maths and code they take a third and more.
    """

    kinds: list[str] = opt(["text"], "kinds of documents to filter; others pass ([]: all kinds)", choices=KINDS)
    rules: list[str] = opt(["gopher"], "rule sets", choices=("gopher", "c4", "yi"))
    limits: dict[str, float] = opt({}, "limits by rule, in place of the sets' own")
    words: list[str] = opt([], "files of forbidden words and phrases, one per line")

    PATHS: ClassVar[tuple[str, ...]] = ("words",)

    def check(self) -> None:
        super().check()
        for name in self.limits:
            if name not in RULES:
                raise ConfigError(f"limits: no rule {name!r}; {listed(name, RULES)}")

    @cached_property
    def active(self) -> list[tuple[str, float, bool]]:
        """(name, limit, whether it is the least) of the rules that are used."""
        used = {name: rule for name, rule in RULES.items() if rule.set in self.rules or name in self.limits}
        return [(name, self.limits.get(name, rule.limit), name.startswith("min")) for name, rule in used.items()]

    @cached_property
    def lists(self) -> list[Words]:
        return [Words(file) for file in self.words]

    def one(self, document: Document) -> Outcome:
        text = text_of(document)
        measured = Measures(text)
        scored(document, "words", measured.words)
        for name, limit, least in self.active:
            value = RULES[name].value(measured)
            if value is not None and (value < limit if least else value > limit):
                return Drop(name, f"{value:.4g}, limit {limit:g}")
        for words in self.lists:
            if (score := words((), text)).value < 1:
                return Drop(f"a word of {words.file.rpartition('/')[2]}", score.reason)
        return document


class Measures:
    """What several rules need of a text, each when it is first asked for."""

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

    @property
    def mean_word(self) -> float | None:
        return self.lengths.mean() if self.spaced and self.words else None

    @property
    def ellipses(self) -> int:
        return self.text.count("...") + self.text.count("…")

    @property
    def stop_words(self) -> set[str]:
        return {STOP_WORDS[word] for word in STOP_WORDS.keys() & self.all_words}

    @property
    def special(self) -> int:
        """Characters that are neither letters, digits nor space."""
        text = self.text
        return len(text.encode().translate(None, PLAIN_ASCII) if text.isascii() else SPECIAL.findall(text))

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
