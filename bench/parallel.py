"""Measure what parallelism costs and gains: ZeRO-3's machinery on one rank, and scaling on this machine's ranks.

    overhead   a step at level 3 on one rank, where nothing is sent, over a step of the plain loop: both in one process,
               in turn, in an order that changes. The bar is 5 %
    strong     the same step on 1, 2, … ranks: speedup is that of the step, efficiency speedup / ranks
    weak       a micro-batch for each rank

A rank is a GPU, or one core's thread. Steps are `Trainer.step`: forward, backward, all messages, the optimizer. On
GPUs, `overlapped` is the share of the messages' time in which other kernels run too, in one more step, profiled.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.profiler import ProfilerActivity, profile

from tritium.bench.contenders import Loop, Settings
from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.measure import timing
from tritium.bench.rows import full, heading, leave
from tritium.bench.step import documents
from tritium.core.config import UserError, load, opt
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.run import RunConfig
from tritium.core.setup import parameter_dtype
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import init_mesh
from tritium.stages.plan import aligned, shape_of
from tritium.stages.pretrain import ShapeConfig

BAR = 1.05  # of the overhead
RELATED = ("ratio", "speedup", "efficiency", "overlapped")
WARM = 2  # steps before any is timed


@dataclass(frozen=True)
class Config:
    device: str = opt("auto", "where to measure; auto is the GPUs, if there are any", choices=("auto", "cpu", "cuda"))
    model: ShapeConfig = opt(ShapeConfig, "the decoder's shape")
    vocab_size: int = opt(8192, "tokens of its vocabulary")
    bin_tokens: int = opt(2048, "tokens of a micro-batch")
    rounds: int = opt(20, "steps of each kind that are timed")
    ranks: int = opt(0, "the most ranks (0: all GPUs, or cores)")
    out: str = opt("bench/results", "folder for parallel.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of parallel.jsonl there")


class Case(NamedTuple):
    kind: str  # "overhead", "strong" or "weak"
    tp: int
    cp: int
    zero: int


def main(argv: list[str]) -> int:
    """Exit code 1 if ZeRO-3's machinery is over its bar."""
    config = load(Config, argv, "python -m tritium.bench parallel", __doc__.partition("\n\n")[0])
    device, worlds = _worlds(config)
    file = rows_file(config, device, "parallel")
    rows: list[dict[str, Any]] = []
    for ranks in worlds:
        facts = run_facts(device) | {"threads": 1 if device == "cpu" else None, "bin_tokens": config.bin_tokens}
        rows += [row | facts for row in _measured(config, device, ranks, max(worlds))]
    _relate(rows)
    rows = [full(row | schema(row)) for row in rows]
    leave(file, rows, [*heading("What parallelism costs and gains", rows[0]), "```", *_table(rows), "```"])
    loads = ", ".join(f"{load:.1f}" for load in dict.fromkeys(row["load"] for row in rows) if load is not None)
    print("\n".join([*_table(rows), "", f"{file}: {len(rows)} rows; load before each number of ranks: {loads}"]))
    return 1 if any(row["kind"] == "overhead" and row["zero"] and row["ratio"] > BAR for row in rows) else 0


def _worlds(config: Config) -> tuple[str, list[int]]:
    """The device, and the numbers of ranks: powers of two up to what there is."""
    device = chosen_device(config.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = config.ranks or (torch.cuda.device_count() if device == "cuda" else cores)
    if min(most, config.rounds) < 1:
        raise UserError(f"--ranks={config.ranks} and --rounds={config.rounds} must be at least 1")
    return device, [1 << i for i in range(most.bit_length())]


def _cases(ranks: int) -> list[Case]:
    if ranks == 1:
        return [*(Case("overhead", 1, 1, zero) for zero in (0, 3)), Case("strong", 1, 1, 0), Case("weak", 1, 1, 0)]
    data = [Case(kind, 1, 1, zero) for kind in ("strong", "weak") for zero in (0, 3)]
    return [*data, Case("strong", ranks, 1, 0), Case("strong", 1, ranks, 0)]


def _measured(config: Config, device: str, ranks: int, bins: int) -> list[dict[str, Any]]:
    """A row for each case, of `ranks` processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, device, ranks, bins, folder)
        multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="spawn")
        return json.loads((Path(folder) / "rows.json").read_text())


def _rank(rank: int, config: Config, device: str, ranks: int, bins: int, folder: str) -> None:
    """One process: all cases in turn, round after round. Rank 0 writes what it timed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    if ranks > 1:
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    cases = _cases(ranks)
    loops = [_Loop(config, device, case, bins, f"{folder}/{i}") for i, case in enumerate(cases)]
    times: list[list[float]] = [[] for _ in cases]
    for number in range(WARM + config.rounds):
        first = number % len(cases)  # each is first once, so that none always follows the same one
        for i in [*range(first, len(cases)), *range(first)]:
            seconds = loops[i].step()
            if number >= WARM:
                times[i].append(1e3 * seconds)
    shares = [{"overlapped": loop.overlapped()} for loop in loops]
    if rank == 0:
        plain = times[0]
        rows = [
            case._asdict() | timing(ms)._asdict() | loop.facts(ms) | {"ranks": ranks, "ratio": _ratio(ms, plain)} | more
            for case, loop, ms, more in zip(cases, loops, times, shares, strict=True)
        ]
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def schema(row: dict[str, Any]) -> dict[str, Any]:
    """A row's place in the schema of all benches; its bar is its efficiency, or the plain loop's share of its time."""
    places = {axis: row[axis] for axis in ("ranks", "dp", "cp", "tp", "zero")}
    share = row["efficiency"] or 1 / row["ratio"]
    label = f"{row['tokens_per_second']:,.0f} tokens/s · {share:.0%}"
    facts = {"op": "parallel", "provider": "tritium", "pass": row["kind"], "shape": places}
    return facts | {"of_ceiling": share, "label": label}


def _ratio(ms: Sequence[float], plain: Sequence[float]) -> float:
    """The median of a round's two times' ratio: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(ms, plain, strict=True))


class _Loop:
    """A trainer of the case's mesh, and its step."""

    def __init__(self, config: Config, device: str, case: Case, bins: int, out: str):
        self.mesh = init_mesh(case.tp, case.cp, case.zero, device)
        dtype = parameter_dtype("auto", self.mesh)
        shape = shape_of(config.model, config.vocab_size, config.model.context)
        model = Transformer(shape, self.mesh, dtype).initialize(0)
        self.trainer = Loop({"policy": model}, CrossEntropy(), Settings(RunConfig(out=out)), self.mesh)
        count = self.mesh.dp if case.kind == "weak" else 1 if case.kind == "overhead" else bins
        sizes = config.vocab_size, config.bin_tokens, config.model.context
        made = [documents(*sizes, seed).to(self.mesh.device) for seed in range(count)]
        self.batches, self.tokens = made[self.mesh.dp_rank :: self.mesh.dp], count * config.bin_tokens

    def step(self) -> float:
        """Seconds of a step, from all ranks' start to all ranks' end."""
        self._wait()
        self.trainer.pace.start()
        start = time.perf_counter()
        self.trainer.step(self.batches)
        self._wait()
        return time.perf_counter() - start

    def overlapped(self) -> float | None:
        """`overlapped_share` of one more step on this rank; None without a GPU, or alone. All ranks must call it."""
        if self.mesh.device.type != "cuda" or self.mesh.world_size == 1:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.step()
        events = [e for e in seen.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
        return overlapped_share([(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events])

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        self.mesh.barrier()

    def facts(self, ms: Sequence[float]) -> dict[str, Any]:
        dtype = str(self.trainer.networks["policy"].dtype).removeprefix("torch.")
        return {"dp": self.mesh.dp, "dtype": dtype, "tokens_per_second": 1e3 * self.tokens / statistics.median(ms)}


def overlapped_share(kernels: Sequence[tuple[str, int, int]]) -> float | None:
    """Of the time in which NCCL's kernels run, the share in which others do too; kernels are (name, start, end)."""
    edges = []
    for name, start, end in kernels:
        if not name.startswith(("Memcpy", "Memset")):
            sends = "nccl" in name.lower()
            edges += [(start, 1, sends), (end, -1, sends)]
    running, sent, hidden, last = {True: 0, False: 0}, 0, 0, 0
    for at, step, sends in sorted(edges):
        sent += (at - last) * (running[True] > 0)
        hidden += (at - last) * (running[True] > 0 and running[False] > 0)
        running[sends], last = running[sends] + step, at
    return hidden / sent if sent else None


def _relate(rows: list[dict[str, Any]]) -> None:
    """Add speedup (of throughput) and efficiency to the rows of a scaling."""
    one = {row["kind"]: row["tokens_per_second"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["ratio"] = row["ratio"] if row["kind"] == "overhead" else None
        row["speedup"] = None if row["kind"] == "overhead" else row["tokens_per_second"] / one[row["kind"]]
        row["efficiency"] = None if row["speedup"] is None else row["speedup"] / row["ranks"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    places = ("kind", "ranks", "dp", "cp", "tp", "zero")
    cells = [(*places, "ms", "p20", "p80", "tokens/s", "× plain", "speedup", "efficiency", "overlapped")]
    for row in rows:
        place = [str(row[key]) for key in places]
        numbers = [f"{row[key]:.4g}" for key in ("ms", "ms_p20", "ms_p80")] + [f"{row['tokens_per_second']:,.0f}"]
        related = ["–" if row[key] is None else f"{row[key]:.3f}" for key in RELATED]
        cells.append((*place, *numbers, *related))
    return aligned(cells, left=(0,))
