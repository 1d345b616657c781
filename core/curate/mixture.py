"""Which mixture of sources, and how much replay: fits of small runs' losses, a line each in a file.

    {"mixture": {"web": 0.7, "code": 0.3}, "loss": 2.91}                                                        mixture
    {"mixture": {"law": 0.3, "web": 0.7}, "tokens": 1e8, "loss": {"law": 2.31, "web": 2.84}}       replay of the second

mixture   log(loss − c) is linear in the shares (Ye et al., Data Mixing Laws, arXiv 2403.16952, eq. 7): fitted to runs
          with different mixtures, then the best of a grid on the simplex
replay    L(D, r) = E + B · r^η / D^β + C / (r + ε)^γ for the loss of a corpus whose share of the D tokens is r (D-CPT
          law, Que et al., arXiv 2406.01375, section 3.1, for one size of the model): the domain's and the general one;
          then the share at which their sum is least, in a run of as many tokens as will be
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from tritium.core.config import ConfigError
from tritium.core.files import Skipped, read_records

EPSILON = 0.05  # of the D-CPT law


@dataclass(frozen=True)
class MixtureFit:
    """loss = floor + exp(shares · slopes)."""

    sources: tuple[str, ...]
    floor: float
    slopes: np.ndarray  # [sources]

    def loss(self, shares: np.ndarray) -> np.ndarray:
        """Of mixtures [n, sources]; [n]."""
        return self.floor + np.exp(shares @ self.slopes)


def fit_mixture(runs: Sequence[tuple[Mapping[str, float], float]]) -> MixtureFit:
    """Least squares over the floors of a grid below the smallest loss. Raises: ConfigError for too few runs."""
    sources = tuple(dict.fromkeys(name for mixture, _ in runs for name in mixture))
    if len(runs) <= len(sources):
        raise ConfigError(f"{len(runs)} runs can't fit {len(sources)} sources: give at least {len(sources) + 1} runs")
    shares = np.array([[mixture.get(name, 0.0) for name in sources] for mixture, _ in runs])
    shares = shares / shares.sum(1, keepdims=True)
    losses, fits = np.array([loss for _, loss in runs]), []
    for floor in losses.min() * np.linspace(0, 0.99, 100):
        slopes = np.linalg.lstsq(shares, np.log(losses - floor), rcond=None)[0]
        fits.append(MixtureFit(sources, float(floor), slopes))
    return min(fits, key=lambda fit: float(((fit.loss(shares) - losses) ** 2).sum()))


def simplex(count: int, parts: int) -> np.ndarray:
    """Every mixture of `count` sources in steps of 1 / parts, [n, count]."""
    cuts = itertools.combinations(range(parts + count - 1), count - 1)
    edges = np.array([(-1, *cut, parts + count - 1) for cut in cuts])
    return (np.diff(edges, axis=1) - 1) / parts


def best_mixture(runs: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """The shares of the smallest predicted loss, within the range of each that the runs have seen."""
    fit = fit_mixture(runs)
    parts = next(p for p in (40, 20, 10, 5) if p == 5 or comb(p + len(fit.sources) - 1, p) < 200_000)
    seen = np.array([[m.get(name, 0.0) / sum(m.values()) for name in fit.sources] for m, _ in runs])
    grid = simplex(len(fit.sources), parts)
    inside = grid[((grid >= seen.min(0) - 1e-9) & (grid <= seen.max(0) + 1e-9)).all(1)]
    tried = np.concatenate([inside, seen])
    return dict(zip(fit.sources, tried[fit.loss(tried).argmin()].tolist(), strict=True))


def mixture_of(path: str, tokens: float, weight: float) -> dict[str, float]:
    """The best shares by the small runs in a file; see the module's docstring. `tokens` of the run to come and `weight`
    of the general loss are for replay. Raises: ConfigError."""
    runs = [record for _, record in read_records(path, Skipped("raise"))]
    try:
        if not any("tokens" in run for run in runs):
            return best_mixture([(run["mixture"], float(run["loss"])) for run in runs])
        domain, general = runs[0]["loss"]
        trained, losses = [float(run["tokens"]) for run in runs], [run["loss"] for run in runs]
        shares = np.array([run["mixture"][domain] / sum(run["mixture"].values()) for run in runs])
        fits = [fit_replay(trained, part, [loss[name] for loss in losses])
                for name, part in ((domain, shares), (general, 1 - shares))]  # fmt: skip
        share = best_ratio(*fits, tokens or max(trained), weight)
        return {domain: share, general: 1 - share}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path}: a line must be {{"mixture": {{source: share}}, "loss": number}}, or, for replay, '
                          f'with "tokens" and two sources, a loss for each ({error})') from None  # fmt: skip


@dataclass(frozen=True)
class ReplayFit:
    """The module's L(D, r)."""

    floor: float
    b: float
    c: float
    eta: float
    beta: float
    gamma: float

    def loss(self, tokens: float, ratio: np.ndarray | float) -> np.ndarray | float:
        return self.floor + self.b * ratio**self.eta / tokens**self.beta + self.c / (ratio + EPSILON) ** self.gamma


def fit_replay(tokens: Sequence[float], ratios: Sequence[float], losses: Sequence[float]) -> ReplayFit:
    """Exponents by a grid that is refined around its best point, the rest by least squares within it."""
    d, r, wanted = (np.array(values, float) for values in (tokens, ratios, losses))
    if len(wanted) < 6:
        raise ConfigError(f"{len(wanted)} points can't fit the six numbers of the D-CPT law")
    centre, width, best = np.array([1.0, 0.4, 0.5]), np.array([0.9, 0.35, 0.45]), (np.inf, None)
    for _ in range(6):
        axes = [np.unique(np.clip(np.linspace(c - w, c + w, 7), 0.01, 3)) for c, w in zip(centre, width, strict=True)]
        for eta, beta, gamma in itertools.product(*axes):
            terms = np.stack([np.ones_like(r), r**eta / d**beta, (r + EPSILON) ** -gamma], 1)
            scale = np.abs(terms).max(0)
            floor, b, c = np.linalg.lstsq(terms / scale, wanted, rcond=None)[0] / scale
            fit = ReplayFit(floor, b, c, eta, beta, gamma)
            best = min(best, (float(((fit.loss(d, r) - wanted) ** 2).sum()), fit), key=lambda pair: pair[0])
        centre, width = np.array([best[1].eta, best[1].beta, best[1].gamma]), width / 2
    return best[1]


def best_ratio(domain: ReplayFit, general: ReplayFit, tokens: float, weight: float = 1.0) -> float:
    """The domain's share r of the tokens at which its loss + weight · the general loss, at share 1 − r, is least."""
    ratios = np.linspace(0.01, 0.99, 99)
    return float(ratios[(domain.loss(tokens, ratios) + weight * general.loss(tokens, 1 - ratios)).argmin()])
