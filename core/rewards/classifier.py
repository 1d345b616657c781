"""A small classifier of rule violations: logistic regression on hashed character n-grams; trains in seconds on a CPU.

train_classifier([("text", True), …], "rules.npz")        rules("rules.npz") is then a judge: 1 − P(violation)
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tritium.core.config import ConfigError
from tritium.core.rewards import Score
from tritium.core.rewards.text import folded

BUCKETS = 1 << 16
SIZES = (2, 3, 4, 5)  # of the n-grams, which stay within words and see their ends


def features(text: str) -> np.ndarray:
    """The buckets of a text's n-grams, each once."""
    words = [f" {word} " for word in folded(text).split()]
    grams = {word[i : i + n] for word in words for n in SIZES for i in range(len(word) - n + 1)}
    return np.array(sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams}), np.int64)


def probability(weights: np.ndarray, found: np.ndarray) -> float:
    """Of a violation; `weights` ends with the bias. Features weigh 1/√n: a text's length says nothing."""
    z = weights[found].sum() / max(len(found), 1) ** 0.5 + weights[-1]
    return float(1 / (1 + np.exp(-np.clip(z, -30, 30))))


def train_classifier(examples: Sequence[tuple[str, bool]], file: str, epochs: int = 20, seed: int = 0) -> np.ndarray:
    """Fit on (text, violates a rule), by AdaGrad (Duchi et al. 2011) with both classes weighing the same, and save.

    Raises: ConfigError where a class is missing.
    """
    labels = np.array([label for _, label in examples], float)
    if not 0 < labels.sum() < len(labels):
        raise ConfigError("a classifier needs examples of both kinds")
    rows, balance = [features(text) for text, _ in examples], len(labels) / 2
    weigh = np.where(labels == 1, balance / labels.sum(), balance / (len(labels) - labels.sum()))
    weights, squares, rng = np.zeros(BUCKETS + 1), np.full(BUCKETS + 1, 1e-8), np.random.default_rng(seed)
    for _ in range(epochs):
        for i in rng.permutation(len(rows)):
            error = weigh[i] * (probability(weights, rows[i]) - labels[i])
            places = np.append(rows[i], BUCKETS)
            inputs = np.append(np.full(len(rows[i]), max(len(rows[i]), 1) ** -0.5), 1.0)
            gradient = error * inputs + 1e-4 * weights[places]
            squares[places] += gradient**2
            weights[places] -= 0.5 * gradient / np.sqrt(squares[places])
    np.savez_compressed(file, weights=weights.astype(np.float32))
    return weights


@dataclass(frozen=True)
class Rules:
    """1 − the probability that the text violates a rule, by a classifier that `train_classifier` has saved."""

    file: str

    def __post_init__(self):
        if not Path(self.file).is_file():
            raise ConfigError(f"reward: rules({self.file!r}): there is no such file; make it with train_classifier")

    @cached_property
    def weights(self) -> np.ndarray:
        return np.load(self.file)["weights"].astype(float)

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        return Score(1 - probability(self.weights, features(text)))
