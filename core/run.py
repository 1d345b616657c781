"""A run's settings, whatever its stage trains, what a stage gives back, and which settings a resume may change."""

import tomllib
from dataclasses import dataclass, field
from typing import Any

from tritium.core.config import check_ranges, opt
from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig, MeshConfig


@dataclass
class LoopConfig:
    """Where a run writes, how long it is, and on what it runs."""

    out: str = opt("", "output folder: checkpoints, config.toml, metrics.jsonl (default: runs/STAGE)")
    steps: int | None = opt(None, "optimizer steps (default: enough for run.epochs)", least=1)
    epochs: float = opt(1.0, "passes over the data, unless run.steps is given; see schedule.batch_patience", above=0)
    seed: int = opt(0, "random seed", least=0)
    dtype: str = opt("auto", "parameter dtype (auto: bf16 if fast)", choices=("auto", "bf16", "fp16", "fp32", "fp64"))
    device: str = opt("auto", "device to run on", choices=("auto", "cpu", "cuda"))
    recompute: str = opt(
        "none",
        "activation checkpointing: recompute the MLPs (selective) or whole layers (full) in the backward",
        choices=("none", "selective", "full"),
    )
    save_every: int = opt(200, "steps between checkpoints", least=1)
    keep: int = opt(2, "number of checkpoints to keep", least=1)
    check_every: int = opt(100, "steps between checks that all replicas hold the same parameters", least=1)
    max_bad_steps: int = opt(10, "stop after this many steps in a row with a non-finite gradient", least=1)

    def __post_init__(self):
        check_ranges(self, "run.")


@dataclass
class RunConfig(LoopConfig):
    """The same, for a stage that evaluates on held-out data."""

    eval_every: int = opt(100, "steps between evaluations on held-out data", least=1)
    eval_bins: int = opt(8, "most bins to evaluate on", least=1)


@dataclass
class Result:
    """What a stage gives back. `checkpoint` is a folder that transformers and `tritium.load` read."""

    checkpoint: str
    metrics: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before the first step


@dataclass
class TrainingConfig:
    """The settings of every stage that trains a model on data."""

    data: DataConfig = opt(DataConfig, "training data")
    optim: OptimConfig = opt(OptimConfig, "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning-rate schedule")
    run: RunConfig = opt(RunConfig, "the run itself")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")
    finetune: FinetuneConfig = opt(FinetuneConfig, "which parameters are trained")


def changed_lines(before: str, after: str) -> str:
    """The settings that differ between two configs in TOML, those aside that may change when a run is resumed."""
    free = {f"run.{n}" for n in ("save_every", "keep", "check_every", "device", "out", "steps", "epochs", "recompute")}
    free |= {"mesh.tp", "mesh.cp", "mesh.zero", "mesh.shard", "mesh.ring", "mesh.timeout"}
    old, new = (flat(tomllib.loads(text)) for text in (before, after))
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in free]
    more = [f"and {len(keys) - 5} more"] if len(keys) > 5 else []
    return ", ".join([f"{k}: {old.get(k, 'unset')} → {new.get(k, 'unset')}" for k in keys[:5]] + more)


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted key."""
    values = {}
    for key, value in table.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values
