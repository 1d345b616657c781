r"""Whether two mathematical answers are the same: fractions, decimals, percentages, LaTeX, units, sets, intervals.

    \boxed{\frac{1}{2}} = 0.5 = 1/2 = 50\%        2/\sqrt{3} = \frac{2\sqrt3}{3}        (x+1)^2 = x^2 + 2x + 1
    \{1, 2\} = {2, 1}     (-\infty, 3] \cup [5, 7) = [5,7) ∪ (-∞,3]      1.5 m = 150 cm     1\frac12 = 3/2
    1 < x \le 2 = (1, 2]  2x + 3y = 6 and 6y = 12 - 4x    x = 1 or x = 2, as {1, 2}    6:8 = 3:4 = 3/4    \log_2 8 = 3

Exact (see polynomial.py), without dependencies. What it cannot express (logarithms, cube roots, …) goes to sympy where
that is installed (the extra `data`), in a process of its own with a time limit. Never evaluates an answer as Python.
Where in doubt the answer is wrong: a policy finds what is wrongly accepted.
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

from tritium.core.chat import parse_reasoning
from tritium.core.rewards import Score
from tritium.core.rewards.exact import NUMBER
from tritium.core.rewards.expression import FUNCTIONS, GREEK, Expression
from tritium.core.rewards.latex import latex_to_plain
from tritium.core.rewards.polynomial import NotExact, Ratio
from tritium.core.rewards.words import WORDS
from tritium.core.rewards.worker import WorkerError, call

LONGEST, MOST_ITEMS = 1000, 64  # characters of an answer that is compared as mathematics; items of a set
MATRIX = re.compile(r"[\s$]*\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}[\s$.]*", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
INTERVALS = ("()", "[]", "[)", "(]")
NAME = re.compile(  # x = …, f(x) = …, θ = …, AB = …, (x, y) = …
    rf"\s*((?:[a-zA-Z]|[A-Z]{{2}}|{'|'.join(GREEK)})(?:_\w+)?(?:\s*\([a-zA-Z]\))?|\([a-z](?:\s*,\s*[a-z])+\))\s*="
)
UNITS = {  # name → (dimension, size)
    name: (dimension, Fraction(size)) for dimension, sizes in WORDS["units"].items() for name, size in sizes.items()
}
WORD = r"[a-zA-Z]+(?:\^?[23])?"  # no part of a pattern can match what the next one does: no time to lose
UNIT = re.compile(rf"^(.*(?:[\d)⟩.]|\bpi))(\s*)({WORD}(?:\s*/\s*{WORD}|\s+{WORD})*)\.?$", re.DOTALL)
RATIO = re.compile(r"[1-9a-z(][^:=<>≤≥≠]*(?::\s*[1-9a-z(][^:=<>≤≥≠]*)+")  # 2:00 is none
FORMULA = re.compile(r"\$\$?([^$]+)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
SAID = re.compile(r"(?:####|answer\s*(?:is|:|=)+)\s*(?:(?:\\\[|\$\$)\s+)?(.+?)(?:\.(?=\s|$)|\n|$)", re.IGNORECASE)


@dataclass(frozen=True)
class MathMatch:
    """1 where the answer means the same as the reference, 0 where not, `malformed` where there is no answer.

    The answer is what the last \\boxed{} holds, or follows "the answer is" or ####; else the last formula, the whole
    text where it is one, or the last number; a reference that is no formula is read likewise. A percentage without its
    sign counts where the reference has none.
    """

    malformed: float = 0.0
    seconds: float = 5.0  # of sympy

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        if not reference.strip():
            raise ValueError("there is no reference answer to compare with")
        wanted = boxed(reference) or reference
        if not parsed(wanted):  # of 7 \\pmod{12}, no part stands for all
            wanted = extract(wanted, guess=not re.search(r"[\\_^]", wanted))
        answer = extract(parse_reasoning(text)[1], wanted)
        if not answer:
            return Score(self.malformed, "no answer")
        if equivalent(answer, wanted, self.seconds):
            return Score(1.0, "right")
        return Score(0.0, f"wrong: {answer[-60:]!r} is not {wanted!r}")


def boxed(text: str) -> str:
    r"""What the last \boxed{…} holds; empty where there is none, or it is cut off."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i].strip()
    return ""


def extract(answer: str, reference: str = "", guess: bool = True) -> str:
    """The final answer in a text, at a `guess` its last number; empty where there is none. An equation is one where the
    reference is."""
    if "\\boxed{" in answer:
        return boxed(answer)
    if said := SAID.findall(answer):
        return said[-1].strip(" .*:`")
    value, wanted = parsed(answer), parsed(reference)
    if plain(answer) == plain(reference) or value and (value.kind != "=" or wanted and wanted.kind == "="):
        return answer
    found = FORMULA.findall(answer[-LONGEST:])
    formulas = ["".join(formula).rpartition("=")[2].strip() for formula in found]
    if formulas := [f for f in formulas if parsed(f) or plain(f).isalpha()]:  # "$5 for tea and $" is none
        value = parsed(formulas[-1])
        several = wanted and wanted.kind in ("list", "set") and value and value.kind == "number"  # $x=1$ and $x=2$
        return ", ".join(formulas) if several and "\n" not in answer.strip() else formulas[-1]
    last = answer.strip().rpartition("\n")[2].rpartition("=")[2].strip(" .*")
    if parsed(last) is not None:
        return last
    numbers = NUMBER.findall(answer)
    return numbers[-1] if numbers and guess else last


def equivalent(answer: str, reference: str, seconds: float = 5.0) -> bool:
    """Whether two answers are equal as values; texts that are no mathematics, up to case and spaces.

    Raises: worker.WorkerError where sympy took too long.
    """
    x, y = plain(answer), plain(reference)
    if x == y or x.isalpha() and x.lower() == y.lower():
        return x != ""
    a, b = parsed(answer), parsed(reference)
    if a is None or b is None:
        return a is b and x.lower() == y.lower()
    return same(a, b, time.monotonic() + seconds)


class Value(NamedTuple):
    """`kind` is "number", or what holds `items`: "()", "[]", "[)", "(]", "set", "list" (without brackets), "union",
    "matrix", or the sign of a relation."""

    kind: str
    items: tuple["Value", ...] = ()
    text: str = ""  # of a number, in plain operators
    ratio: Ratio | None = None  # None: not exact
    unit: str = ""
    name: str = ""  # what it is the value of, where that is said


def same(a: Value, b: Value, until: float) -> bool:
    kinds = {a.kind, b.kind}
    if kinds == {"number", "="}:  # y = 2x + 1 gives y a value; 2x - y + 1 = 0 says the same
        a, b = (Value("=", (number(f"({v.name})-({v.text})"),)) if v.name else v for v in (a, b))
        kinds = {a.kind, b.kind}
    if a.name and b.name and a.name != b.name or len(kinds) == 2 and kinds not in ({"set", "list"}, {"()", "list"}):
        return False
    if kinds == {"number"}:
        return same_number(a, b, until)
    if kinds in ({"="}, {"≠"}):
        return proportional(a.items[0], b.items[0])
    if kinds <= {"set", "list"} or kinds == {"union"}:  # unordered; in brackets, what is there twice counts once
        if kinds == {"list"} and len(a.items) != len(b.items):
            return False
        pairs = ((a.items, b.items), (b.items, a.items))
        return all(any(same(x, y, until) for y in others) for items, others in pairs for x in items)
    return len(a.items) == len(b.items) and all(same(x, y, until) for x, y in zip(a.items, b.items, strict=True))


def proportional(a: Value, b: Value) -> bool:
    """Of the differences of two equations' sides: whether one is the other times a number."""
    try:
        return a.ratio is not None and b.ratio is not None and a.ratio.over(b.ratio).fraction() != 0
    except NotExact:
        return False


def same_number(a: Value, b: Value, until: float) -> bool:
    (dim_a, f), (dim_b, g) = measure(a.unit), measure(b.unit)
    if dim_a and dim_b and dim_a != dim_b:
        return False
    if a.ratio is None or b.ratio is None:
        return dim_a == dim_b and f == g and same_by_sympy(a.text, b.text, until)
    if (a.unit == "%") != (b.unit == "%") and a.ratio.same(b.ratio) and not is_small(b.ratio):
        return True  # "50%" where "50" is asked for
    if bool(dim_a) != bool(dim_b):  # a unit may be left unsaid
        f, g = (Fraction(1) if dim else factor for dim, factor in ((dim_a, f), (dim_b, g)))
    return a.ratio.times(Ratio.of(f)).same(b.ratio.times(Ratio.of(g)))


def measure(unit: str) -> tuple[frozenset, Fraction]:
    """The dimensions of a unit with their exponents, and its size: "km/h" is 5/18 of length / time."""
    dimensions, factor, sign = Counter(), Fraction(1), 1
    for over, name, power in re.findall(r"(/?)\s*([a-z%]+)\^?(\d?)", unit):
        sign = -1 if over else sign
        name = name if name in UNITS else name.removesuffix("s")
        dimension, size = UNITS.get(name, (name, Fraction(1)))
        exponent = sign * int(power or 1)
        dimensions[dimension] += exponent if dimension else 0
        factor *= size**exponent
    return frozenset((d, e) for d, e in dimensions.items() if e), factor


def is_small(y: Ratio) -> bool:
    try:
        return 0 < abs(y.fraction()) <= 1
    except NotExact:
        return False


def same_by_sympy(a: str, b: str, until: float) -> bool:
    if find_spec("sympy") is None:
        return False
    if (left := until - time.monotonic()) <= 0:
        raise WorkerError("no answer in time: too many comparisons that need sympy")
    return call("tritium.core.rewards.maths:sympy_equal", [a, b], left)


def sympy_equal(a: str, b: str) -> bool:
    """Run in a process of its own. The texts hold numbers, operators, variables and `FUNCTIONS` only."""
    import sympy

    words = {*re.findall(r"[a-zA-Z_]\w*", f"{a} {b}")} - {*FUNCTIONS, "Abs", "factorial"}
    names = {word: sympy.Symbol(word, real=True) for word in words}
    names |= {"e": sympy.E, "i": sympy.I, "ln": sympy.log, "pi": sympy.pi}
    y = sympy.sympify(b, locals=names, rational=True)
    try:
        return bool(sympy.simplify(sympy.sympify(a, locals=names, rational=True) - y) == 0)
    except Exception:  # an answer that sympy can't read is not the reference
        return False


def plain(text: str) -> str:
    """A text without LaTeX's dress, spaces (but those that keep two numbers apart), and brackets around a letter."""
    text = re.sub(r"\s+(?=\D|$)|(?<=\D)\s+|[{}]", "", latex_to_plain(text[:LONGEST])).strip("*")
    return re.sub(r"^\((\w)\)$", r"\1", text)


def parsed(text: str) -> Value | None:
    """None where the text is no mathematics."""
    if len(text) > LONGEST:
        return None
    try:
        if not (matrix := MATRIX.fullmatch(text)):
            return parse(latex_to_plain(text))
        rows = [row.split("&") for row in matrix[1].strip().removesuffix("\\\\").split("\\\\")]
        cells = (tuple(parse(latex_to_plain(cell)) for cell in row) for row in rows)
        return Value("matrix", tuple(Value("()", row) for row in cells))
    except (ValueError, OverflowError, RecursionError):
        return None


def parse(text: str) -> Value:
    """Raises: ValueError for what is no mathematics."""
    text = text.strip()
    text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) if text[:1] not in ("(", "[", "⟨", "{") else text
    parts = split_list(re.sub(r",\s*(?:or|and)\s", ",", text))
    if len(parts) == 1 and (" or " in text or " and " in text):
        parts = re.split(r"\s+(?:or|and)\s+", text)
    if len(parts) > 1:
        items = parse_all(part for part in parts if part.strip())
        either = " or " in text and all(item.kind in INTERVALS for item in items)  # x < 1 or x > 2
        return Value("union" if either else "list", items)
    if "∪" in text and not NAME.match(text):
        return Value("union", parse_all(text.split("∪")))
    if (named := NAME.match(text)) and not re.search("[=<>≤≥≠]", text[named.end() :]):
        return parse(text[named.end() :])._replace(name=re.sub(r"\s", "", named[1]))
    if "±" in text:
        return Value("set", tuple(parse(text.replace("±", sign)) for sign in "+-"))
    if RATIO.fullmatch(text):  # 6:8 is 3/4; of more terms, each to the first
        first, *others = text.split(":")
        parts = [number(f"({first})/({other})") for other in others]
        return parts[0] if len(parts) == 1 else Value(":", tuple(parts))
    if re.search("[=<>≤≥≠]", text):
        return relation(re.split(r"\s*([=<>≤≥≠])\s*", text))
    brackets, inner = text[:1] + text[-1:], text[1:-1]
    if brackets in ("⟨⟩", "{}"):
        return Value("set", parse_all(split_list(inner)) if inner.strip() else ())
    if brackets in INTERVALS and len(split_list(inner)) > 1:
        return Value(brackets, parse_all(split_list(inner)))
    return number(text)


def parse_all(parts) -> tuple[Value, ...]:
    values = tuple(parse(part) for part in parts)
    if len(values) > MOST_ITEMS:
        raise ValueError(f"more than {MOST_ITEMS} items")
    return values


def relation(sides: list[str]) -> Value:
    """An inequality in a variable is an interval; any other compares its sides. `sides` come with the signs between.

    Raises: ValueError where the signs do not go together.
    """
    if {*sides[1::2]} <= {*">≥"}:
        sides = [{">": "<", "≥": "≤"}.get(side, side) for side in reversed(sides)]
    signs, sides = sides[1::2], sides[::2]
    variable = [bool(re.fullmatch(r"[a-zA-Z](?:_\w+)?", side)) for side in sides]
    if {*signs} <= {*"<≤"} and variable in ([True, False], [False, True], [False, True, False]):
        low = "-infty" if variable[0] else sides[0]
        high = "infty" if variable[-1] else sides[-1]
        opened = "(" if variable[0] or signs[0] == "<" else "["
        closed = ")" if variable[-1] or signs[-1] == "<" else "]"
        return Value(opened + closed, (number(low), number(high)), name=sides[variable.index(True)])
    if len(signs) != 1:
        raise ValueError(f"the signs {', '.join(signs)}")
    if signs[0] in "=≠":
        return Value(signs[0], (number(f"({sides[0]})-({sides[1]})"),))
    return Value(signs[0], tuple(number(side) for side in sides))


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
    elif (found := UNIT.match(text)) and is_unit(*found.groups()):
        text, unit = found[1], found[3].lower()
        unit = {"percent": "%", "deg": "degree", "degrees": "degree"}.get(unit, unit)
    expression = Expression(text)
    ratio = expression.whole()
    return Value("number", (), "".join(expression.written), None if expression.inexact else ratio, unit)


def is_unit(before: str, space: str, unit: str) -> bool:
    """A letter alone is a unit only after a number and a space: 2 h are hours, 2h is twice h; 2 pi h is no time."""
    words = re.findall("[a-zA-Z]+", unit)
    if {*words} & {*FUNCTIONS, *GREEK, "pi", "infty"} or "deg" in words and re.search("sin|cos|tan", before):
        return False
    if len(words[0]) == 1:
        return bool(space) and before[-1] in "0123456789." and all(len(w) > 1 or w in UNITS for w in words)
    return any(len(word) > 1 for word in words) and (len(words[0]) > 2 or words[0] in UNITS or bool(space))
