"""The `tritium` command: find the stage, read its configuration, run it, turn errors into exit codes.

Exit codes: 0 finished; 2 a user's mistake, reported in one sentence; 1 a failure, with its traceback; 130 after
Ctrl-C, 143 after SIGTERM and 138 after SIGUSR1 (Slurm's warning). A stage may catch these signals as KeyboardInterrupt
to save its state.

GOMP_SPINCOUNT is set only here, since importing a library should not change its program's environment. Run as
`python -m tritium.stages.STAGE`, a stage has loaded torch before it gets here; if other programs compute on the same
cores, set it yourself: `export GOMP_SPINCOUNT=10000`.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType

import tritium
from tritium.core.config import ConfigError, UserError, listed, load, to_toml

STAGES = {
    "pretrain": "train a model from scratch, or further, on raw text",
    "sft": "fine-tune a model on conversations",
    "reward": "train a reward model on preference pairs",
    "dpo": "align a model with preference pairs, without a reward model",
    "grpo": "align a model by reinforcement learning on groups of samples",
    "ppo": "align a model by reinforcement learning with a critic",
    "distill": "train a student on the distribution or the answers of a larger model",
    "sample": "sample several answers to each problem, verify and rank them",
    "rank": "rank answers by hand, on a local web page or in the terminal",
    "evaluate": "evaluate a model: problems, multiple choice, programs, win rates, perplexity",
    "chat": "chat with a model in the terminal",
    "generate": "answer a file of prompts",
    "serve": "serve a model over HTTP, with OpenAI's API",
    "inspect": "show the tokens, loss weights and denominators of a stage's first micro-batch",
    "consolidate": "turn a checkpoint into one Hugging Face folder",
    "surgery": "merge an adapter, duplicate layers, change the vocabulary, average models",
    "run": "run several stages from one recipe file",
    "sweep": "search for a stage's best settings",
    "tokenizer": "train a tokenizer on raw text",
    "curate": "collect, filter, deduplicate, select, distil and reject data, with a report",
    "corpus": "write the ladder recipe's data, without downloading anything",
    "plan": "estimate a run's memory, communication and time, and the best meshes for it",
    "doctor": "describe this machine, and compile every kernel for every target",
}


# The metrics of a result that a stage's last line shows.
RESULT_METRICS = ("loss", "eval_loss", "eval_accuracy", "right", "solved", "bytes_per_token", "megabytes")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1, its argument: handled like Ctrl-C, but the exit code says which it was."""


def _for_a_reader(command: Callable[..., int]) -> Callable[..., int]:
    """Who reads what is printed may leave early (`tritium --help | head`): that ends a command as it ends others."""

    @wraps(command)
    def run(*args) -> int:
        try:
            try:
                return command(*args)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # the interpreter flushes once more
            return 128 + signal.SIGPIPE

    return run


@_for_a_reader
def main(argv: list[str] | None = None) -> int:
    """Run `tritium NAME …` with the arguments `argv` (sys.argv's by default) and return the exit code."""
    # Idle threads spin only briefly (must be set before torch loads libgomp): with the default, two programs on the
    # same cores slow each other down severalfold; for a program alone this costs up to 5 % (bench/results/cpu.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"tritium {tritium.__version__}")
        return 0
    name, *rest = argv
    if name not in STAGES:
        print(f"tritium: no stage {name!r}; {listed(name, STAGES)}", file=sys.stderr)
        return 2
    return run_stage(name, rest)


@_for_a_reader
def run_stage(stage: str | ModuleType, argv: list[str] | None = None) -> int:
    """Run one stage, given by name or as a module of the same form, and return the exit code.

    A stage is a module with `Config`, `train(config)` and a docstring whose first line describes it, or, if it is
    not a training run, with `main(argv) -> int`. It may set `SHOWS_ITS_RESULT = True` (nothing is printed at the end)
    and `ONE_PROCESS = True` (it refuses to run under torchrun). Stages end with

        if __name__ == "__main__":
            raise SystemExit(run_stage("sft"))
    """
    argv = sys.argv[1:] if argv is None else argv
    name = stage if isinstance(stage, str) else stage.__name__.rpartition(".")[2]
    prog, main_rank = f"tritium {name}", os.environ.get("RANK", "0") == "0"
    try:
        with _signals_interrupt():
            module = import_module(f"tritium.stages.{stage}") if isinstance(stage, str) else stage
            if hasattr(module, "main"):
                return module.main(argv)
            config = load(module.Config, argv, prog, (module.__doc__ or "").strip().partition("\n")[0])
            if getattr(module, "ONE_PROCESS", False) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError("this stage runs in one process: start it without torchrun")
            if main_rank:
                print(f"# {prog}\n{to_toml(config, whole=False)}", file=sys.stderr, flush=True)
            _share_cores()
            result = module.train(config)
            if main_rank and not getattr(module, "SHOWS_ITS_RESULT", False):
                print(f"{prog}: done: {_shown(result)}", file=sys.stderr)
    except UserError as error:
        _tell(f"{prog}: {error}")
        return 2
    except Terminated as caught:
        print(f"{prog}: terminated", file=sys.stderr)
        return 128 + caught.args[0]
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _tell(sentence: str) -> None:
    """Print a user's mistake, and add it to torchrun's error report. Under torchrun most likely every rank has the
    same one: the first rank of a host prints it, and torchrun ends the others while they wait."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)
        said = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": said}))
    print(sentence, file=sys.stderr, flush=True)


def _shown(result) -> str:
    """A stage's Result on one line: its output folder and its main metrics."""
    numbers = [f"{name}={result.metrics[name]:.4g}" for name in RESULT_METRICS if name in result.metrics]
    return "  ".join([result.checkpoint, *numbers])


def _overview() -> str:
    width = max(map(len, STAGES))
    lines = ["tritium trains language models: raw text in, aligned model out.", ""]
    lines += ["usage: tritium STAGE [--config FILE.toml] [--name=value …]", "       tritium STAGE --help", ""]
    lines += ["stages:", *(f"  {name:<{width}}  {line}" for name, line in STAGES.items()), ""]
    lines += ["Training stages, sample and evaluate run on several GPUs:"]
    lines += ["       torchrun --nproc-per-node N -m tritium.stages.STAGE [--name=value …]"]
    return "\n".join(lines)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into Terminated, so that a run can save its state; in the main thread only."""

    def terminate(signum, frame):
        raise Terminated(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _share_cores() -> None:
    """Give each local rank of torchrun its share of the cores; torchrun's own default is one thread per rank."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        import torch  # not above: `tritium --help` answers at once

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))
