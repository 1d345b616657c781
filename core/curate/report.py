"""The report of a pipeline, curate.html: a funnel, and for each step why documents were dropped, with examples."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tritium.core.curate.runner import write_atomically
from tritium.core.report import escaped, facts, page, section

BINS = 24


def write_report(path: Path, steps: Sequence[Mapping[str, Any]], config_toml: str) -> None:
    """Write the page from the steps' summaries (runner.run_steps)."""
    style = (resources.files("tritium.core.curate") / "report.css").read_text("utf-8")
    body = section("Funnel", funnel(steps))
    body += section("Steps", "".join(map(one_step, steps)))
    body += section("Configuration", f"<details><summary>TOML</summary><pre>{escaped(config_toml)}</pre></details>")
    write_atomically(path, page("What became of the documents", body, style))


def funnel(steps: Sequence[Mapping[str, Any]]) -> str:
    """A row for each step: what came in, what stayed."""
    largest = max((step["rows"] for step in steps), default=0) or 1
    head = "".join(f'<th scope="col">{name}</th>' for name in ("step", "in", "dropped", "out", "characters", ""))
    rows = ""
    for step in steps:
        numbers = (step["read"], sum(step["dropped"].values()), step["rows"], step["characters"])
        cells = "".join(f'<td class="number">{n:,}</td>' for n in numbers)
        width = 100 * step["rows"] / largest
        bar = f'<div class="track"><div class="fill" style="width: {width:.1f}%"></div></div>'
        name = escaped(step["name"])
        rows += f'<tr><th scope="row"><a href="#{name}">{name}</a></th>{cells}<td class="bar">{bar}</td></tr>'
    table = f'<table class="funnel"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def one_step(step: Mapping[str, Any]) -> str:
    """Counts by reason, what was mended, facts, histograms, examples."""
    came, went = step["read"], sum(step["dropped"].values())
    share = f"{went:,} of {came:,} dropped ({went / came:.1%})" if went else f"nothing dropped of {came:,}"
    name = escaped(step["name"])
    parts = [f'<h3 id="{name}">{name} <span class="faint">{step["do"]}: {share}</span></h3>']
    reasons = "".join(f"<li>{n:,} × {escaped(reason)}</li>" for reason, n in step["dropped"].items())
    reasons += "".join(f'<li class="faint">{n:,} × {escaped(said)}</li>' for said, n in step["notes"].items() if n)
    parts.append(f'<ul class="reasons">{reasons}</ul>' if reasons else "")
    parts.append(facts(step["facts"]) if step["facts"] else "")
    parts += [histogram(name, values) for name, values in step["values"].items() if values]
    dropped = {reason: rows for reason, rows in step["samples"].items() if reason}
    if dropped:
        shown = "".join(example(row, step["twins"], reason) for reason, rows in dropped.items() for row in rows[:2])
        opened = ' open=""' if step["twins"] else ""
        parts.append(f"<details{opened}><summary>dropped, examples</summary>{shown}</details>")
    if kept := step["samples"].get(""):
        shown = "".join(example(row, {}) for row in kept[:3])
        parts.append(f"<details><summary>kept, examples</summary>{shown}</details>")
    return "".join(parts)


def example(row: Mapping[str, Any], twins: Mapping[str, str], reason: str = "") -> str:
    """A document; a duplicate beside what it resembles."""
    verdict = f'<span class="why">{escaped(reason)}</span>' if reason else '<span class="kept">kept</span>'
    said = "; ".join(f"{k} {v}" for p in row["provenance"] for k, v in p.items() if k != "step")
    facts_of = " · ".join(escaped(part) for part in (row["id"], row["detail"], said) if part)
    boxes = f'<div><p>{verdict} <span class="faint">{facts_of}</span></p><pre>{escaped(row["text"])}</pre></div>'
    if row["twin"] in twins:
        twin, text = escaped(row["twin"]), escaped(twins[row["twin"]])
        boxes += f'<div><p class="faint">resembles {twin}</p><pre>{text}</pre></div>'
    return f'<div class="sample">{boxes}</div>'


def histogram(name: str, values: Sequence[float]) -> str:
    """Of a sample of the values, dropped documents included; on a logarithmic axis where they spread over decades."""
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    logarithmic = low >= 0 and high > 10 * (middle + 1)
    counts = np.histogram(np.log10(np.add(values, 1)) if logarithmic else values, BINS)[0].tolist()
    bars = "".join(f'<div style="height: {100 * n / max(counts):.0f}%" title="{n}"></div>' for n in counts)
    axis = " (logarithmic)" if logarithmic else ""
    return (
        f"<h4>{escaped(name)}{axis}</h4>"
        f'<div class="bars" role="img" aria-label="{escaped(name)}: median {middle:.4g}">{bars}</div>'
        f'<div class="scale"><span>{low:.4g}</span><span>median {middle:.4g}</span><span>{high:.4g}</span></div>'
    )
