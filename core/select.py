"""Which answers and records to learn from: filters and samplers over numbers that others computed."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

NUMBER = r"\d+(?:\.\d+)?"
CALCULATION = re.compile(rf"(?<!\d){NUMBER}(?:\s*[-+*/×÷]\s*{NUMBER})+(?:\s*=\s*{NUMBER})?")


def distinct_paths(texts: Sequence[str]) -> list[int]:
    """The first answer of each way to compute: those with the same list of calculations are one (RFT, Yuan et al.,
    arXiv 2308.01825, section 3.2). Answers without any are told apart by their words."""
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        steps = CALCULATION.findall(text)
        seen.setdefault(";".join("".join(s.split()) for s in steps) or " ".join(text.split()), i)
    return list(seen.values())


def by_worth(answers: Iterable[T], text: Callable[[T], str], worth: Callable[[T], Any]) -> list[list[T]]:
    """Different answers with a text, grouped by what they are worth, best first."""
    different = {said: answer for answer in answers if (said := text(answer).strip())}
    values = sorted(set(map(worth, different.values())), reverse=True)
    return [[answer for answer in different.values() if worth(answer) == value] for value in values]


def rejection_sample(rewards: Sequence[float], beta: float, count: int, seed: Sequence[int]) -> list[int]:
    """Indices drawn without replacement, each accepted with probability exp((r − r_max) / β), r_max of those left:
    samples of the optimal policy from those of the present one (RSO, Liu et al., arXiv 2309.06657, algorithm 1)."""
    rng, left, chosen = np.random.default_rng(list(seed)), list(range(len(rewards))), []
    while left and len(chosen) < count:
        best = max(rewards[i] for i in left)
        accepted = [i for i in left if rng.random() < np.exp((rewards[i] - best) / beta)]
        chosen += accepted
        left = [i for i in left if i not in accepted]
    return chosen[:count]


def agreed_pairs(margins: np.ndarray, margin: float, agreement: float) -> np.ndarray:
    """Of pairs whose margins several reward models gave, [models, pairs]: those whose mean is above `margin`, and whose
    chosen answer at least a share `agreement` of the models prefers. Indices, ascending."""
    return np.flatnonzero((margins.mean(0) > margin) & ((margins > 0).mean(0) >= agreement))


def spread_out(vectors: np.ndarray, count: int) -> list[int]:
    """`count` rows of [n, E], far apart: each next one is the farthest from those before (k-center greedy, Sener &
    Savarese, arXiv 1708.00489, algorithm 1), from the row nearest to the mean on."""
    if not len(vectors):
        return []
    squares = np.einsum("ne,ne->n", vectors, vectors)

    def distances(point: np.ndarray) -> np.ndarray:  # squared, [n]: no difference [n, E] is formed
        return squares - 2 * (vectors @ point) + point @ point

    chosen = [int(distances(vectors.mean(0)).argmin())]
    nearest = distances(vectors[chosen[0]])
    while len(chosen) < min(count, len(vectors)):
        nearest[chosen[-1]] = -np.inf  # once
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances(vectors[chosen[-1]]))
    return chosen


def balanced(records: Sequence, tag: Callable[..., Hashable], count: int) -> list[int]:
    """`count` indices, the tags in turn: each gives one, in the order of the records, until it has no more."""
    piles: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        piles.setdefault(tag(record), []).append(i)
    rounds = [(turn, pile[turn]) for pile in piles.values() for turn in range(len(pile))]
    return [i for _, i in sorted(rounds, key=lambda pair: pair[0])][:count]
