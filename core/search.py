"""Search for the settings with the smallest value: at random, or by a Gaussian process that learns from the trials.

    space = [Setting.parse("optim.lr=1e-5:1e-2:log"), Setting.parse("finetune.rank=4,8,16")]
    settings = suggest(space, tried, values, rng)         # {"optim.lr": 0.00031, "finetune.rank": "8"}

Settings become points of the unit cube: ranges linearly or by their logarithm, a list's values by a coordinate each.
The process has a Matérn-5/2 kernel with a length per coordinate and noise, chosen by the marginal likelihood (Rasmussen
and Williams 2006, sections 4.2.1, 5.4.1); what is tried next has the largest expected improvement (Jones et al. 1998).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tritium.core.config import ConfigError

LENGTHS = 2.0 ** np.arange(-4, 4)  # in the unit cube
NOISES = (1e-6, 1e-3, 1e-1)  # variances, of values that have the variance 1
CANDIDATES = 2000

Settings = dict[str, float | int | str]


@dataclass(frozen=True)
class Setting:
    """A range of numbers, `whole` ones for what counts things, or a list of values."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C. Raises: ConfigError."""
        name, equals, given = text.partition("=")
        ends = given.split(":")
        if not equals or not name:
            raise ConfigError(f"--vary={text}: write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C")
        if len(ends) == 1:
            if len(set(given.split(","))) < 2:
                raise ConfigError(f"--vary={text}: give two values or more: NAME=A,B,C")
            return cls(name, values=tuple(dict.fromkeys(given.split(","))))
        try:
            low, high = map(float, ends[:2])
        except ValueError:
            raise ConfigError(f"--vary={text}: {':'.join(ends[:2])} are not numbers") from None
        log = ends[2:] == ["log"]
        if len(ends) > 2 and not log:
            raise ConfigError(f"--vary={text}: after LOW:HIGH there may be :log, and no more")
        if not (-math.inf < low < high < math.inf) or (log and low <= 0):
            raise ConfigError(f"--vary={text}: LOW must be below HIGH" + (", and above 0 for log" if log else ""))
        return cls(name, low, high, log)

    @property
    def size(self) -> int:
        """How many coordinates it has."""
        return len(self.values) or 1

    def draw(self, rng: np.random.Generator) -> float | int | str:
        return self.values[rng.integers(len(self.values))] if self.values else self.at(rng.random())

    def at(self, place: float) -> float | int:
        """The number at a place in [0, 1] of the range, to four digits."""
        if self.log:
            value = self.low * (self.high / self.low) ** place
        else:
            value = self.low + (self.high - self.low) * place
        return round(value) if self.whole else min(max(float(f"{value:.4g}"), self.low), self.high)

    def place(self, value: float | int | str) -> list[float]:
        """Its coordinates in the unit cube."""
        if self.values:
            return [float(value == other) for other in self.values]
        if self.log:
            return [math.log(value / self.low) / math.log(self.high / self.low)]
        return [(value - self.low) / (self.high - self.low)]


def matern(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The Matérn-5/2 correlation of points [n, d] and [m, d]: [n, m]."""
    r = np.sqrt(5 * (((a[:, None] - b[None]) / lengths) ** 2).sum(-1))
    return (1 + r + r**2 / 3) * np.exp(-r)


class GaussianProcess:
    """Through values y [n] at points x [n, d]."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.mean, self.scale = x, y.mean(), y.std() or 1.0
        self.y = (y - self.mean) / self.scale
        self.lengths, self.noise = np.full(x.shape[1], 0.5), 1e-3
        best = self.fit()
        for _ in range(2):  # coordinate by coordinate
            for i in range(len(self.lengths) + 1):
                kept = self.lengths.copy(), self.noise
                for value in LENGTHS if i < len(self.lengths) else NOISES:
                    self.lengths, self.noise = kept[0].copy(), kept[1]
                    if i < len(self.lengths):
                        self.lengths[i] = value
                    else:
                        self.noise = value
                    if (likelihood := self.fit()) > best:
                        best, kept = likelihood, (self.lengths, self.noise)
                self.lengths, self.noise = kept
        self.fit()

    def fit(self) -> float:
        """Factor the covariance; the log marginal likelihood, up to a constant."""
        covariance = matern(self.x, self.x, self.lengths) + (self.noise + 1e-9) * np.eye(len(self.x))
        self.factor = np.linalg.cholesky(covariance)
        self.weights = np.linalg.solve(self.factor.T, np.linalg.solve(self.factor, self.y))
        return float(-0.5 * self.y @ self.weights - np.log(np.diag(self.factor)).sum())

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the function at points [m, d]."""
        across = matern(x, self.x, self.lengths)  # [m, n]
        inner = np.linalg.solve(self.factor, across.T)
        deviation = np.sqrt(np.maximum(1.0 - (inner**2).sum(0), 1e-12))
        return self.mean + self.scale * (across @ self.weights), self.scale * deviation

    def expected_improvement(self, x: np.ndarray, best: float) -> np.ndarray:
        """How far below `best` a point is expected to be: [m]."""
        mean, deviation = self.predict(x)
        z = (best - mean) / deviation
        below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
        return (best - mean) * below + deviation * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def suggest(
    space: Sequence[Setting], tried: Sequence[Settings], values: Sequence[float], rng: np.random.Generator
) -> Settings:
    """What to try next for a smaller value: at random at first, until there are two trials for each coordinate."""
    drawn = [{s.name: s.draw(rng) for s in space} for _ in range(CANDIDATES)]
    if len(values) < 2 * sum(s.size for s in space):
        return drawn[0]
    best = tried[int(np.argmin(values))]
    for settings in drawn[: CANDIDATES // 4]:  # near the best so far
        for s in space:
            if s.values:
                settings[s.name] = best[s.name] if rng.random() < 0.8 else settings[s.name]
            else:
                settings[s.name] = s.at(float(np.clip(s.place(best[s.name])[0] + 0.1 * rng.normal(), 0, 1)))
    points, known = (np.array([sum((s.place(t[s.name]) for s in space), []) for t in rows]) for rows in (drawn, tried))
    process = GaussianProcess(known, np.array(values, np.float64))
    return drawn[int(process.expected_improvement(points, min(values)).argmax())]
