"""What `tritium plan` proposes for the presets on 8 to 1024 H100s: the table of estimates in docs/parallel.md."""

from dataclasses import dataclass, replace

from tritium.core.config import load
from tritium.core.machines import MACHINES, PRESETS, Work
from tritium.core.plan import GIB, best, plans
from tritium.model.config import ModelConfig
from tritium.stages import plan

GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Config:
    pass


def main(argv: list[str]) -> int:
    load(Config, argv, "python -m tritium.bench scaling", __doc__)
    print(scaling_table(), end="")
    return 0


def scaling_table() -> str:
    """Presets by numbers of H100s: the best mesh of each, in Markdown."""
    rows = ["| model | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |", "|---" * (1 + len(GPUS)) + "|"]
    for name, model in PRESETS.items():
        cells = [scaling_cell(replace(model, max_positions=8192), gpus) for gpus in GPUS]
        rows.append(f"| {name.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def scaling_cell(model: ModelConfig, gpus: int) -> str:
    defaults = plan.Config()
    work = Work(defaults.context, defaults.context)
    found = best(plans(model, MACHINES["h100"], gpus, work, defaults.step_tokens), 1)[0]
    if not found.fits:
        return f"does not fit: {found.peak / GIB:.0f} GiB"
    cut = [f"{axis} {getattr(found.mesh, axis)}" for axis in ("tp", "cp") if getattr(found.mesh, axis) > 1]
    cut.append(f"zero {found.mesh.zero}" + f" over {found.mesh.shard}" * (found.mesh.shard > 0))
    return f"{', '.join(cut)}: {found.peak / GIB:.0f} GiB, {found.mfu:.0%}"
