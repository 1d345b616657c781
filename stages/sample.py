"""Sample k answers to each problem, verify and rank them, and write training data for later stages.

tritium sample --model=runs/sft/step-00000200 --sources=problems.jsonl --k=8 --out=runs/sample

sft.jsonl        conversations for `sft`; `learn` selects
                   right        up to `paths` right answers per problem with different calculations (rejection sampling)
                   reward       all, weighted by exp(score / β): reward-weighted regression (Peters & Schaal 2007)
                   advantage    all, weighted by exp((score − the problem's mean) / β) (AWR, arXiv 1910.00177, eq. 8)
                   condition    all, after a system message that says how good they are (arXiv 2302.08582, section 2)
pairs.jsonl      a right and a wrong answer to the same problem, or with `chosen=best` the best and the worst, for
                 `reward` and `dpo`; with `rso`, from answers kept by statistical rejection sampling (arXiv 2309.06657)
rankings.jsonl   answers with different scores, best first, for `reward --loss=listwise`
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np

from tritium.core.config import ConfigError, opt, to_toml
from tritium.core.files import DataError, Skipped
from tritium.core.output import make_folder, write_lines
from tritium.core.problems import load_problems, share
from tritium.core.rewards.make import make_reward
from tritium.core.rollout import AskConfig, Rollout, Sample, gather, roll_out
from tritium.core.run import Result
from tritium.core.select import by_worth, distinct_paths, rejection_sample
from tritium.core.setup import MeshConfig, check_same_vocabulary, join, load_model

FILES = ("sft", "pairs", "rankings")


@dataclass
class Config(AskConfig):
    others: list[str] = opt([], "folders of further models with the same tokenizer, which also answer")
    sources: list[str] = opt([], "problem files")
    reward: str = opt("exact", "reward expression; see core/rewards/make.py")
    learn: str = opt("right", "which answers go to sft.jsonl", choices=("right", "reward", "advantage", "condition"))
    paths: int = opt(1, "learn=right: most answers per problem", least=1)
    beta: float = opt(1.0, "temperature β of the weights and of rso", above=0)
    rso: int = opt(0, "pairs: answers to keep by statistical rejection sampling (0: all)", least=0)
    k: int = opt(8, "answers per problem", least=2)
    pairs: int = opt(2, "most pairs per problem", least=1)
    chosen: str = opt("right", "pairs: right and wrong answers, or best and worst", choices=("right", "best"))
    limit: int | None = opt(None, "use only this many problems, the first ones", least=1)
    out: str = opt("runs/sample", "output folder")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        super().__post_init__()
        if self.rso == 1:
            raise ConfigError("rso=1: a pair needs two answers; set rso to 0 (all) or at least 2")
        make_reward(self.reward)


def train(config: Config) -> Result:
    """Write the three files; `right` is the fraction of right answers, `solved` that of problems with at least one.

    `tokens_per_second` is over all answers' tokens and the time until the last answer was scored.
    Raises: DataError if the answers give nothing to learn from.
    """
    make_folder(config.out, "out", now=False)
    mesh = join(config.mesh, config.device, to_toml(config))
    (model, tokenizer), skipped = config.open(mesh), Skipped()
    context = model.config.max_positions
    problems = load_problems(config.sources, tokenizer, context, skipped, key="sources")[: config.limit]
    for folder in config.others:  # before the work
        check_same_vocabulary(config.model, folder, "others")
    mine, reward, start = share(problems, mesh), make_reward(config.reward, malformed=-0.5), time.perf_counter()
    rollouts = [roll_out(model, tokenizer, mine, reward, config.sampling, n=config.k, seed=(config.seed,))]
    for i, folder in enumerate(config.others, 1):
        model = load_model(folder, config.dtype, mesh, frozen=True)
        rollouts.append(roll_out(model, tokenizer, mine, reward, config.sampling, n=config.k, seed=(config.seed, i)))
    groups = [list(chain(*same)) for same in zip(*(r.groups for r in rollouts), strict=True)]  # of a problem
    rollout = gather(Rollout(groups, sum((r.failures for r in rollouts), Counter())), mesh)
    seconds = time.perf_counter() - start
    if mesh.main:
        skipped.tell()
        written = write(config, rollout)
    mesh.close()
    right = [[s.right for s in group] for group in rollout.groups]
    metrics = {"right": float(np.mean(right)), "solved": float(np.mean([any(row) for row in right]))}
    if mesh.main:
        tell(config, written, sum(any(row) for row in right), len(right))
    metrics["verifier_failures"] = float(sum(rollout.failures.values()))
    metrics["tokens_per_second"] = sum(len(s.completion.tokens) for s in rollout.samples) / seconds
    return Result(config.out, metrics)


def write(config: Config, rollout: Rollout) -> Counter:
    """The three files, each in the order of the problems; how many lines each has."""
    folder, rows = make_folder(config.out, "out"), {name: [] for name in FILES}
    for group in rollout.groups:
        levels = by_score(group)
        if not levels:
            continue
        prompt = group[0].problem.messages
        rows["sft"] += [{"messages": messages} for messages in to_learn(config, prompt, levels)]
        pairs = pairs_of(config, levels, group[0].problem.index)
        rows["pairs"] += [{"prompt": prompt, "chosen": a.text, "rejected": b.text} for a, b in pairs]
        if len(levels) > 1:
            rows["rankings"].append({"prompt": prompt, "ranked": [level[0].text for level in levels]})
    return Counter({name: write_lines(folder / f"{name}.jsonl", found) for name, found in rows.items()})


def tell(config: Config, written: Counter, solved: int, problems: int) -> None:
    """Print how many lines the files have. Raises: DataError if they are empty."""
    counts = f"{solved} of {problems} problems have a right answer among {config.k * (1 + len(config.others))}"
    if not written.total():
        raise DataError(f"{counts}: nothing to learn from. Train the model longer, sample more answers (--k), allow "
                        f"longer ones (--sampling.max_tokens), or check --reward={config.reward!r}")  # fmt: skip
    lines = ", ".join(f"{name}.jsonl {written[name]}" for name in FILES)
    print(f"{counts}; lines: {lines}", file=sys.stderr)


def to_learn(config: Config, prompt: list[dict], levels: list[list[Sample]]) -> list[list[dict]]:
    """What sft.jsonl holds of a problem: conversations."""
    if config.learn == "right":
        right = [s.text for level in levels for s in level if s.right]
        return [[*prompt, {"role": "assistant", "content": right[i]}] for i in distinct_paths(right)[: config.paths]]
    answers = [sample for level in levels for sample in level]
    if config.learn == "condition":
        marks = [{"role": "system", "content": f"Quality: {'right' if s.right else 'wrong'}"} for s in answers]
        rest = [m for m in prompt if m["role"] != "system"]
        return [[m, *rest, {"role": "assistant", "content": s.text}] for m, s in zip(marks, answers, strict=True)]
    scores = np.array([s.score.value for s in answers])
    scores = scores - scores.mean() if config.learn == "advantage" else scores
    weights = np.exp(np.minimum(scores / config.beta, 3.0)).tolist()  # AWR, section 5: at most e³ ≈ 20
    return [
        [*prompt, {"role": "assistant", "content": s.text, "weight": weight}]
        for s, weight in zip(answers, weights, strict=True)
    ]


def pairs_of(config: Config, levels: list[list[Sample]], index: int) -> list[tuple[Sample, Sample]]:
    """(chosen, rejected) of problem `index`: its best right answers and its best wrong ones; or best and worst."""
    levels = rso_levels(config, levels, index) if config.rso else levels
    if config.chosen == "best":
        best, *worse = levels
        pairs = zip(best, chain(*worse[::-1]), strict=False)
    else:
        right, wrong = ([s for level in levels for s in level if s.right == wanted] for wanted in (True, False))
        pairs = zip(right, wrong, strict=False)
    return list(pairs)[: config.pairs]


def rso_levels(config: Config, levels: list[list[Sample]], index: int) -> list[list[Sample]]:
    """The levels, of the answers that statistical rejection sampling leaves."""
    answers = [sample for level in levels for sample in level]
    kept = rejection_sample([s.score.value for s in answers], config.beta, config.rso, (config.seed, index))
    return by_score([answers[i] for i in sorted(kept)])


def by_score(group: list[Sample]) -> list[list[Sample]]:
    """Different answers with a text, grouped by score, best first."""
    return by_worth((s for s in group if s.score is not None), attrgetter("text"), attrgetter("score.value"))


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("sample"))
