"""Measure a model: exact match on problems, and bits per byte on text.

    tritium evaluate --model=runs/grpo/step-00000060 --data=problems.jsonl
    tritium evaluate --model=… --data=problems.jsonl --json          {"exact_match": 0.71, "n": 500, …}
    tritium evaluate --model=… --text=book.txt

Problems are records {"question", "answer"}; an answer counts when what follows the reasoning is the reference (for
numbers: its last number). Answers are the likeliest ones unless `sampling.temperature` says otherwise.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tritium.core.batch import Document, pack
from tritium.core.config import REQUIRED, ConfigError, opt, to_toml
from tritium.core.formats import DataError, Skipped, read_documents
from tritium.core.objectives import supervised_logprob
from tritium.core.output import make_room_for
from tritium.core.rewards.exact import ExactMatch
from tritium.core.rollout import Rollout, SamplingConfig, gather, load_problems, roll_out, share
from tritium.core.setup import MeshConfig, join, load_model, load_tokenizer
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Result
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

SHOWS_ITS_RESULT = True  # the command line need not


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model, with its tokenizer")
    data: str = opt("", 'problems to solve: {"question", "answer"} records')
    text: str = opt("", "text to predict")
    limit: int | None = opt(None, "use only the first problems")
    sampling: SamplingConfig = opt(SamplingConfig(temperature=0.0), "how answers are drawn")
    json: bool = opt(False, "print one JSON object")
    save: str = opt("", "write every answer and its verdict to this .jsonl file")
    seed: int = opt(0, "seed of sampled answers")
    dtype: str = opt(
        "auto", "of the parameters (auto: bf16 where it is fast)", choices=("auto", "bf16", "fp32", "fp64")
    )
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1")


def train(config: Config) -> Result:
    """Measure and print; the result's metrics hold `exact_match` and `n`, `bits_per_byte` and `perplexity`."""
    result = measure(config)
    if int(os.environ.get("RANK", 0)) == 0:
        metrics = result.metrics
        print(json.dumps(metrics) if config.json else "\n".join(f"{k:>18}  {v:.4g}" for k, v in metrics.items()))
    return result


def measure(config: Config) -> Result:
    """`train` without the print."""
    if not config.data and not config.text:
        raise ConfigError("give --data=problems.jsonl, --text=file.txt, or both")
    for key, file in (("data", config.data), ("text", config.text)):
        if file and not Path(file).is_file():
            raise DataError(f"{key}: {file} does not exist")
    if config.save:
        make_room_for(config.save, "save")
    mesh = join(config.mesh, config.device, to_toml(config))
    model = load_model(config.model, config.dtype, mesh, frozen=True)
    tokenizer = load_tokenizer(config.model, model)
    metrics: dict[str, float] = {}
    if config.data:
        rollout = solve(config, model, tokenizer)
        metrics |= problem_metrics(rollout)
        if config.save and mesh.main:
            write_answers(config.save, rollout)
    if config.text:
        metrics |= text_metrics(model, tokenizer, config.text)
    mesh.close()
    return Result(config.model, metrics)


def solve(config: Config, model: Transformer, tokenizer: Tokenizer) -> Rollout:
    """The model's answers to all problems, judged, on every rank."""
    skipped = Skipped()
    context = model.config.max_positions
    problems = load_problems([config.data], tokenizer, context, skipped, key="data")[: config.limit]
    tell(skipped, model.mesh)
    mine = share(problems, model.mesh)
    return gather(roll_out(model, tokenizer, mine, ExactMatch(), config.sampling, seed=(config.seed,)), model.mesh)


def tell(skipped: Skipped, mesh: Mesh) -> None:
    if skipped.reasons and mesh.main:
        print(skipped.summary(), file=sys.stderr)  # standard output is for the numbers


def problem_metrics(rollout: Rollout) -> dict[str, float]:
    """Exact match with its 95 % interval (Wilson's); a sample whose judge failed counts as unsolved, and is told."""
    right = [s.right for s in rollout.samples]
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle, spread = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {
        "exact_match": p,
        "n": n,
        "low_95": max(middle - spread / (1 + z * z / n), 0.0),
        "high_95": middle + spread / (1 + z * z / n),
        "answer_tokens": float(np.mean([len(s.completion.tokens) for s in rollout.samples])),
        "cut_off": float(np.mean([s.completion.finish_reason != "stop" for s in rollout.samples])),
        "verifier_failures": float(sum(rollout.failures.values())),
    }


@torch.no_grad()
def text_metrics(model: Transformer, tokenizer: Tokenizer, path: str) -> dict[str, float]:
    """Perplexity per token and bits per byte of a text, in windows as long as the model's context."""
    nats = tokens = size = 0
    context = model.config.max_positions
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    skipped = Skipped()
    for text in read_documents(path, skipped):
        ids = np.array(before + tokenizer.encode(text), np.int32)
        size += len(text.encode())
        # A window begins with the last token of the one before, so that every token but the first is predicted once.
        for window in (ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)):
            batch = pack([[Document(window, np.ones(len(window), np.float32))]]).to(model.mesh.device)
            nats -= float(supervised_logprob(model, batch).logp.sum())
            tokens += len(batch.supervised)
    tell(skipped, model.mesh)
    return {"perplexity": math.exp(nats / max(tokens, 1)), "bits_per_byte": nats / math.log(2) / max(size, 1)}


def write_answers(path: str, rollout: Rollout) -> None:
    rows = [
        {"messages": s.problem.messages, "reference": s.problem.reference, "answer": s.text}
        | {"tokens": s.completion.tokens, "finish_reason": s.completion.finish_reason}
        | ({"score": asdict(s.score)} if s.score else {})
        for s in rollout.samples
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("evaluate"))
