"""What a bench leaves: rows of JSON in the schema of the kernels' bench, a table in Markdown and bars beside them.

Every row says `op`, `shape`, `dtype`, `provider`, `pass`, `status` and `reason`, milliseconds where it took some, and
the facts of its run (`bench/kernels.run_facts`); more keys are the bench's own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritium.bench.chart import svg_bars

SCHEMA = {"op", "shape", "dtype", "provider", "pass", "status", "reason"}
SCHEMA |= {"ms", "ms_p20", "ms_p80", "rounds", "of_ceiling", "bound", "speedup"}
SCHEMA |= {"device", "threads", "load", "backend", "date", "machine"}
Row = dict[str, Any]


def full(row: Mapping[str, Any]) -> Row:
    """A row with all keys of the schema; what it does not say is None, and its status ok."""
    return dict.fromkeys(SCHEMA) | {"status": "ok"} | row


def leave(file: Path, rows: Sequence[Row], lines: Iterable[str], bars: Iterable[Row] | None = None) -> None:
    """Write the rows to `file`, and beside it the lines (.md) and the bars (.svg), which are the rows if not given: as
    long as `of_ceiling`, with a row's `label`."""
    file.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.with_suffix(".svg").write_text(svg_bars(rows if bars is None else bars), encoding="utf-8")


def heading(title: str, row: Row) -> list[str]:
    """The first lines of a table's file: what it is, the day, the machine and its versions."""
    machine = " · ".join(f"{name} {value}" for name, value in row["machine"].items() if value)
    return [f"# {title}", "", f"{row['date']} · {machine}", ""]
