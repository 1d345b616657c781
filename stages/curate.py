"""Make training data: collect, filter, deduplicate, select, distil, reject, pack.

tritium curate --config pipeline.toml

The steps are tables, run in this order; `do` names the step if it is not the table's name:

    out = "runs/curate"
    [steps.maths]
    do = "collect"
    sources = ["gsm8k/*.jsonl.gz"]
    licence = "MIT"
    [steps.filter]
    rules = ["gopher"]
    [steps.near]

Documents go through steps/NN-NAME/ in shards; curate.html and curate.json report what was dropped and why. A run that
is killed can be started again at any time: it continues, and its output is that of an uninterrupted run. The steps and
their options are in core/curate/.
"""

import json
import sys
from dataclasses import dataclass, fields
from typing import Any

from tritium.core.config import ConfigError, UserError, check_ranges, from_dict, listed, opt, to_toml
from tritium.core.curate.clean import Clean
from tritium.core.curate.dedup import Exact, Near, Passages
from tritium.core.curate.distil import Distil
from tritium.core.curate.filters import Filter
from tritium.core.curate.pack import Pack
from tritium.core.curate.reject import Reject
from tritium.core.curate.report import write_report
from tritium.core.curate.runner import run_steps, write_atomically
from tritium.core.curate.score import Classify, Perplexity
from tritium.core.curate.select import Select
from tritium.core.curate.semantic import Decontaminate, Semantic
from tritium.core.curate.sources import Collect
from tritium.core.curate.step import Context, Step
from tritium.core.output import make_folder
from tritium.core.run import Result

ONE_PROCESS = True
ALL = (Collect, Clean, Filter, Exact, Near, Passages, Semantic, Decontaminate, Perplexity, Classify, Distil, Select)
STEPS: dict[str, type[Step]] = {step.__name__.lower(): step for step in (*ALL, Reject, Pack)}
OPTIONS = "; ".join(f"{name}: {', '.join(f.name for f in fields(step))}" for name, step in STEPS.items())


@dataclass
class Config:
    steps: dict[str, dict] = opt({}, f"tables [steps.NAME], run in this order; {OPTIONS}")
    out: str = opt("runs/curate", "output folder; an unfinished run is continued")
    workers: int = opt(2, "number of processes", least=1)
    shard_mb: float = opt(64.0, "MB of input per shard", above=0)
    memory_mb: float = opt(512.0, "MB of memory for tables that grow with the data; the rest is on disk", above=0)
    seed: int = opt(0, "random seed")

    def __post_init__(self):
        check_ranges(self)
        read_steps(self.steps)  # of what files there are, only `train` can judge


def train(config: Config) -> Result:
    """Run the pipeline. Metrics: documents `collected` and `kept`, and their share."""
    if not config.steps:
        raise ConfigError("steps is empty: give at least [steps.collect] with its sources, in a --config file")
    steps = read_steps(config.steps)
    for name, step in steps.items():
        try:
            step.check()
        except UserError as error:
            raise type(error)(f"[steps.{name}]: {error}") from None
    out = make_folder(config.out, "out")
    old = (".*.[0-9]*", "scratch/*/.*", "pack/.*", "pack/*.npy", "pack/*.json")  # unfinished; packed, and written anew
    last = out / "curate.json"
    rejected = last.exists() and '"do": "reject"' in last.read_text(encoding="utf-8")  # else these are somebody's
    for file in [file for pattern in old + Reject.FILES * rejected for file in out.glob(pattern)]:
        file.unlink()
    sizes = int(config.shard_mb * 1e6), int(config.memory_mb * 1e6)
    context = Context(out, out / "scratch", config.seed, *sizes, map=None, cache=out / "said.sqlite")
    done: list[dict[str, Any]] = []
    for summary in run_steps(steps, context, config.workers):
        done.append(summary)
        print(told(summary), file=sys.stderr, flush=True)
        write_report(out / "curate.html", done, to_toml(config))
        write_atomically(out / "curate.json", json.dumps({"steps": done}, indent=1, ensure_ascii=False) + "\n")
    collected = sum(row["read"] for row in done if row["do"] == "collect")
    return Result(config.out, {"collected": float(collected), "kept": float(done[-1]["rows"])})


def read_steps(tables: dict[str, dict]) -> dict[str, Step]:
    """Steps by name. Raises: ConfigError naming the table and the key."""
    steps = {}
    for name, table in tables.items():
        where, do = f"[steps.{name}]", table.get("do", name)
        if do not in STEPS:
            raise ConfigError(f"{where}: there is no step {do!r}; {listed(str(do), STEPS)}")
        try:
            steps[name] = from_dict(STEPS[do], {k: v for k, v in table.items() if k != "do"})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    for do in ("reject", "pack"):
        if len({frozenset(step.kinds) for step in steps.values() if type(step) is STEPS[do]}) > 1:
            raise ConfigError(f"steps: two {do} documents of other kinds, and would overwrite each other's files")
    if tables and not isinstance(next(iter(steps.values())), Collect):
        raise ConfigError(f"[steps.{next(iter(tables))}]: the first step must be a collect")
    return steps


def told(summary: dict[str, Any]) -> str:
    """A step in a few lines."""
    lines = [f"{summary['name']:<14}{summary['read']:>10,} in {summary['rows']:>10,} out"]
    lines += [f"    {n:>10,} × {reason}" for reason, n in [*summary["dropped"].items(), *summary["notes"].items()] if n]
    return "\n".join(lines)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("curate"))
