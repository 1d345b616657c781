"""Rows as an SVG: a bar for each provider, as long as its share of the ceiling that limits the pass."""

from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from typing import Any

_STYLE = """
.bench { color: #59636e; font: 12px system-ui, sans-serif; width: 100%; height: auto }
.bench text { fill: currentColor } .bench .title { font-size: 14px; font-weight: 600 }
.bench .group { font-weight: 600 }
.bench .bar { fill: currentColor; fill-opacity: .3 } .bench .ours { fill: #0072b2; fill-opacity: 1 }
.bench .ceiling { stroke: #d55e00; stroke-width: 1.5 } .bench .limit { fill: #d55e00 }
@media (prefers-color-scheme: dark) { .bench { color: #9198a1 } .bench .ours { fill: #56b4e9 } }
"""
_WIDTH, _LEFT, _FULL = 880, 170, 400  # the chart, where bars begin, and the length of 100 %
_LINE, _HEADING = 20, 30


def svg_bars(rows: Iterable[Mapping[str, Any]], ours: str = "tritium") -> str:
    """An `<svg>` that scales to its container, valid as a file of its own; rows as `case.measure` makes them."""
    rows = list(rows)
    body, y, ops = [], 28, list(dict.fromkeys(row["op"] for row in rows))
    for heading, group in groupby(rows, lambda row: f"{row['op']}  " * (len(ops) > 1) + _heading(row)):
        group = list(group)
        y += _HEADING
        body.append(f'<text class="group" x="8" y="{y - 8}">{escape(heading)}</text>')
        top = y
        for row in group:
            body += _bar(row, y, row["provider"] == ours)
            y += _LINE
        if limit := next((row for row in group if row["bound"]), None):
            x = _LEFT + _FULL
            body.append(f'<line class="ceiling" x1="{x}" x2="{x}" y1="{top - 2}" y2="{y - 2}"/>')
            body.append(f'<text class="limit" x="{x}" y="{top - 8}">{_ceiling(limit)}</text>')
    title = f"{', '.join(ops)} on {rows[0]['machine'].get('gpu') or rows[0]['machine']['cpu']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bench" role="img" viewBox="0 0 {_WIDTH} {y + 12}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<text class="title" x="8" y="22">{escape(title)}</text>{"".join(body)}</svg>\n'
    )


def _heading(row: Mapping[str, Any]) -> str:
    extents = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    return f"{row['dtype']} {row['pass']}  {extents}"


def _ceiling(row: Mapping[str, Any]) -> str:
    if row["bound"] == "matmul":
        return f"matmul {row['matmul_tflops']:.3g} TFLOP/s"
    return f"copy {row['copy_gbps']:.3g} GB/s"


def _bar(row: Mapping[str, Any], y: int, ours: bool) -> list[str]:
    length = _FULL * min(row["of_ceiling"] or 0.0, 1.1)
    colour = "bar ours" if ours else "bar"
    return [
        f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(row["provider"])}</text>',
        f'<rect class="{colour}" x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_LINE - 5}"/>',
        f'<text x="{_LEFT + length + 6:.1f}" y="{y + 12}">{escape(_label(row))}</text>',
    ]


def _label(row: Mapping[str, Any]) -> str:
    if row.get("label"):
        return row["label"]
    if row["ms"] is None:
        return (row["reason"] or row["status"])[:100]
    parts = [f"{row['ms']:.4g} ms"]
    if row["of_ceiling"] is not None:
        parts.append(f"{row['of_ceiling']:.0%}")
    if row["speedup"] is not None:
        parts.append(f"{row['speedup']:.2f} × eager")
    return " · ".join(parts + [f"FAILED: {row['reason']}"] * (row["status"] == "failed"))
