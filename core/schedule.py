"""What changes over a run: the learning rate (warm-up, then constant, linear, cosine or WSD) and the batch size."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from statistics import fmean

from tritium.core.config import ConfigError, check_ranges, opt

SHAPES = {  # how the rate falls from 1 to (nearly) 0 over x = 0 … 1
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),  # Hägele et al., arXiv 2405.18392
    "exponential": lambda x: 0.5 ** (10.0 * x),  # MiniCPM, arXiv 2404.06395: halves ten times over the decay
}


@dataclass
class ScheduleConfig:
    """How the learning rate and the batch size change over a run."""

    kind: str = opt("cosine", "schedule after the warm-up", choices=("constant", "linear", "cosine", "wsd"))
    warmup: float = opt(0.02, "length of the linear warm-up: steps if ≥ 1, else a fraction of the run", least=0)
    floor: float = opt(0.1, "final learning rate, as a fraction of the peak", least=0)
    decay: float = opt(0.2, "wsd: length of the final decay: steps if ≥ 1, else a fraction of the run", least=0)
    decay_shape: str = opt("1-sqrt", "wsd: shape of the final decay", choices=("linear", "1-sqrt", "exponential"))

    batch_start: float = opt(1.0, "initial batch size, as a fraction of data.bins_per_step", above=0, most=1)
    batch_ramp: float = opt(0.0, "linear growth to full size: steps if ≥ 1, else a fraction of the run", least=0)
    batch_patience: int = opt(0, "double the batch when the mean loss of this many steps stops falling", least=0)

    def __post_init__(self):
        check_ranges(self, "schedule.")
        ways = bool(self.batch_ramp) + bool(self.batch_patience)
        if ways != (self.batch_start < 1):
            raise ConfigError("schedule.batch_start below 1 needs one of schedule.batch_ramp and batch_patience")


def learning_rate(config: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """The learning rate of step `step` (counted from 0) of `total`.

    warm-up     peak · (step + 1) / warmup
    after it    peak · (floor + (1 − floor) · shape(x)),   x = 0 … 1 over the decay
    """
    warmup = steps_of(config.warmup, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.kind == "constant":
        return peak
    start = decay_start(config, total) if config.kind == "wsd" else warmup
    x = min(max(step - start, 0) / max(total - start, 1), 1.0)
    shape = SHAPES[config.decay_shape if config.kind == "wsd" else config.kind]
    return peak * (config.floor + (1.0 - config.floor) * shape(x))


def decay_start(config: ScheduleConfig, total: int) -> int:
    """The step at which WSD's final decay begins."""
    return max(steps_of(config.warmup, total), total - steps_of(config.decay, total))


def steps_of(value: float, total: int) -> int:
    return round(value) if value >= 1 else round(value * total)


class BatchRamp:
    """Which bins of the sequence each step takes while the batch grows (Smith et al., arXiv 1711.00489).

    `notes` is saved in checkpoints: [first step, first bin, bins per step] of each change, and the newest [step, loss].
    A loss is read one step late, or at once before a checkpoint; so that a resumed run grows at the same step, losses
    count from two steps later on in either case.
    """

    def __init__(self, config: ScheduleConfig, full: int, least: int, total: int, notes: dict[str, list]):
        self.config, self.full = config, full
        first = min(full, max(least, round(config.batch_start * full)))
        ramp = 0 if "changes" in notes else steps_of(config.batch_ramp, total)  # a longer run goes on with its bins
        self.changes = notes.setdefault("changes", [[0, 0, first]])
        self.losses = notes.setdefault("losses", [])
        for step in range(1, ramp + 1):
            self.change(step, round(first + (full - first) * step / ramp))

    def change(self, step: int, count: int) -> None:
        """From `step` on, `count` bins."""
        first, begin, before = self.changes[-1]
        if count != before:
            self.changes.append([step, begin + (step - first) * before, count])

    def observe(self, step: int, loss: float) -> None:
        if self.config.batch_patience and step >= self.changes[-1][0]:
            self.losses[:] = [*self.losses, [step, loss]][-2 * self.config.batch_patience - 1 :]

    def span(self, step: int) -> tuple[int, int]:
        """(first bin, number of bins) of the step."""
        n, count = self.config.batch_patience, self.changes[-1][2]
        known = [loss for logged, loss in self.losses if logged <= step - 2][-2 * n :]
        if n and count < self.full and len(known) == 2 * n and fmean(known[n:]) >= fmean(known[:n]):
            self.change(step, min(self.full, 2 * count))
            self.losses.clear()
        first, begin, count = self.changes[bisect_right(self.changes, step, key=lambda change: change[0]) - 1]
        return begin + (step - first) * count, count
