"""Talk to a model in the terminal.

    tritium chat --model=runs/ladder/grpo/step-00000060

/reset starts a new conversation, /save FILE.jsonl appends this one to a file (as training data), /adapter FOLDER lets
a LoRA adapter act (/adapter none: none), Ctrl-C ends an answer or clears the line, /quit (or Ctrl-D, or a second
Ctrl-C) ends the session. With --sampling.tool=python the model may run programs, in the sandbox.
"""

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, zip_longest

from tritium.core.chat import render, stop_ids
from tritium.core.checkpoint import model_folder
from tritium.core.config import UserError, opt
from tritium.core.rollout import AskConfig, SamplingConfig
from tritium.core.run import Result
from tritium.core.tokenizer import Tokenizer
from tritium.core.tools import TOOLS
from tritium.model.adapters import key_of, load_adapter, use
from tritium.model.generate import run
from tritium.model.transformer import Transformer

SHOWS_ITS_RESULT = True  # the command line need not
ONE_PROCESS = True  # there is one terminal


@dataclass
class Config(AskConfig):
    system: str = opt("", "system prompt")
    sampling: SamplingConfig = opt(SamplingConfig(temperature=0.4, max_tokens=256, max_batch=1), "sampling options")


def train(config: Config) -> Result:
    """Read questions from standard input until it ends, and stream the answers to standard output."""
    model, tokenizer = config.open()
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn = list(opening), 0
    if sys.stdin.isatty():
        print("(/reset, /save FILE, /adapter FOLDER, /quit; Ctrl-C ends an answer)", file=sys.stderr)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is not the end of the session
    while (question := ask()) is not None:
        command, _, argument = question.partition(" ")
        if command == "/reset":
            messages = list(opening)
        elif command in COMMANDS:
            try:
                print(COMMANDS[command](argument.strip(), messages, model))
            except (UserError, ValueError, OSError) as error:
                print(f"({error})")
        elif re.fullmatch(r"/[a-z]+", command):
            print(f"({command} is not a command: /reset, {', '.join(COMMANDS)}, /quit)")
        elif question:
            asked = [*messages, {"role": "user", "content": question}]
            try:
                said = reply(model, tokenizer, asked, config, config.seed + turn)
            except UserError as error:  # of the question: a lone surrogate is no text that a model can read
                print(f"({error})")
                continue
            messages = asked + said if said else list(opening)
            turn += 1
    return Result(config.model)


def save(file: str, messages: list[dict], model: Transformer) -> str:
    if not file:
        raise ValueError("/save needs the name of a file: /save chats.jsonl")
    with open(file, "a", encoding="utf-8", errors="backslashreplace") as lines:  # a lone surrogate is \\udXXX
        lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return f"(saved to {file})"


def switch(folder: str, messages: list[dict], model: Transformer) -> str:
    """Raises: ValueError for a folder that holds no adapter of this model."""
    if folder and folder != "none" and folder not in model.adapters:
        load_adapter(model, model_folder(folder), name=folder)
    elif folder:
        use(model, None if folder == "none" else folder)
    acting = next((name for name in model.adapters if key_of(name) == model.active), "none")
    return f"(adapters: {', '.join(model.adapters) or 'none'}; acting: {acting})"


COMMANDS = {"/save": save, "/adapter": switch}


def ask() -> str | None:
    """The next line from the user; None at the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # keys that edit, a history, and lines longer than the 4096 bytes of a terminal
            import readline  # noqa: F401
    for hint in ("(a second Ctrl-C, or Ctrl-D, ends the chat)", ""):
        try:
            line = input("you> " if terminal else "").strip()
            return None if line == "/quit" else line
        except EOFError:
            print("\n" * terminal, end="")
            return None
        except KeyboardInterrupt as stop:
            if not terminal or type(stop) is not KeyboardInterrupt:  # SIGTERM ends the session
                raise
            print(f"\n{hint}")
    return None


def reply(model: Transformer, tokenizer: Tokenizer, messages: list[dict], config: Config, seed: int) -> list[dict]:
    """Stream one answer; its turns, the tool's between them. none where the conversation is too long."""
    ids = render(tokenizer, messages, generation_prompt=True).ids
    if len(ids) >= model.config.max_positions:
        print(f"(the conversation has {len(ids)} tokens, the context {model.config.max_positions}: starting anew)")
        return []
    observations: list[str] = []

    def tool(code: str) -> str:
        observations.append(TOOLS[config.sampling.tool](code))
        print(f"\n[{config.sampling.tool}] {observations[-1]}", flush=True)
        return observations[-1]

    engine, start = config.engine(model, tokenizer, tool if config.sampling.tool else None), time.perf_counter()
    (sequence,) = engine.submit(ids, config.sampling.options(stop_ids(tokenizer)), [(seed, 0)])
    try:
        for event in run(engine):
            print(event.text, end="", flush=True)
    except KeyboardInterrupt as stop:
        if type(stop) is not KeyboardInterrupt:  # SIGTERM ends the session
            raise
        engine.cancel(sequence)
    print("\n", flush=True)
    completion, rate = sequence.completion, sequence.drawn / (time.perf_counter() - start)
    print(f"({sequence.drawn} tokens, {rate:.0f}/s, {completion.finish_reason})", file=sys.stderr)
    if not observations:
        return [{"role": "assistant", "content": sequence.text.shown}]
    turns = [
        [token for token, _ in part]
        for learned, part in groupby(zip(completion.tokens, completion.weights, strict=True), lambda x: x[1])
        if learned
    ]
    answers = [{"role": "assistant", "content": tokenizer.decode(turn)} for turn in turns]
    between = [{"role": "tool", "content": text} for text in observations[: len(turns) - 1]]
    return [x for pair in zip_longest(answers, between) for x in pair if x]


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("chat"))
