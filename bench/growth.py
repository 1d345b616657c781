"""How the time and the memory of a training step grow: with the tokens, the vocabulary, the layers, the width, and how
the tokens are cut into documents. A slope is that of log(measured) by log(size), fitted over the sizes; beside it is
the theory's: for time that of the FLOPs that the step needs (`ModelConfig.flops`), for memory that of the activations
and of what the backward makes (`core/plan.py`).

Memory is the most that the step's new tensors take together, counted where torch makes and frees them: weights, their
gradients and the optimizer's state are not in it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.bench import contenders, train
from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.rows import Row, full, heading, leave
from tritium.core.config import load, opt
from tritium.core.machines import MACHINES, Work
from tritium.core.plan import Plan
from tritium.parallel.mesh import Mesh

BASE = train.Config(
    model=replace(train.SMALL, layers=4, hidden_size=256, intermediate_size=768, heads=4, kv_heads=2),
    vocab_size=4096, bin_tokens=2048, context=256,
)  # fmt: skip
KINDS = {"ms": "time", "flops": "its FLOPs", "mb": "memory", "held": "what is held"}  # measured, and by theory
# What grows: its sizes, and the step's config at one of them.
GROWTH: dict[str, tuple[tuple[int, ...], Callable[[int], train.Config]]] = {
    "tokens T": ((1024, 2048, 4096), lambda n: replace(BASE, bin_tokens=n)),
    "vocabulary V": ((8192, 16384, 32768), lambda n: replace(BASE, vocab_size=n)),
    "layers L": ((4, 8, 16), lambda n: replace(BASE, model=replace(BASE.model, layers=n))),
    "width E": (
        (256, 512, 1024),
        lambda n: replace(
            BASE, bin_tokens=1024, model=replace(BASE.model, hidden_size=n, intermediate_size=3 * n, heads=n // 64)
        ),
    ),
    "documents of T": ((2, 8, 32), lambda n: replace(BASE, context=BASE.bin_tokens // n)),
}


@dataclass(frozen=True)
class Config:
    steps: int = opt(3, "steps of each size that are timed, in turns; the fastest counts")
    threads: int = opt(2, "of the CPU")
    out: str = opt("bench/results", "folder for growth.jsonl and growth.md, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of growth.jsonl there")


class Live(TorchDispatchMode):
    """`peak`: the most bytes of tensors made within that lived at one time."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        known = {x.untyped_storage().data_ptr() for x in tensors((arguments, options or {}))}
        for x in tensors(found):
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        if sum(size for _, size in self.storages.values()) > self.peak:  # as far as some have not gone since
            self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return found


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def main(argv: list[str]) -> int:
    config = load(Config, argv, "python -m tritium.bench growth", __doc__.partition("\n\n")[0])
    device = chosen_device()
    file = rows_file(config, device, "growth")
    torch.set_num_threads(config.threads)
    facts, rows = run_facts(device), []
    for name in GROWTH:
        rows.append(measure(name, config.steps) | facts)
        print(line(rows[-1]), flush=True)
    lines = [*heading("Growth of a training step", rows[0]), *" ".join(__doc__.split("\n\n")).splitlines(), ""]
    lines += ["| grows | sizes | ms | slope | of the FLOPs | MB | slope | of what is held |"]
    lines += ["|---|---|---|---:|---:|---|---:|---:|", *map(line, rows)]
    leave(file, [by for row in rows for by in by_size(row)], lines, [bar for row in rows for bar in bars(row)])
    return 0


def measure(name: str, steps: int) -> Row:
    """Milliseconds and bytes of a step at each size of GROWTH[name], and their slopes."""
    sizes, config_of = GROWTH[name]
    row = full({"op": "growth", "provider": "tritium", "pass": name, "dtype": "bf16", "shape": {"sizes": sizes}})
    row |= {key: [] for key in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for size in sizes:
            work = train.make_work(config_of(size), "pretrain", Path(folder) / str(size))
            runs.append(contenders.tritium(work))
            next(runs[-1])
            with Live() as live:
                next(runs[-1])
            row["mb"].append(live.peak / 1e6)
            row["flops"].append(train.flops_per_token(work) * work.bin_tokens)
            row["held"].append(held(work) / 1e6)
        times: list[list[float]] = [[] for _ in sizes]
        for _ in range(steps):
            for run, found in zip(runs, times, strict=True):
                start = time.perf_counter()
                next(run)
                found.append(1e3 * (time.perf_counter() - start))
        row["ms"] = [min(found) for found in times]
        row["spread"] = [statistics.median(found) / min(found) for found in times]
    return row | {"rounds": steps} | {f"{kind}_slope": slope(sizes, row[kind]) for kind in KINDS}


def by_size(row: Row) -> list[Row]:
    """A row for each size, in the schema of all benches."""
    sizes = row["shape"]["sizes"]
    return [row | {"shape": {"size": n}} | {key: row[key][i] for key in KINDS} for i, n in enumerate(sizes)]


def held(work: contenders.Work) -> int:
    """Bytes that a step must hold beside parameters, gradients and the optimizer's state, by the planner."""
    machine = MACHINES["h100"] if contenders.DEVICE == "cuda" else replace(MACHINES["h100"], device="cpu")
    sizes = Work(work.micro_tokens, len(work.groups[0][0]))
    memory = Plan(work.shape, Mesh.single(torch.device("cpu")), sizes, machine).memory
    return memory["activations"] + memory["working"]


def bars(row: Row) -> list[Row]:
    """The slopes, measured and by theory, as bars."""
    slopes = {name: row[f"{kind}_slope"] for kind, name in KINDS.items()}
    return [row | {"provider": n, "shape": {}, "of_ceiling": max(s, 0), "label": f"{s:.2f}"} for n, s in slopes.items()]


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """b of the least squares log(value) = a + b log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(row: dict[str, Any]) -> str:
    texts = [
        ", ".join(f"{x:{form}}" for x in values)
        for values, form in ((row["shape"]["sizes"], ""), (row["ms"], ",.0f"), (row["mb"], ",.0f"))
    ]
    time, flops, memory, held = (f"{row[f'{kind}_slope']:.2f}" for kind in KINDS)
    return f"| {row['pass']} | {texts[0]} | {texts[1]} | {time} | {flops} | {texts[2]} | {memory} | {held} |"
