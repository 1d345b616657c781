"""Judges: from a prompt and an answer to a score. One protocol, whoever judges.

    reward(ids, text, prompt=…, reference=…) -> Score

`judge` runs one over many answers. A judge that raises is *counted*, and its answer takes part in nothing: a broken
verifier must never look like a model that is always wrong.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol


@dataclass(frozen=True)
class Score:
    """`value` for the whole answer; `steps` for its parts, where the judge sees parts; `reason` for the reader."""

    value: float
    reason: str = ""
    steps: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    ends: tuple[int, ...] = ()


class Reward(Protocol):
    """A judge. `ids` are the answer's tokens as they were sampled, `text` their decoding without control tokens."""

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score: ...


@dataclass
class Answer:
    """What a judge is shown."""

    ids: Sequence[int]
    text: str
    prompt: str = ""
    reference: str = ""


@dataclass
class Judged:
    """Scores in the order of the answers (None where the judge failed), and why it failed how often."""

    scores: list[Score | None]
    failures: Counter = field(default_factory=Counter)


def judge(reward: Reward, answers: Sequence[Answer]) -> Judged:
    """Score every answer; a judge's exception, or a score that is not finite, counts as its failure."""
    judged = Judged([])
    for answer in answers:
        try:
            score = reward(answer.ids, answer.text, prompt=answer.prompt, reference=answer.reference)
            if not math.isfinite(value := float(score.value)):
                raise ValueError(f"the score is {value}")
            judged.scores.append(replace(score, value=value))  # a judge may well say True, or 1
        except Exception as error:  # a judge may fail in any way
            judged.scores.append(None)
            judged.failures[f"{type(error).__name__}: {error}"] += 1
    return judged
