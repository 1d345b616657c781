"""The verifier of short answers: right or wrong, after the reasoning."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tritium.core.chat import parse_reasoning
from tritium.core.rewards import Score

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


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
        value, target = (Fraction(numbers[-1].replace(",", "")) for numbers in (found, wanted))
        if abs(value - target) <= Fraction(self.tolerance) * abs(target):
            return Score(1.0, "right")
        return Score(0.0, f"wrong: {found[-1]} is not {wanted[-1]}")


def final_answer(answer: str, reference: str) -> str:
    """What of `answer` is compared with `reference`."""
    if NUMBER.fullmatch(reference.strip()):
        numbers = NUMBER.findall(answer)
        return normal(numbers[-1]) if numbers else ""
    return normal(answer)


def normal(text: str) -> str:
    """A number without thousands separators and trailing zeros; any other text in lower case, single spaces."""
    text = " ".join(text.lower().split())
    if not NUMBER.fullmatch(text):
        return text
    text = text.replace(",", "")
    return (text.rstrip("0").rstrip(".") if "." in text else text).lstrip("0") or "0"
