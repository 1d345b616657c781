"""Measure every op against the machine's ceilings and against others, and check what is measured.

Ceilings are the copy bandwidth and the matmul rate of the same run; which of the two limits a pass is decided by its
FLOPs per byte. Errors are against the reference in fp64, and a provider passes if each of its outputs and gradients
has an error of at most 1.5 × torch eager's in the same dtype + 2 ulp of the RMS. Who does not gets no speed-up.
"""

import json
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tritium.bench.case import Case, Row, measure
from tritium.bench.chart import svg_bars
from tritium.bench.providers import BARE, COMPILED, OURS, providers
from tritium.bench.rows import heading
from tritium.bench.summary import table_of_ops
from tritium.core.config import UserError, load, nearest, opt
from tritium.core.metrics import machine
from tritium.core.output import make_folder, make_room_for
from tritium.kernels import all_ops
from tritium.kernels.registry import Shape
from tritium.stages.plan import aligned

# What a CPU measures in a second or so, in place of the registry's last shape, which is one for GPUs.
CPU_SHAPES: dict[str, Shape] = {
    "adamw_": {"N": 1 << 21},
    "attention": {"T": 2048, "N": 1024, "H": 8, "G": 2, "D": 64},
    "cross_entropy": {"T": 512, "V": 8192},
    "decode_attention": {"B": 64, "N": 4, "page": 64, "H": 8, "G": 2, "D": 64},
    "dequantize_nf4": {"N": 1024, "K": 1024},
    "gae": {"T": 1 << 12, "S": 16},
    "geglu": {"T": 1024, "F": 2048},
    "global_norm": {"N": 1 << 22},
    "linear_cross_entropy": {"T": 1024, "E": 256, "V": 8192},
    "linear_kl": {"T": 512, "E": 256, "V": 8192},
    "linear_logprob": {"T": 1024, "E": 256, "V": 8192},
    "lora_linear": {"T": 1024, "E": 1024, "F": 1024, "R": 16},
    "rms_norm": {"T": 2048, "E": 1024},
    "rope": {"T": 2048, "H": 8, "G": 2, "D": 64},
    "segment_sum": {"T": 1 << 15, "S": 100},
    "swiglu": {"T": 1024, "F": 2048},
}
# The heads at the size of a small model, beside the bare matmuls that they can't do without.
HEADS, HEAD_SHAPE = ("linear_cross_entropy", "linear_logprob"), {"T": 4096, "E": 384, "V": 49152}


@dataclass(frozen=True)
class Config:
    device: str = opt("auto", "where to measure; auto is the GPU, if there is one", choices=("auto", "cpu", "cuda"))
    ops: list[str] = opt([], "the ops to measure; none named: all")
    dtypes: list[str] = opt(
        [],
        "of the inputs; none named: bfloat16, on a GPU float32 too",
        choices=("float32", "bfloat16", "float16"),
    )
    providers: list[str] = opt([], "who else is measured; none named: all that there are")
    shape: dict[str, int] = opt({}, "extents in place of the usual ones, e.g. T=512,E=64, in ops that have them")
    seconds: float = opt(2.0, "of measuring, for each op and dtype")
    threads: int = opt(0, "of the CPU; 0: torch's default")
    quick: bool = opt(False, f"half a second each, without the large heads and {COMPILED}: a look")
    out: str = opt("bench/results", "folder for kernels.jsonl and an SVG of each op, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of kernels.jsonl there")


def main(argv: list[str]) -> int:
    """Exit code 1 if an op of ours fails its check."""
    config = load(Config, argv, "python -m tritium.bench kernels", __doc__.partition("\n\n")[0])
    device, cases = _plan(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    file, facts = rows_file(config, device, "kernels"), run_facts(device)
    charts = rows_file(replace(config, jsonl=""), device, "kernels").parent
    print("  ".join(f"{name} {value}" for name, value in facts["machine"].items()), flush=True)
    rows: list[Row] = []
    with file.open("w", encoding="utf-8") as lines:
        for case in cases:
            found = [row | facts for row in measure(case, 0.5 if config.quick else config.seconds)]
            lines.writelines(json.dumps(row, allow_nan=False) + "\n" for row in found)
            lines.flush()
            rows += found
            print("\n".join(["", case.title, *_table(found)]), flush=True)
            of_op = [row for row in rows if row["op"] == case.spec.name]
            (charts / f"{case.spec.name}.svg").write_text(svg_bars(of_op), encoding="utf-8")
    file.with_suffix(".md").write_text("\n".join([*heading("Kernels", rows[0]), *table_of_ops(rows)]) + "\n")
    wrong = sorted({row["op"] for row in rows if row["provider"] == OURS and row["status"] in ("failed", "error")})
    print(f"\n{file}: {len(rows)} rows" + (f"\nFAILED: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


# The plan -------------------------------------------------------------------------------------------------------------


def _plan(config: Config) -> tuple[str, list[Case]]:
    device, ops = chosen_device(config.device), all_ops()
    names = [_known("--ops", name, sorted(ops)) for name in config.ops] or sorted(ops)
    for letter in config.shape:
        _known("--shape", letter, sorted({x for name in names for x in ops[name].shape}))
    for option, least, value in (("threads", 0, config.threads), ("shape", 1, min(config.shape.values(), default=1))):
        if value < least:
            raise UserError(f"--{option}: got {value}, wanted {least} or more")
    usual = ["float32", "bfloat16"] if device == "cuda" else ["bfloat16"]
    dtypes = [getattr(torch, name) for name in config.dtypes or usual]
    offered = {name: providers(ops[name], device) for name in names}
    every = sorted({provider.name for found in offered.values() for provider in found})
    asked = [_known("--providers", name, every) for name in config.providers]
    wanted = {*asked} or {*every} - ({COMPILED} if config.quick else set())
    cases = []
    for name in names:
        shape = ops[name].shape | (CPU_SHAPES.get(name, {}) if device == "cpu" else {})
        shape = {letter: config.shape.get(letter, value) for letter, value in shape.items()}
        chosen = tuple(provider for provider in offered[name] if provider.name in wanted)
        cases += [Case(ops[name], shape, dtype, device, chosen) for dtype in dtypes if dtype in ops[name].dtypes]
        if name in HEADS and device == "cpu" and torch.bfloat16 in dtypes and not (config.quick or config.shape):
            bare = tuple(provider for provider in chosen if provider.name in (OURS, BARE))
            cases.append(Case(ops[name], shape | HEAD_SHAPE, torch.bfloat16, device, bare))
    return device, cases


def _known(option: str, name: str, names: list[str]) -> str:
    if name in names:
        return name
    guess = nearest(name, names)
    hint = f"; did you mean {guess}?" if guess else "."
    raise UserError(f"{option}: no {name!r}{hint} There are: {', '.join(names)}")


def chosen_device(device: str = "auto") -> str:
    """Raises: UserError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch sees no GPU here")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def rows_file(config: Any, device: str, name: str) -> Path:
    """`config.jsonl`, or OUT/DEVICE/NAME.jsonl, in a folder that is there and can be written to."""
    of_device = "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    folder = make_folder(Path(config.out) / of_device, "--out")
    return make_room_for(config.jsonl or str(folder / f"{name}.jsonl"), "--jsonl")


def run_facts(device: str) -> dict[str, Any]:
    """What each row says of its run."""
    peers = {}
    for package in ("liger-kernel", "flash-attn"):
        try:
            peers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of other programs, before this one
        "backend": os.environ.get("TRITIUM_BACKEND", "auto"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | peers,
    }


# What is shown --------------------------------------------------------------------------------------------------------

_COLUMNS = ("pass", "provider", "ms", "p20", "p80", "rate", "", "of ceiling", "MB", "error", "× eager", "")


def _table(rows: list[Row]) -> list[str]:
    ceilings = f"copy {rows[0]['copy_gbps']:.4g} GB/s, matmul {rows[0]['matmul_tflops']:.4g} TFLOP/s"
    words = [i for i, column in enumerate(_COLUMNS) if column in ("pass", "provider", "")]  # the others are numbers
    return [ceilings, *aligned([_COLUMNS, *map(_cells, rows)], left=words)]


def _cells(row: Row) -> tuple[str, ...]:
    def text(key: str, form: str, scale: float = 1) -> str:
        return "–" if row[key] is None else form.format(row[key] * scale)

    said = f"FAILED: {row['reason']}" if row["status"] == "failed" else row["reason"] or ""
    if row["of_bare"] and row["pass"] == "both":
        working = text("working_bytes", "{:.0f} MB", 1e-6)
        said = f"{row['of_bare']:.2f} × the bare matmuls, {working} besides gradients"
    return (
        row["pass"],
        row["provider"],
        *(text(key, "{:.4g}") for key in ("ms", "ms_p20", "ms_p80")),
        text("tflops" if row["bound"] == "matmul" else "gbps", "{:.3g}"),
        {"matmul": "TFLOP/s", "memory": "GB/s", None: ""}[row["bound"]],
        text("of_ceiling", "{:.0%}"),
        text("memory_bytes", "{:.1f}", 1e-6),
        text("error", "{:.1e}"),
        text("speedup", "{:.2f}"),
        said,
    )
