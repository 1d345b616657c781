"""What changes over a run: the learning rate (warm-up, then constant, linear, cosine, or WSD) and the batch."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from statistics import fmean

from tritium.core.config import ConfigError, check_ranges, opt

DECAYS = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),  # Hägele et al., arXiv 2405.18392
    "exponential": lambda x: 0.5 ** (10.0 * x),  # MiniCPM, arXiv 2404.06395: halves ten times over the decay
}


@dataclass
class ScheduleConfig:
    """How the learning rate and the batch move over a run."""

    kind: str = opt("cosine", "shape after the warm-up", choices=("constant", "linear", "cosine", "wsd"))
    warmup: float = opt(0.02, "warm-up, rising linearly from 0: steps if ≥ 1, else a share of the run", least=0)
    floor: float = opt(0.1, "the rate at the end of the run, as a share of the peak", least=0)
    decay: float = opt(0.2, "wsd: length of the final decay, steps if ≥ 1, else a share of the run", least=0)
    decay_shape: str = opt("1-sqrt", "wsd: shape of the final decay", choices=tuple(DECAYS))

    batch_start: float = opt(1.0, "bins of the first steps, as a share of data.bins_per_step", above=0, most=1)
    batch_ramp: float = opt(0.0, "the batch grows linearly to its full size: in so many steps, if < 1 a share", least=0)
    batch_patience: int = opt(0, "or it doubles when the loss of so many steps is no lower than before", least=0)

    def __post_init__(self):
        check_ranges(self, "schedule.")
        ways = bool(self.batch_ramp) + bool(self.batch_patience)
        if ways != (self.batch_start < 1):
            raise ConfigError("schedule.batch_start below 1 goes with one of schedule.batch_ramp and batch_patience")


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


class BatchRamp:
    """How many bins a step has while the batch grows (Smith et al., arXiv 1711.00489), and which of the sequence.

    `notes` is kept in checkpoints: [first step, first bin, bins] of each change, and the newest [step, loss]. A step's
    loss is read one step late, or at once before a checkpoint: a stall counts two steps later, whenever it was read.
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
        """(the first bin, how many) of the step."""
        n, count = self.config.batch_patience, self.changes[-1][2]
        known = [loss for of, loss in self.losses if of <= step - 2][-2 * n :]
        if n and count < self.full and len(known) == 2 * n and fmean(known[n:]) >= fmean(known[:n]):
            self.change(step, min(self.full, 2 * count))
            self.losses.clear()
        first, begin, count = self.changes[bisect_right(self.changes, step, key=lambda change: change[0]) - 1]
        return begin + (step - first) * count, count
