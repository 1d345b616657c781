"""Data that every machine has: Python's own standard library, and generated conversations. The ladder runs on it."""

import ast
import re
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tritium.core.arithmetic import Problem, chat_answer

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "pydoc_data", "__pycache__"}
TERSE = 0.75  # share of bare results among the answers to stories: what RL has to unlearn
PIECE = 6000  # characters of a document: sources are long, and a document should fit a small context

SAYINGS = tomllib.loads(Path(__file__).with_name("corpus.toml").read_text("utf-8"))


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the standard library's modules, in alphabetical order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def documented(module: str, source: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module and of its public functions, classes and methods."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    if text := ast.get_docstring(tree):
        yield module, text
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if text := ast.get_docstring(node):
                yield f"{module}.{node.name}", text
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for member in (m for m in methods if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")):
                if text := ast.get_docstring(member):
                    yield f"{module}.{node.name}.{member.name}", text


def library_texts(characters: int, seed: int) -> list[str]:
    """Docstrings, and sources in pieces, shuffled, up to so many characters."""
    texts = []
    for module, source in modules():
        texts += [f"{name}\n\n{text}\n" for name, text in documented(module, source)]
        texts += [source[i : i + PIECE] for i in range(0, len(source), PIECE)]
    order = np.random.default_rng([seed, 1]).permutation(len(texts))
    chosen, used = [], 0
    for i in order:
        if used >= characters:
            break
        chosen.append(texts[i])
        used += len(texts[i])
    return chosen


def library_questions(seed: int) -> list[list[dict]]:
    """Conversations about what the library's functions do, from the first sentences of their docstrings."""
    rng = np.random.default_rng([seed, 2])
    conversations = []
    for module, source in modules():
        for name, text in documented(module, source):
            sentence = first_sentence(text)
            if "." in name and sentence and "._" not in name:
                forms = (f"What does {name} do?", f"What is {name} for?", f"Tell me about {name}.")
                conversations.append(turns(forms[rng.integers(3)], sentence))
    return [conversations[i] for i in rng.permutation(len(conversations))]


def first_sentence(text: str) -> str:
    """The docstring's first sentence, if it is one of moderate length."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 15 <= len(sentence) <= 120 and sentence.endswith(".") else ""


def turns(*texts: str) -> list[dict]:
    """Messages of alternating roles, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def worked_or_terse(problem: Problem, rng: np.random.Generator) -> str:
    """An answer as people give it: sums are worked out, but of little stories most get the bare result."""
    return problem.answer if problem.kind == "story" and rng.random() < TERSE else chat_answer(problem)


def small_talk(problems: list[Problem], count: int, seed: int) -> list[list[dict]]:
    """General conversations of one to five exchanges, most with a problem or two among them."""
    rng = np.random.default_rng([seed, 3])
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    general, conversations = SAYINGS["general"], []
    for _ in range(count):
        parts = [pick(SAYINGS["greetings"]), pick(SAYINGS["welcomes"])] if rng.random() < 0.5 else []
        if rng.random() < 0.5:
            question = pick(list(general))
            parts += [question, general[question]]
        for _ in range(rng.choice(3, p=(0.3, 0.5, 0.2)) or int(not parts)):
            problem = pick(problems)
            parts += [problem.question, worked_or_terse(problem, rng)]
        if rng.random() < 0.3:
            parts += [pick(SAYINGS["thanks"]), pick(SAYINGS["pleasures"])]
        conversations.append(turns(*parts))
    return conversations
