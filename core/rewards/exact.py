"""The verifier of short answers: right or wrong, after the reasoning."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tritium.core.chat import parse_reasoning
from tritium.core.rewards import Score

NUMBER = re.compile(  # 1,234.5, -$2 and 1/2 are one number each; the sign in 3-4 is none
    r"(?:(?<![\w)])-\$?)?(?:\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/0*[1-9]\d*)?"
)
LONGEST = 1000  # characters of a number


@dataclass(frozen=True)
class ExactMatch:
    """1 where the answer (what follows </think>) is the reference, else 0, or `malformed` where there is no answer.

    Where the reference is a number, the answer's last number counts: "The total is 1,232." is 1232. Otherwise the
    texts must be equal up to case and white space.
    """

    malformed: float = 0.0

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        if not reference:
            raise ValueError("there is no reference answer to compare with")
        _, answer = parse_reasoning(text)
        if not answer:
            return Score(self.malformed, "no answer")
        if final_answer(answer, reference) == normal(reference):
            return Score(1.0, "right")
        return Score(0.0, f"wrong: {answer[-40:]!r} is not {reference!r}")


@dataclass(frozen=True)
class NumberMatch:
    """1 where the answer's last number equals the reference's (its only or last one) within `tolerance`, relative."""

    tolerance: float = 0.0
    malformed: float = 0.0

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        wanted, found = (NUMBER.findall(t.replace("−", "-")) for t in (reference, parse_reasoning(text)[1]))
        if not wanted:
            raise ValueError(f"the reference {reference!r} holds no number")
        if not found:
            return Score(self.malformed, "no number")
        value, target = fraction(found[-1]), fraction(wanted[-1])
        if value is not None and abs(value - target) <= Fraction(self.tolerance) * abs(target):
            return Score(1.0, "right")
        return Score(0.0, f"wrong: {found[-1][:40]} is not {wanted[-1]}")


def final_answer(answer: str, reference: str) -> str:
    """What of `answer` is compared with `reference`."""
    if NUMBER.fullmatch(reference.strip()):
        numbers = NUMBER.findall(answer)
        return normal(numbers[-1]) if numbers else ""
    return normal(answer)


def normal(text: str) -> str:
    """A number as a fraction in lowest terms; any other text in lower case, single spaces."""
    text = " ".join(text.lower().split())
    value = fraction(text) if NUMBER.fullmatch(text) else None
    return text if value is None else str(value)


def fraction(number: str) -> Fraction | None:
    """The value of what `NUMBER` matches; None for one that is there to hang the judge."""
    if len(number) > LONGEST:
        return None
    top, _, bottom = re.sub("[,$]", "", number).partition("/")
    return Fraction(top) / int(bottom or 1)
