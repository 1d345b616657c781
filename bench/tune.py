"""Search for launch configurations: an op with other block sizes, warps and stages, each checked, and timed in turn.

    python -m tritium.bench tune --ops=attention --shape=T=16384,N=16384 --most=12
    TRITIUM_BACKEND=triton TRITON_INTERPRET=1 python -m tritium.bench tune --ops=swiglu --shape=T=8,F=64   (a rehearsal)

Kernels take theirs from a function of their file, `_config`: see LAUNCHES. Nothing is kept but the rows: a winner goes
into that function by hand, for the architecture that it was found on.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from tritium.bench.case import Case, measure
from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.providers import OURS, Provider
from tritium.bench.rows import Row
from tritium.bench.summary import table_of_launches
from tritium.core.config import load, opt
from tritium.kernels import all_ops


@dataclass(frozen=True)
class Launch:
    """What to try in place of what `module`'s `_config` gives; for one kernel, where its first argument names it."""

    module: str
    values: dict[str, tuple[int, ...]]
    kernel: str = ""


_ATTENTION = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
_HEAD = {
    "BLOCK_T": (64, 128),
    "BLOCK_V": (128, 256),
    "BLOCK_E": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
}
_LORA = {
    "BM": (64, 128, 256),
    "BN": (128, 256),
    "BK": (32, 64),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
    "GROUP": (4, 8),
}
_ROWS = {"BLOCK": (512, 1024, 2048, 4096), "ROWS": (1, 2, 4), "num_warps": (2, 4, 8, 16)}
LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "attention": tuple(Launch("attention", _ATTENTION, kernel) for kernel in ("forward", "dq", "dkv")),
    "cross_entropy": (Launch("cross_entropy", _ROWS),),
    "linear_cross_entropy": (Launch("head_triton", _HEAD),),
    "linear_logprob": (Launch("head_triton", _HEAD),),
    "linear_kl": (Launch("linear_kl", _HEAD),),
    "lora_linear": (Launch("lora_linear", _LORA),),
    "swiglu": (Launch("gated", _ROWS),),
    "geglu": (Launch("gated", _ROWS),),
}


@dataclass(frozen=True)
class Config:
    ops: list[str] = opt(["attention"], "whose launches", choices=tuple(LAUNCHES))
    shape: dict[str, int] = opt({}, "extents in place of the usual ones, e.g. T=512,E=64, in ops that have them")
    most: int = opt(12, "combinations to try of each launch, drawn at random", least=1)
    seconds: float = opt(1.0, "of measuring, for each launch")
    device: str = opt("auto", "where to measure; auto is the GPU, if there is one", choices=("auto", "cpu", "cuda"))
    out: str = opt("bench/results", "folder for tune.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of tune.jsonl there")


def main(argv: list[str]) -> int:
    """Exit code 1 where a launch as it is fails its check."""
    config = load(Config, argv, "python -m tritium.bench tune", __doc__.partition("\n\n")[0])
    device, ops = chosen_device(config.device), all_ops()
    file, facts, rows = rows_file(config, device, "tune"), run_facts(device), []
    with file.open("w", encoding="utf-8") as lines:
        for spec, launch in ((ops[name], launch) for name in config.ops for launch in LAUNCHES[name]):
            shape = {letter: config.shape.get(letter, value) for letter, value in spec.shape.items()}
            found = [row | facts for row in searched(launch, spec, shape, device, config)]
            lines.writelines(json.dumps(row, allow_nan=False) + "\n" for row in found)
            lines.flush()
            rows += found
            print("\n".join(table_of_launches(found)), flush=True)
    print(f"{file}: {len(rows)} rows")
    return int(any(row["provider"] == OURS and row["status"] != "ok" for row in rows))


def searched(launch: Launch, spec: Any, shape: dict[str, int], device: str, config: Config) -> list[Row]:
    """The rows of `case.measure`, a provider being a launch; "searched" says whose."""
    every = [dict(zip(launch.values, values, strict=True)) for values in itertools.product(*launch.values.values())]
    drawn = random.Random(0).sample(every, min(config.most, len(every)))
    with switched(launch) as switch:
        own = [Provider(OURS, lambda args, kwargs: switch({}, spec.function))]
        for values in drawn:
            name = " ".join(f"{key}={value}" for key, value in values.items())
            own.append(Provider(name, lambda args, kwargs, values=values: switch(values, spec.function)))
        rows = measure(Case(spec, shape, torch.bfloat16, device, tuple(own)), config.seconds)
    title = f"{launch.module}{f' {launch.kernel}' if launch.kernel else ''}"
    return [row | {"searched": title} for row in rows]


@contextmanager
def switched(launch: Launch) -> Iterator[Callable]:
    """`switch(values, function)` is the function, launched with these values, and so is its backward, until another
    one is called."""
    module, chosen = import_module(f"tritium.kernels.{launch.module}"), {}
    as_it_is = module._config

    def config(*arguments: Any) -> dict[str, Any]:
        found = as_it_is(*arguments)
        meant = not launch.kernel or arguments[0] == launch.kernel
        return found | {key: value for key, value in chosen.items() if meant and key in found}

    def switch(values: dict[str, int], function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            chosen.clear()
            chosen.update(values)
            return function(*args, **kwargs)

        return run

    with mock.patch.object(module, "_config", config):
        yield switch
