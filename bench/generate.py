"""Measure generation beside transformers' `generate`, on the same weights, in turn; and a decode step by itself.

    equal    32 prompts of 40 tokens, 64 new tokens each
    varied   prompts and answers of 8 to 256 tokens: transformers pads the prompts, and stops each row at its length
    step     a decode step of 1, 8 and 32 sequences (--batches) of about 100 tokens, over the time in which a copy, at
             the rate measured in the same run, would read the weights

Tokens drawn are counted, at temperature 1, and nothing else; speedup is of the medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.measure import Ceilings, Stopwatch, timing
from tritium.bench.rows import full, heading, leave
from tritium.bench.step import random_model
from tritium.core.config import UserError, load, opt
from tritium.core.machines import PRESETS
from tritium.core.setup import DTYPES
from tritium.model.cache import cache_pages
from tritium.model.config import ModelConfig
from tritium.model.generate import Engine, run
from tritium.model.sampling import Options
from tritium.model.transformer import Transformer

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_layers": 6, "num_heads": 6, "num_kv_heads": 3}


@dataclass(frozen=True)
class Config:
    against: str = opt("", "whom to compare with: hf (transformers)", choices=("", "hf"))
    device: str = opt("auto", "where to measure; auto is the GPU, if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("bf16", "of the parameters", choices=("bf16", "fp32"))
    preset: str = opt("", "a known model's shape (empty: a small one)", choices=("", *PRESETS))
    vocab_size: int = opt(49152, "tokens of the small model's vocabulary")
    prompts: int = opt(32, "prompts of a workload")
    rounds: int = opt(5, "runs of each that are timed")
    steps: int = opt(40, "decode steps of each batch that are timed")
    batches: list[int] = opt([1, 8, 32], "sequences of a decode step")
    out: str = opt("bench/results", "folder for generate.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of generate.jsonl there")


def main(argv: list[str]) -> int:
    config = load(Config, argv, "python -m tritium.bench generate", __doc__.partition("\n\n")[0])
    device = chosen_device(config.device)
    file = rows_file(config, device, "generate")
    facts, dtype = run_facts(device), DTYPES[config.dtype]
    small = ModelConfig(config.vocab_size, **SHAPE, head_dim=64, max_positions=1024, tie_embeddings=True)
    model = random_model(PRESETS.get(config.preset, small), torch.device(device), dtype).requires_grad_(False)
    providers: dict[str, Callable] = {"tritium": ours(model)}
    if config.against:
        providers["transformers"] = theirs(model)
    rows = [row for name in ("equal", "varied") for row in whole(config, providers, name)] + steps(
        config, model, device
    )
    common = {"dtype": str(dtype).removeprefix("torch."), "pass": "forward"} | facts
    rows = [full(row | common) for row in rows]
    leave(file, rows, [*heading("Generation", rows[0]), *table(rows)])
    print("\n".join(table(rows)) + f"\n{file}: {len(rows)} rows")
    return 0


def workload(config: Config, name: str) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens are to follow each."""
    rng = np.random.default_rng(0)
    count = config.prompts
    lengths = [40] * count if name == "equal" else rng.integers(8, 257, count).tolist()
    new = [64] * count if name == "equal" else rng.integers(8, 257, count).tolist()
    return [rng.integers(3, config.vocab_size, n).tolist() for n in lengths], new


def whole(config: Config, providers: dict[str, Callable], name: str) -> list[dict[str, Any]]:
    prompts, new = workload(config, name)
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for i in range(config.rounds + 1):
        for provider, function in providers.items():
            start = time.perf_counter()
            function(prompts, new)
            if i:  # the first warms up
                times[provider].append(1e3 * (time.perf_counter() - start))
    slowest = statistics.median(times[list(providers)[-1]])
    return [
        {
            "op": f"generate {name}",
            "shape": {"B": len(prompts), "prompt": sum(map(len, prompts)), "new": sum(new)},
            "provider": provider,
            **timing(found)._asdict(),
            "tokens_per_second": 1e3 * sum(new) / statistics.median(found),
            "speedup": slowest / statistics.median(found) if len(providers) > 1 else None,
            "of_ceiling": min(map(statistics.median, times.values())) / statistics.median(found),
            "label": f"{1e3 * sum(new) / statistics.median(found):,.0f} tokens/s",
        }
        for provider, found in times.items()
    ]


def ours(model: Transformer) -> Callable:
    def function(prompts: list[list[int]], new: list[int]) -> None:
        longest = max(len(p) + n for p, n in zip(prompts, new, strict=True))
        engine = Engine(model, cache_pages(len(prompts), longest), max_batch=len(prompts))
        made = [
            engine.submit(p, Options(max_tokens=n, stop_ids=()), [(0, i)])[0]
            for i, (p, n) in enumerate(zip(prompts, new, strict=True))
        ]
        list(run(engine))
        if [len(s.completion.tokens) for s in made] != new:
            raise RuntimeError("not all tokens were drawn")

    return function


def theirs(model: Transformer) -> Callable:
    """Raises: UserError where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.generation import StoppingCriteria, StoppingCriteriaList
    except ImportError:
        raise UserError("--against=hf needs transformers: pip install transformers") from None
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.mesh.device).eval()

    def function(prompts: list[list[int]], new: list[int]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.mesh.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.mesh.device)
        limits = torch.tensor(new, device=model.mesh.device) + longest

        class Limits(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids.shape[1] >= limits

        found = other.generate(
            ids, attention_mask=mask, max_new_tokens=max(new), do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=None, stopping_criteria=StoppingCriteriaList([Limits()]),
        )  # fmt: skip
        if found.shape[1] != longest + max(new):
            raise RuntimeError(f"transformers drew {found.shape[1] - longest} tokens, not {max(new)}")

    return function


def steps(config: Config, model: Transformer, device: str) -> list[dict[str, Any]]:
    """The step of each batch, and the copy, in turn; weights are read once a step, a tied head for the second time."""
    ceilings, stopwatch = Ceilings(device, model.dtype), Stopwatch(device)
    copies: list[float] = []
    weight_bytes = sum(p.nbytes for p in model.parameters())
    engines, times = {}, {size: [] for size in config.batches}
    for size in config.batches:
        engines[size] = engine = Engine(model, cache_pages(size, 100 + config.steps + 2), max_batch=size)
        rng = np.random.default_rng(1)
        for i in range(size):
            prompt = rng.integers(3, config.vocab_size, 96).tolist()
            engine.submit(prompt, Options(max_tokens=config.steps + 4, stop_ids=()), [(0, i)])
        while engine.waiting or any(len(s.ids) - s.cached > 1 for s in engine.running) or not engine.running:
            engine.step()
        for _ in range(3):
            engine.step()
    for _ in range(config.steps):
        copies.append(stopwatch(ceilings.functions["copy"])[1])
        for size, engine in engines.items():
            start = time.perf_counter()  # of the host, too: what it does between two steps takes its time
            engine.step()  # waits for its tokens
            times[size].append(1e3 * (time.perf_counter() - start))
    copy = ceilings.bytes / (1e-3 * statistics.median(copies))  # bytes read and written a second
    reading = 1e3 * weight_bytes / copy
    return [
        {
            "op": "decode step",
            "shape": {"B": size, "length": 100},
            "provider": "tritium",
            **timing(times[size])._asdict(),
            "of_ceiling": reading / statistics.median(times[size]),
            "bound": "memory",
            "copy_gbps": copy / 1e9,
            "weight_bytes": weight_bytes,
            "of_reading": statistics.median(times[size]) / reading,
        }
        for size in config.batches
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | | ms | tokens/s | × transformers | × reading the weights |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        rate = row.get("tokens_per_second") or 1e3 * row["shape"]["B"] / row["ms"]
        cells = [row["op"], f"{row['provider']}, B={row['shape']['B']}", f"{row['ms']:.1f}", f"{rate:,.0f}"]
        cells += [f"{row[key]:.2f}" if row.get(key) else "" for key in ("speedup", "of_reading")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
