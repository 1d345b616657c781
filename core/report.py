"""The report of a run: one HTML file without scripts or external resources, and its charts as SVG.

Everything that comes from data is escaped; the page is well-formed XML too, which is how the tests read it.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tritium.core.config import UserError
from tritium.core.metrics import read_lines

Points = Sequence[tuple[float, float]]

_STAGE_COLUMNS = ("name", "metric", "before", "after", "seconds", "tokens_per_second", "checkpoint")
_LABELS = {"name": "stage", "tokens_per_second": "tokens/s"}  # others are their names

# Okabe and Ito's colours, told apart by most colour-blind readers and visible on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 624, 64, 312  # the plot's edges
_MAX_POINTS = 280  # one for every two pixels of the plot's width


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    config_toml: str,
    stages: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Points]],
    samples: Sequence[Mapping[str, str]],
    machine: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> None:
    """Write `report.html` at `path`.

    stages: rows with name, metric, before, after, seconds, tokens_per_second, checkpoint (each optional);
    curves: {chart title: {series name: [(step, value)]}}; samples: {prompt, before, after}; machine: metrics.machine();
    warnings: sentences, as core/health.py has them.
    """
    sections = [
        section("Stages", _stage_table(stages)) if stages else "",
        section("Warnings", "".join(f"<p>⚠ {escaped(warning)}</p>" for warning in warnings)) if warnings else "",
        section("Curves", _charts(curves)) if curves else "",
        section("Samples", "".join(map(_sample, samples))) if samples else "",
        section("Configuration", f"<details><summary>TOML</summary><pre>{escaped(config_toml)}</pre></details>"),
        section("Machine and versions", facts(machine)),
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(title, "".join(sections)), encoding="utf-8")


def page(title: str, body: str, style: str = "") -> str:
    """A whole page around `body`, which is markup."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escaped(title)}</title><style>\n{style_sheet('report.css')}{style}</style></head>\n"
        f"<body><h1>{escaped(title)}</h1>\n{body}</body></html>\n"
    )


def read_curves(metrics_jsonl: str | os.PathLike, keys: Iterable[str]) -> dict[str, list[tuple[float, float]]]:
    """{key: [(step, value)]} from a metrics file; a key's list holds the steps that logged it.

    Raises: UserError if the file cannot be read.
    """
    curves: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    try:
        for _, values in read_lines(Path(metrics_jsonl)):
            for key in curves.keys() & values.keys():
                curves[key].append((values["step"], float(values[key])))
    except OSError as error:
        raise UserError(f"{metrics_jsonl}: cannot read the metrics ({error.strerror})") from None
    return curves


def svg_chart(series: Mapping[str, Points], title: str, x_label: str, y_label: str) -> str:
    """A line chart as one `<svg>` element that scales to its container; also valid as a file of its own.

    Values that are not finite are left out. Long series are averaged down to what the width can show, and drawn
    faintly behind a smoothed line.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    drawn = {name: _thin(points) for name, points in finite.items() if points}
    body = [f'<text class="title" x="{_LEFT}" y="22">{escaped(title)}</text>']
    if drawn:
        x_ticks = _ticks([x for points in drawn.values() for x, _ in points])
        y_ticks = _ticks([y for points in drawn.values() for _, y in points])
        body += _axes(x_ticks, y_ticks, x_label, y_label)
        for i, points in enumerate(drawn.values()):
            pixels = [(_place(x, x_ticks, _LEFT, _RIGHT), _place(y, y_ticks, _BOTTOM, _TOP)) for x, y in points]
            body += _series(pixels, _COLOURS[i % len(_COLOURS)])
        body += _legend(list(drawn))
    else:
        body.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">nothing was logged</text>')
    spans = (f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in finite.items() if p)
    label = f"{title}: {'; '.join(spans) or 'no values'}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'aria-label="{escaped(label)}">'
        f"<title>{escaped(title)}</title><style>\n{style_sheet('chart.css')}</style>{''.join(body)}</svg>"
    )


# ── the chart ────────────────────────────────────────────────────────────────────────────────────────────────────


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten) whose first and last enclose the values."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    magnitude = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * 5 >= (high - low) * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
    """The pixel of a value on an axis that runs from `start` at the first tick to `end` at the last."""
    return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = _place(tick, y_ticks, _BOTTOM, _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick, y_ticks)}</text>')
    for tick in x_ticks:
        x = _place(tick, x_ticks, _LEFT, _RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{_tick_text(tick, x_ticks)}</text>')
    middle = (_TOP + _BOTTOM) / 2
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escaped(x_label)}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escaped(y_label)}</text>'
    )
    return parts


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    """As many decimals as the distance of the ticks needs; powers of ten for what is very large or very small."""
    step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    if largest >= 1e6 or step < 1e-4:
        return f"{tick:.3g}"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _series(pixels: Points, colour: str) -> list[str]:
    if len(pixels) == 1:
        x, y = pixels[0]
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>']
    if len(pixels) < 40:
        return [f'<path stroke="{colour}" d="{_path(pixels)}"/>']
    return [
        f'<path class="raw" stroke="{colour}" d="{_path(pixels)}"/>',
        f'<path stroke="{colour}" d="{_path(_smooth(pixels))}"/>',
    ]


def _path(pixels: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)


def _thin(points: Points) -> Points:
    """At most _MAX_POINTS points: the means of runs of equal length."""
    run = math.ceil(len(points) / _MAX_POINTS)
    if run == 1:
        return points
    runs = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def _smooth(points: Points) -> Points:
    """Centred means over a twentieth of the points; the window shrinks at both ends, so that nothing lags."""
    widest, last = len(points) // 40, len(points) - 1
    smoothed = []
    for i, (x, _) in enumerate(points):
        half = min(widest, i, last - i)
        window = points[i - half : i + half + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def _legend(names: Sequence[str]) -> list[str]:
    if len(names) < 2:
        return []
    width = (_RIGHT - _LEFT) / len(names)
    parts = []
    for i, name in enumerate(names):
        x, shown = _LEFT + i * width, name if len(name) * 7 < width - 28 else name[: int((width - 28) / 7)] + "…"
        parts.append(f'<path stroke="{_COLOURS[i % len(_COLOURS)]}" d="M{x:.1f} 42h16"/>')
        parts.append(f'<text x="{x + 22:.1f}" y="46">{escaped(shown)}</text>')
    return parts


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────


def section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>\n"


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{_LABELS.get(key, key)}</th>' for key in _STAGE_COLUMNS)
    rows = ("".join(cell(stage.get(key)) for key in _STAGE_COLUMNS) for stage in stages)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f'<td class="number">{f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"}</td>'
    return f"<td>{'–' if value is None else escaped(value)}</td>"


def _charts(curves: Mapping[str, Mapping[str, Points]]) -> str:
    charts = (svg_chart(series, name, "step", "") for name, series in curves.items())
    return f'<div class="charts">{"".join(charts)}</div>'


def _sample(sample: Mapping[str, str]) -> str:
    parts = (
        f"<div><h3>{key}</h3><pre>{escaped(sample[key])}</pre></div>"
        for key in ("prompt", "before", "after")
        if key in sample
    )
    return f'<div class="sample">{"".join(parts)}</div>'


def facts(machine: Mapping[str, Any]) -> str:
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th>{cell(value)}</tr>' for name, value in machine.items())
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def escaped(value: Any) -> str:
    """Escaped text; characters that HTML and XML cannot hold (as an untrained model may emit) become U+FFFD."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def style_sheet(name: str) -> str:
    """A file that lies beside this one. (The chart has its own, so that it stands alone in a README, too.)"""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
