"""What each way of alignment gains from one SFT checkpoint in the same time: held-out accuracy, and the KL it costs.

    python -m tritium.bench alignment --model=runs/ladder/sft --problems=rl.jsonl --test=test.jsonl

dpo and rft (rejection-sampling fine-tuning) train on answers that are sampled and verified first, outside the clock;
grpo, rloo, ppo and distill (dual-level, from a teacher) sample as they go, within it. A short run measures how many
steps fit into `seconds`. Rows go to a file of JSON lines beside the table; a second run
measures only what is not there.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritium.bench.chart import svg_bars
from tritium.bench.kernels import chosen_device, run_facts
from tritium.bench.rows import Row, full
from tritium.core.batch import pack
from tritium.core.config import REQUIRED, UserError, from_dict, load, opt
from tritium.core.files import Skipped
from tritium.core.metrics import machine, read_lines
from tritium.core.objectives.base import supervised_logprob
from tritium.core.objectives.policy import kl_estimate
from tritium.core.output import make_room_for
from tritium.core.problems import load_problems
from tritium.core.rewards.exact import ExactMatch
from tritium.core.rollout import SamplingConfig, roll_out, sample_document
from tritium.core.setup import load_model, load_tokenizer
from tritium.parallel.mesh import Mesh
from tritium.stages import distill, dpo, evaluate, grpo, ppo, sample, sft

STAGES = {"dpo": dpo, "rft": sft, "grpo": grpo, "rloo": grpo, "ppo": ppo, "distill": distill}
PROBE = 3  # steps of the run that measures a step


@dataclass(frozen=True)
class Config:
    model: str = opt(REQUIRED, "folder of the SFT model that all start from")
    problems: str = opt(REQUIRED, "problems to train on")
    test: str = opt(REQUIRED, "held-out problems")
    methods: list[str] = opt(["dpo", "rft", "grpo", "rloo", "ppo"], "what to compare", choices=tuple(STAGES))
    teacher: str = opt("", "distill: folder of the teacher")
    seconds: float = opt(60.0, "of training, for each")
    max_steps: int = opt(200, "optimizer steps of a method, at most")
    seeds: int = opt(3, "runs of each")
    sampled: int = opt(400, "problems whose answers dpo and rft learn from")
    max_tokens: int = opt(64, "longest answer")
    out: str = opt("bench/results/alignment.md", "file for the table")


def main(argv: list[str]) -> int:
    """Exit code 1 where a method is no better than what it started from."""
    config = load(Config, argv, "python -m tritium.bench alignment", __doc__.partition("\n\n")[0])
    for key in ("problems", "test"):
        if not Path(getattr(config, key)).is_file():
            raise UserError(f"--{key}={getattr(config, key)} does not exist")
    if "distill" in config.methods and not config.teacher:
        raise UserError("--methods=distill needs --teacher=FOLDER")
    file, before = make_room_for(config.out, "--out"), exact_match(config.model, config)
    kept = file.with_suffix(".jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = [row for row in rows if (row["model"], row["budget"]) == (config.model, config.seconds)]
    done = {(row["method"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(config.seeds):
            answers = ""
            for method in config.methods:
                if (method, seed) in done:
                    continue
                if method in ("dpo", "rft") and not answers:
                    answers = sampled_answers(config, seed, Path(folder) / f"answers-{seed}")
                rows.append(measured(method, config, seed, answers, Path(folder) / f"{method}-{seed}"))
                print(json.dumps(rows[-1]), flush=True)
                with kept.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    methods = [m for m in STAGES if any(row["method"] == m for row in rows)]
    file.write_text(report(rows, methods, before, config), encoding="utf-8")
    file.with_suffix(".svg").write_text(svg_bars(bars(rows, methods, before, config)), encoding="utf-8")
    return int(any(mean(rows, m, "after") <= before for m in methods))


def sampled_answers(config: Config, seed: int, out: Path) -> str:
    drawn = {"model": config.model, "sources": [config.problems], "out": str(out), "seed": seed}
    drawn |= {"limit": config.sampled, "sampling": {"max_tokens": config.max_tokens}}
    return sample.train(from_dict(sample.Config, drawn)).checkpoint


def measured(method: str, config: Config, seed: int, answers: str, out: Path) -> dict[str, Any]:
    """Train one method for the time there is, and measure what came of it."""
    stage = STAGES[method]

    def run(name: str, steps: int) -> str:
        settings = settings_of(method, config, answers)
        settings["run"] = {"out": str(out / name), "steps": steps, "seed": seed}
        return stage.train(from_dict(stage.Config, settings)).checkpoint

    run("probe", PROBE)
    times = [row["time/step"] for _, row in read_lines(out / "probe" / "metrics.jsonl") if "time/step" in row]
    steps = max(1, min(config.max_steps, int(config.seconds / statistics.fmean(times))))
    start = time.perf_counter()
    checkpoint = run("run", steps)
    seconds = time.perf_counter() - start
    numbers = full(run_facts(chosen_device()) | {"op": "alignment", "provider": method, "pass": "held out"})
    numbers |= {"shape": {"steps": steps}, "dtype": "exact match", "rounds": steps, "ms": 1e3 * seconds / steps}
    numbers |= {"method": method, "seed": seed, "steps": steps, "seconds": seconds}
    numbers |= {"model": config.model, "budget": config.seconds}
    return numbers | {"after": exact_match(checkpoint, config), "kl": kl(checkpoint, config)}


def settings_of(method: str, config: Config, answers: str) -> dict[str, Any]:
    """A stage's settings, as the ladder has them."""
    common: dict[str, Any] = {"model": config.model, "optim": {"lr": 2e-4, "weight_decay": 0.0}}
    rl = common | {"data": {"sources": [config.problems]}, "sampling": {"max_tokens": config.max_tokens}}
    if method == "dpo":
        data = {"sources": [f"{answers}/pairs.jsonl"], "holdout": 0.1}
        return common | {"data": data, "sft": 0.5, "optim": {"lr": 5e-5}}
    if method == "rft":
        return common | {"data": {"sources": [f"{answers}/sft.jsonl"], "bin_tokens": 1024, "holdout": 0.1}}
    if method == "ppo":
        options = {"prompts": 64, "group": 4, "epochs": 2, "beta": 0.01, "value_warmup": 1, "critic_lr": 2.0}
        return rl | {"reward": "exact", "ppo": options}
    if method == "distill":
        draw = {"prompts": 32, "sampling": rl.pop("sampling")}
        return rl | {"mode": "dual", "teacher": config.teacher, "draw": draw, "optim": {"lr": 1e-4}}
    return rl | {"grpo": {"algorithm": {"grpo": "dapo"}.get(method, method), "prompts": 32, "group": 8}}


def exact_match(model: str, config: Config) -> float:
    settings = evaluate.Config(model=model, data=config.test)
    settings.sampling.max_tokens = config.max_tokens
    return evaluate.measure(settings).metrics["exact_match"]


@torch.no_grad()
def kl(checkpoint: str, config: Config, prompts: int = 100) -> float:
    """KL(π ‖ SFT) per token, by k3 on answers that π draws to held-out problems."""
    mesh = Mesh.single()
    policy, start = (load_model(folder, "fp32", mesh, frozen=True) for folder in (checkpoint, config.model))
    tokenizer = load_tokenizer(checkpoint, policy)
    problems = load_problems([config.test], tokenizer, policy.config.max_positions, Skipped())[:prompts]
    rollout = roll_out(policy, tokenizer, problems, ExactMatch(), SamplingConfig(max_tokens=config.max_tokens))
    batch = pack([[sample_document(s, {})] for s in rollout.samples])
    return float(kl_estimate(*(supervised_logprob(m, batch).logp for m in (policy, start)), "k3").mean())


def mean(rows: list[dict[str, Any]], method: str, name: str) -> float:
    return statistics.fmean(row[name] for row in rows if row["method"] == method)


def bars(rows: list[dict[str, Any]], methods: list[str], before: float, config: Config) -> Iterator[Row]:
    """The share of held-out problems that each solves, beside that of what all start from."""
    found = {"SFT": (before, "")} | {m: (mean(rows, m, "after"), f", KL {mean(rows, m, 'kl'):.3f}") for m in methods}
    for name, (share, cost) in found.items():
        row = {"op": "alignment", "provider": name, "pass": "of held-out problems", "dtype": "exact match"}
        row |= {"shape": {"seconds": config.seconds}, "machine": machine(), "label": f"{share:.1%}{cost}"}
        yield full(row | {"of_ceiling": share})


def report(rows: list[dict[str, Any]], methods: list[str], before: float, config: Config) -> str:
    """The table in Markdown: mean and standard deviation over the seeds."""
    facts = machine()
    lines = ["# `python -m tritium.bench alignment`", ""]
    lines += [f"{facts['cores']} cores of {facts['cpu']}, torch {facts['torch']}, commit {facts.get('commit', '?')}."]
    lines += [f"All start from one SFT model: {before:.1%} of the held-out problems. ≤ {config.seconds:g} s each, "]
    lines[-1] += f"{len({row['seed'] for row in rows})} seed(s); `grpo` is DAPO's form. KL(π ‖ SFT) per token (k3)."
    lines += ["", "| method | before | after | spread | KL | steps | seconds |", "|---|---:|---:|---:|---:|---:|---:|"]
    for method in methods:
        after = [row["after"] for row in rows if row["method"] == method]
        shown = [before, statistics.fmean(after), statistics.pstdev(after), mean(rows, method, "kl")]
        numbers = f"{mean(rows, method, 'steps'):.0f} | {mean(rows, method, 'seconds'):.0f}"
        lines.append(f"| {method} | {' | '.join(f'{value:.3f}' for value in shown)} | {numbers} |")
    return "\n".join(lines) + "\n"
