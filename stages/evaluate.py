"""Evaluate a model: problems, multiple choice, programs, win rate against other answers, bits per byte on text.

    tritium evaluate --model=runs/grpo/step-00000060 --data=problems.jsonl
    tritium evaluate --model=… --data=gsm8k.jsonl --reward=math --shots=4 --json    {"exact_match": 0.71, "n": 500, …}
    tritium evaluate --model=… --data=HumanEval.jsonl --reward=code --samples=20 --sampling.temperature=0.8    pass@k
    tritium evaluate --model=… --choices=arc_easy.jsonl --shots=2        ARC, SciQ, LAMBADA, {"question", "choices", …}
    tritium evaluate --model=… --data=problems.jsonl --against=other.jsonl --reward_model=runs/reward    win rate
    tritium evaluate --model=… --data=problems.jsonl --against=other.jsonl --judge=FOLDER        a language model's
    tritium evaluate --model=… --text=book.txt

Problems are records {"question", "answer"}, or with tests; `reward` decides whether an answer is right. Decoding is
greedy unless `sampling.temperature` is set. Intervals are Wilson's, at 95 %.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritium.core.batch import Document, pack
from tritium.core.chat import render
from tritium.core.config import ConfigError, opt, to_toml
from tritium.core.evaluate import Choice, Likelihood, interval, likelihoods, pass_at_k, read_choices
from tritium.core.files import DataError, Skipped, read_documents, read_records
from tritium.core.formats import CODE_KEYS
from tritium.core.objectives.base import supervised_logprob
from tritium.core.output import make_room_for, write_lines
from tritium.core.problems import Problem, load_problems, share
from tritium.core.rewards import Answer, judge
from tritium.core.rewards.llm import open_judge
from tritium.core.rewards.make import make_reward
from tritium.core.rewards.model import open_reward
from tritium.core.rollout import AskConfig, Rollout, Sample, SamplingConfig, gather, roll_out
from tritium.core.run import Result
from tritium.core.setup import MeshConfig, join
from tritium.core.tokenizer import Tokenizer
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

SHOWS_ITS_RESULT = True  # the command line need not


@dataclass
class Config(AskConfig):
    data: str = opt("", 'problems to solve: {"question", "answer"} records')
    reward: str = opt("exact", "judge of right answers, e.g. math or code; see core/rewards/make.py")
    choices: str = opt("", "file of multiple-choice questions (scored by likelihood), or of LAMBADA")
    text: str = opt("", "file of text, for perplexity and bits per byte")
    shots: int = opt(0, "few-shot: prepend this many solved problems, the file's first ones", least=0)
    samples: int = opt(1, "answers per problem: more than one gives pass@k", least=1)
    against: str = opt("", "another model's answers to the same problems, as written by `save`: gives win_rate")
    reward_model: str = opt("", "win_rate: folder of a reward model that decides (default: `reward`)")
    judge: str = opt("", "win_rate: folder or URL of a language model, or a comparison model, that sees both orders")
    limit: int | None = opt(None, "use only this many problems, the first ones", least=1)
    sampling: SamplingConfig = opt(SamplingConfig(temperature=0.0), "how answers are sampled")
    json: bool = opt(False, "print one JSON object")
    save: str = opt("", "write all answers and their scores to this .jsonl file")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        super().__post_init__()
        if self.samples > 1 and not self.sampling.temperature:
            raise ConfigError(f"samples={self.samples} needs a temperature above 0: set --sampling.temperature=0.8")
        if self.judge and not self.against:
            raise ConfigError(f"judge={self.judge} compares with another model's answers: set --against=FILE")
        make_reward(self.reward)


def train(config: Config) -> Result:
    """Measure and print; the result's metrics hold `exact_match` and `n`, `bits_per_byte` and `perplexity`."""
    result = measure(config)
    if int(os.environ.get("RANK", 0)) == 0:
        metrics = result.metrics
        print(json.dumps(metrics) if config.json else "\n".join(f"{k:>18}  {v:.4g}" for k, v in metrics.items()))
    return result


def measure(config: Config) -> Result:
    """`train` without the print."""
    if not config.data and not config.text and not config.choices:
        raise ConfigError("give --data=problems.jsonl, --choices=questions.jsonl or --text=file.txt")
    for key in ("data", "text", "choices", "against"):
        file = getattr(config, key)
        if file and not Path(file).is_file():
            raise DataError(f"{key}: {file} does not exist, or is not a file")
    if config.judge:
        open_judge(config.judge, pairwise=True)  # report a wrong folder or URL before the work begins
    if config.save:
        make_room_for(config.save, "save")
    mesh = join(config.mesh, config.device, to_toml(config))
    model, tokenizer = config.open(mesh)
    metrics: dict[str, float] = {}
    if config.data:
        problems = open_problems(config, model, tokenizer)
        theirs = others_answers(config.against, problems) if config.against else []
        rollout = solve(config, model, tokenizer, problems)
        metrics |= problem_metrics(rollout)
        if config.save and mesh.main:
            write_lines(Path(config.save), map(answer_row, rollout.samples))
        if config.against:
            metrics |= win_rate(config, rollout, theirs, mesh)
    if config.choices:
        metrics |= choice_metrics(config, model, tokenizer)
    if config.text:
        metrics |= text_metrics(model, tokenizer, config.text)
    mesh.close()
    return Result(config.model, metrics)


def open_problems(config: Config, model: Transformer, tokenizer: Tokenizer) -> list[Problem]:
    skipped = Skipped()
    context = model.config.max_positions
    problems = load_problems([config.data], tokenizer, context, skipped, key="data")
    problems = with_shots(problems, config.shots, tokenizer, context, skipped)[: config.limit]
    if model.mesh.main:
        skipped.tell()
    return problems


def others_answers(path: str, problems: list[Problem]) -> list[str]:
    """What another answered to each of the problems. Raises: DataError where the file lacks some."""
    others = {json.dumps(r.get("messages")): r.get("answer") for _, r in read_records(path, Skipped("raise"))}
    found = [others.get(json.dumps(list(p.messages))) for p in problems]
    if missing := sum(not isinstance(text, str) for text in found):
        raise DataError(f"against: {path} lacks {missing} of {len(found)} problems: save answers to the same --data")
    return found


def solve(config: Config, model: Transformer, tokenizer: Tokenizer, problems: list[Problem]) -> Rollout:
    """The model's answers to all problems, judged, on every rank."""
    mine, reward = share(problems, model.mesh), make_reward(config.reward)
    rollout = roll_out(model, tokenizer, mine, reward, config.sampling, n=config.samples, seed=(config.seed,))
    return gather(rollout, model.mesh)


def with_shots(
    problems: list[Problem], shots: int, tokenizer: Tokenizer, context: int, skipped: Skipped
) -> list[Problem]:
    """The problems after the first `shots`, each with those, solved, as turns before it.

    Raises: ConfigError where none fits the context, or there is nothing to show.
    """
    if not shots:
        return problems
    if any(p.reference.startswith(tuple(f'{{"{key}"' for key in CODE_KEYS)) for p in problems[:shots]):
        raise ConfigError(f"shots={shots}: problems with tests have no reference answer to show; set shots=0")
    pairs = [(*p.messages, {"role": "assistant", "content": p.reference}) for p in problems[:shots]]
    made = []
    for p in problems[shots:]:
        messages = [*(turn for pair in pairs for turn in pair), *p.messages]
        ids = render(tokenizer, messages, generation_prompt=True).ids
        if len(ids) < context:
            made.append(replace(p, index=len(made), messages=messages, ids=ids))
        else:
            skipped.add("a question longer than the context, with its shots", f"problem {p.index}")
    if not made:
        raise ConfigError(f"shots={shots}: with them no problem fits the context of {context} tokens; use fewer shots")
    return made


def problem_metrics(rollout: Rollout) -> dict[str, float]:
    """The share of right answers; a sample whose judge failed counts as unsolved, and is told."""
    samples, per_problem = rollout.samples, [[s.right for s in group] for group in rollout.groups]
    k, shares = len(per_problem[0]), [float(np.mean(group)) for group in per_problem]
    low, high = interval(shares, k)
    metrics = {"exact_match": float(np.mean(shares)), "n": len(per_problem), "low_95": low, "high_95": high}
    for size in (size for size in (1, 2, 4, 5, 8, 10, 16, 32, 50, 64, 100) if size <= k > 1):
        values = [pass_at_k(k, sum(group), size) for group in per_problem]
        low, high = interval(values, k)
        metrics |= {f"pass@{size}": float(np.mean(values)), f"pass@{size}_low": low, f"pass@{size}_high": high}
    return metrics | {
        "answer_tokens": float(np.mean([len(s.completion.tokens) for s in samples])),
        "cut_off": float(np.mean([s.completion.finish_reason != "stop" for s in samples])),
        "verifier_failures": float(sum(rollout.failures.values())),
    }


def win_rate(config: Config, rollout: Rollout, others: list[str], mesh: Mesh) -> dict[str, float]:
    """How often the first answer scores higher than the other's to the same problem, or the `judge` prefers it; equal
    ones count half. Raises: DataError where none could be compared.
    """
    mine = [group[0].shown() for group in rollout.groups]
    theirs = [replace(answer, ids=(), text=text) for answer, text in zip(mine, others, strict=True)]
    if config.judge:
        pairs = [replace(a, reference=b.text) for a, b in zip(mine, theirs, strict=True)]
        wins = [score.value for score in judge(open_judge(config.judge, pairwise=True), pairs).scores if score]
    else:
        wins = wins_by_score(config, mine, theirs, mesh)
    if not wins:
        raise DataError("the judge failed on every pair of answers: use another --judge or --reward")
    low, high = interval(wins)
    return {"win_rate": float(np.mean(wins)), "win_rate_low": low, "win_rate_high": high, "compared": len(wins)}


def wins_by_score(config: Config, mine: list[Answer], theirs: list[Answer], mesh: Mesh) -> list[float]:
    reward = open_reward("" if config.reward_model else config.reward, config.reward_model, 0.0, config.dtype, mesh)
    scores = [judge(reward, answers).scores for answers in (mine, theirs)]
    return [0.5 * (np.sign(a.value - b.value) + 1) for a, b in zip(*scores, strict=True) if a and b]


def choice_metrics(config: Config, model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
    """Accuracy by the likelihood of each choice, and by that per byte; of a single one, whether it is the likeliest."""
    skipped = Skipped()
    choices = read_choices(config.choices, config.shots, skipped)[: config.limit]
    if model.mesh.main:
        skipped.tell()
    if not choices:
        raise DataError(f"choices: {config.choices} holds no usable question\n{skipped.summary()}")
    mine = choices[model.mesh.dp_rank :: model.mesh.dp]
    found = iter(likelihoods(model, tokenizer, [(c.prompt, option) for c in mine for option in c.options]))
    scored = [(c, [next(found) for _ in c.options]) for c in mine]
    rows = [row for part in model.mesh.gather_objects(scored)[:: model.mesh.cp * model.mesh.tp] for row in part]
    if config.save and model.mesh.main:
        lines = [asdict(c) | {"likelihoods": [asdict(x) for x in given]} for c, given in rows]
        write_lines(Path(f"{config.save}.choices.jsonl" if config.data else config.save), lines)
    right, by_byte = np.array([verdict(*row) for row in rows], dtype=float).T
    low, high = interval(right)
    metrics = {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
    metrics["accuracy_per_byte"] = float(by_byte.mean())
    return metrics | {"questions": len(rows)}


def verdict(asked: Choice, given: list[Likelihood]) -> tuple[bool, bool]:
    """Whether the right choice is the likeliest; and per byte of its text."""
    if len(given) == 1:
        return given[0].greedy, given[0].greedy
    per_byte = [x.logp / len(option.encode()) for x, option in zip(given, asked.options, strict=True)]
    return is_best([x.logp for x in given], asked.answer), is_best(per_byte, asked.answer)


def is_best(values: list[float], place: int) -> bool:
    """Above all others: SciQ's right answer comes first, where equal values, or NaN, would have argmax find it."""
    return all(values[place] > value for i, value in enumerate(values) if i != place)


@torch.no_grad()
def text_metrics(model: Transformer, tokenizer: Tokenizer, path: str) -> dict[str, float]:
    """Perplexity per token and bits per byte of a text, in windows as long as the model's context; their intervals are
    of a ratio estimator over the windows (Cochran 1977, section 2.11)."""
    found, size = [], 0
    context = model.config.max_positions
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    skipped = Skipped()
    for text in read_documents(path, skipped):
        ids = np.array(before + tokenizer.encode(text), np.int32)
        size += len(text.encode())
        # A window begins with the last token of the one before, so that every token but the first is predicted once.
        for window in (ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)):
            batch = pack([[Document(window, np.ones(len(window), np.float32))]]).to(model.mesh.device)
            found.append((-float(supervised_logprob(model, batch).logp.sum()), len(batch.supervised)))
    if model.mesh.main:
        skipped.tell()
    nats, tokens = np.array(found or [(0.0, 0)], float).T  # of each window
    total, n = max(tokens.sum(), 1.0), len(nats)
    rate = nats.sum() / total
    spread = 1.96 * math.sqrt(((nats - rate * tokens) ** 2).sum() * n / max(n - 1, 1)) / total
    rates = {"": rate} | ({"_low": rate - spread, "_high": rate + spread} if n > 1 else {})
    metrics = {f"perplexity{which}": math.exp(value) for which, value in rates.items()}
    bits = total / math.log(2) / max(size, 1)
    return metrics | {f"bits_per_byte{which}": value * bits for which, value in rates.items()}


def answer_row(s: Sample) -> dict[str, Any]:
    """What `save` keeps of an answer."""
    row = {"messages": s.problem.messages, "reference": s.problem.reference, "answer": s.text}
    row |= {"tokens": s.completion.tokens, "finish_reason": s.completion.finish_reason}
    return row | ({"score": asdict(s.score)} if s.score else {})


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("evaluate"))
