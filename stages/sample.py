"""Draw k answers to each problem, verify and rank them, and write what the later stages train on.

tritium sample --model=runs/sft/step-00000200 --sources=problems.jsonl --k=8 --out=runs/sample

sft.jsonl        the right answers (one of each problem), as conversations: rejection sampling
pairs.jsonl      a right and a wrong answer of the same problem: for `reward` and `dpo`
rankings.jsonl   answers of different score, best first: for `reward --loss=listwise`
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tritium.core.config import REQUIRED, ConfigError, opt, to_toml
from tritium.core.formats import Skipped
from tritium.core.output import make_folder
from tritium.core.rewards.exact import ExactMatch
from tritium.core.rollout import Rollout, Sample, SamplingConfig, gather, load_problems, roll_out, share
from tritium.core.setup import MeshConfig, join, load_model, load_tokenizer
from tritium.core.trainer import Result


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model, with its tokenizer")
    sources: list[str] = opt([], "files of problems")
    k: int = opt(8, "answers to each problem")
    pairs: int = opt(2, "pairs written for a problem, at most")
    chosen: str = opt("right", "a pair's better answer: a right one, or the best there is", choices=("right", "best"))
    limit: int | None = opt(None, "use only the first problems")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are drawn")
    out: str = opt("runs/sample", "folder to write")
    seed: int = opt(0, "seed of the answers")
    dtype: str = opt(
        "auto", "of the parameters (auto: bf16 where it is fast)", choices=("auto", "bf16", "fp32", "fp64")
    )
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        if self.k < 2 or self.pairs < 1:
            raise ConfigError(f"k={self.k} must be at least 2, and pairs={self.pairs} at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1")


def train(config: Config) -> Result:
    """Write the three files; `right` is the share of right answers, `solved` that of problems with one.

    `tokens_per_second` counts the tokens of all answers, over the seconds until the last of them was judged.
    """
    make_folder(config.out, "out")
    mesh = join(config.mesh, config.device, to_toml(config))
    model = load_model(config.model, config.dtype, mesh, frozen=True)
    tokenizer = load_tokenizer(config.model, model)
    skipped = Skipped()
    context = model.config.max_positions
    problems = load_problems(config.sources, tokenizer, context, skipped, key="sources")[: config.limit]
    mine, reward, start = share(problems, mesh), ExactMatch(malformed=-0.5), time.perf_counter()
    rollout = roll_out(model, tokenizer, mine, reward, config.sampling, n=config.k, seed=(config.seed,))
    rollout = gather(rollout, mesh)
    seconds = time.perf_counter() - start
    if mesh.main:
        if skipped.reasons:
            print(skipped.summary(), file=sys.stderr)
        write(config, rollout)
    mesh.close()
    right = [[s.right for s in group] for group in rollout.groups]
    metrics = {"right": float(np.mean(right)), "solved": float(np.mean([any(row) for row in right]))}
    metrics["verifier_failures"] = float(sum(rollout.failures.values()))
    metrics["tokens_per_second"] = sum(len(s.completion.tokens) for s in rollout.samples) / seconds
    return Result(config.out, metrics)


def write(config: Config, rollout: Rollout) -> None:
    """The three files, each in the order of the problems."""
    folder = Path(config.out)
    files = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in ("sft", "pairs", "rankings")}
    for group in rollout.groups:
        levels = by_score(group)
        if not levels:
            continue
        prompt, (best, *worse) = group[0].problem.messages, levels
        if best[0].right:
            put(files["sft"], {"messages": [*prompt, {"role": "assistant", "content": best[0].text}]})
        if best[0].right or config.chosen == "best":
            wrong = [sample for level in worse for sample in level]
            for chosen, rejected in list(zip(best, wrong, strict=False))[: config.pairs]:
                put(files["pairs"], {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text})
        if worse:
            put(files["rankings"], {"prompt": prompt, "ranked": [level[0].text for level in levels]})
    for file in files.values():
        file.close()


def by_score(group: list[Sample]) -> list[list[Sample]]:
    """Different answers with a text, grouped by score, best first."""
    different = {s.text: s for s in group if s.score is not None and s.text.strip()}
    values = sorted({s.score.value for s in different.values()}, reverse=True)
    return [[s for s in different.values() if s.score.value == value] for value in values]


def put(file, row: dict) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("sample"))
