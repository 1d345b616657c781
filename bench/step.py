"""Measure one training step by itself, on random weights: tokens/s, MFU and memory of any shape that fits.

    python -m tritium.bench step --preset=1b --context=4096 --recompute=none,selective,full
    python -m tritium.bench step --preset=8b --finetune=lora,qlora

A step is what the trainer does for one micro-batch of whole documents: forward, backward into fp32 gradients, clip,
AdamW with fp32 masters. MFU is (useful FLOPs of the step, see ModelConfig.flops) / its time / the rate of bare matmuls
of the model's shapes, measured before and after; what is computed again in the backward is not useful.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.measure import timing
from tritium.bench.rows import Row, full, heading, leave
from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.config import UserError, load, opt
from tritium.core.machines import PRESETS
from tritium.core.metrics import matmul_rate, peak_memory
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.optim import OptimConfig, Optimizer
from tritium.core.setup import DTYPES, trained_share
from tritium.model.adapters import attach
from tritium.model.config import ModelConfig
from tritium.model.lora import LoraConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.parallel.zero import FlatModule
from tritium.stages.plan import aligned, shape_of
from tritium.stages.pretrain import ShapeConfig

WARM = 3  # steps before any is timed: compilation, the tables of AdamW


@dataclass(frozen=True)
class Config:
    preset: str = opt("", "a known model's shape (empty: that of `model`)", choices=("", *PRESETS))
    model: ShapeConfig = opt(ShapeConfig, "the decoder's shape, where there is no preset")
    vocab_size: int = opt(8192, "tokens of its vocabulary")
    finetune: list[str] = opt(["full"], "what is trained: full, lora, qlora", choices=("full", "lora", "qlora"))
    recompute: list[str] = opt(
        ["none"], "what a layer computes again: none, selective, full", choices=("none", "selective", "full")
    )
    context: int = opt(512, "tokens of a document")
    bin_tokens: int = opt(4096, "tokens of the step")
    steps: int = opt(10, "steps that are timed")
    dtype: str = opt("bf16", "of the parameters", choices=("bf16", "fp32"))
    device: str = opt("auto", "where to measure; auto is the GPU, if there is one", choices=("auto", "cpu", "cuda"))
    out: str = opt("bench/results", "folder for step.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of step.jsonl there")


def main(argv: list[str]) -> int:
    """Exit code 1 where a step could not be made: out of memory, say."""
    config = load(Config, argv, "python -m tritium.bench step", __doc__.partition("\n\n")[0])
    if config.steps < 1 or not 1 < config.context <= config.bin_tokens:
        sizes = f"--steps={config.steps}, --context={config.context}, --bin_tokens={config.bin_tokens}"
        raise UserError(f"{sizes}: wanted a step or more, of documents of 2 tokens at least, that the bin can hold")
    device = chosen_device(config.device)
    file = rows_file(config, device, "step")
    facts = run_facts(device)
    with file.open("w", encoding="utf-8") as lines:
        rows = []
        for finetune in config.finetune:
            for recompute in config.recompute:
                rows.append(full(measured(config, device, finetune, recompute) | facts))
                print(json.dumps(rows[-1], allow_nan=False), file=lines, flush=True)
    leave(file, rows, [*heading("A training step", rows[0]), "```", *table(rows), "```"], map(bar, rows))
    print("\n".join([*table(rows), f"{file}: {len(rows)} rows"]))
    return int(any(row["status"] != "ok" for row in rows))


def measured(config: Config, device: str, finetune: str, recompute: str) -> dict[str, Any]:
    """The row of one way to train; with status "error" and the reason where it can't be done."""
    shape = PRESETS[config.preset] if config.preset else shape_of(config.model, config.vocab_size, config.context)
    row: dict[str, Any] = {"op": "train step", "provider": "tritium", "pass": "both", "dtype": config.dtype}
    row |= {"preset": config.preset, "shape": asdict(shape), "finetune": finetune, "recompute": recompute}
    row |= {"bin_tokens": config.bin_tokens, "context": config.context, "status": "ok", "reason": None}
    if device == "cuda":
        gc.collect()  # the model before this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return row | numbers(config, shape, device, finetune, recompute)
    except (RuntimeError, ValueError) as error:  # out of memory is the finding
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return row | {"status": "error", "reason": reason} | dict.fromkeys(_NUMBERS)


_NUMBERS = ("ms", "ms_p20", "ms_p80", "rounds", "tokens_per_second", "mfu", "matmul_tflops", "memory_bytes", "losses")


def numbers(config: Config, shape: ModelConfig, device: str, finetune: str, recompute: str) -> dict[str, Any]:
    dtype = DTYPES[config.dtype]
    model = random_model(shape, torch.device(device), dtype, finetune)
    model.set_recompute(recompute)
    batch = documents(shape.vocab_size, config.bin_tokens, config.context).to(device)
    step = training_step(model, batch)
    losses, times, rates = [], [], []
    for i in range(WARM + config.steps):
        if i in (WARM, WARM + config.steps - 1):
            rates.append(matmul_rate(dtype, shape.matmul_shapes(config.bin_tokens), device=device))
        start = time.perf_counter()
        losses.append(float(step()))  # waits for the step
        times.append(1e3 * (time.perf_counter() - start))
    found, rate = timing(times[WARM:]), statistics.mean(rates)
    passes = 2 + trained_share(model)  # forward, the input's gradients, and those of what is trained
    work = passes * shape.flops(batch.lengths, len(batch.supervised))
    return found._asdict() | {
        "tokens_per_second": 1e3 * config.bin_tokens / found.ms,
        "mfu": work / (found.ms / 1e3) / rate,
        "matmul_tflops": rate / 1e12,
        "memory_bytes": peak_memory(),
        "losses": losses,
    }


def random_model(shape: ModelConfig, device: torch.device, dtype: torch.dtype, finetune: str = "full") -> Transformer:
    """Weights drawn on the device: an initialisation that does not depend on it takes minutes for billions of them."""
    torch.manual_seed(0)
    model = Transformer(shape, Mesh.single(device), dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, p.shape[1] ** -0.5)
    if finetune != "full":
        attach(model, LoraConfig(rank=16, quantized=finetune == "qlora"))
    return model


def documents(vocab_size: int, tokens: int, context: int, seed: int = 0) -> PackedBatch:
    """A stream of random documents of `context` tokens, the last one shorter, all of it learned."""
    rng = np.random.default_rng(seed)
    sizes = [context] * (tokens // context) + [tokens % context] * (tokens % context > 0)
    made = [rng.integers(0, vocab_size, n).astype(np.int32) for n in sizes]
    return pack([[Document(ids, np.ones(len(ids), np.float32))] for ids in made])


def training_step(model: Transformer, batch: PackedBatch, lr: float = 1e-5) -> Callable[[], Tensor]:
    """A function that makes one step on `batch` and gives its mean loss, a scalar that nobody has waited for."""
    network, objective = FlatModule(model, model.mesh), CrossEntropy()
    optimizer = Optimizer(network, OptimConfig(lr=lr))

    def step() -> Tensor:
        with network.whole():
            term = objective.loss(objective.outputs({"policy": model}, batch), batch)[0]["loss"]
            loss = term.sum / batch.counts["tokens"]
            with network.backward(last=True):
                loss.backward()
        optimizer.step(lr)
        network.zero_grad()
        return loss.detach()

    return step


def bar(row: Row) -> Row:
    shape = {"T": row["bin_tokens"], "context": row["context"], "model": row["preset"] or row["shape"]["hidden_size"]}
    label = f"{row['tokens_per_second']:,.0f} tokens/s · {row['mfu']:.0%}" if row["status"] == "ok" else row["reason"]
    way = f"{row['finetune']}, recompute {row['recompute']}"
    bound = "matmul" if row["status"] == "ok" else None
    return row | {"shape": shape, "provider": way, "label": label, "of_ceiling": row["mfu"], "bound": bound}


def table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [("trained", "recompute", "ms", "p20", "p80", "tokens/s", "MFU", "peak GB", "last loss", "")]
    for row in rows:
        names = row["finetune"], row["recompute"]
        if row["status"] != "ok":
            cells.append((*names, *"–––––––", row["reason"]))
            continue
        times = (f"{row[key]:.4g}" for key in ("ms", "ms_p20", "ms_p80"))
        rates = f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}", f"{row['memory_bytes'] / 1e9:.2f}"
        cells.append((*names, *times, *rates, f"{row['losses'][-1]:.4g}", ""))
    return aligned(cells, left=(0, 1, 9))
