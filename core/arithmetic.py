"""Generated arithmetic: problems with a worked solution and an answer that can be checked.

| kind     | question                                                        | numbers                           |
|----------|-----------------------------------------------------------------|-----------------------------------|
| add      | What is 347 + 85?                                               | both 10 … 999                     |
| subtract | What is 532 - 287?                                              | 10 … 999, never below zero        |
| multiply | What is 7 * 38?                                                 | 2 … 9 times 10 … 999              |
| two_step | What is 46 + 87 - 59?                                           | 10 … 99, no result below zero     |
| story    | Tom has 46 apples and buys 87 more. How many apples does Tom have? | as add or subtract, up to 99   |

The first three have a second form: "Add 347 and 85.", "Subtract 287 from 532.", "Multiply 7 by 38.". The answer is a
whole number in digits. Solutions work digit by digit from the right, as one does on paper:

    347 + 85    7+5=12 4+8+1=13 3+1=4         → 432      the carry is added in the next step
    532 - 287   12-7=5 13-8-1=4 5-2-1=2       → 245      a borrow puts 10 before a digit and takes 1 in the next step
    7 * 38      7*8=56 7*3+5=26               → 266
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Eva")
THINGS = ("apples", "coins", "books", "cards", "shells", "stamps", "pens", "marbles")


@dataclass(frozen=True)
class Problem:
    """`difficulty` is the number of digit steps in the solution."""

    kind: str
    question: str
    reasoning: str
    answer: str
    difficulty: int


def problems(seed: int, count: int, kinds: tuple[str, ...] = ()) -> list[Problem]:
    """`count` problems, of all kinds in equal shares unless `kinds` are named; a question may come twice."""
    rng = np.random.default_rng([seed, 0xA217])
    makers = [MAKERS[kind] for kind in kinds or MAKERS]
    return [makers[i % len(makers)](rng) for i in range(count)]


def chat_answer(problem: Problem) -> str:
    """The assistant's turn: the reasoning in <think>, then the answer alone."""
    return f"<think>{problem.reasoning}</think>{problem.answer}"


def equation(problem: Problem) -> str:
    """A line of text for pretraining: question, working, answer."""
    return f"{problem.question} {problem.reasoning} Answer: {problem.answer}"


# ---------------------------------------------------------------------------------------------- working by digits


def add_steps(a: int, b: int) -> list[str]:
    """Column addition from the right; a carry shows as +1 in the next step."""
    steps, carry = [], 0
    for x, y in columns(a, b):
        terms = [str(d) for d in (x, y) if d is not None] + (["1"] if carry else [])
        total = (x or 0) + (y or 0) + carry
        steps.append(f"{'+'.join(terms)}={total}")
        carry = total // 10
    return steps


def subtract_steps(a: int, b: int) -> list[str]:
    """Column subtraction, a ≥ b; a borrow puts 10 before the digit, and takes 1 in the next step."""
    steps, borrow = [], 0
    for x, y in columns(a, b):
        short = x - (y or 0) - borrow < 0
        top = x + 10 if short else x
        terms = [str(top)] + ([] if y is None else [str(y)]) + (["1"] if borrow else [])
        steps.append(f"{'-'.join(terms)}={top - (y or 0) - borrow}")
        borrow = int(short)
    return steps


def multiply_steps(a: int, b: int) -> list[str]:
    """A digit times a number, from the right; the carry is added in the next step."""
    steps, carry = [], 0
    for digit in map(int, reversed(str(b))):
        total = a * digit + carry
        steps.append(f"{a}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return steps


def columns(a: int, b: int) -> list[tuple[int | None, int | None]]:
    """The digits of both numbers from the right; None where one has no more."""
    x, y = str(a)[::-1], str(b)[::-1]
    digit = lambda text, i: int(text[i]) if i < len(text) else None  # noqa: E731
    return [(digit(x, i), digit(y, i)) for i in range(max(len(x), len(y)))]


# ---------------------------------------------------------------------------------------------- kinds


def pick(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def two_numbers(rng: np.random.Generator, high: int) -> tuple[int, int]:
    """Two numbers from 10 to `high`, the larger one first."""
    a, b = pick(rng, 10, high), pick(rng, 10, high)
    return max(a, b), min(a, b)


def build(kind: str, question: str, steps: list[str], answer: int) -> Problem:
    return Problem(kind, question, " ".join(steps), str(answer), len(steps))


def make_add(rng: np.random.Generator) -> Problem:
    a, b = pick(rng, 10, 999), pick(rng, 10, 999)
    return build("add", (f"What is {a} + {b}?", f"Add {a} and {b}.")[pick(rng, 0, 1)], add_steps(a, b), a + b)


def make_subtract(rng: np.random.Generator) -> Problem:
    a, b = two_numbers(rng, 999)
    question = (f"What is {a} - {b}?", f"Subtract {b} from {a}.")[pick(rng, 0, 1)]
    return build("subtract", question, subtract_steps(a, b), a - b)


def make_multiply(rng: np.random.Generator) -> Problem:
    a, b = pick(rng, 2, 9), pick(rng, 10, 999)
    question = (f"What is {a} * {b}?", f"Multiply {a} by {b}.")[pick(rng, 0, 1)]
    return build("multiply", question, multiply_steps(a, b), a * b)


def make_two_step(rng: np.random.Generator) -> Problem:
    a, b = pick(rng, 10, 99), pick(rng, 10, 99)
    if rng.random() < 0.5:
        first, sign, steps = a + b, "+", add_steps(a, b)
    else:
        a, b = max(a, b), min(a, b)
        first, sign, steps = a - b, "-", subtract_steps(a, b)
    c = pick(rng, 10, 99)
    if first >= c and rng.random() < 0.5:
        last, second, more = first - c, "-", subtract_steps(first, c)
    else:
        last, second, more = first + c, "+", add_steps(first, c)
    question = f"What is {a} {sign} {b} {second} {c}?"
    return build("two_step", question, [*steps, f"so {first}", *more], last)


def make_story(rng: np.random.Generator) -> Problem:
    name, thing = NAMES[pick(rng, 0, len(NAMES) - 1)], THINGS[pick(rng, 0, len(THINGS) - 1)]
    a, b = two_numbers(rng, 99)
    if rng.random() < 0.5:
        verb = ("buys", "finds", "gets")[pick(rng, 0, 2)]
        question = f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have?"
        return build("story", question, add_steps(a, b), a + b)
    verb = ("loses", "sells", "gives away")[pick(rng, 0, 2)]
    question = f"{name} has {a} {thing} and {verb} {b} of them. How many {thing} are left?"
    return build("story", question, subtract_steps(a, b), a - b)


MAKERS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "add": make_add,
    "subtract": make_subtract,
    "multiply": make_multiply,
    "two_step": make_two_step,
    "story": make_story,
}
