"""A trainer on records (conversations, pairs, rankings, scored answers), and the bins that it takes."""

from typing import Any

from torch import nn

from tritium.core.batch import Convert
from tritium.core.data import Bins, open_bins, record_sources
from tritium.core.files import Skipped
from tritium.core.objectives.base import Objective
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer


def open_records(
    config: Any,
    name: str,
    networks: dict[str, nn.Module],
    objective: Objective,
    tokenizer: Tokenizer,
    convert: Convert,
    count: str = "groups",
    atomic: bool = True,
) -> tuple[Trainer, Bins]:
    """The trainer of stage `name` on what `convert` makes of the records of `config.data`; `count` names the
    denominator that counts these groups, which are cut where not `atomic`. Raises: DataError where there are none."""
    first, skipped = next(iter(networks.values())), Skipped(config.data.on_error)
    sources = record_sources(config.data, convert, first.config.max_positions, config.run.seed, skipped, atomic)
    bins, evaluation = open_bins(*sources, config, first.mesh, count)
    steps = config.run.steps or bins.steps_in(config.run.epochs, config.schedule)
    settings = {"name": name, "total_steps": steps, "tokenizer": tokenizer, "skipped": skipped}
    settings |= {"evaluation": evaluation}
    return Trainer(networks, objective, config, first.mesh, **settings), bins
