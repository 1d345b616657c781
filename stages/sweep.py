"""Search for the settings with which a stage does best, each trial a process of its own.

    tritium sweep sft --vary=optim.lr=1e-5:1e-2:log --vary=data.bin_tokens=1024,4096 --trials=12 \
        --model=runs/pretrain --data.sources=chats.jsonl --run.steps=200 --run.eval_every=20

All other options are the stage's. The trials are in OUT/trial-NNN, what they gave in OUT/trials.jsonl, a table in
OUT/sweep.md and the curves in OUT/sweep.svg; the same command again goes on where it stopped. A trial is stopped
early when its best value so far is worse than the median of what the others had at that step (the median stopping rule
of Google Vizier, Golovin et al. 2017, section 3.2.1).
"""

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import count
from operator import attrgetter
from pathlib import Path
from statistics import median

import numpy as np

from tritium.core.config import ConfigError, UserError, listed, load
from tritium.core.files import Skipped, json_lines
from tritium.core.output import make_folder
from tritium.core.report import read_curves, svg_chart
from tritium.core.search import Setting, Settings, suggest

STAGES = ("pretrain", "sft", "reward", "dpo", "distill", "grpo", "ppo")
PATIENCE = 3  # trials that must have reached a step before another is stopped there


@dataclass
class Trial:
    """One set of settings. `curve` holds the metric by step; `value` is the best of it, NaN without any."""

    settings: Settings
    state: str = "running"  # then "done", "stopped" or "failed"
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    value: float = math.nan
    number: int = 0  # of its folder

    def best(self, sign: float, step: float = math.inf) -> float:
        """The smallest `sign` · metric of a trained model up to a step; infinite where there is none."""
        return min((sign * y for x, y in self.curve if 0 < x <= step and math.isfinite(y)), default=math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and show the table. Raises: UserError, also where no trial gave a value."""
    made = argparse.ArgumentParser(prog="tritium sweep", description=__doc__.partition("\n")[0], allow_abbrev=False)
    made.add_argument("stage", help="|".join(STAGES) + "; its options follow")
    made.add_argument("--vary", action="append", required=True, help="NAME=LOW:HIGH[:log] or NAME=A,B,C; several times")
    made.add_argument("--trials", type=int, default=16, help="how many (default: 16)")
    made.add_argument("--search", choices=("gp", "random"), default="gp", help="Gaussian process (default), or random")
    made.add_argument("--metric", default="eval_loss", help="what counts, of metrics.jsonl (default: eval_loss)")
    made.add_argument("--maximize", action="store_true", help="the larger, the better")
    made.add_argument("--no-stopping", action="store_true", help="let bad trials run to their end")
    made.add_argument("--jobs", type=int, default=1, help="trials at a time (default: 1)")
    made.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    made.add_argument("--out", default="runs/sweep", help="folder to write (default: runs/sweep)")
    options, rest = made.parse_known_args(argv)
    if options.stage not in STAGES:
        raise ConfigError(f"no stage {options.stage!r} to vary; {listed(options.stage, STAGES)}")
    if options.trials < 1 or options.jobs < 1:
        raise ConfigError(f"--trials={options.trials} and --jobs={options.jobs} must be at least 1")
    config, space = import_module(f"tritium.stages.{options.stage}").Config, []
    for setting in map(Setting.parse, options.vary):  # a mistake is told before the first trial
        for value in setting.values or (setting.low, setting.high):
            loaded = load(config, [*rest, f"--{setting.name}={value}"], f"tritium sweep {options.stage}", "")
        space.append(replace(setting, whole=isinstance(attrgetter(setting.name)(loaded), int)))
    out = make_folder(options.out, "out")
    trials = Sweep(options, rest, space, out).run()
    report = table(trials, space, options)
    (out / "sweep.md").write_text(report)
    print(report, end="")
    if all(math.isnan(trial.value) for trial in trials):
        raise UserError(f"no trial gave {options.metric}: look at {out}/trial-000/log.txt")
    return 0


class Sweep:
    """The trials, those of an earlier call first, and the processes of those that run."""

    def __init__(self, options: argparse.Namespace, rest: list[str], space: list[Setting], out: Path):
        self.options, self.rest, self.space, self.out = options, rest, space, out
        self.sign, self.record, self.trials = -1.0 if options.maximize else 1.0, out / "trials.jsonl", []
        self.running: dict[int, tuple[subprocess.Popen, float]] = {}  # place in trials → process, when it began
        for _, row in json_lines(str(self.record), Skipped()) if self.record.exists() else ():  # not half of a line
            self.trials.append(Trial(**row))
        names = {setting.name for setting in space}
        if odd := next((t for t in self.trials if set(t.settings) != names), None):
            raise UserError(f"{self.record} holds trials of {', '.join(odd.settings)}: use another --out, or delete it")

    def run(self) -> list[Trial]:
        """All trials. Whatever ends it, no process stays behind."""
        try:
            while len(self.trials) < self.options.trials or self.running:
                while len(self.running) < self.options.jobs and len(self.trials) < self.options.trials:
                    self.begin()
                time.sleep(0.05)
                for place in list(self.running):
                    self.look(place)
        finally:
            for process, _ in self.running.values():
                process.terminate()
                process.wait()
        return self.trials

    def begin(self) -> None:
        number = next(i for i in count() if i not in {t.number for t in self.trials})
        known = [t for t in self.trials if t.curve]
        rng = np.random.default_rng([self.options.seed, number])
        values = [t.best(self.sign) for t in known]
        worst = max((v for v in values if math.isfinite(v)), default=0.0)
        values = [v if math.isfinite(v) else worst for v in values]  # diverged: as bad as the worst that did not
        settings = suggest(self.space, [t.settings for t in known], values if self.options.search == "gp" else [], rng)
        folder = self.out / f"trial-{number:03d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was killed: its curve is not this one's
        make_folder(folder, "out")
        given = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "tritium.stages", self.options.stage, *self.rest, *given]
        with open(folder / "log.txt", "w") as log:
            process = subprocess.Popen([*command, f"--run.out={folder}"], stdout=log, stderr=log)
        self.running[len(self.trials)] = process, time.perf_counter()
        self.trials.append(Trial(settings, number=number))

    def look(self, place: int) -> None:
        """Read a trial's metrics, stop it where it is hopeless, and note what it gave when it has ended."""
        trial, (process, began), name = self.trials[place], self.running[place], self.options.metric
        ended, metrics = process.poll() is not None, self.out / f"trial-{trial.number:03d}" / "metrics.jsonl"
        if metrics.exists():
            trial.curve = read_curves(metrics, [name])[name]
        if not ended and trial.state == "running" and not self.options.no_stopping and self.hopeless(trial):
            trial.state = "stopped"
            process.send_signal(signal.SIGTERM)
        if not ended:
            return
        del self.running[place]
        if trial.state == "running":
            trial.state = "done" if process.returncode == 0 else "failed"
        trial.seconds = round(time.perf_counter() - began, 1)
        trial.value = self.sign * trial.best(self.sign) if trial.best(self.sign) < math.inf else math.nan
        with open(self.record, "a") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
        shown = "  ".join(f"{key}={value}" for key, value in trial.settings.items())
        print(f"trial {trial.number}: {shown}  {name}={trial.value:.4g}  {trial.state}", file=sys.stderr, flush=True)

    def hopeless(self, trial: Trial) -> bool:
        if not trial.curve:
            return False
        step = trial.curve[-1][0]
        others = [t.best(self.sign, step) for t in self.trials if t is not trial and t.curve and t.curve[-1][0] >= step]
        return step > 0 and len(others) >= PATIENCE and trial.best(self.sign, step) > median(others)


def table(trials: list[Trial], space: list[Setting], options: argparse.Namespace) -> str:
    """Markdown, the best first; the picture of the curves is written beside it."""
    sign = -1.0 if options.maximize else 1.0
    order = sorted(trials, key=lambda trial: trial.best(sign))
    curves = {f"trial {trial.number}": trial.curve for trial in order[:6]}
    title = f"{options.metric} of the best {len(curves)} of {len(trials)} trials"
    (Path(options.out) / "sweep.svg").write_text(svg_chart(curves, title, "step", options.metric))
    head = ["trial", *(setting.name for setting in space), options.metric, "steps", "seconds", "state"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for trial in order:
        step = trial.curve[-1][0] if trial.curve else 0
        numbers = f"{trial.value:.4g}", f"{step:g}", f"{trial.seconds:.0f}"
        cells = trial.number, *trial.settings.values(), *numbers, trial.state
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("sweep"))
