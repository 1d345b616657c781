"""Problems: the prompts that answers are drawn for, each with the answer that is right, and which of them are next."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tritium.core.chat import render
from tritium.core.config import ConfigError
from tritium.core.data import parse_sources
from tritium.core.files import DataError, Skipped, read_records
from tritium.core.formats import Message, RecordError, problem, usable
from tritium.core.tokenizer import Tokenizer
from tritium.parallel.mesh import Mesh

RECHECK = 20  # draws (rollouts, where each has one round) after which a problem outside the band is tried again


@dataclass
class Problem:
    """A prompt with the answer that is right; `index` is its place among all problems."""

    index: int
    messages: list[Message]
    ids: list[int]
    reference: str


def load_problems(
    sources: Sequence[str], tokenizer: Tokenizer, context: int, skipped: Skipped, key: str = "data.sources"
) -> list[Problem]:
    """Read {"question", "answer"} records; `key` is the option that names the files.

    Raises: DataError for a file without a usable one; ConfigError for a weight, which problems don't have.
    """
    problems = []
    for path, weight in parse_sources(sources, key):
        if weight != 1:
            raise ConfigError(f"{key}: {path}@{weight:g}: problems have no weights; leave out the @{weight:g}")
        before = len(problems)
        for place, record in read_records(path, skipped):
            with usable(skipped, place):
                messages, reference = problem(record)
                ids = render(tokenizer, messages, generation_prompt=True).ids
                if len(ids) >= context:
                    raise RecordError("a question longer than the context")
                problems.append(Problem(len(problems), messages, ids, reference))
        if len(problems) == before:
            raise DataError(f"{path} holds no usable problem\n{skipped.summary()}")
    return problems


def problems_of(
    number: int,
    problems: list[Problem],
    count: int,
    seed: int,
    rates: dict[str, list[float]] | None = None,
    band: Sequence[float] = (0.0, 1.0),
) -> list[Problem]:
    """The problems of rollout `number`: shuffled passes over all of them, a function of (seed, number).

    With `rates` ({index: [share of right answers, draw]}), a draw from those that are within `band`, or were not
    tried for a while; from all where these are too few.
    """
    if rates is not None:
        known = [rates.get(str(p.index)) for p in problems]
        open_ = lambda r: r is None or number - r[1] >= RECHECK or band[0] <= r[0] <= band[1]  # noqa: E731
        within = [p for p, r in zip(problems, known, strict=True) if open_(r)]
        within = within if len(within) >= count else problems
        return [within[i] for i in np.random.default_rng([seed, number]).permutation(len(within))[:count]]
    places = range(number * count, (number + 1) * count)
    epochs = {p // len(problems) for p in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(problems)) for epoch in epochs}
    return [problems[orders[p // len(problems)][p % len(problems)]] for p in places]


def share(problems: Sequence[Problem], mesh: Mesh) -> list[Problem]:
    """This data-parallel rank's problems."""
    return list(problems[mesh.dp_rank :: mesh.dp])
