r"""Whether two mathematical answers are the same: fractions, decimals, percentages, LaTeX, units, sets, intervals.

    \boxed{\frac{1}{2}} = 0.5 = 1/2 = 50\%        2/\sqrt{3} = \frac{2\sqrt3}{3}        (x+1)^2 = x^2 + 2x + 1
    \{1, 2\} = {2, 1}     (-\infty, 3] \cup [5, 7) = [5,7) ∪ (-∞,3]      1.5 m = 150 cm     1\frac12 = 3/2

Exact (see polynomial.py), without dependencies. What it cannot express (logarithms, cube roots, …) goes to sympy where
that is installed (the extra `data`), in a process of its own with a time limit. Never evaluates an answer as Python.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

from tritium.core.chat import parse_reasoning
from tritium.core.rewards import Score
from tritium.core.rewards.exact import NUMBER
from tritium.core.rewards.polynomial import NotExact, Ratio
from tritium.core.rewards.worker import call

LONGEST = 1000  # characters of an answer that is compared as mathematics
SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": " pi ", "∞": " infty ", "°": " deg ", "√": " sqrt "}
    | {"²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
LATEX = [  # in this order
    (r"\\(?:left|right|displaystyle|bigl?|bigr?|,|;|!|:| |quad|qquad)(?![a-zA-Z])|\\(?=\s)|~|\$|\{,\}(?=\d{3})", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|mathrm|textbf|mbox|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " deg "),
    (r"\\(?:cdot|times)", "*"),
    (r"\\div", "/"),
    (r"\\%", "%"),
    (r"\\cup", "∪"),
    (r"\\pm|±", "±"),
    (r"\\\{", "⟨"),  # a set's brackets, apart from LaTeX's grouping
    (r"\\\}", "⟩"),
    (r"(?<![\w}])(-?\d+)\s*\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?", r"(\1 & \2/\3)"),  # mixed numbers: 1\frac{1}{2}
    (r"(?<![\w./])(-?\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1 & \2/\3)"),
    (r"\\frac\s*(\d)\s*(\d)", r"((\1)/(\2))"),
    (r"\\sqrt\s*(\d)", r"sqrt(\1)"),
]
FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
ROOT = re.compile(r"\\sqrt\s*(?:\[([^\[\]{}]*)\])?\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
TOKEN = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|[a-zA-Z]+|\*\*|[-+*/^()!&|])")
FUNCTIONS = ("sin", "cos", "tan", "log", "ln", "exp", "sqrt", "asin", "acos", "atan")
SIZES = {
    "length": "mm 1/1000 cm 1/100 m 1 km 1000 millimeter 1/1000 centimeter 1/100 meter 1 metre 1 kilometer 1000",
    "imperial": "inch 1 inche 1 foot 12 feet 12 yard 36 mile 63360",
    "mass": "mg 1/1000 g 1 gram 1 kg 1000 kilogram 1000",
    "time": "s 1 second 1 min 60 minute 60 h 3600 hour 3600 day 86400 week 604800",
    "volume": "ml 1/1000 l 1 liter 1 litre 1",
    "money": "dollar 1 cent 1/100",
}
UNITS = {  # name → (dimension, factor)
    name: (dimension, Fraction(factor))
    for dimension, text in SIZES.items()
    for name, factor in zip(text.split()[::2], text.split()[1::2], strict=True)
}
UNIT = re.compile(r"^(.*[\d)}.⟩])\s*([a-zA-Z]+(?:\s*[/ ^]\s*[a-zA-Z2-3]+)*)\.?$", re.DOTALL)
SAID = re.compile(r"(?:####|answer\s*(?:is|:|=)+)\s*(.+?)(?:\.(?=\s|$)|\n|$)", re.IGNORECASE)


@dataclass(frozen=True)
class MathMatch:
    """1 where the answer means the same as the reference, 0 where not, `malformed` where there is no answer.

    The answer is what the last \\boxed{} holds, or follows "the answer is" or ####; else the last formula, the whole
    text where it is one, or the last number. A percentage without its sign counts where the reference has none.
    """

    malformed: float = 0.0
    seconds: float = 5.0  # of sympy

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        if not reference.strip():
            raise ValueError("there is no reference answer to compare with")
        wanted = boxed(reference) or reference
        answer = extract(parse_reasoning(text)[1], wanted)
        if not answer:
            return Score(self.malformed, "no answer")
        if equivalent(answer, wanted, self.seconds):
            return Score(1.0, "right")
        return Score(0.0, f"wrong: {answer[-60:]!r} is not {wanted!r}")


def boxed(text: str) -> str:
    r"""What the last complete \boxed{…} holds; empty where there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i].strip()
    return ""


def extract(answer: str, reference: str) -> str:
    """The final answer in a text; empty where there is none."""
    if found := boxed(answer):
        return found
    if said := SAID.findall(answer):
        return said[-1].strip(" .*:")
    if plain(answer) == plain(reference) or parsed(answer) is not None:
        return answer
    if formulas := re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", answer[-LONGEST:], re.DOTALL):
        return "".join(formulas[-1]).rpartition("=")[2].strip()
    last = answer.strip().rpartition("\n")[2].rpartition("=")[2].strip(" .*")
    if parsed(last) is not None:
        return last
    numbers = NUMBER.findall(answer)
    return numbers[-1] if numbers else last


def equivalent(answer: str, reference: str, seconds: float = 5.0) -> bool:
    """Whether two answers are equal as values; texts that are no mathematics, up to case and spaces.

    Raises: worker.WorkerError where sympy took too long.
    """
    a, b = parsed(answer), parsed(reference)
    if a is None or b is None:
        return plain(answer) == plain(reference) != ""
    return same(a, b, seconds)


class Value(NamedTuple):
    """`kind` is "number", or what holds `items`: "()", "[]", "[)", "(]", "set", "union"."""

    kind: str
    items: tuple["Value", ...] = ()
    text: str = ""  # of a number, in plain operators
    ratio: Ratio | None = None  # None: not exact
    unit: str = ""


def same(a: Value, b: Value, seconds: float) -> bool:
    if a.kind != b.kind or len(a.items) != len(b.items):
        return False
    if a.kind == "number":
        return same_number(a, b, seconds)
    if a.kind not in ("set", "union"):
        return all(same(x, y, seconds) for x, y in zip(a.items, b.items, strict=True))
    left = list(b.items)
    for item in a.items:  # unordered; each matches one
        match = next((other for other in left if same(item, other, seconds)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def same_number(a: Value, b: Value, seconds: float) -> bool:
    if a.ratio is None or b.ratio is None:
        return same_by_sympy(a.text, b.text, seconds)
    x, y = a.ratio, b.ratio
    if (a.unit == "%") != (b.unit == "%") and x.same(y) and not is_small(y):
        return True  # "50%" where "50" is asked for
    factors = []
    for value in (a, b):
        dimension, factor = UNITS.get(value.unit, (value.unit, Fraction(1)))
        factors.append(("", Fraction(1, 100)) if dimension == "%" else (dimension, factor))
    (dim_a, f), (dim_b, g) = factors
    if dim_a and dim_b and dim_a != dim_b:
        return False
    if not (dim_a and dim_b) and "%" not in (a.unit, b.unit):
        f = g = Fraction(1)  # one does not say its unit
    return x.times(Ratio.of(f)).same(y.times(Ratio.of(g)))


def is_small(y: Ratio) -> bool:
    try:
        return 0 < abs(y.fraction()) < 1
    except NotExact:
        return False


def same_by_sympy(a: str, b: str, seconds: float) -> bool:
    return find_spec("sympy") is not None and call("tritium.core.rewards.maths:sympy_equal", [a, b], seconds)


def sympy_equal(a: str, b: str) -> bool:
    """Run in a process of its own. The texts hold numbers, operators, single letters and `FUNCTIONS` only."""
    import sympy

    names = {c: sympy.Symbol(c, positive=True) for c in "abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    names |= {"e": sympy.E, "i": sympy.I, "ln": sympy.log, "pi": sympy.pi}
    x, y = (sympy.sympify(text, locals=names, rational=True) for text in (a, b))
    return bool(sympy.simplify(x - y) == 0)


def plain(text: str) -> str:
    """A text answer: without LaTeX's dress, brackets around a letter, case."""
    return re.sub(r"[^\w+\-*/=.]", "", latex_to_plain(text[:LONGEST]).lower()).strip(".")


def parsed(text: str) -> Value | None:
    """None where the text is no mathematics."""
    if len(text) > LONGEST:
        return None
    try:
        return parse(latex_to_plain(text))
    except (ValueError, OverflowError, RecursionError):
        return None


def latex_to_plain(text: str) -> str:
    text = text.strip().translate(SIGNS)
    text = re.sub(r"^[\\$ ]*\$", " ", text)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    for _ in range(20):  # from the inside out
        before = text
        text = FRACTION.sub(r"((\1)/(\2))", text)
        text = ROOT.sub(lambda m: f"(({m[2]})^(1/({m[1]})))" if m[1] else f"sqrt({m[2]})", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text)
        if text == before:
            break
    return re.sub(r"\\([a-zA-Z]+)", r" \1 ", text).strip().rstrip(".")


def parse(text: str) -> Value:
    """Raises: ValueError for what is no mathematics."""
    text = re.sub(r"^\s*[a-zA-Z]\s*(?:=|∈|\bin\b)\s*", "", text.strip())  # x = …
    if "∪" in text:
        return Value("union", tuple(parse(part) for part in text.split("∪")))
    if "±" in text:
        return Value("set", tuple(parse(text.replace("±", sign)) for sign in "+-"))
    text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) if text[:1] not in ("(", "[", "⟨", "{") else text
    parts = split_list(text)
    if len(parts) == 1 and " or " in text or " and " in text:
        parts = re.split(r"\s+(?:or|and)\s+|,", text)
    if len(parts) > 1:
        return Value("set", tuple(parse(part) for part in parts if part.strip()))
    brackets = text[:1] + text[-1:]
    if brackets in ("⟨⟩", "{}"):
        inner = text[1:-1].strip()
        return Value("set", tuple(parse(part) for part in split_list(inner)) if inner else ())
    inner = split_list(text[1:-1])
    if brackets in ("()", "[]", "[)", "(]") and len(inner) > 1:
        return Value(brackets, tuple(parse(part) for part in inner))
    return number(text)


def split_list(text: str) -> list[str]:
    """At the commas and semicolons outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([⟨{") - (c in ")]⟩}")
        if c in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def number(text: str) -> Value:
    unit, text = "", text.strip()
    if text.endswith("%"):
        unit, text = "%", text[:-1]
    elif (found := UNIT.match(text)) and is_unit(found[2]):
        text, unit = found[1], re.sub(r"\s", "", found[2].lower().removesuffix(" deg"))
        unit = {"percent": "%", "deg": "degree"}.get(unit, unit)
        unit = unit if unit in UNITS else unit.removesuffix("s")
    tokens, place = [], 0
    while place < len(text.rstrip()):
        if not (match := TOKEN.match(text, place)):
            raise ValueError(text)
        tokens.append(match[1])
        place = match.end()
    expression = Expression(tokens)
    ratio = expression.sum()
    if expression.place < len(tokens):
        raise ValueError(text)
    exact = None if expression.inexact else ratio
    return Value("number", text="".join(expression.written), ratio=exact, unit=unit)


def is_unit(text: str) -> bool:
    words = re.findall("[a-zA-Z]+", text)
    return not {*words} & {*FUNCTIONS, "pi", "infty"} and any(len(word) > 1 or word in UNITS for word in words)


class Expression:
    """Recursive descent: sum → product → power → atom. Computes a `Ratio`, and writes the expression out for sympy.

    Where a step has no exact value, `inexact` says so and the value is of no use, but the syntax is still checked.
    """

    def __init__(self, tokens: list[str]):
        self.tokens, self.place, self.inexact = tokens, 0, False
        self.written: list[str] = []

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, written: str | None = None) -> str:
        token = self.peek()
        if not token:
            raise ValueError("it ends too early")
        self.place += 1
        self.written.append(token if written is None else written)
        return token

    def exact(self, compute) -> Ratio:
        try:
            return compute()
        except NotExact:
            self.inexact = True
            return Ratio.of(1)

    def sum(self) -> Ratio:
        total = self.product()
        while self.peek() in ("+", "-", "&"):
            minus = self.peek() == "-" or self.peek() == "&" and total.fraction() < 0  # -1 1/2 is -(1 + 1/2)
            self.take("-" if minus else "+")
            other = self.product()
            total = self.exact(lambda a=total, b=other, s=-1 if minus else 1: a.plus(b, s))
        return total

    def product(self) -> Ratio:
        total = self.signed()
        while self.peek() and self.peek() not in ("+", "-", ")", "&"):
            operator = self.take() if self.peek() in ("*", "/") else self.written.append("*")
            other = self.signed() if operator else self.power()
            total = self.exact(lambda a=total, b=other, o=operator: a.over(b) if o == "/" else a.times(b))
        return total

    def signed(self) -> Ratio:
        if self.peek() in ("+", "-"):
            minus = self.take() == "-"
            value = self.signed()
            return value.times(Ratio.of(-1)) if minus else value
        return self.power()

    def power(self) -> Ratio:
        base = self.atom()
        if self.peek() in ("^", "**"):
            self.take("**")
            exponent = self.signed()
            return self.exact(lambda: base.power(exponent))
        return base

    def atom(self) -> Ratio:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.take() != ")":
                raise ValueError("a bracket that is not closed")
            return value
        if token[0].isdigit() or token[0] == ".":
            if len(token) > 300 or "e" in token and abs(int(token.partition("e")[2])) > 300:
                raise ValueError("a number too long")
            return Ratio.of(Fraction(token))
        if token in FUNCTIONS:
            return self.function(token)
        if token == "infty":
            self.written[-1] = "oo"
            return Ratio.of(1, token)
        if token == "pi" or len(token) == 1 and token.isalpha():
            if token in "ei":
                self.inexact = self.inexact or token == "i" or self.peek() in ("^", "**")
            return Ratio.of(1, token)
        raise ValueError(token)

    def function(self, name: str) -> Ratio:
        power, start = [], len(self.written)
        if self.peek() == "^":  # sin^2 x
            self.take()
            self.signed()
            power, self.written[start:] = ["**", "(", *self.written[start + 1 :], ")"], []
        self.written.append("(")
        value = self.power()
        self.written += [")", *power]
        if name == "sqrt" and not power:
            return self.exact(value.root)
        self.inexact = True
        return value
