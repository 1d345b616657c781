"""Answer a file of prompts, line by line: a file of answers in the same order, resumable.

tritium generate --model=runs/sft --sources=prompts.jsonl --out=answers.jsonl

A record is {"prompt": text} (continued as it is), {"messages": […]} or a problem ({"question", …}, answered in the
model's chat format). Each line of the answers is its record with "answers": [{"text", "finish_reason", "tokens"}, …].
The same command again goes on after the last whole line; lines that answer other records, or were drawn from another
model or with other options (answers.jsonl.settings keeps them), are refused. A record that can't be answered keeps its
line, with "error".
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tritium.core.chat import render, stop_ids
from tritium.core.config import ConfigError, UserError, opt
from tritium.core.files import Skipped, read_records
from tritium.core.formats import listed_messages
from tritium.core.output import make_room_for
from tritium.core.rollout import AskConfig, sample_seed
from tritium.core.run import Result
from tritium.core.tokenizer import Tokenizer
from tritium.model.generate import Engine, Running
from tritium.model.transformer import Transformer
from tritium.parallel.data import fingerprint

ONE_PROCESS = True


@dataclass
class Config(AskConfig):
    sources: list[str] = opt([], "files of prompts, conversations or questions")
    out: str = opt("answers.jsonl", "file to write, or to go on with")
    n: int = opt(1, "answers to each", least=1)
    logprobs: bool = opt(False, "write the log-probability of each token, too")

    def __post_init__(self):
        super().__post_init__()
        if not self.sources:
            raise ConfigError("sources is empty: name a file of prompts, --sources=prompts.jsonl")


def train(config: Config) -> Result:
    """Write `config.out`. Metrics: `answers`, `failed` records, and `tokens_per_second` of this call."""
    file = make_room_for(config.out, "out")
    (model, tokenizer), skipped = config.open(), Skipped()
    records = (record for path in config.sources for _, record in read_records(path, skipped))
    done = resume(file, config, settings(config, model))
    engine = config.engine(model, tokenizer)
    start, tokens, answers, failed = time.perf_counter(), 0, 0, 0
    with file.open("a", encoding="utf-8", errors="backslashreplace") as lines:
        queue: list[tuple[dict[str, Any], list[Running] | str]] = []
        coming = islice(enumerate(records), done, None)
        while True:
            for number, record in islice(coming, max(0, 2 * engine.max_batch - len(queue) * config.n)):
                queue.append((record, submit(engine, tokenizer, record, number, config)))
            if not queue:
                break
            engine.step()
            while queue and is_done(queue[0][1]):
                record, made = queue.pop(0)
                if wrong := isinstance(made, str):
                    row = {"error": made}
                else:
                    row = {"answers": [shown(s, tokenizer, config) for s in made]}
                    tokens += sum(len(s.completion.tokens) for s in made)
                lines.write(json.dumps(record | row, ensure_ascii=False) + "\n")
                lines.flush()
                answers, failed = answers + (not wrong), failed + wrong
    if skipped.reasons:
        print(skipped.summary(), file=sys.stderr)
    if failed:
        print(f'{failed} records could not be answered: their lines have an "error"', file=sys.stderr)
    rate = tokens / (time.perf_counter() - start)
    return Result(str(file), {"answers": float(answers), "failed": float(failed), "tokens_per_second": rate})


def submit(engine: Engine, tokenizer: Tokenizer, record: Any, number: int, config: Config) -> list[Running] | str:
    """The samples of a record; or what is wrong with it."""
    try:
        ids = prompt_ids(tokenizer, record)
        seeds = [(sample_seed(config.seed, number, i), 0) for i in range(config.n)]
        decoder = partial(tokenizer.incremental, first=not isinstance(record.get("prompt"), str))
        return engine.submit(ids, config.sampling.options(stop_ids(tokenizer)), seeds, decoder)
    except (UserError, ValueError) as error:
        return str(error)


def prompt_ids(tokenizer: Tokenizer, record: Any) -> list[int]:
    """Raises: ValueError or UserError for a record that is no prompt, conversation or question."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    if isinstance(record.get("prompt"), str):
        return tokenizer.encode(record["prompt"], bos=tokenizer.adds_bos)
    messages = record.get("messages")
    if messages is None and isinstance(record.get("question"), str):
        messages = [{"role": "user", "content": record["question"]}]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('a record needs "prompt" (text), "messages" (a list) or "question" (text)')
    return render(tokenizer, listed_messages({"messages": messages}), generation_prompt=True).ids


def is_done(made: list[Running] | str) -> bool:
    return isinstance(made, str) or all(s.completion.finish_reason for s in made)


def shown(sequence: Running, tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    completion = sequence.completion
    row = {"text": sequence.text.shown, "finish_reason": completion.finish_reason, "tokens": len(completion.tokens)}
    if config.logprobs:
        row["logprobs"] = [[tokenizer.piece(t), p] for t, p in zip(completion.tokens, completion.logps, strict=True)]
    return row


def settings(config: Config, model: Transformer) -> dict[str, Any]:
    """What decides the answers to a record: the options, and the weights by their bits."""
    given = {name: asdict(config)[name] for name in ("n", "logprobs", "seed", "dtype")}
    sampling = {f"sampling.{k}": v for k, v in asdict(config.sampling).items() if k not in ("max_batch", "cache_mb")}
    return given | sampling | {"model": f"{fingerprint(model.parameters()):x}"}


def resume(file: Path, config: Config, now: dict[str, Any]) -> int:
    """How many records a run before has answered in `file`, with the settings of `now`, which are kept beside it.

    Raises: ConfigError where its lines answer other records, or were drawn with other settings.
    """
    beside = file.with_name(file.name + ".settings")
    if not (done := keep_whole_lines(file)):
        beside.write_text(json.dumps(now), encoding="utf-8")
        return 0
    skipped = Skipped()
    records = islice((record for path in config.sources for _, record in read_records(path, skipped)), done)
    with file.open(encoding="utf-8") as lines:
        for number, (line, record) in enumerate(zip_longest(lines, records), start=1):
            if not answers_to(line, record, config.n):
                raise ConfigError(
                    f"out: line {number} of {file} is not n={config.n} answers to record {number} of the sources: "
                    f"give another --out, or delete it"
                )
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if changed := [name for name, value in now.items() if before.get(name) != value]:
        told = ", ".join(f"{name}={before.get(name, 'unknown')}" for name in changed)
        raise ConfigError(f"out: {file} was drawn with {told}: give that again or another --out, or delete the file")
    print(f"{file} holds {done} of the answers: going on after them", file=sys.stderr)
    return done


def answers_to(line: str, record: Any, n: int) -> bool:
    """Whether a line of the answers is this record, with n of them or the error."""
    made = ("answers", "error")
    try:
        row = json.loads(line)
        same = {k: v for k, v in row.items() if k not in made} == {k: v for k, v in record.items() if k not in made}
        return same and ("error" in row or len(row["answers"]) == n)
    except (ValueError, TypeError, KeyError, AttributeError):  # it is no such line
        return False


def keep_whole_lines(file: Path) -> int:
    """The lines of a file that a run left; one that it did not finish is cut off."""
    if not file.exists():
        return 0
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        file.write_bytes(whole)
    return whole.count(b"\n")


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("generate"))
