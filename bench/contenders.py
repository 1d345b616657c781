"""Those who train the same model on the same data, each in a process of its own: `python -m tritium.bench.contenders`.

A contender is a generator of steps: it yields (real tokens, loss or None, seconds by part or {}) after each; all losses
that are told are those of the steps in order. The
process takes a turn when it reads a line: some steps, then a line of JSON. Between turns it waits, so that contenders
take turns on one machine, and each has its own peak memory.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritium.core.batch import Document, PackedBatch, pack, plan_bins
from tritium.core.config import opt
from tritium.core.kept import Kept
from tritium.core.metrics import Metrics
from tritium.core.objectives.distill import Distill
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.policy import PPO, PolicyGradient
from tritium.core.objectives.preference import PairOptions, Preference
from tritium.core.objectives.reward import Pairwise
from tritium.core.optim import OptimConfig
from tritium.core.problems import Problem
from tritium.core.rollout import Sample, sample_document
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig, load_model
from tritium.core.trainer import Trainer
from tritium.model.config import ModelConfig
from tritium.model.generate import generate
from tritium.model.heads import ScalarModel
from tritium.parallel.mesh import Mesh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUP, NEW = 8, 64  # answers to a prompt, and tokens of each, where answers are sampled
SAMPLED = ("grpo", "ppo")
Steps = Iterator[tuple[int, float | None, dict[str, float]]]


@dataclass
class Work:
    """What is trained: `groups` holds the documents of a record ([document], or [chosen, rejected]) as token ids, and
    `prompts` how many of a record's first tokens are not learned."""

    kind: str  # a stage of bench/train.py
    folder: str  # the starting weights, a Hugging Face folder in fp32
    shape: ModelConfig
    bin_tokens: int  # of a step
    micro_tokens: int  # of our micro-batches
    groups: list[list[list[int]]]
    prompts: list[int]
    lr: float  # constant

    def batches(self) -> Iterator[list[int]]:
        """The records of a step, endlessly: as many as fill about `bin_tokens` without being cut."""
        while True:
            yield from plan_bins([self.tokens(group) for group in self.groups], self.bin_tokens)

    def tokens(self, group: list[list[int]]) -> int:
        """Of a record, with the answers that will be sampled."""
        return sum(map(len, group)) if self.kind not in SAMPLED else GROUP * (len(group[0]) + NEW)

    @classmethod
    def read(cls, path: str) -> "Work":
        stored = json.loads(Path(path).read_text())
        return cls(**stored | {"shape": ModelConfig(**stored["shape"])})


# ---------------------------------------------------------------------------------------------- ours


@dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    schedule: ScheduleConfig = opt(ScheduleConfig, "")


class Loop(Trainer):
    """A trainer that shows nothing, and measures no peak: who times it has tables of its own."""

    def __init__(self, networks: dict[str, torch.nn.Module], objective: Any, settings: Settings, mesh: Mesh):
        super().__init__(networks, objective, settings, mesh, name="", total_steps=1 << 30)
        self.metrics = Metrics(None, main=False, total_steps=1, name="")

    def measure_peak(self) -> float:
        return 1.0


def tritium(work: Work, dtype: str = "bf16") -> Steps:
    """Packed streams, `Trainer.step`: forward, backward, clip, AdamW with fp32 masters and moments."""
    mesh = Mesh.single(torch.device(DEVICE))
    networks, objective = _networks(work, mesh, dtype)
    schedule = ScheduleConfig(kind="constant", warmup=0)  # a part of a run without an end would be for ever
    settings = Settings(RunConfig(out=f"{work.folder}/run"), OptimConfig(lr=work.lr), schedule)
    loop = Loop(networks, objective, settings, mesh)
    for number, members in enumerate(work.batches()):
        if work.kind in SAMPLED:
            groups = _sampled(work, loop, members, number)
        else:
            groups = [_documents(work, i) for i in members]
        with loop.phase("data"):
            batches = [batch.to(mesh.device) for batch in _micro_batches(groups, work.micro_tokens)]
        loss = None
        if work.kind in SAMPLED:
            loop.estimate(batches)
        elif number == 0:
            loss = loop.evaluate(batches)["eval_loss"]
        loop.step(batches)
        if number > 1 and work.kind not in SAMPLED:
            loss = loop.last.get("loss")  # of the step before: this one's is not waited for
        if work.kind in SAMPLED and DEVICE == "cuda":
            with loop.phase("rest"):  # of training, so that what is sampled next does not wait for it
                torch.cuda.synchronize()
        times = {k.removeprefix("time/"): v for k, v in loop.pending[1].values.items() if k.startswith("time/")}
        yield int(sum(batch.counts["stream"] for batch in batches)), loss, times


def _micro_batches(groups: list[list[Document]], tokens: int) -> list[PackedBatch]:
    bins = plan_bins([sum(map(len, group)) for group in groups], tokens)
    return [pack([groups[i] for i in b], {"pairs": float(len(b))}, multiple_of=max(tokens // 8, 1)) for b in bins]


def tritium_fp32(work: Work) -> Steps:
    """The same in fp32 throughout."""
    return tritium(work, "fp32")


def _networks(work: Work, mesh: Mesh, dtype: str) -> tuple[dict[str, torch.nn.Module], Any]:
    """What a stage trains, beside what it only asks, and its objective."""
    finetune = FinetuneConfig(kind="lora") if work.kind == "lora" else None
    model = load_model(work.folder, dtype, mesh, finetune=finetune)
    if work.kind == "reward":
        return {"reward": ScalarModel(model).initialize(0)}, Pairwise()
    networks: dict[str, torch.nn.Module] = {"policy": model}
    if name := {"dpo": "reference", "ppo": "reference", "distill": "teacher"}.get(work.kind):
        networks[name] = load_model(work.folder, dtype, mesh, frozen=True)
    if work.kind == "ppo":
        networks["critic"] = ScalarModel(load_model(work.folder, dtype, mesh)).initialize(0)
    made = {
        "dpo": lambda: Preference(options=PairOptions(), kept=Kept()),
        "distill": Distill,
        "ppo": lambda: PPO(beta=0.05),
        "grpo": lambda: PolicyGradient(on_policy=True),
    }
    return networks, made.get(work.kind, CrossEntropy)()


def _sampled(work: Work, loop: Trainer, members: list[int], number: int) -> list[list[Document]]:
    """Answers of the policy to the prompts, GROUP to each; an answer's score is the share of different tokens."""
    prompts = [work.groups[i][0] for i in members]
    with loop.phase("sample"), loop.whole(layers=True):
        options = {"n": GROUP, "seed": number, "max_tokens": NEW, "stop_ids": ()}
        completions = generate(loop.networks["policy"], prompts, **options)
    groups: list[list[Document]] = [[] for _ in prompts]
    for i, completion in enumerate(completions):
        rewards = np.zeros(len(completion.tokens), np.float32)
        rewards[-1] = len(set(completion.tokens)) / len(completion.tokens)
        sample = Sample(Problem(members[i // GROUP], [], prompts[i // GROUP], ""), completion, "")
        fields = {"rewards": rewards, "scored": np.sign(rewards)}
        groups[i // GROUP].append(sample_document(sample, {"number": float(i % GROUP)}, fields))
    return groups


def _documents(work: Work, i: int) -> list[Document]:
    weights = [(np.arange(len(ids)) >= work.prompts[i]).astype(np.float32) for ids in work.groups[i]]
    return [Document(np.array(ids, np.int32), w) for ids, w in zip(work.groups[i], weights, strict=True)]


# ---------------------------------------------------------------------------------------------- plain loops


def hf(work: Work, compiled: bool = False, dtype: torch.dtype = torch.bfloat16, autocast: bool = False) -> Steps:
    """transformers: bf16 weights, SDPA, fused AdamW; padded batches, labels -100 where nothing is learned."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(DEVICE).train()
    forward = torch.compile(model, dynamic=False) if compiled else model
    for members in work.batches():
        rows = [(ids, work.prompts[i]) for i in members for ids in work.groups[i]]
        longest = max(len(ids) for ids, _ in rows)
        longest += -longest % (64 if compiled else 1)  # fewer shapes to compile
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for row, (ids, prompt) in enumerate(rows):
            tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
            labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
        whole = bool(mask.all())
        arguments = {"input_ids": tokens, "labels": labels} | ({} if whole else {"attention_mask": mask})
        arguments = {name: x.to(DEVICE) for name, x in arguments.items()}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = forward(**arguments).loss
        yield int(mask.sum()), _plain_step(model, loss, work.lr), {}


def hf_compiled(work: Work) -> Steps:
    """The same with torch.compile."""
    return hf(work, compiled=True)


def hf_fp32(work: Work) -> Steps:
    """transformers in fp32 throughout, not bf16: faster where a CPU's fp32 units are."""
    return hf(work, dtype=torch.float32)


def hf_autocast(work: Work) -> Steps:
    """transformers with fp32 weights under bf16 autocast, which learn as our fp32 masters do; the same else."""
    return hf(work, dtype=torch.float32, autocast=True)


def nanogpt(work: Work) -> Steps:
    """bench/nanogpt.py: plain torch with torch.compile, bf16 weights, SDPA, fused AdamW; documents of one length."""
    from tritium.bench.nanogpt import GPT

    model = GPT(work.shape).load(f"{work.folder}/model.safetensors").bfloat16().to(DEVICE)
    forward = torch.compile(model, dynamic=False)
    for members in work.batches():
        tokens = torch.tensor([ids for i in members for ids in work.groups[i]], device=DEVICE)
        yield tokens.numel(), _plain_step(model, forward(tokens), work.lr), {}


def _plain_step(model: torch.nn.Module, loss: torch.Tensor, lr: float) -> float:
    if not hasattr(model, "bench_optimizer"):
        ours, parameters = OptimConfig(), list(model.parameters())
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": ours.weight_decay}]
        groups += [{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        model.bench_optimizer = torch.optim.AdamW(groups, lr, (ours.beta1, ours.beta2), ours.eps, fused=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.bench_optimizer.step()
    model.bench_optimizer.zero_grad(set_to_none=True)
    return float(loss)


# ---------------------------------------------------------------------------------------------- TRL


def trl(work: Work) -> Callable[[Callable], None]:
    """TRL's trainer of the stage: bf16 weights, SDPA, fused AdamW, SFT packed; it calls back after each step."""
    return lambda pace: _trl_train(work, pace)


def _trl_train(work: Work, pace: Callable) -> None:
    import transformers
    import trl as library

    class Pace(transformers.TrainerCallback):
        tokens = 0

        def on_step_end(self, args, state, control, **_):
            pace(Pace.tokens, None, {})
            Pace.tokens = 0

    kind = {"sft": "SFT", "lora": "SFT", "pretrain": "SFT", "dpo": "DPO", "reward": "Reward", "grpo": "GRPO"}[work.kind]
    records = len(plan_bins([work.tokens(g) for g in work.groups], work.bin_tokens))
    per_step = max(1, round(len(work.groups) / records))
    common = {
        "output_dir": f"{work.folder}/trl",
        "max_steps": 1 << 20,
        "learning_rate": work.lr,
        "optim": "adamw_torch_fused",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,  # the weights are bf16: autocast would only add casts
        "use_cpu": DEVICE == "cpu",
        "disable_tqdm": True,
        "max_length": work.bin_tokens,
    }
    packed = work.kind in ("sft", "lora")
    own = {"packing": True, "max_length": work.bin_tokens} if packed else {}
    more: dict[str, Any] = {"peft_config": _peft_lora()} if work.kind == "lora" else {}
    if kind == "GRPO":  # a step is per_step prompts
        per_step *= GROUP
        del common["max_length"]
        own = {"num_generations": GROUP, "max_completion_length": NEW, "beta": 0.0, "temperature": 1.0}

        def reward(completion_ids: list[list[int]], **_) -> list[float]:
            Pace.tokens += sum(map(len, completion_ids)) + len(completion_ids) * len(work.groups[0][0])
            return [len(set(ids)) / max(1, len(ids)) for ids in completion_ids]

        more = {"reward_funcs": reward}
    arguments = getattr(library, f"{kind}Config")(**common | own, per_device_train_batch_size=1 if packed else per_step)
    if kind == "Reward":
        auto, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        auto, options = transformers.AutoModelForCausalLM, {}
    model = auto.from_pretrained(work.folder, dtype=torch.bfloat16, attn_implementation="sdpa", **options)
    trainer = getattr(library, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=_trl_dataset(work),
        processing_class=_words(work.shape.vocab_size),
        callbacks=[Pace()],
        **more,
    )
    collate = trainer.data_collator

    def counted(features: list) -> dict:
        batch = collate(features)
        mask = batch.get("attention_mask")
        Pace.tokens += int(mask.sum() if mask is not None else batch["input_ids"].numel())
        return batch

    if kind != "GRPO":
        trainer.data_collator = counted
    trainer.train()


def _peft_lora() -> Any:
    """Our FinetuneConfig(kind="lora"), as peft says it."""
    import peft

    ours = FinetuneConfig(kind="lora")
    return peft.LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _trl_dataset(work: Work) -> Any:
    """The records in the form that the trainer reads; token i is the word "wi"."""
    from datasets import Dataset

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    if work.kind == "grpo":
        rows = [{"prompt": text(group[0])} for group in work.groups]
    elif work.kind in ("sft", "lora", "pretrain"):
        rows = [
            {"input_ids": group[0], "completion_mask": [int(t >= prompt) for t in range(len(group[0]))]}
            for group, prompt in zip(work.groups, work.prompts, strict=True)
        ]
    else:
        rows = [
            {"prompt": text(a[:prompt]), "chosen": " " + text(a[prompt:]), "rejected": " " + text(b[prompt:])}
            for (a, b), prompt in zip(work.groups, work.prompts, strict=True)
        ]
    return Dataset.from_list(rows)


def _words(size: int) -> Any:
    """A tokenizer whose words are w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


CONTENDERS: dict[str, Callable[[Work], Any]] = {
    "tritium": tritium,
    "tritium_fp32": tritium_fp32,
    "hf": hf,
    "hf_compiled": hf_compiled,
    "hf_fp32": hf_fp32,
    "hf_autocast": hf_autocast,
    "nanogpt": nanogpt,
    "trl": trl,
}


# ---------------------------------------------------------------------------------------------- a process


def main(name: str, work: str, threads: str) -> None:
    """Take turns as standard input says: a line holds a number of steps."""
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the one who listens
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    left, done, losses, parts = 0, 0, [], {}
    start = time.perf_counter()

    def pace(tokens: int, loss: float | None, times: dict[str, float]) -> None:
        nonlocal left, done, losses, parts, start
        done, left = done + tokens, left - 1
        losses += [] if loss is None or not math.isfinite(loss) else [loss]
        parts = {name: parts.get(name, 0.0) + seconds for name, seconds in times.items()}
        if left <= 0:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            _say(talk, time.perf_counter() - start, done, losses, parts)
            left, done, losses, parts = _turn(), 0, [], {}
            start = time.perf_counter()

    left = _turn()
    start = time.perf_counter()
    steps = CONTENDERS[name](Work.read(work))
    if callable(steps):
        steps(pace)
    else:
        for step in steps:
            pace(*step)


def _turn() -> int:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)  # the other end is gone: libraries' threads must not keep this alive
    return int(line)


def _say(talk: Any, seconds: float, tokens: int, losses: list[float], parts: dict[str, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    row = {"seconds": seconds, "tokens": tokens, "peak_bytes": peak, "losses": losses, "parts": parts}
    print(json.dumps(row), file=talk, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
