"""Judges: from a prompt and an answer to a score. One protocol, whoever judges.

    reward(ids, text, prompt=…, reference=…) -> Score

`judge` runs one over many answers. A judge that raises, or is late, is *counted*, and its answer takes part in nothing:
a broken verifier must never look like a model that is always wrong. A judge that is better off with many answers at
once (a model, sandboxes side by side) also has `batch`. `make.make_reward` builds judges from text: "math + 0.1*tags".
"""

import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

MOST_TOLD = 5  # reasons of failures that a process tells
SECONDS = 300.0  # that a judge has for an answer: longer than all tries of an endpoint


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


def judge(reward: Reward, answers: Sequence[Answer], seconds: float = SECONDS) -> Judged:
    """Score every answer; an exception, a score that is not finite, or none within `seconds` (of one answer; a batch
    has as many times that as answers) is the judge's failure. New reasons are told on standard error.

    Ours end well before: what runs a model's program, a pattern or sympy is killed at its deadline (sandbox.py,
    worker.py), an endpoint has `seconds` for each of its `tries`, a local model `max_tokens`.
    """
    judged = Judged([])
    for score in scores(reward, answers, seconds):
        if isinstance(score, Exception):
            judged.failures[f"{type(score).__name__}: {score}"] += 1
        judged.scores.append(None if isinstance(score, Exception) else score)
    for reason, times in judged.failures.items():
        if reason not in _told and len(_told) < MOST_TOLD:
            _told.add(reason)
            print(f"tritium: the judge failed on {times} of {len(answers)} answers: {reason}", file=sys.stderr)
    return judged


_told: set[str] = set()


def scores(reward: Reward, answers: Sequence[Answer], seconds: float = SECONDS) -> list[Score | Exception]:
    """The score of each answer, or what went wrong; all at once where the judge can."""
    if not hasattr(reward, "batch"):
        return [checked(score_one(reward, answer, seconds)) for answer in answers]
    try:
        with deadline(seconds * len(answers)):
            given = reward.batch(answers)
        if len(given) != len(answers):
            raise ValueError(f"{len(given)} scores for {len(answers)} answers")
        return [checked(score) for score in given]
    except Exception as error:  # a judge may fail in any way
        return [error] * len(answers)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises: TimeoutError in the block after `seconds`, in whatever it does: a loop, a pattern, a read; and again each
    second, should the block catch it. By a signal, which the main thread alone can get: elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_) -> None:
        raise TimeoutError(f"no score within {seconds:g} s")

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    outer, again = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer and max(outer - (time.monotonic() - start), 1e-3), again)
        signal.signal(signal.SIGALRM, before)


class Composed:
    """A judge of many answers at once, by `batch`: one answer is a batch of one."""

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        (score,) = self.batch([Answer(ids, text, prompt, reference)])
        if isinstance(score, Exception):
            raise score
        return score


def score_one(reward: Reward, answer: Answer, seconds: float = SECONDS) -> Score | Exception:
    try:
        with deadline(seconds):
            return reward(answer.ids, answer.text, prompt=answer.prompt, reference=answer.reference)
    except Exception as error:
        return error


def checked(score: Score | Exception) -> Score | Exception:
    """With finite floats as its values: a judge may well say True, or 1."""
    if isinstance(score, Exception):
        return score
    try:
        value, *steps = map(float, (score.value, *score.steps))
    except (AttributeError, TypeError, ValueError) as error:
        return error
    if odd := [x for x in (value, *steps) if not math.isfinite(x)]:
        return ValueError(f"the score is {odd[0]}")
    if score.ends and len(score.ends) != len(steps):
        return ValueError(f"{len(steps)} scores of steps that end at {len(score.ends)} places")
    return replace(score, value=value, steps=tuple(steps))
