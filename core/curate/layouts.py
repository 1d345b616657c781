"""The layouts in which people publish prompts, answers, tests and reasoning chains: a record → a document.

Found from a record's keys: APPS, CodeContests, Codeforces, OpenR1-Math, NuminaMath, MATH, Natural Reasoning, Orca,
HTML, plain text; and, by core/formats.py, GSM8K, SVAMP, MBPP, HumanEval, assertions, Alpaca, ShareGPT, messages.
"""

import html.parser
import json
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from tritium.core.curate.step import Document
from tritium.core.formats import RecordError, answer_key, conversation, number_text, problem, required_text
from tritium.core.rewards.maths import boxed

LONGEST_REFERENCE = 100  # characters: a longer "answer" without "####" is an explanation, which nothing compares with
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations
FACTS = {  # a document's key → where records have it
    "own_id": ("id", "uuid", "problem_id", "task_id", "name"), "language": ("language", "lang"),
    "licence": ("license", "licence"), "category": ("category", "problem_type", "type"),
    "level": ("difficulty", "level"),
}  # fmt: skip


def parse(record: Any) -> Document:
    """A document without its labels. Raises: RecordError, and what a record of another shape may raise."""
    if not isinstance(record, dict):
        raise RecordError("a record that is not a JSON object")
    form = next((form for keys, form in LAYOUTS if keys <= record.keys()), other)
    document = form(record)
    for key, names in FACTS.items():
        value = next((record[name] for name in names if isinstance(record.get(name), str | int)), None)
        if value is not None:
            document[key] = str(value)
    return document


def asked(prompt: Any, gold: Any, reference: Any = "", others: Sequence[dict] = ()) -> Document:
    """A problem, where there is a reference; else a chat. Empty answers are left out."""
    messages = [{"role": "user", "content": required_text(prompt, "question")}]
    return answered(messages, [{"text": gold, "by": "gold"}, *others], reference)


def answered(messages: list[dict], answers: Sequence[dict], reference: Any) -> Document:
    reference = number_text(reference) if isinstance(reference, int | float) else (reference or "").strip()
    answers = [a for a in answers if isinstance(a["text"], str) and a["text"].strip()]
    kind = "problem" if reference else "chat"
    return {"kind": kind, "messages": messages, "answers": answers, "reference": reference}


def maths(record: dict) -> Document:
    """NuminaMath and MATH, whose solutions box their answers; OpenR1-Math, whose generations are marked right or wrong;
    Natural Reasoning, with other models' responses."""
    solution, marks = record.get("solution") or "", record.get("correctness_math_verify") or []
    reference = record.get("reference_answer") or record.get("answer") or boxed(solution)
    reference = "" if reference in ("proof", "notfound") else reference  # what NuminaMath says of those without one
    chains = zip_longest(record.get("generations") or [], marks)
    others = [{"text": text, "by": "r1"} | mark(right) for text, right in chains]
    others += [{"text": r["response"], "by": r.get("response_model", "model")} for r in record.get("responses") or []]
    return asked(record.get("problem") or record["question"], solution, reference, others)


def mark(right: Any) -> dict:
    """What is said of an answer, where it is said; anything but true and false says nothing."""
    return {"right": right} if isinstance(right, bool) else {}


def fenced(program: str | None) -> str:
    return f"```python\n{program}\n```" if program else ""


def cases(pairs: Sequence[tuple[str, str]], checker: str | None = None) -> str:
    """The reference of a program that reads and prints."""
    rows = [{"input": given, "output": wanted} for given, wanted in dict.fromkeys(pairs)]
    return json.dumps({"cases": rows} | ({"checker": checker} if checker else {})) if rows else ""


def apps(record: dict) -> Document:
    tests = json.loads(record["input_output"] or "{}")
    pairs = list(zip(tests.get("inputs", []), tests.get("outputs", []), strict=False))
    if name := tests.get("fn_name"):  # an output may be wrapped in a list
        wanted = [[out, out[0]] if isinstance(out, list) and len(out) == 1 else [out] for _, out in pairs]
        asserts = [f"assert {name}(*{given!r}) in {outs!r}" for (given, _), outs in zip(pairs, wanted, strict=True)]
        reference = json.dumps({"tests": asserts, "entry_point": name})
    else:
        reference = cases(pairs)
    solutions = json.loads(record["solutions"]) if record.get("solutions") else [""]
    prompt = "\n\n".join(filter(None, (record["question"], record.get("starter_code"))))
    return asked(prompt, fenced(solutions[0]), reference)


def code_contests(record: dict) -> Document:
    tests = [record.get(f"{name}_tests") or {} for name in ("public", "private", "generated")]
    pairs = [pair for t in tests for pair in zip(t.get("input", []), t.get("output", []), strict=True)]
    known = record.get("solutions") or {}
    solutions = zip(known.get("language", []), known.get("solution", []), strict=True)
    python = next((text for language, text in solutions if language in (3, "PYTHON3")), None)
    return asked(record["description"], fenced(python), cases(pairs))


def codeforces(record: dict) -> Document:
    if record.get("interaction_format") or record.get("input_mode") == "file":
        raise RecordError("a problem whose program does not read its standard input alone")
    tests = [*(record.get("examples") or []), *(record.get("official_tests") or [])]
    parts = {"": record["description"], "Input\n": record["input_format"], "Output\n": record.get("output_format")}
    parts |= {"Example input\n": tests[0]["input"], "Example output\n": tests[0]["output"]} if tests else {}
    prompt = "\n\n".join(name + text for name, text in parts.items() if text)
    reference = cases([(t["input"], t["output"]) for t in tests], record.get("generated_checker"))
    return asked(prompt, record.get("editorial"), reference)


def text(value: Any) -> Document:
    return {"kind": "text", "text": required_text(value, "text")}


def other(record: dict) -> Document:
    """What core/formats.py reads; beside it, GSM8K's model solutions."""
    try:
        messages, reference = problem(record)
    except RecordError:
        return chat(record)
    gold = record.get(answer_key(record)) or ""
    if reference.startswith('{"'):  # tests
        solution = record.get("canonical_solution")
        gold = fenced(record["prompt"] + solution if solution else record.get("code"))
    elif len(reference) > LONGEST_REFERENCE:
        reference = ""
    marked = {name: v for name, v in record.items() if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()}
    others = [{"text": v["solution"], "by": name} | mark(v["is_correct"]) for name, v in marked.items()]
    return answered(messages, [{"text": CALCULATOR.sub("", str(gold)), "by": "gold"}, *others], reference)


def chat(record: dict) -> Document:
    """A conversation; its last answer is the gold one."""
    messages = conversation(record)
    while messages and (messages[-1]["role"] != "assistant" or messages[-1].get("weight") == 0):
        messages = messages[:-1]
    if not messages:
        raise RecordError("a conversation of which nothing is to be learned")
    *before, last = messages
    if not before:
        raise RecordError("a conversation without a question")
    if last.get("tool_calls"):
        raise RecordError("a conversation that ends with a tool call")
    thought = f"<think>\n{last['reasoning_content']}\n</think>\n\n" if last.get("reasoning_content") else ""
    return answered(before, [{"text": thought + last["content"], "by": "gold"}], "")


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SKIPPED_TAGS = {"script", "style", "title", "nav", "footer", "noscript", "template", "svg", "button", "select"}
BLOCKS = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "section", "article"}
BLOCKS |= {"table", "dl", "dt", "dd", "figcaption", "main", "header", "form", "hr"}
UNENDED = re.compile("<(?=[a-zA-Z][^<>\"']*<)")  # no tag; of many in a row, the parser's time grows with the square
KEPT = {ord(" "): "\ue000", ord("\t"): "\ue001"}  # the white space of code, until lines are put together


class TextOnly(html.parser.HTMLParser):
    """The text that a reader of the page would see, a line for each block."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden, self.code = [], [], 0

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag in SKIPPED_TAGS:
            self.hidden.append(tag)
        elif tag in BLOCKS or tag in ("td", "th"):
            self.parts.append("\n" if tag in BLOCKS else " ")
        self.code += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            del self.hidden[self.hidden.index(tag) :]
        elif tag in BLOCKS:
            self.parts.append("\n")
        self.code = max(self.code - (tag == "pre"), 0)  # pages close what they did not open

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data.translate(KEPT) if self.code else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    parser = TextOnly()
    parser.feed(UNENDED.sub("&lt;", page))
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text.translate({ord(sign): white for white, sign in KEPT.items()})


LAYOUTS: list[tuple[set[str], Callable[[dict], Document]]] = [
    ({"question", "input_output"}, apps), ({"description", "public_tests"}, code_contests),
    ({"description", "input_format"}, codeforces), ({"problem", "generations"}, maths),
    ({"problem", "solution"}, maths), ({"question", "reference_answer"}, maths),
    ({"html"}, lambda r: text(html_text(r["html"]))), ({"text", "test_list"}, other),
    ({"text"}, lambda r: text(r["text"])), ({"content"}, lambda r: text(r["content"])),
]  # fmt: skip
