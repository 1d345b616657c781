"""Code for pretraining: files with a hole in the middle, and repositories as one document."""

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from tritium.core.config import UserError
from tritium.core.tokenizer import Tokenizer

# (prefix, suffix, middle): the markers of StarCoder, Qwen-Coder and ours, DeepSeek-Coder, Mistral.
MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
_IMPORTS = (
    re.compile(r"^\s*from\s+(\.*[\w.]+)\s+import", re.M),
    re.compile(r"^\s*import\s+(?:static\s+)?([\w.]+)", re.M),
    re.compile(r"^\s*#include\s+[\"<]([\w./-]+)[\">]", re.M),
    re.compile(r"(?:from|require\()\s*[\"']([\w./@-]+)[\"']"),
)


def hole_markers(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the prefix's, suffix's and middle's marker. Raises: UserError where the vocabulary has none."""
    for markers in MARKERS:
        ids = tuple(tokenizer.special_id(marker) for marker in markers)
        if None not in ids:
            return ids
    raise UserError(
        "data.fim: this tokenizer has no tokens for it; train one with "
        f"--special='{','.join(MARKERS[0])}' (tritium tokenizer), or use a code model's"
    )


def fill_in_the_middle(
    tokenizer: Tokenizer, text: str, markers: tuple[int, int, int], rng: np.random.Generator, spm: bool
) -> list[int]:
    """The text's ids with a random span moved to the end ("Efficient Training of Language Models to Fill in the
    Middle", arXiv 2207.14255): cut at two characters drawn uniformly, before tokenising (section 3).

        PSM   <pre> prefix <suf> suffix <mid> middle
        SPM   <pre> <suf> suffix <mid> prefix middle     (its appendix D, so that both can be learned together)
    """
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    pre, suf, mid = markers
    suffix = tokenizer.encode(text[second:], first=False)
    if spm:
        return [pre, suf, *suffix, mid, *tokenizer.encode(text[:second], first=False)]
    prefix, middle = (tokenizer.encode(part, first=False) for part in (text[:first], text[first:second]))
    return [pre, *prefix, suf, *suffix, mid, *middle]


def repository(files: Mapping[str, str]) -> str:
    """A repository's files as one text, each after what it imports, its path in a comment before it.

    As DeepSeek-Coder's (arXiv 2401.14196, section 2.2 and algorithm 1): the file with the fewest unmet imports comes
    next, so that circles do no harm; ties go to the order given.
    """
    waiting = {path: imports(path, text, files) for path, text in files.items()}
    ordered = []
    while waiting:
        path = min(waiting, key=lambda p: len(waiting[p]))
        del waiting[path]
        ordered.append(path)
        for needs in waiting.values():
            needs.discard(path)
    return "\n".join(f"{comment(path)} {path}\n{files[path]}" for path in ordered)


def comment(path: str) -> str:
    return "#" if path.endswith((".py", ".sh", ".rb", ".toml", ".yaml", ".yml")) else "//"


def imports(path: str, text: str, files: Mapping[str, str]) -> set[str]:
    """The files of a repository that one of them imports, by name."""
    by_stem = defaultdict(list)
    for other in files:
        by_stem[re.sub(r"(/__init__)?\.\w+$", "", other).rpartition("/")[2]].append(other)
    found = set()
    for pattern in _IMPORTS:
        for name in pattern.findall(text):
            parts = [part for part in re.split(r"[./]+", re.sub(r"\.(h|hpp|js|ts)$", "", name)) if part]
            for other in by_stem.get(parts[-1], ()) if parts else ():
                stem = re.sub(r"(/__init__)?\.\w+$", "", other).split("/")
                shared = min(len(stem), len(parts))
                if other != path and stem[-shared:] == parts[-shared:]:
                    found.add(other)
    return found
