"""Answer a file of prompts, line by line: a file of answers in the same order, resumable.

tritium generate --model=runs/sft --sources=prompts.jsonl --out=answers.jsonl

A record is {"prompt": text} (continued as it is), {"messages": […]} or a problem ({"question", …}, answered in the
model's chat format). Each output line is its record with "answers": [{"text", "finish_reason", "tokens"}, …], or with
"error" if it can't be answered. The same command again continues after the last complete line. It refuses a file whose
lines answer other records, or come from another model or other options (recorded in answers.jsonl.settings).
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tritium.core.chat import render, stop_ids
from tritium.core.config import ConfigError, UserError, opt
from tritium.core.data import parse_sources
from tritium.core.files import Skipped, read_records
from tritium.core.formats import listed_messages
from tritium.core.output import make_room_for
from tritium.core.rollout import AskConfig, SamplingConfig, sample_seed
from tritium.core.run import Result
from tritium.core.tokenizer import Tokenizer
from tritium.core.tokenizer.tokenizer import StreamDecoder
from tritium.model.beam import beam_search
from tritium.model.generate import Completion, Engine, Running, check_prompt
from tritium.model.stops import Text
from tritium.model.transformer import Transformer
from tritium.parallel.data import fingerprint

ONE_PROCESS = True
SEARCHED = ("max_tokens", "max_batch")  # what a beam search asks of the sampling
Coming = Iterator[tuple[int, dict]]  # records, by their numbers
Answered = tuple[dict, list[tuple[Completion, str]] | str]  # a record, and its answers with their texts, or an error


@dataclass
class Config(AskConfig):
    sources: list[str] = opt([], "files of prompts, conversations or questions")
    out: str = opt("answers.jsonl", "output file; an unfinished one is continued")
    n: int = opt(1, "answers per record", least=1)
    logprobs: bool = opt(False, "also write the log-prob of each token")
    beams: int = opt(1, "number of beams: above 1, beam search instead of sampling", least=1)
    length_penalty: float = opt(1.0, "beams are compared by Σ log-prob / tokens ** length_penalty")

    def __post_init__(self):
        super().__post_init__()
        self.check_beams()
        if not self.sources:
            raise ConfigError("sources is empty: give a file of prompts, --sources=prompts.jsonl")

    def check_beams(self) -> None:
        """Raises: ConfigError for options that don't apply to beam search."""
        if self.beams == 1 and self.length_penalty != 1:
            raise ConfigError(f"length_penalty={self.length_penalty} needs beam search: set e.g. beams=4")
        usual = asdict(SamplingConfig())
        given = [f"sampling.{k}={v}" for k, v in asdict(self.sampling).items() if v != usual[k] and k not in SEARCHED]
        given += [f"n={self.n}"] if self.n > 1 else []
        if self.beams > 1 and given:
            raise ConfigError(f"beams={self.beams} searches for one answer instead of sampling: leave out {given[0]}")


def train(config: Config) -> Result:
    """Write `config.out`. Metrics: `answers`, `failed` records, and `tokens_per_second` of this call."""
    parse_sources(config.sources, "sources")  # what is not there is told before the work
    file = make_room_for(config.out, "out")
    (model, tokenizer), skipped = config.open(), Skipped()
    records = (record for path in config.sources for _, record in read_records(path, skipped))
    done = resume(file, config, settings(config, model))
    answer, coming = searched if config.beams > 1 else drawn, islice(enumerate(records), done, None)
    start, tokens, answers, failed = time.perf_counter(), 0, 0, 0
    with file.open("a", encoding="utf-8", errors="backslashreplace") as lines:
        for record, made in answer(model, tokenizer, coming, config):
            if wrong := isinstance(made, str):
                row = {"error": made}
            else:
                row = {"answers": [shown(*one, tokenizer, config) for one in made]}
                tokens += sum(len(completion.tokens) for completion, _ in made)
            lines.write(json.dumps(record | row, ensure_ascii=False) + "\n")
            lines.flush()
            answers, failed = answers + (not wrong), failed + wrong
    skipped.tell()
    if failed:
        print(f'not answered: {failed} of {answers + failed} records; their lines have an "error"', file=sys.stderr)
    rate = tokens / (time.perf_counter() - start)
    return Result(str(file), {"answers": float(answers), "failed": float(failed), "tokens_per_second": rate})


def drawn(model: Transformer, tokenizer: Tokenizer, coming: Coming, config: Config) -> Iterator[Answered]:
    """The records in their order, each as soon as it and those before it are answered."""
    engine, queue = config.engine(model, tokenizer), deque()
    while True:
        for number, record in islice(coming, max(0, 2 * engine.max_batch - len(queue) * config.n)):
            queue.append((record, told(submit, engine, tokenizer, record, number, config)))
        if not queue:
            return
        engine.step()
        while queue and is_done(queue[0][1]):
            record, made = queue.popleft()
            yield record, made if isinstance(made, str) else [(s.completion, s.text.shown) for s in made]


def searched(model: Transformer, tokenizer: Tokenizer, coming: Coming, config: Config) -> Iterator[Answered]:
    """As `drawn`, by beam search: together as many prompts as have room for their beams, before and after a step."""
    together = max(1, config.sampling.max_batch // (2 * config.beams))
    options = config.beams, config.sampling.max_tokens, config.length_penalty, stop_ids(tokenizer)
    while some := [record for _, record in islice(coming, together)]:
        asked = [told(checked_ids, model, tokenizer, record) for record in some]
        found = iter(beam_search(model, [ids for ids in asked if not isinstance(ids, str)], *options))
        for record, ids in zip(some, asked, strict=True):
            if isinstance(ids, str):
                yield record, ids
            else:
                completion = next(found)
                yield record, [(completion, Text.of(decoder_of(tokenizer, record), (), completion.tokens))]


def told(work: Callable, *given: Any) -> Any:
    """What `work` makes of a record; or what is wrong with it."""
    try:
        return work(*given)
    except (UserError, ValueError) as error:
        return str(error)


def submit(engine: Engine, tokenizer: Tokenizer, record: dict, number: int, config: Config) -> list[Running]:
    """The samples of a record."""
    ids, options = prompt_ids(tokenizer, record), config.sampling.options(stop_ids(tokenizer))
    seeds = [(sample_seed(config.seed, number, i), 0) for i in range(config.n)]
    return engine.submit(ids, options, seeds, partial(decoder_of, tokenizer, record))


def checked_ids(model: Transformer, tokenizer: Tokenizer, record: dict) -> list[int]:
    check_prompt(ids := prompt_ids(tokenizer, record), model.config.max_positions, model.config.vocab_size)
    return ids


def decoder_of(tokenizer: Tokenizer, record: dict) -> StreamDecoder:
    """Of a record's answers: a prompt goes on in the middle of a text."""
    return tokenizer.incremental(first=not isinstance(record.get("prompt"), str))


def prompt_ids(tokenizer: Tokenizer, record: dict) -> list[int]:
    """Raises: ValueError or UserError for a record that is no prompt, conversation or question."""
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


def shown(completion: Completion, text: str, tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    row = {"text": text, "finish_reason": completion.finish_reason, "tokens": len(completion.tokens)}
    if config.logprobs:
        row["logprobs"] = [[tokenizer.piece(t), p] for t, p in zip(completion.tokens, completion.logps, strict=True)]
    return row


def settings(config: Config, model: Transformer) -> dict[str, Any]:
    """What decides the answers to a record: the options, and the weights by their bits."""
    given = {name: asdict(config)[name] for name in ("n", "logprobs", "seed", "dtype", "beams", "length_penalty")}
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
        raise ConfigError(f"out: {file} was written with {told}: set that again, use another --out, or delete the file")
    print(f"{file} holds {done} answered records: continuing after them", file=sys.stderr)
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
