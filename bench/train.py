"""Measure training: tokens/s, share of the matmul rate, and peak memory, ours beside others', on the same work.

Everyone trains the same weights on the same records with AdamW in bf16 (ours with fp32 masters), in a process of its
own with as many threads, and takes turns: A B C A B C …; the matmul rate is measured between. Tokens are real ones:
padding does not count. "of matmul" is (FLOPs that the work needs) / seconds / the rate of bare matmuls of the model's
shapes; FLOPs are 6 per matrix parameter and token, the head on learned tokens only, and causal attention's triangle
(ModelConfig.flops x 3; PASSES says how many for the other stages). That is the MFU whose peak is this machine's.
Where a CPU multiplies fp32 faster than bf16 (kernels/wide.py), the rate is fp32's: the higher of the two.

Beside the rows there are tables (Markdown) and bars (SVG). Rows of other stages and sizes in the file stay.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritium.bench.contenders import CONTENDERS, NEW, SAMPLED, Work
from tritium.bench.kernels import chosen_device, rows_file, run_facts
from tritium.bench.measure import timing
from tritium.bench.rows import Row, full, leave
from tritium.core.config import UserError, load, opt
from tritium.core.corpus import library_texts
from tritium.core.metrics import matmul_rate
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.stages.plan import aligned, shape_of
from tritium.stages.pretrain import ShapeConfig


def sized(layers: int, width: int, inner: int, heads: int, kv_heads: int, vocab_size: int) -> dict[str, Any]:
    """A decoder's shape, as Config has it."""
    shape = ShapeConfig(layers=layers, hidden_size=width, intermediate_size=inner, heads=heads, kv_heads=kv_heads)
    return {"model": shape, "vocab_size": vocab_size}


SMALL = ShapeConfig(hidden_size=384, intermediate_size=1024, heads=6, kv_heads=3)
# What --sizes names: Llamas, by their parameters. What does not fit is a row with its reason.
SIZES: dict[str, dict[str, Any]] = {
    "1m": sized(3, 128, 384, 2, 1, 4096),
    "13m": sized(6, 384, 1024, 6, 3, 8192),
    "29m": sized(6, 384, 1024, 6, 3, 49152),
    "123m": sized(12, 768, 2048, 12, 12, 49152),
    "405m": sized(24, 1024, 4096, 16, 4, 49152),
    "1b": sized(16, 2048, 8192, 32, 8, 49152),
}
# Forward passes' worth of FLOPs of a token: of the whole model, and of the decoder without head. Sampling (grpo, ppo)
# is one, and of ppo the log-probs before an update; ppo has a reference and a critic (3, and 1 for the old values).
PASSES = {"pretrain": (3, 0), "sft": (3, 0), "lora": (2, 0), "reward": (3, 0), "dpo": (4, 0), "distill": (4, 0)}
PASSES |= {"grpo": (4, 0), "ppo": (6, 4)}
STAGES = tuple(PASSES)
PEERS = {"nanogpt": ("pretrain",), "trl": ("pretrain", "sft", "lora", "reward", "dpo", "grpo")}
WARM = 3  # steps before any is timed: compilation, oneDNN's kernels
SAME = 0.02  # the losses of the first step may differ by that much, bf16 being what it is


@dataclass(frozen=True)
class Config:
    stages: list[str] = opt(["pretrain"], "what is trained", choices=STAGES)
    against: list[str] = opt([], "who else, where it has the stage: hf…, nanogpt, trl", choices=tuple(CONTENDERS))
    model: ShapeConfig = opt(SMALL, "the decoder's shape")
    vocab_size: int = opt(8192, "tokens of its vocabulary")
    bin_tokens: int = opt(4096, "tokens of a step")
    sizes: list[str] = opt([], "models in place of --model and --vocab_size, one after another", choices=tuple(SIZES))
    micro_tokens: int = opt(0, "of our micro-batches, whose gradients a step adds (0: as many as bin_tokens)", least=0)
    context: int = opt(512, "tokens of a document of pretraining, and the most of any other")
    text: bool = opt(False, "pretraining is on texts of Python's standard library, a byte a token, and not on noise")
    lr: float = opt(1e-5, "learning rate of everyone, constant", above=0)
    rounds: int = opt(5, "turns of each")
    steps: int = opt(3, "steps of a turn")
    threads: int = opt(2, "of each")
    out: str = opt("bench/results", "folder for train.jsonl, in a folder for the device")
    jsonl: str = opt("", "file for the rows, in place of train.jsonl there")


def main(argv: list[str]) -> int:
    """Exit code 1 if anyone failed, or did other work than ours."""
    config = load(Config, argv, "python -m tritium.bench train", __doc__.partition("\n\n")[0])
    device = chosen_device()
    if config.rounds < 1 or config.steps < 1 or config.threads < 1:
        raise UserError(f"--rounds={config.rounds}, --steps={config.steps}, --threads={config.threads}: at least 1")
    if config.text and config.vocab_size < 256:
        raise UserError(f"--text: bytes are 256 tokens, --vocab_size={config.vocab_size}")
    file = rows_file(config, device, "train")
    torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    works = [replace(config, **SIZES[size]) for size in config.sizes] or [config]
    for work, stage in itertools.product(works, config.stages):
        facts = run_facts(device) | {"stage": stage, "shape": asdict(_shape(work)), "bin_tokens": work.bin_tokens}
        facts |= {"micro_tokens": work.micro_tokens or work.bin_tokens, "text": work.text}
        found = [row | facts for row in measure(work, stage)]
        rows += found
        write_report(file, found)  # a run that is cut short keeps what it measured
        print("\n".join(["", f"{stage}  {_title(work)}", *_table(found), *_settings(found)]), flush=True)
    print(f"\n{file}: {len(rows)} rows")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


def _shape(config: Config) -> ModelConfig:
    return shape_of(config.model, config.vocab_size, max(config.context, 64))


def _title(config: Config) -> str:
    c, parts = _shape(config), ("L={num_layers} E={hidden_size} H={num_heads} G={num_kv_heads} F={intermediate_size}")
    return f"{parts.format(**asdict(c))} V={c.vocab_size} T={config.bin_tokens} context={config.context}"


# ---------------------------------------------------------------------------------------------- the work


def make_work(config: Config, stage: str, folder: Path) -> Work:
    """Random weights and records. Lengths are log-normal as in public chat and preference files: median 160 tokens for
    a conversation, 300 for an answered prompt of a pair (sigma 0.8), at most `context`; two fifths are the prompt."""
    shape, rng = _shape(config), np.random.default_rng(0)
    Transformer(shape, Mesh.single(torch.device("cpu")), torch.float32).initialize(0).save(str(folder))
    if stage == "pretrain":
        steps = WARM + config.rounds * config.steps if config.text else 1
        lengths, prompts, copies = [config.context] * max(1, steps * config.bin_tokens // config.context), [0], 1
    elif stage in SAMPLED:
        lengths, prompts, copies = [40] * 256, [40], 1
    else:
        median, copies = (300, 2) if stage in ("reward", "dpo") else (160, 1)
        drawn = np.exp(rng.normal(np.log(median), 0.8, 256)).astype(int).clip(16, config.context)
        lengths, prompts = drawn.tolist(), [int(n * 0.4) for n in drawn]
    prompts = prompts * (len(lengths) // len(prompts))
    groups = []
    for length, prompt in zip(lengths, prompts, strict=True):
        start = rng.integers(3, shape.vocab_size, prompt).tolist()  # 0 to 2 are control tokens of TRL's tokenizer
        groups.append([start + rng.integers(3, shape.vocab_size, length - prompt).tolist() for _ in range(copies)])
    if stage == "pretrain" and config.text:
        text = "".join(library_texts(sum(lengths), 0)).encode()
        ids = np.frombuffer(text, np.uint8)
        rows = np.resize(ids, (len(lengths), config.context))  # where there is too little, it comes again
        groups = [[row] for row in rows.tolist()]
    micro_tokens = config.micro_tokens or config.bin_tokens
    return Work(stage, str(folder), shape, config.bin_tokens, micro_tokens, groups, prompts, config.lr)


def flops_per_token(work: Work) -> float:
    """What the work needs, averaged over its records: see the module's docstring."""
    (passes, headless), total, tokens = PASSES[work.kind], 0.0, 0.0
    for group, prompt in zip(work.groups, work.prompts, strict=True):
        for ids in group:
            length = len(ids) + NEW * (work.kind in SAMPLED)
            learned = 0 if work.kind == "reward" else length - max(prompt, 1)
            total += passes * work.shape.flops([length], learned)
            total += headless * work.shape.flops([length], 0)
            tokens += length
    return total / tokens


# ---------------------------------------------------------------------------------------------- the turns


class Contender:
    """A process that takes turns."""

    def __init__(self, name: str, work: str, threads: int):
        self.name, self.turns = name, []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        command = [sys.executable, "-m", "tritium.bench.contenders", name, work, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def take(self, steps: int) -> dict[str, Any] | None:
        """What `steps` steps took; None where the process ended."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> str:
        """End it; the last line of what it said on standard error."""
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or [""])[-1]


def measure(config: Config, stage: str) -> list[dict[str, Any]]:
    """A row for each contender, ours first."""
    names = ["tritium", *(name for name in config.against if name != "tritium")]
    names = [
        name
        for name in names
        if stage in PEERS.get(name, STAGES if name.startswith("tritium") else ("pretrain", "sft"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(config, stage, Path(folder))
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(asdict(work)))
        every = [Contender(name, str(path), config.threads) for name in names]
        shapes = work.shape.matmul_shapes(config.bin_tokens)
        rates = []
        alive = [contender for contender in every if _warm(contender)]
        for number in range(config.rounds):
            rates.append(matmul_rate(torch.bfloat16, shapes, device="cuda" if torch.cuda.is_available() else "cpu"))
            first = number % max(1, len(alive))  # each is first once, so that none always follows the same one
            for contender in [*alive[first:], *alive[:first]]:
                contender.turns.append(contender.take(config.steps))
        ours = every[0]
        rate, cost = statistics.median(rates), flops_per_token(work)
        return [_row(contender, ours, rate, cost, config.steps) | {"pass": stage} for contender in every]


def losses_of(contender: Contender) -> list[float]:
    return [loss for turn in (contender.first, *contender.turns) if turn for loss in turn["losses"]]


def _warm(contender: Contender) -> bool:
    contender.first = contender.take(WARM)
    return contender.first is not None


def _row(contender: Contender, ours: Contender, rate: float, cost: float, steps: int) -> Row:
    said, turns, name = contender.close(), contender.turns, contender.name
    row = full({"op": "train", "provider": name, "dtype": "fp32" if name.endswith("fp32") else "bf16"})
    row |= {"contender": name, "setting": CONTENDERS[name].__doc__, "bound": "matmul", "reason": ""}
    row |= {"matmul_tflops": rate / 1e12, "flops_per_token": cost}
    if not turns or None in turns:
        return row | {"status": "failed", "reason": said} | dict.fromkeys(_NUMBERS)
    speeds = [turn["tokens"] / turn["seconds"] for turn in turns]
    own = [turn["tokens"] / turn["seconds"] for turn in ours.turns if turn]
    row["losses"], wanted = losses_of(contender), losses_of(ours)  # of each step
    loss, wanted = (next(iter(losses), None) for losses in (row["losses"], wanted))
    if loss is not None and wanted and abs(loss - wanted) > SAME * wanted:
        row |= {"status": "other work", "reason": f"its first loss is {loss:.4g}, ours {wanted:.4g}"}
    low, *_, high = statistics.quantiles(speeds, n=5, method="inclusive") if len(speeds) > 1 else speeds * 2
    same = row["status"] == "ok" and len(own) == len(speeds)
    ratio = statistics.median(a / b for a, b in zip(own, speeds, strict=True)) if same else None
    middle = statistics.median(speeds)
    numbers = (middle, low, high, middle * cost / rate, turns[-1]["peak_bytes"] / 1e6, loss, ratio)
    parts: dict[str, float] = {}
    for turn in turns:
        parts = {name: parts.get(name, 0.0) + seconds for name, seconds in turn["parts"].items()}
    seconds = sum(turn["seconds"] for turn in turns)
    row["share"] = {name: spent / seconds for name, spent in parts.items() if name != "step"}
    row |= timing([1e3 * turn["seconds"] / steps for turn in turns])._asdict() | {"of_ceiling": middle * cost / rate}
    return row | dict(zip(_NUMBERS, numbers, strict=True))


_NUMBERS = ("tokens_per_second", "p20", "p80", "of_matmul", "peak_mb", "loss", "ours_over_it")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [("", "tokens/s", "p20", "p80", "of matmul", "peak MB", "first loss", "ours / it", "")]
    for row in rows:
        form = ("{:,.0f}", "{:,.0f}", "{:,.0f}", "{:.0%}", "{:,.0f}", "{:.4g}", "{:.2f}")
        numbers = ["–" if row[key] is None else text.format(row[key]) for key, text in zip(_NUMBERS, form, strict=True)]
        cells.append((row["contender"], *numbers, row["reason"]))
    cost, rate = rows[0]["flops_per_token"] / 1e6, rows[0]["matmul_tflops"]
    mfu = f"of matmul (MFU) = {cost:.1f} MFLOP a token × tokens/s / {rate:.3g} TFLOP/s, the peak: bare matmuls' rate"
    return [mfu, *aligned(cells, left=(0, 8))]


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    """What each contender is set to, and where the time of our step went."""
    lines = [f"{row['contender']}: {' '.join(row['setting'].split())}" for row in rows]
    if share := rows[0].get("share"):
        parts = sorted(share.items(), key=lambda item: -item[1])
        lines.append("Our step: " + ", ".join(f"{name} {part:.0%}" for name, part in parts if part >= 0.005))
    return lines


# ---------------------------------------------------------------------------------------------- what is left of it


def write_report(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as JSONL, with those of other work that were there; the same as Markdown and SVG beside it."""
    measured = {_work(row) for row in rows}
    before = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    rows = [row for row in before if _work(row) not in measured] + rows
    rows.sort(key=lambda row: STAGES.index(row["stage"]))
    leave(file, rows, markdown(rows), map(_bar, rows))


def _work(row: dict[str, Any]) -> tuple:
    return row["stage"], json.dumps(row["shape"], sort_keys=True), row["bin_tokens"]


def _bar(row: dict[str, Any]) -> dict[str, Any]:
    """As a row of the kernels' bench."""
    shape = {"V": row["shape"]["vocab_size"], "E": row["shape"]["hidden_size"], "L": row["shape"]["num_layers"]}
    speed = row["tokens_per_second"]
    label = f"{speed:,.0f} tokens/s · {row['of_matmul']:.0%}" if speed else row["reason"]
    more = {"op": "training", "pass": row["stage"], "dtype": "bf16", "shape": shape, "provider": row["contender"]}
    return row | more | {"ms": None, "of_ceiling": row["of_matmul"], "bound": "matmul", "label": label}


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each piece of work, with the machine, the versions and what each contender was set to."""
    lines = ["# Training, beside others, on the same work in the same run", ""]
    lines += [f"`python -m tritium.bench train`. {' '.join(__doc__.split(chr(10) * 2)[1].split())}", ""]
    for work in dict.fromkeys(map(_work, rows)):
        mine = [row for row in rows if _work(row) == work]
        first, shape = mine[0], mine[0]["shape"]
        size = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
        lines += [f"## {first['stage']}: " + ", ".join(f"{name} {shape[name]}" for name in size), ""]
        facts = " · ".join(f"{k} {v}" for k, v in first["machine"].items())
        lines += [f"{first.get('date', '')} · {facts} · matmul {first['matmul_tflops']:.3f} TFLOP/s · "
                  f"{first['flops_per_token'] / 1e6:.1f} MFLOP a token · {first['bin_tokens']} tokens a step, "
                  f"ours in micro-batches of {first.get('micro_tokens', first['bin_tokens'])}", ""]  # fmt: skip
        lines += [
            "| | tokens/s (p20 to p80) | of matmul | peak MB | ours / it | setting |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for row in mine:
            if row["tokens_per_second"] is None:
                lines.append(f"| {row['contender']} | {row['status']}: {row['reason'][:100]} | | | | |")
                continue
            ratio = "–" if row["ours_over_it"] is None else f"{row['ours_over_it']:.2f}"
            speed = f"{row['tokens_per_second']:,.0f} ({row['p20']:,.0f} to {row['p80']:,.0f})"
            cells = (row["contender"], speed, f"{row['of_matmul']:.0%}", f"{row['peak_mb']:,.0f}", ratio)
            lines.append(f"| {' | '.join(cells)} | {' '.join(row['setting'].split())} |")
        lines += ["", _settings(mine)[-1] if first.get("share") else "", ""]
    return lines
