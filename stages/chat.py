"""Talk to a model in the terminal.

    tritium chat --model=runs/ladder/grpo/step-00000060

/reset starts a new conversation, /quit (or Ctrl-D) ends the session.
"""

import sys
import time
from dataclasses import dataclass

from tritium.core.chat import render, stop_ids
from tritium.core.config import REQUIRED, opt
from tritium.core.rollout import SamplingConfig
from tritium.core.setup import load_model, load_tokenizer
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Result
from tritium.model.generate import generate
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh, local_device

SHOWS_ITS_RESULT = True  # the command line need not
ONE_PROCESS = True  # there is one terminal


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model, with its tokenizer")
    system: str = opt("", "system prompt")
    sampling: SamplingConfig = opt(SamplingConfig(temperature=0.4, max_tokens=256), "how answers are drawn")
    seed: int = opt(0, "seed of the answers")
    dtype: str = opt(
        "auto", "of the parameters (auto: bf16 where it is fast)", choices=("auto", "bf16", "fp32", "fp64")
    )
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))


def train(config: Config) -> Result:
    """Read questions from standard input until it ends, and stream the answers to standard output."""
    mesh = Mesh.single(local_device(config.device))
    model = load_model(config.model, config.dtype, mesh, frozen=True)
    tokenizer = load_tokenizer(config.model, model)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn = list(opening), 0
    while (question := ask()) is not None:
        if question == "/reset":
            messages = list(opening)
        elif question:
            messages.append({"role": "user", "content": question})
            answer = reply(model, tokenizer, messages, config, config.seed + turn)
            if answer is None:
                messages = list(opening)
            else:
                messages.append({"role": "assistant", "content": answer})
            turn += 1
    return Result(config.model)


def ask() -> str | None:
    """The next line from the user; None at the end."""
    try:
        line = input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


def reply(model: Transformer, tokenizer: Tokenizer, messages: list[dict], config: Config, seed: int) -> str | None:
    """Stream one answer; None where the conversation has outgrown the model's context."""
    ids = render(tokenizer, messages, generation_prompt=True).ids
    if len(ids) >= model.config.max_positions:
        print(f"(the conversation has {len(ids)} tokens, the context {model.config.max_positions}: starting anew)")
        return None
    decoder, start = tokenizer.incremental(), time.perf_counter()
    completion = generate(
        model,
        [ids],
        options=config.sampling.options(stop_ids(tokenizer)),
        decoder=tokenizer.incremental,
        seed=seed,
        on_token=lambda _, token: print(decoder.push(token), end="", flush=True),
    )[0]
    rate = len(completion.tokens) / (time.perf_counter() - start)
    print(f"{decoder.finish()}\n", flush=True)
    print(f"({len(completion.tokens)} tokens, {rate:.0f}/s, {completion.finish_reason})", file=sys.stderr)
    return tokenizer.decode(completion.tokens)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("chat"))
