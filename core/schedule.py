"""The learning rate as a function of the step: warm-up, then constant, linear, cosine, or WSD."""

import math
from dataclasses import dataclass

from tritium.core.config import ConfigError, opt

DECAYS = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),  # Hägele et al., arXiv 2405.18392
    "exponential": lambda x: 0.5 ** (10.0 * x),  # MiniCPM, arXiv 2404.06395: halves ten times over the decay
}


@dataclass
class ScheduleConfig:
    """How the learning rate moves over a run."""

    kind: str = opt("cosine", "shape after the warm-up", choices=("constant", "linear", "cosine", "wsd"))
    warmup: float = opt(0.02, "warm-up, rising linearly from 0: steps if ≥ 1, else a share of the run")
    floor: float = opt(0.1, "the rate at the end of the run, as a share of the peak")
    decay: float = opt(0.2, "wsd: length of the final decay, steps if ≥ 1, else a share of the run")
    decay_shape: str = opt("1-sqrt", "wsd: shape of the final decay", choices=tuple(DECAYS))

    def __post_init__(self):
        for name in ("warmup", "floor", "decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name}={getattr(self, name)} must not be negative")


def learning_rate(config: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`."""
    warmup = steps_of(config.warmup, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.kind == "constant":
        return peak
    start = decay_start(config, total) if config.kind == "wsd" else warmup
    progress = min(max(step - start, 0) / max(total - start, 1), 1.0)  # 0 … 1 over the decay
    shape = {
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
        "wsd": DECAYS[config.decay_shape],
    }[config.kind]
    return peak * (config.floor + (1.0 - config.floor) * shape(progress))


def decay_start(config: ScheduleConfig, total: int) -> int:
    """The step at which WSD's final decay begins."""
    return max(steps_of(config.warmup, total), total - steps_of(config.decay, total))


def steps_of(value: float, total: int) -> int:
    return round(value) if value >= 1 else round(value * total)
