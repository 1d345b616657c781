"""Estimate what a run needs before it starts: memory, communication and time per rank, and the best meshes.

    tritium plan --preset=8b --gpus=64 --machine=h100                    # the best meshes for a step of 4 M tokens
    tritium plan --preset=8b --gpus=8 --mesh.zero=3 --bin_tokens=16384   # one mesh, in detail
    tritium plan --stage=sft --settings=my.toml --gpus=8                 # what a stage's settings say

Formulas and what they leave out: core/plan.py. Rates are `reached` × the datasheet's, or measured with --machine=here.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from tritium.core.config import ConfigError, check_ranges, load, opt
from tritium.core.machines import MACHINES, PRESETS, Machine, Work
from tritium.core.metrics import matmul_rate
from tritium.core.plan import GIB, Plan, best, last_rank, plans
from tritium.core.setup import MeshConfig, read_shape
from tritium.model.config import ModelConfig
from tritium.parallel.mesh import check_grid
from tritium.stages.pretrain import ShapeConfig

STAGES = ("pretrain", "sft", "dpo", "grpo")


@dataclass
class Config:
    preset: str | None = opt(None, "shape of a known model (none: that of `folder` or `model`)", choices=tuple(PRESETS))
    folder: str = opt("", "Hugging Face folder, whose config.json gives the shape")
    model: ShapeConfig = opt(ShapeConfig, "shape, if neither preset nor folder is given")
    vocab_size: int = opt(8192, "vocabulary size, with `model`")
    stage: str = opt("pretrain", "stage to plan: dpo and grpo have more passes and models", choices=STAGES)
    settings: str = opt("", "TOML file of that stage, for its model, mesh, batches and dtype")
    machine: str = opt("h100", "GPU type; here: this machine, measured", choices=(*MACHINES, "here"))
    reached: float = opt(0.7, "fraction of the datasheet's rates that is assumed", above=0)
    gpus: int = opt(8, "number of GPUs (ranks)", above=0)
    context: int = opt(8192, "tokens per document", least=8)
    step_tokens: int = opt(1 << 22, "tokens per step, over all ranks", above=0)
    bin_tokens: int = opt(0, "tokens per micro-batch, on `mesh` (0: find the best meshes and micro-batches)", least=0)
    mesh: MeshConfig = opt(MeshConfig, "parallelism, if bin_tokens is given")
    muon: bool = opt(False, "Muon for the layers' matrices")
    offload: bool = opt(False, "optimizer state in host memory")
    dtype: str = opt("bf16", "parameter dtype", choices=("bf16", "fp32"))
    sequences: int = opt(256, "grpo: sequences of `context` tokens that are sampled at once", above=0)

    def __post_init__(self):
        check_ranges(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan. Returns 0, and 1 where nothing fits."""
    config = load(Config, argv or [], "tritium plan", __doc__.partition("\n\n")[0])
    machine = this_machine() if config.machine == "here" else replace(MACHINES[config.machine], reached=config.reached)
    config, model, kept = from_settings(config)
    work = Work(config.bin_tokens or config.context, config.context, dtype=config.dtype, **kept, **passes(config))
    if config.bin_tokens:
        found = [plan_of(model, config, work, machine)]
    else:
        found = best(plans(model, machine, config.gpus, work, config.step_tokens))
    if not found:
        raise ConfigError(
            f"step_tokens={config.step_tokens} can't be split into whole documents of context={config.context} for "
            f"{config.gpus} GPUs on any mesh: choose a multiple of context · gpus"
        )
    print("\n".join([*overview(found), "", *details(found[0])]))
    return 0 if found[0].fits else 1


def plan_of(model: ModelConfig, config: Config, work: Work, machine: Machine) -> Plan:
    """The one plan that the config names. Raises: ConfigError for a mesh that can't be."""
    mesh, ranks = config.mesh, config.mesh.cp * config.mesh.tp
    micro_batches = max(1, round(config.step_tokens * ranks / config.gpus / config.bin_tokens))
    try:
        check_grid(config.gpus, mesh.cp, mesh.tp, mesh.zero, mesh.shard, mesh.ring)
        rank = last_rank(config.gpus, mesh.tp, mesh.cp, mesh.zero, mesh.shard, mesh.ring)
        return Plan(model, rank, replace(work, micro_batches=micro_batches), machine)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from None


def passes(config: Config) -> dict[str, int]:
    """What a stage's step has besides one forward and backward pass of the policy."""
    if config.stage == "dpo":
        return {"frozen": 1}
    if config.stage == "grpo":
        return {"passes": 1, "sequences": config.sequences, "sampled_tokens": config.context}
    return {}


def from_settings(config: Config) -> tuple[Config, ModelConfig, dict[str, bool]]:
    """The config with what a stage's TOML file says, the model's shape, and what the optimizer does.

    Raises: ConfigError as the stage would; UserError where there is no such model.
    """
    folder, shape, vocab_size, context = config.folder, config.model, config.vocab_size, config.context
    kept = {"muon": config.muon, "offload": config.offload}
    if config.settings:
        settings = load(import_module(f"tritium.stages.{config.stage}").Config, ["--config", config.settings], "", "")
        folder = settings.init if config.stage == "pretrain" else settings.model
        shape, vocab_size = getattr(settings, "model", None), getattr(settings, "vocab_size", 0)
        context = context if folder else shape.context
        optim, config = settings.optim, replace(config, **planned(settings))
        kept = {"muon": optim.kind == "muon", "offload": optim.offload, "ema": optim.ema > 0}
    if config.preset and not config.settings:
        return config, replace(PRESETS[config.preset], max_positions=context), kept
    if not folder:
        return replace(config, context=context), shape_of(shape, vocab_size, context), kept
    model = read_shape(folder)
    return replace(config, context=min(context, model.max_positions)), model, kept


def planned(settings: Any) -> dict[str, Any]:
    """Of a stage's settings, what a plan depends on. GRPO's micro-batches depend on its answers: one is planned."""
    dtype = "bf16" if settings.run.dtype == "auto" else settings.run.dtype
    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f"run.dtype={dtype}: only bf16 and fp32 are planned")
    tokens = settings.data.bin_tokens
    found = {"mesh": settings.mesh, "dtype": dtype, "bin_tokens": tokens}
    found["step_tokens"] = getattr(settings.data, "bins_per_step", 1) * tokens
    return found | ({"sequences": settings.sampling.max_batch} if hasattr(settings, "sampling") else {})


def shape_of(shape: ShapeConfig, vocab_size: int, context: int) -> ModelConfig:
    """Raises: ConfigError."""
    try:
        return replace(shape, context=context).build(vocab_size)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def this_machine() -> Machine:
    """Memory and measured rates of this machine: a GPU, or a core of its CPU.

    Links are not measured. Of GPUs, the slowest of the known ones are assumed; the ranks of a CPU pass data on through
    its memory, with sums and copies on the way: a tenth of a copy's rate.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    rates = [matmul_rate(dtype, [(2048, 2048, 2048)], device=device) for dtype in (torch.bfloat16, torch.float32)]
    rates.append(copy_rate(device))
    if cuda:
        memory, slowest = torch.cuda.get_device_properties(0).total_memory, MACHINES["a100"]
        links = slowest.link, slowest.network, slowest.host
        return Machine("here", torch.cuda.device_count(), memory, *rates, *links, reached=1.0)
    memory, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), os.cpu_count() or 1
    own = [rate / cores for rate in rates]
    return Machine("here", cores, memory / cores, *own, rates[2] / 10, rates[2] / 10, own[2], reached=1.0, device="cpu")


def copy_rate(device: str, rounds: int = 5) -> float:
    """Bytes/s read and written by a copy that no cache holds."""
    source = torch.ones((512 if device == "cuda" else 64) << 18, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


# What is shown --------------------------------------------------------------------------------------------------------


def overview(found: Sequence[Plan]) -> list[str]:
    """A line for each plan: mesh, micro-batches, memory, and at most this speed."""
    heads = ("dp", "cp", "tp", "zero", "shard", "bin_tokens", "micro-batches", "GiB", "s/step", "tokens/s", "MFU", "")
    rows = [heads]
    for plan in found:
        mesh, work = plan.mesh, plan.work
        numbers = (mesh.dp, mesh.cp, mesh.tp, mesh.zero, mesh.parts, work.tokens, work.micro_batches)
        speed = (f"{plan.peak / GIB:.1f}", f"{plan.seconds:.3g}", f"{plan.step_tokens / plan.seconds:,.0f}")
        rows.append((*map(str, numbers), *speed, f"{plan.mfu:.0%}", plan.verdict))
    machine = found[0].machine
    title = f"{machine.name}: {machine.memory / GIB:.0f} GiB, {found[0].peak_flops / 1e12:.3g} TFLOP/s, "
    title += f"{machine.bandwidth / 1e9:,.0f} GB/s, of which {machine.reached:.0%} are counted on (estimates)"
    return [title, "", *aligned(rows, left=(len(heads) - 1,))]


def details(plan: Plan) -> list[str]:
    """The first plan's memory, messages and time."""
    memory = [(name, f"{size / GIB:.3f}") for name, size in plan.memory.items() if size]
    memory += [("peak", f"{plan.peak / GIB:.3f}")]
    memory += [("optimizer, on the host", f"{plan.optimizer / GIB:.3f}")] if not plan.memory["optimizer"] else []
    lines = ["GiB of a rank:", *aligned(memory, left=(0,)), ""]
    sent = [("collective", "axis", "count", "MiB each", "seconds", "hidden behind", "what")]
    for c in plan.collectives:
        if c.kind != "objects":
            seconds = f"{plan.seconds_of(c):.4f}"
            sent.append((c.kind, c.axis, str(c.count), f"{c.payload / 2**20:.3f}", seconds, c.behind or "–", c.what))
    lines += ["of a step:", *aligned(sent, left=(0, 1, 5, 6))] if len(sent) > 1 else ["nothing is sent"]
    return [*lines, "", "seconds: " + "  ".join(f"{name} {seconds:.4g}" for name, seconds in plan.times.items())]


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("plan"))
