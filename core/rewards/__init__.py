"""Judges: from a prompt and an answer to a score. One protocol, whoever judges.

    reward(ids, text, prompt=…, reference=…) -> Score

`judge` runs one over many answers. A judge that raises is *counted*, and its answer takes part in nothing: a broken
verifier must never look like a model that is always wrong. A judge that is better off with many answers at once (a
model, sandboxes side by side) also has `batch`. `make.make_reward` builds judges from text: "math + 0.1*tags".
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol


@dataclass(frozen=True)
class Score:
    """`value` for the whole answer; `steps` for its parts, where the judge sees parts; `reason` for the reader.

    `ends[i]` is the place among the tokens where step i ends. `parts` holds the value of each component of a composed
    judge, before its weight. `right` says whether the answer is right, where `value` does not (None: it is if ≥ 1).
    """

    value: float
    reason: str = ""
    steps: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    right: bool | None = None

    @property
    def solved(self) -> bool:
        return self.value >= 1.0 if self.right is None else self.right


class Reward(Protocol):
    """A judge. `ids` are the answer's tokens as they were sampled, `text` their decoding without control tokens.

    It may have `batch(answers) -> [Score | Exception]` too, in the order of the answers.
    """

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score: ...


@dataclass
class Answer:
    """What a judge is shown."""

    ids: Sequence[int]
    text: str
    prompt: str = ""
    reference: str = ""
    messages: Sequence[dict] = ()  # the whole conversation up to the answer, where there is more than a prompt
    decoder: Callable[[], Any] | None = None  # makes an incremental decoder of `ids`, e.g. Tokenizer.incremental


@dataclass
class Judged:
    """Scores in the order of the answers (None where the judge failed), and why it failed how often."""

    scores: list[Score | None]
    failures: Counter = field(default_factory=Counter)


def judge(reward: Reward, answers: Sequence[Answer]) -> Judged:
    """Score every answer; a judge's exception, or a score that is not finite, counts as its failure.

    Ours all come to an end: what runs a model's program, a pattern or sympy is killed at its deadline (sandbox.py,
    worker.py), an endpoint has `seconds` for each of its `tries`, a local model `max_tokens`, and the rest takes time
    in proportion to the text. A judge from elsewhere must keep its own time: put what may hang behind worker.call.
    """
    judged = Judged([])
    for score in scores(reward, answers):
        if isinstance(score, Exception):
            judged.failures[f"{type(score).__name__}: {score}"] += 1
        judged.scores.append(None if isinstance(score, Exception) else score)
    return judged


def scores(reward: Reward, answers: Sequence[Answer]) -> list[Score | Exception]:
    """The score of each answer, or what went wrong; all at once where the judge can."""
    try:
        given = reward.batch(answers) if hasattr(reward, "batch") else [score_one(reward, a) for a in answers]
        if len(given) != len(answers):
            raise ValueError(f"{len(given)} scores for {len(answers)} answers")
        return [checked(score) for score in given]
    except Exception as error:  # a judge may fail in any way
        return [error] * len(answers)


class Composed:
    """A judge of many answers at once, by `batch`: one answer is a batch of one."""

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        (score,) = self.batch([Answer(ids, text, prompt, reference)])
        if isinstance(score, Exception):
            raise score
        return score


def score_one(reward: Reward, answer: Answer) -> Score | Exception:
    try:
        return reward(answer.ids, answer.text, prompt=answer.prompt, reference=answer.reference)
    except Exception as error:
        return error


def checked(score: Score | Exception) -> Score | Exception:
    """With a finite float as its value: a judge may well say True, or 1."""
    if isinstance(score, Exception):
        return score
    try:
        value = float(score.value)
    except (AttributeError, TypeError, ValueError) as error:
        return error
    return replace(score, value=value) if math.isfinite(value) else ValueError(f"the score is {value}")
