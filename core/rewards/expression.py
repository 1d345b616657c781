"""Mathematical expressions in plain operators: their exact value, and themselves as sympy reads them."""

import re
from fractions import Fraction
from math import factorial

from tritium.core.rewards.polynomial import NotExact, Ratio
from tritium.core.rewards.words import WORDS

TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\w*_)|\.\d+|[a-zA-Z]+(?:_\w+)?|\*\*|[-+*/^()!|])")
FUNCTIONS = ("sin", "cos", "tan", "log", "ln", "exp", "sqrt", "asin", "acos", "atan")
GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lamda", "mu", "sigma", "phi", "omega")


def tokens_of(text: str) -> list[str]:
    """Raises: ValueError for what is no expression."""
    tokens, place = [], 0
    while place < len(text.rstrip()):
        if not (match := TOKEN.match(text, place)):
            raise ValueError(text)
        word = match[1]
        known = word.lower() in (*FUNCTIONS, *GREEK, *WORDS["prose"], "pi", "infty", "deg") or len(word) > 3
        tokens += word if word.isalpha() and not known else [word]  # xy is x times y
        place = match.end()
    if "infty" in tokens and len([token for token in tokens if token not in "+()"]) > 1 + (tokens[0] == "-"):
        raise ValueError("arithmetic with infinity")
    return tokens


def is_function(token: str) -> bool:
    return token in FUNCTIONS or re.fullmatch(r"log_(\d+|[a-z])", token) is not None


class Expression:
    """Recursive descent: sum → product → power → atom. Computes a `Ratio`, and writes the expression out for sympy.

    Where a step has no exact value, `inexact` says so and the value is of no use, but the syntax is still checked.
    """

    def __init__(self, text: str):
        self.tokens, self.place, self.inexact = tokens_of(text), 0, False
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

    def whole(self) -> Ratio:
        """Raises: ValueError where it is none, or something comes after it."""
        value = self.sum()
        if self.peek():
            raise ValueError(f"{self.peek()} where it should end")
        return value

    def sum(self) -> Ratio:
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            other = self.product()
            total = self.exact(lambda a=total, b=other, s=sign: a.plus(b, s))
        return total

    def product(self) -> Ratio:
        total = self.signed()
        while self.peek() and self.peek() not in ("+", "-", ")", "|"):
            operator = self.take() if self.peek() in ("*", "/") else self.written.append("*")
            if not operator and self.peek()[0] in "0123456789.":
                raise ValueError("two numbers side by side")
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
        if self.peek() == "!":
            n = base.fraction()  # of something else it is no value that we know
            if self.inexact or n.denominator != 1 or not 0 <= n <= 1000:
                raise ValueError(f"{n}!")
            self.take(f"*{factorial(n.numerator - 1)}" if n else "**0")  # n! = n · (n − 1)!; 0! = 1 = 0⁰
            base = Ratio.of(factorial(n.numerator))
        if self.peek() in ("^", "**"):
            self.take("**")
            exponent = self.signed()
            return self.exact(lambda: base.power(exponent))
        return base

    def atom(self) -> Ratio:
        token = self.take()
        if token in ("(", "|"):
            start = len(self.written)
            value = self.sum()
            if self.take() != (")" if token == "(" else "|"):
                raise ValueError("a bracket that is not closed")
            return value if token == "(" else self.absolute(value, start)
        if token[0].isdigit() or token[0] == ".":
            if len(token) > 300 or "e" in token.lower() and abs(int(token.lower().partition("e")[2])) > 300:
                raise ValueError("a number too long")
            return Ratio.of(Fraction(token))
        if is_function(token):
            return self.function(token)
        if token == "infty":
            self.written[-1] = "oo"
            return Ratio.of(1, token)
        if token in ("pi", *GREEK) or len(token.partition("_")[0]) == 1 and token[0].isalpha():
            if token in ("f", "g") and self.peek() == "(":
                raise ValueError("a function that nobody knows")
            self.inexact = self.inexact or token == "i" or token == "e" and self.peek() in ("^", "**")
            return Ratio.of(1, token)
        raise ValueError(token)

    def absolute(self, value: Ratio, start: int) -> Ratio:
        self.written[start - 1], self.written[-1] = "Abs(", ")"
        return self.exact(lambda: Ratio.of(abs(value.fraction())))

    def function(self, name: str) -> Ratio:
        """sin x, sin(x), sin^2 x, log_2 x; without brackets the argument goes on to the next operator or function."""
        power, start, base = [], len(self.written), name.partition("_")[2]
        if base:
            self.written[-1] = "(log"
        if self.peek() == "^":
            self.take()
            self.signed()
            power, self.written[start:] = ["**", "(", *self.written[start + 1 :], ")"], []
        self.written.append("(")
        bare = self.peek() != "("
        value = self.power()
        while bare and name != "sqrt" and self.peek()[:1].isalpha() and not is_function(self.peek()):
            if self.peek() == "deg":
                self.take("*pi/180")
                continue
            self.written.append("*")
            factor = self.power()
            value = self.exact(lambda a=value, b=factor: a.times(b))
        self.written += [f")/log({base}))" if base else ")", *power]
        if name == "sqrt" and not power:
            return self.exact(value.root)
        self.inexact = True
        return value
