"""Judges from text, and judges made of judges.

    math                                         one judge
    math + 0.2*tags("think", "answer") - 0.5*repetition     a weighted sum; each component is kept in Score.parts
    gate(json("name"), math)                     math where the first is 1, else 0
    clip(math + 0.1*length(100, 200), -1, 1)    bounded
    abstain(math, right=1, abstained=0, wrong=-4)
    model("runs/reward") + process("runs/steps")  trained by `tritium reward`: of the answer, of each of its steps
    model("runs/heads", helpfulness=0.7, verbosity=-0.2)    a weighted sum of its heads
    ensemble(model("runs/a"), model("runs/b"), k=0.5)       mean − k · standard deviation

The text is Python's syntax, read but never run: names, calls with constants, +, −, and * with a number.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

from tritium.core.chat import parse_reasoning
from tritium.core.config import ConfigError, listed
from tritium.core.rewards import Answer, Composed, Reward, Score, scores
from tritium.core.rewards.classifier import Rules
from tritium.core.rewards.code import Code
from tritium.core.rewards.exact import ExactMatch, NumberMatch
from tritium.core.rewards.llm import open_judge
from tritium.core.rewards.maths import MathMatch
from tritium.core.rewards.scorer import ModelReward, ProcessReward
from tritium.core.rewards.text import Json, Language, Length, Regex, Repetition, Tags, Words
from tritium.core.rewards.words import WORDS


@dataclass(frozen=True)
class WeightedSum(Composed):
    """Σ weight · judge. `parts` are the judges' own values; an answer is right where the first judge says so.

    Where one judge fails, the sum fails, with its name. Where one scores steps, the sum does too: what the others say
    of the whole answer comes at its last token.
    """

    judges: dict[str, Reward]
    weights: dict[str, float]

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        columns = {name: scores(judge, answers) for name, judge in self.judges.items()}
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(answers))]
        return [self.total(row, len(a.ids) - 1) for row, a in zip(rows, answers, strict=True)]

    def total(self, given: dict[str, Score | Exception], last: int) -> Score | Exception:
        for name, score in given.items():
            if isinstance(score, Exception):
                return type(score)(f"{name}: {score}") if type(score) in (ValueError, RuntimeError) else score
        value = sum(self.weights[name] * score.value for name, score in given.items())
        parts = {name: score.value for name, score in given.items()}
        for score in given.values():
            parts |= score.parts
        first = next(iter(given.values()))
        reason = "; ".join(f"{name}: {score.reason}" for name, score in given.items() if score.reason)
        total = Score(value, reason, first.steps, parts, right=first.solved)
        return replace(total, **self.steps(given, last)) if any(s.ends for s in given.values()) else total

    def steps(self, given: dict[str, Score], last: int) -> dict[str, tuple]:
        at: dict[int, float] = {}
        for name, score in given.items():
            places = zip(score.ends, score.steps, strict=True) if score.ends else [(last, score.value)]
            for end, value in places:
                at[end] = at.get(end, 0.0) + self.weights[name] * value
        return {"ends": tuple(sorted(at)), "steps": tuple(at[end] for end in sorted(at))}


WHOLE: dict[str, tuple] = {"steps": (), "ends": ()}  # of a score that speaks of no steps


def together(judges: Sequence[Reward], answers: Sequence[Answer], combine: Callable) -> list[Score | Exception]:
    """What `combine` makes of the judges' scores of each answer; where one fails, its failure."""
    columns = [scores(judge, answers) for judge in judges]
    failed = lambda row: next((score for score in row if isinstance(score, Exception)), None)  # noqa: E731
    return [failed(row) or combine(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Gate(Composed):
    """What `judge` says where `condition` gives 1 or more, else `closed`; the judge is not asked there."""

    condition: Reward
    judge: Reward
    closed: float = 0.0

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        given = scores(self.condition, answers)
        is_open = [i for i, score in enumerate(given) if isinstance(score, Score) and score.value >= 1]
        asked = dict(zip(is_open, scores(self.judge, [answers[i] for i in is_open]), strict=True))
        closed = {"value": self.closed, "right": False} | WHOLE
        shut = [s if isinstance(s, Exception) else replace(s, **closed) for s in given]
        return [asked.get(i, shut[i]) for i in range(len(answers))]


@dataclass(frozen=True)
class Clip(Composed):
    """The judge's value, held between `low` and `high`; each step's, where it scores steps."""

    judge: Reward
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low <= self.high:
            raise ConfigError(f"reward: clip(…, {self.low}, {self.high}): the first must not be above the second")

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        return together([self.judge], answers, self.clipped)

    def clipped(self, score: Score) -> Score:
        value, *steps = (min(max(v, self.low), self.high) for v in (score.value, *score.steps))
        return replace(score, value=value, steps=tuple(steps), right=score.solved)


@dataclass(frozen=True)
class Ensemble(Composed):
    """The judges' mean less `k` standard deviations: where they disagree, an answer may only look good (Coste et al.,
    arXiv 2310.02743, section 3.2, with the variance's root). Where one fails, all do."""

    judges: tuple[Reward, ...]
    k: float = 0.0

    def __post_init__(self):
        if len(self.judges) < 2 or self.k < 0:
            raise ConfigError(f"reward: an ensemble of {len(self.judges)}, k={self.k}: give two judges or more, k ≥ 0")

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        return together(self.judges, answers, self.doubted)

    def doubted(self, *row: Score) -> Score:
        values = [score.value for score in row]
        mean, std = fmean(values), pstdev(values)
        return Score(mean - self.k * std, parts={"mean": mean, "std": std}, right=all(s.solved for s in row))


@dataclass(frozen=True)
class Abstain(Composed):
    """Right +1, "I don't know" 0, wrong −4: guessing pays only above 80 % confidence."""

    judge: Reward
    right: float = 1.0
    abstained: float = 0.0
    wrong: float = -4.0

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        given, said = together([self.judge], answers, self.paid), Score(self.abstained, "abstained", right=False)
        return [said if abstains(answer.text) else score for answer, score in zip(answers, given, strict=True)]

    def paid(self, score: Score) -> Score:
        return replace(score, value=self.right if score.solved else self.wrong, right=score.solved, **WHOLE)


def abstains(text: str) -> bool:
    """Whether an answer says no more than that it does not know: "I don't know, but 7" is a guess."""
    answer = parse_reasoning(text)[1].lower().replace("’", "'").strip(" .!*")
    return any(answer.endswith(words) for words in WORDS["abstentions"]) and not any(c.isdigit() for c in answer)


JUDGES: dict[str, Any] = {
    "exact": ExactMatch, "number": NumberMatch, "math": MathMatch, "code": Code, "regex": Regex, "length": Length,
    "tags": lambda *names: Tags(names or ("think",)), "json": lambda *keys: Json(keys), "repetition": Repetition,
    "language": Language, "words": Words, "rules": Rules, "judge": open_judge, "gate": Gate, "clip": Clip,
    "model": lambda folder, **weights: ModelReward(folder, weights=weights),
    "process": lambda folder, over="min": ProcessReward(folder, over=over),
    "ensemble": lambda *judges, k=0.0: Ensemble(judges, k), "abstain": Abstain,
}  # fmt: skip
ASKS = {"gate": 2, "clip": 1, "abstain": 1, "ensemble": 100}  # how many of their first arguments are judges


def make_reward(spec: str, malformed: float | None = None) -> Reward:
    """The judge that a text describes. See the module's docstring.

    `malformed` is what exact, number and math give where there is no answer, unless the text says (default: 0).
    Raises: ConfigError naming what is wrong in the text.
    """
    try:
        parsed = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError:
        raise ConfigError(f"reward={spec!r} can't be read: write e.g. math + 0.1*tags") from None
    return _sum(_terms(parsed, 1.0), {} if malformed is None else {"malformed": malformed})


def _sum(terms: list[tuple[float, ast.expr]], defaults: dict) -> Reward:
    judges: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    for weight, node in terms:
        name = ast.unparse(node)
        judges[name], weights[name] = _build(node, defaults), weights.get(name, 0.0) + weight
    if len(judges) == 1 and next(iter(weights.values())) == 1:
        return next(iter(judges.values()))
    return WeightedSum(judges, weights)


def _terms(node: ast.expr, weight: float) -> list[tuple[float, ast.expr]]:
    """A sum as (weight, judge) each."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as operator, right):
            return _terms(left, weight) + _terms(right, -weight if isinstance(operator, ast.Sub) else weight)
        case ast.UnaryOp(ast.USub(), operand):
            return _terms(operand, -weight)
        case ast.BinOp(ast.Constant(int() | float() as factor), ast.Mult(), right):
            return _terms(right, weight * factor)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int() | float() as factor)):
            return _terms(left, weight * factor)
    return [(weight, node)]


def _build(node: ast.expr, defaults: dict) -> Reward:
    name, arguments, keywords = node, [], []
    if isinstance(node, ast.Call):
        name, arguments, keywords = node.func, node.args, node.keywords
    if not isinstance(name, ast.Name):
        raise ConfigError(f"reward: {ast.unparse(node)!r} is no judge: write a name, e.g. math, or a sum of them")
    if name.id not in JUDGES:
        raise ConfigError(f"reward: no judge {name.id!r}; {listed(name.id, JUDGES)}")
    given = {k.arg: _argument(k.value, defaults) for k in keywords}
    if name.id in ("exact", "number", "math"):
        given = {**defaults, **given}
    values = [_argument(a, defaults) for a in arguments]
    if odd := [value for value in values[: ASKS.get(name.id, 0)] if not callable(value)]:
        raise ConfigError(f"reward: {ast.unparse(node)}: {odd[0]!r} is no judge")
    try:
        return JUDGES[name.id](*values, **given)
    except TypeError as error:
        raise ConfigError(f"reward: {ast.unparse(node)}: {str(error).partition(') ')[2] or error}") from None


def _argument(node: ast.expr, defaults: dict) -> Any:
    """A constant as it is; anything else is a judge."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _sum(_terms(node, 1.0), defaults)
