"""What `bench/gpu.sh` found, from the JSONL files of its folder: a Markdown table, and with --charts an SVG of each op.

A run that was made in slices, or on several machines, is summed up as one; of a step that was made twice, the later
counts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritium.bench.bars import table_of_bars
from tritium.bench.chart import svg_bars
from tritium.core.config import UserError, load, opt
from tritium.core.output import make_folder

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    folder: str = opt("", "that of a run of bench/gpu.sh")
    charts: str = opt("", "folder for an SVG of each op (empty: none)")


def main(argv: list[str]) -> int:
    """Exit code 1 where a step failed."""
    config = load(Config, argv, "python -m tritium.bench summary", __doc__.partition("\n\n")[0])
    if not (Path(config.folder) / "steps.jsonl").is_file():
        raise UserError(f"--folder={config.folder!r}: no steps.jsonl there, which bench/gpu.sh writes")
    steps = list({row["step"]: row for row in rows_of(config.folder, "steps.jsonl")}.values())
    results = rows_of(config.folder, "results.jsonl")
    tables = table_of_bars(results), table_of_models(results), table_of_curves(results), table_of_launches(results)
    print("\n".join([*head(results), *sum(tables, []), *table_of_ops(results), "", *table_of_steps(steps)]))
    if config.charts:
        folder = make_folder(config.charts, "--charts")
        of_ops = [row for row in results if "checked_shape" in row and "searched" not in row]
        for op in sorted({row["op"] for row in of_ops}):
            (folder / f"{op}.svg").write_text(svg_bars([row for row in of_ops if row["op"] == op]), encoding="utf-8")
    return int(any(step["status"] not in ("ok", "absent", "no tests") for step in steps))


def rows_of(folder: str, name: str) -> list[Row]:
    file = Path(folder) / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def head(results: list[Row]) -> list[str]:
    """The machines that the numbers are of."""
    every = {json.dumps(row["machine"], sort_keys=True): row["machine"] for row in results if "machine" in row}
    dates = sorted(row["date"] for row in results if "date" in row)
    lines = [", ".join(f"{name} {value}" for name, value in machine.items() if value) for machine in every.values()]
    return [*lines, f"from {dates[0]} to {dates[-1]}" if dates else "nothing was measured"]


def table_of_steps(steps: list[Row]) -> list[str]:
    lines = ["| step | status | seconds |", "|---|---|---:|"]
    return lines + [f"| {step['step']} | {step['status']} | {step['seconds']} |" for step in steps]


def table_of_ops(results: list[Row]) -> list[str]:
    """Ours: the rate, its share of the ceiling, and each other provider's time over ours."""
    key = ("op", "dtype", "pass")
    groups: dict[tuple, dict[str, Row]] = {}
    for row in (row for row in results if "checked_shape" in row and "searched" not in row):
        groups.setdefault((*(row[k] for k in key), json.dumps(row["shape"])), {})[row["provider"]] = row
    lines = [
        "",
        "| op | shape | dtype | pass | ms | of ceiling | others' time / ours |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for (op, dtype, kind, shape), by_name in groups.items():
        ours = by_name.get("tritium")
        if ours is None:
            continue
        sizes = " ".join(f"{letter}={size}" for letter, size in json.loads(shape).items())
        ceiling = f"{ours['of_ceiling']:.0%} of {ours['bound']}" if ours["of_ceiling"] else "–"
        time = f"{ours['ms']:.4g}" if ours["status"] == "ok" and ours["ms"] else f"{ours['status']}: {ours['reason']}"
        others = (_against(name, row, ours) for name, row in by_name.items() if row is not ours)
        lines.append(f"| {op} | {sizes} | {dtype} | {kind} | {time} | {ceiling} | {', '.join(filter(None, others))} |")
    return lines if len(lines) > 3 else []


def _against(name: str, row: Row, ours: Row) -> str:
    """Nothing of who could not do it; no ratio where one of the two is wrong."""
    if not row["ms"] or row["status"] in ("error", "failed") or ours["status"] != "ok" or not ours["ms"]:
        return f"{name} {row['status']}" if row["status"] == "failed" else ""
    return f"{name} {row['ms'] / ours['ms']:.2f}"


def table_of_models(results: list[Row]) -> list[str]:
    """Training, against others too, and generation."""
    lines = ["", "| | | ms | p20 – p80 | tokens/s | MFU, or × reading the weights | peak GB |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for row in results:
        cells = _trained(row) if "contender" in row else _timed(row) if row.get("op") in _MODEL_OPS else None
        if cells:
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


def table_of_curves(results: list[Row]) -> list[str]:
    """The loss of each contender on real text, at eight steps."""
    rows = [row for row in results if row.get("text") and row["losses"]]
    if not rows:
        return []
    last = min(len(row["losses"]) for row in rows) - 1
    steps = sorted({round(last * i / 7) for i in range(8)})
    lines = ["", f"| loss at step | {' | '.join(map(str, steps))} |", "|---|" + "---:|" * len(steps)]
    for row in rows:
        losses = (f"{row['losses'][i]:.4f}" for i in steps)
        lines.append(f"| {row['contender']} | {' | '.join(losses)} |")
    return lines


def table_of_launches(results: list[Row]) -> list[str]:
    """What `bench tune` found: of each pass the fastest launch that was tried, and how far ours is from it."""
    rows = [row for row in results if "searched" in row and row["status"] == "ok" and row["ms"]]
    lines = [
        "",
        "| op | pass | launch | ms as it is | the fastest of what was tried | ms |",
        "|---|---|---|---:|---|---:|",
    ]
    for op, kind, launch in dict.fromkeys((row["op"], row["pass"], row["searched"]) for row in rows):
        same = [row for row in rows if (row["op"], row["pass"], row["searched"]) == (op, kind, launch)]
        best, ours = min(same, key=lambda row: row["ms"]), [row for row in same if row["provider"] == "tritium"]
        now = f"{ours[0]['ms']:.4g}" if ours else "–"
        lines.append(f"| {op} | {kind} | {launch} | {now} | {best['provider']} | {best['ms']:.4g} |")
    return lines if len(lines) > 3 else []


_MODEL_OPS = ("train step", "decode step", "generate equal", "generate varied")


def _trained(row: Row) -> tuple[str, ...]:
    """A contender of `bench train`; its spread is one of rates."""
    ratio = f", ours {row['ours_over_it']:.2f} ×" if row["ours_over_it"] else ""
    ratio += f", {row['share']['sample']:.0%} of it sampling" if (row.get("share") or {}).get("sample") else ""
    what = f"{row['stage']} T={row['bin_tokens']}", f"{row['contender']}{ratio}"
    if row["status"] != "ok":
        return *what, "", f"{row['status']}: {row['reason']}", "", "", ""
    spread = f"{row['p20']:,.0f} – {row['p80']:,.0f} tokens/s"
    numbers = f"{row['tokens_per_second']:,.0f}", f"{row['of_matmul']:.2f}", f"{row['peak_mb'] / 1e3:.2f}"
    return *what, "", spread, *numbers


def _timed(row: Row) -> tuple[str, ...]:
    """A step, or a generation."""
    sizes = {"T": row["bin_tokens"], "context": row["context"]} if row["op"] == "train step" else row["shape"]
    way = [row.get("preset"), row.get("finetune"), row.get("recompute"), row["provider"]]
    what = " ".join([row["op"], *(f"{k}={v}" for k, v in sizes.items())]), " ".join(filter(None, way))
    if row["status"] != "ok":
        return *what, "", f"{row['status']}: {row['reason']}", "", "", ""
    rate, share, peak = row.get("tokens_per_second"), row.get("mfu") or row.get("of_reading"), row.get("memory_bytes")
    numbers = (f"{rate:,.0f}" if rate else "", f"{share:.2f}" if share else "", f"{peak / 1e9:.2f}" if peak else "")
    return *what, f"{row['ms']:.4g}", f"{row['ms_p20']:.4g} – {row['ms_p80']:.4g}", *numbers
