"""Generated problems: every answer and every step of the working is true, and questions come from the seed alone."""

import re

import pytest

from tritium.core.arithmetic import MAKERS, chat_answer, equation, problems
from tritium.core.rewards.exact import ExactMatch

WORDS = {"Add": "{0}+{1}", "Subtract": "{1}-{0}", "Multiply": "{0}*{1}"}  # of the second forms
LESS = ("loses", "sells", "gives away")


def solve(question: str) -> int:
    """The answer, from the words of the question alone."""
    numbers = re.findall(r"\d+", question)
    if question.startswith("What is "):
        return eval(question.removeprefix("What is ").removesuffix("?"))
    if (first := question.split()[0]) in WORDS:
        return eval(WORDS[first].format(*numbers))
    a, b = map(int, numbers)
    return a - b if any(word in question for word in LESS) else a + b


@pytest.mark.parametrize("kind", MAKERS)
def test_answers_are_right_and_never_negative(kind):
    made = problems(0, 300, (kind,))
    assert all(p.kind == kind and int(p.answer) == solve(p.question) >= 0 for p in made)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_step_of_the_working_is_true(kind):
    for problem in problems(1, 300, (kind,)):
        steps = re.findall(r"(\S+)=(\d+)", problem.reasoning)
        assert steps and all(eval(left) == int(right) for left, right in steps), problem


def test_difficulty_is_the_number_of_steps():
    for problem in problems(2, 300):
        assert problem.difficulty == len(re.findall(r"=\d|\bso\b", problem.reasoning))


def test_a_seed_makes_the_same_problems_and_another_seed_others():
    assert problems(3, 200) == problems(3, 200)
    same = {p.question for p in problems(3, 200)} & {p.question for p in problems(4, 200)}
    assert len(same) < 20


def test_kinds_come_in_equal_shares():
    kinds = [p.kind for p in problems(0, 10 * len(MAKERS))]
    assert all(kinds.count(kind) == 10 for kind in MAKERS)


def test_the_chat_answer_satisfies_the_verifier():
    for problem in problems(5, 100):
        assert ExactMatch()([], chat_answer(problem), reference=problem.answer).value == 1.0
        assert problem.question in equation(problem) and equation(problem).endswith(problem.answer)
