"""Clean: Unicode normalised, personal data replaced, the language named."""

import ipaddress
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tritium.core.config import opt
from tritium.core.curate.step import Document, Drop, Outcome, Step, map_texts, note, text_of
from tritium.core.rewards.text import SCRIPTS, script

CONTROLS = dict.fromkeys([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xFEFF, 0x200B, 0x00AD])
LETTERS = 2000  # of a text are looked at, to name its language
FENCED = re.compile(r"```.*?(?:```|\Z)|^ *(?:assert|from|import|def) [^\n]*", re.DOTALL | re.MULTILINE)
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
SCRIPT_LANGUAGES = {SCRIPTS[language]: language for language in ("ko", "el", "ar", "he", "hi", "th")}

# What a call or an index follows is no mail address but a product of matrices, X@W.mean(0).
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[a-zA-Z]{2,24}\b(?!(?:\.\w+)*[(\[])")
PHONE = re.compile(
    r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # with the country's code
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}[-.]\d{3}[-.]\d{4})(?![\w-]|\.\d)"  # North America's
)
ADDRESS = re.compile(  # of version 6 those that are given out, whole or with two groups before the ::, as no slice is
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?=[\da-fA-F:]*::|(?:[\da-fA-F]+:){7})"
    r"[23][\da-fA-F]{3}:[\da-fA-F]{1,4}:(?:[\da-fA-F]{0,4}:){1,5}[\da-fA-F]{0,4})(?![\w:]|\.\d)"
)
SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{22,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[\w-]{35}|(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?i:(?<=api_key=)|(?<=api-key=)|(?<=password=)|(?<=secret=)|(?<=token=))[\"']?[\w+/-]{16,}[\"']?",
    re.DOTALL,
)


@dataclass
class Clean(Step):
    """Texts made uniform; nothing is dropped but by language, or where no text is left."""

    pii: bool = opt(True, "replace e-mail addresses, phone numbers, IP addresses and keys with <EMAIL>, <PHONE>, …")
    identify: str = opt("words", "identify languages by frequent words and scripts, or with a library",
                        choices=("words", "py3langid", "none"))  # fmt: skip
    languages: list[str] = opt([], "languages to keep (empty: all)")

    def one(self, document: Document) -> Outcome:
        found: Counter = Counter()
        map_texts(document, lambda text: self.changed(text, found))
        if found:
            note(document, **found)
        if self.identify != "none" and not document["language"]:
            document["language"] = identified(FENCED.sub("", text_of(document)[: 4 * LETTERS]), self.identify)
        if document["kind"] == "text" and not document["text"].strip():
            return Drop("no text")
        if self.languages and document["language"] not in self.languages:
            return Drop(f"language {document['language']}")
        return document

    def changed(self, text: str, found: Counter) -> str:
        if not text.isascii() or "\x00" <= min(text, default=" ") < " ":
            text = unicodedata.normalize("NFC", text.translate(CONTROLS))  # they may part a letter from its accent
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return anonymised(text, found) if self.pii else text


def anonymised(text: str, found: Counter) -> str:
    """A text with personal data replaced; `found` counts it by kind. Local addresses stay: they are nobody's."""

    def put(kind: str):
        def replacement(match: re.Match) -> str:
            if kind == "ip" and not public(match[0]):
                return match[0]
            found[kind] += 1
            return f"<{kind.upper()}>"

        return replacement

    text = SECRET.sub(put("key"), text)
    text = EMAIL.sub(put("email"), text) if "@" in text else text
    text = ADDRESS.sub(put("ip"), text) if "." in text or ":" in text else text
    return PHONE.sub(put("phone"), text)


def public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def identified(text: str, how: str = "words") -> str:
    """ISO 639-1 code of a text's language; "?" where nothing speaks for one, "code" is not told apart."""
    if how == "py3langid":
        import py3langid

        return py3langid.classify(text)[0]
    letters = [c for c in text[:LETTERS] if c.isalpha()]
    scripts = Counter("LATIN" if c.isascii() else script(c) for c in letters)
    if not scripts:
        return "?"
    main = scripts.most_common(1)[0][0]
    if main in ("CJK", "HIRAGANA", "KATAKANA"):  # Japanese has kana in every sentence
        return "ja" if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.05 * len(letters) else "zh"
    if main in SCRIPT_LANGUAGES:
        return SCRIPT_LANGUAGES[main]
    counts = Counter(WORD.findall(text.lower()))
    scores = {language: sum(counts[w] for w in words) for language, words in frequent_words().items()}
    best = max(scores, key=scores.get)
    return best if scores[best] >= max(1, 0.05 * counts.total()) else "?"


@cache
def frequent_words() -> dict[str, frozenset[str]]:
    lines = (resources.files("tritium.core.curate") / "stopwords.txt").read_text("utf-8").splitlines()
    parts = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {language: frozenset(words.split()) for language, _, words in parts}
