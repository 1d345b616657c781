"""`tritium doctor`: what the compiler makes of each kernel, what this machine has, and which backend each op uses."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritium.core.config import UserError, load, opt
from tritium.kernels import doctor
from tritium.stages.cli import run_stage
from tritium.stages.plan import aligned


@dataclass(frozen=True)
class Config:
    json: bool = opt(False, "print JSON: kernels and machine")
    targets: list[str] = opt([], "the GPUs to compile for; none named: all", choices=tuple(doctor.TARGETS))
    ops: list[str] = opt([], "only the kernels of these ops")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON. Returns 1 if a kernel does not compile or does not fit its target, else 0."""
    config = load(Config, argv, "tritium doctor", __doc__)
    if unknown := set(config.ops) - set(doctor.all_ops()):
        raise UserError(f"--ops: no op is called {', '.join(sorted(unknown))}; there are {', '.join(doctor.all_ops())}")
    targets = config.targets or list(doctor.TARGETS)
    if doctor.HAS_TRITON:
        hint = "" if config.targets or config.ops else " (--targets=sm_90 or --ops=rms_norm takes less time)"
        print(f"compiling for {', '.join(targets)}{hint}", file=sys.stderr)
    rows = doctor.compile_kernels(targets, config.ops) if doctor.HAS_TRITON else []
    machine = doctor.machine()
    print(_json(rows, machine) if config.json else _table(rows, machine))
    return 1 if doctor.problems(rows) else 0


def _json(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # one kernel a line, for readable diffs
    return f'{{"kernels": [\n{lines}\n],\n"machine": {json.dumps(machine, indent=1)}}}'


def _table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    heads = ("op", "kernel", "config", "target", "registers", "spill", "shared", "instructions")
    table = aligned([heads, *map(_cells, rows)], left=range(len(heads)))
    facts = [f"{key}: {value}" for key, value in machine.items() if key != "backends"]
    backends = [f"{op}: {why}" for op, why in machine["backends"].items()]
    spilling = [f"{row['kernel']} {row['config']} on {row['target']}" for row in rows if row.get("spill_bytes")]
    spills = f"; these spill registers, within what is allowed: {', '.join(spilling)}" if spilling else ""
    verdict = doctor.problems(rows) or [f"all {len(rows)} kernels compiled and fit{spills}"]
    return "\n".join([*table, "", *facts, "", *backends, "", *verdict])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = tuple(row[key] for key in ("op", "kernel", "config", "target"))
    if "error" in row:
        return (*names, "-", "-", "-", row["error"])
    numbers = tuple(str(row[key]) for key in ("registers", "spill_bytes", "shared_bytes"))
    return (*names, *numbers, " ".join(f"{name}×{count}" for name, count in row["instructions"].items()))


if __name__ == "__main__":
    raise SystemExit(run_stage("doctor"))
