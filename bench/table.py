"""The README's table of kernels, from the registry: printed, or with --write put between its markers."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tritium
from tritium.core.config import UserError, load, opt
from tritium.kernels import all_ops
from tritium.kernels.backend import TARGETS

BEGIN, END = "<!-- python -m tritium.bench table --write -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True)
class Config:
    write: bool = opt(False, "put it into README.md, in place of the one that is there")


def main(argv: list[str]) -> int:
    config = load(Config, argv, "python -m tritium.bench table", __doc__)
    if not config.write:
        print(kernel_table(), end="")
        return 0
    readme = Path(tritium.__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not (BEGIN in text and END in text):
        raise UserError(f"{readme}: no such file, or without the lines {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}{kernel_table()}{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


def kernel_table() -> str:
    """A row for each op: its name, the first line of its file's docstring, and what runs on a GPU."""
    rows = ["| op | computes | on a GPU |", "|---|---|---|"]
    for name, spec in sorted(all_ops().items()):
        summary = sys.modules[spec.function.__module__].__doc__.partition("\n")[0].rstrip(".")
        backend = "Triton" if spec.launches(TARGETS["sm_90"]) else "torch"
        rows.append(f"| `{name}` | {' '.join(summary.split()).replace('|', chr(92) + '|')} | {backend} |")
    return "\n".join(rows) + "\n"
