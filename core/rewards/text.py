"""Judges that look at the text alone: its form, length, repetitions, language, and words that must not occur."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tritium.core.chat import parse_reasoning
from tritium.core.config import ConfigError
from tritium.core.files import read_text
from tritium.core.rewards import Score
from tritium.core.rewards.words import WORDS
from tritium.core.rewards.worker import call

SCRIPTS = WORDS["scripts"]
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, kana, CJK
WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


@dataclass(frozen=True)
class Regex:
    """1 where `pattern` matches somewhere in the text (dots match newlines), else 0. Runs in a process of its own."""

    pattern: str
    seconds: float = 1.0

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"reward: regex({self.pattern!r}): {error}") from None

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        found = call("tritium.core.rewards.text:search", [self.pattern, text], self.seconds)
        return Score(float(found), "" if found else f"{self.pattern} does not match")


def search(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


@dataclass(frozen=True)
class Tags:
    """Whether the text has the form `<a>…</a><b>…</b>…`: each of `names` once, in order, closed, none within another.

    The share of the names that are so; below 1 too where text stands between them. Without an opening tag at the very
    beginning of the answer the first counts as opened: it may be part of the prompt.
    """

    names: tuple[str, ...] = ("think",)

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        first, place, good = f"<{self.names[0]}>", 0, 0
        text = text if first in text or f"</{self.names[0]}>" not in text else first + text
        for name in self.names:
            opened, closed = f"<{name}>", f"</{name}>"
            start, end = text.find(opened, place), text.find(closed, place)
            if text.count(opened) == text.count(closed) == 1 and place <= start < end:
                good += not text[place:start].strip()
                place = end + len(closed)
        return Score(good / len(self.names), "" if good == len(self.names) else "tags missing, or not in order")


@dataclass(frozen=True)
class Json:
    """1 where the answer is JSON (a code fence around it is allowed) with the `keys`; half where it lacks keys."""

    keys: tuple[str, ...] = ()

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        answer = parse_reasoning(text)[1]
        fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)```", answer, re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else answer)
        except (ValueError, RecursionError) as error:
            return Score(0.0, f"not JSON: {error}")
        missing = [key for key in self.keys if not isinstance(value, dict) or key not in value]
        return Score(0.5 if missing else 1.0, f"without {', '.join(missing)}" if missing else "")


@dataclass(frozen=True)
class Length:
    """1 up to `target` tokens, then down by a straight line to 0 at `limit` (DAPO, arXiv 2503.14476)."""

    target: int
    limit: int

    def __post_init__(self):
        if not 0 <= self.target < self.limit:
            raise ConfigError(f"reward: length({self.target}, {self.limit}): the first must be below the second")

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        return Score(min(max((self.limit - len(ids)) / (self.limit - self.target), 0.0), 1.0), f"{len(ids)} tokens")


@dataclass(frozen=True)
class Repetition:
    """The share of n-grams of words (characters, in scripts without spaces) that occurred before: 0 is best."""

    n: int = 4

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        words = WORD.findall(text)
        grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return Score(1 - len(set(grams)) / len(grams) if grams else 0.0)


@dataclass(frozen=True)
class Language:
    """The share of the letters that are of the language's script. Languages of one script are not told apart."""

    language: str

    def __post_init__(self):
        if self.language not in SCRIPTS:
            raise ConfigError(f"reward: language({self.language!r}): one of {', '.join(SCRIPTS)}")

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        scripts = [script(c) for c in text if c.isalpha()]
        own = sum(s in SCRIPTS[self.language].split() for s in scripts)
        if self.language == "ja" and scripts and not {"HIRAGANA", "KATAKANA"} & {*scripts}:
            return Score(0.0, "no kana")
        return Score(own / len(scripts) if scripts else 0.0)


@lru_cache(maxsize=10_000)
def script(character: str) -> str:
    return unicodedata.name(character, "?").partition(" ")[0].removesuffix("-EXTENDED")


@dataclass(frozen=True)
class Words:
    """1 where none of the words or phrases of a file (one a line, # comments) occurs as whole words, else 0."""

    file: str

    def __post_init__(self):
        if not Path(self.file).is_file():
            raise ConfigError(f"reward: words({self.file!r}): there is no such file")

    @cached_property
    def phrases(self) -> re.Pattern:
        lines = (folded(line.partition("#")[0]) for line in read_text(self.file).splitlines())
        alternatives = "|".join(sorted((re.escape(line) for line in lines if line), key=len, reverse=True))
        return re.compile(rf"(?<!\w)(?:{alternatives or '(?!)'})(?!\w)")

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        found = self.phrases.search(folded(text))
        return Score(0.0, f"it says {found[0]!r}") if found else Score(1.0)


def folded(text: str) -> str:
    """Case, width, accents and invisible characters taken away: how people get round word lists."""
    text = unicodedata.normalize("NFKD", text).casefold()
    return " ".join("".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf")).split())
