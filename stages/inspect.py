"""Show what a stage trains on: which tokens are learned, where documents begin, weights and denominators.

    tritium inspect sft --model=runs/pretrain --data.sources=chats.jsonl

The options are the stage's own, its --config too. The first records of each file are read, as many as make a
micro-batch (training shuffles); neither the rest of the files nor the model's weights are, so that large ones take
seconds. On a terminal, learned tokens are green, those of another weight than 1 yellow, and what is only read is grey;
elsewhere, learned tokens stand in ⟦ ⟧.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np

from tritium.core.batch import Convert, Document, Group, PackedBatch, pack, plan_bins
from tritium.core.chat import find_template, render
from tritium.core.config import ConfigError, UserError, listed, load
from tritium.core.data import DataConfig, encode_documents, fit, packed_shard, parse_sources
from tritium.core.files import Skipped, holds_records, opened, read_documents, read_records
from tritium.core.formats import problem, usable
from tritium.core.groups import conversation_group, feedback_group, preference_group
from tritium.core.setup import load_tokenizer, read_shape
from tritium.core.tokenizer import Tokenizer
from tritium.stages import reward

GREEN, YELLOW, GREY, BOLD, OFF = "\x1b[32m", "\x1b[33m", "\x1b[90m", "\x1b[1m", "\x1b[0m"
STAGES = ("pretrain", "sft", "reward", "dpo", "grpo", "ppo", "distill")
UNUSABLE = 1000  # records, after which no more are read
CHARACTERS = 64  # read for a token, at most: of text files


class Enough(Exception):
    """So many records can't be used that the rest of the file is not looked at."""


class Glance(Skipped):
    """Raises: Enough, at last."""

    def add(self, reason: str, place: str) -> None:
        super().add(reason, place)
        if self.reasons.total() >= UNUSABLE:
            raise Enough


@dataclass
class Inspected:
    """The first micro-batch, with its tokenizer."""

    batch: PackedBatch
    tokenizer: Tokenizer
    skipped: Skipped
    template: str  # empty for plain text


def main(argv: list[str]) -> int:
    """`tritium inspect STAGE …`. Raises: UserError for a stage without data, and as the stage itself would."""
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h"):
        usage = f"usage: tritium inspect {'|'.join(STAGES)} [--config FILE.toml] [--name=value …]\n\n{__doc__}"
        print(usage, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if name not in STAGES:
        raise ConfigError(f"no data to inspect of a stage {name!r}; {listed(name, STAGES)}")
    config = load(import_module(f"tritium.stages.{name}").Config, rest, f"tritium inspect {name}", __doc__)
    colour = bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    print("\n".join(report(inspect(name, config), colour)))
    return 0


def inspect(stage: str, config: Any) -> Inspected:
    """The first micro-batch of a stage with this config. Raises: UserError where nothing can be read."""
    folder = config.model if stage != "pretrain" else config.tokenizer or config.init
    if not folder:
        raise ConfigError("pretrain trains a tokenizer first: name one with --tokenizer, made by `tritium tokenizer`")
    tokenizer, skipped = load_tokenizer(folder, template=config.data.template), Glance(config.data.on_error)
    model = config.init if stage == "pretrain" else config.model
    context = read_shape(model).max_positions if model else config.model.context
    groups = first_groups(stage, config, tokenizer, context, skipped)
    if not groups:
        raise UserError(f"{', '.join(config.data.sources)}: no usable record at the beginning\n{skipped.summary()}")
    members = plan_bins([sum(map(len, group)) for group in groups], config.data.bin_tokens)[0]
    batch = pack([groups[i] for i in members])
    return Inspected(batch, tokenizer, skipped, "" if stage == "pretrain" else find_template(tokenizer))


def first_groups(stage: str, config: Any, tokenizer: Tokenizer, context: int, skipped: Skipped) -> list[Group]:
    """Groups from each file in turn, until they fill a micro-batch."""
    data, length, groups = config.data, 0, []
    paths = [path for path, _ in parse_sources(data.sources)]
    if stage == "pretrain":
        readers = [text_groups(path, config, tokenizer, context, skipped) for path in paths]
    else:
        convert = converter(stage, config, tokenizer)
        readers = [record_groups(path, config, convert, context, skipped) for path in paths]
    with suppress(Enough):
        while readers and length < data.bin_tokens:
            for reader in list(readers):
                group = next(reader, None)
                if group is None:
                    readers.remove(reader)
                    continue
                groups.append(group)
                length += sum(map(len, group))
    return groups


def converter(stage: str, config: Any, tokenizer: Tokenizer) -> Convert:
    """What the stage makes of a record; of a problem, the prompt that is answered."""
    if (stage, getattr(config, "loss", "")) in (("sft", "unlikelihood"), ("dpo", "kto")):
        return feedback_group(tokenizer)
    if stage == "sft" or (stage == "distill" and config.mode == "logit"):
        return conversation_group(tokenizer, config.data)
    if stage == "dpo" and not config.online:
        return preference_group(tokenizer)
    if stage == "reward":
        return reward.converter_of(config, tokenizer)

    def prompt(record: dict) -> Group:
        ids = render(tokenizer, problem(record)[0], generation_prompt=True).ids
        return [Document(np.array(ids, np.int32), np.zeros(len(ids), np.float32))]

    return prompt


def record_groups(path: str, config: Any, convert: Convert, context: int, skipped: Skipped) -> Iterator[Group]:
    told = getattr(config.data, "told", lambda record: record)
    for place, record in read_records(path, skipped):
        with usable(skipped, place):
            group = convert(told(record))
            learned = any(document.weights.any() for document in group)
            yield fit(group, context, getattr(config.data, "on_overlong", "skip")) if learned else group


def text_groups(path: str, config: Any, tokenizer: Tokenizer, context: int, skipped: Skipped) -> Iterator[Group]:
    """The windows that a text's first documents are cut into."""
    for ids in text_ids(path, config.data, tokenizer, skipped):
        for start in range(0, len(ids), context):
            piece = ids[start : start + context].astype(np.int32)
            yield [Document(piece, np.ones(len(piece), np.float32))]


def text_ids(path: str, data: DataConfig, tokenizer: Tokenizer, skipped: Skipped) -> Iterator[np.ndarray]:
    """A file's documents, encoded. Raises: DataError, of packed ones, where they are of another tokenizer."""
    if path.endswith(".tokens.npy"):
        tokens, starts = packed_shard(path, tokenizer)
        yield from (tokens[a:b] for a, b in zip(starts, np.append(starts[1:], len(tokens)), strict=True))
        return
    if holds_records(path):
        texts = read_documents(path, skipped, data.repositories)
    else:
        with opened(path) as file:
            texts = iter([file.read(CHARACTERS * data.bin_tokens)])
    while batch := list(islice(texts, 16)):
        yield from encode_documents(batch, tokenizer, data)


def report(found: Inspected, colour: bool) -> list[str]:
    """The lines that are shown."""
    batch, lines = found.batch, []
    cu = batch.cu_seqlens.tolist()
    for s in range(batch.sequences):
        start, end = cu[s], cu[s + 1]
        weights = [0.0, *batch.weights[start : end - 1].tolist()]  # of the tokens themselves, as targets
        fields = "".join(f", {name} {v[s]:g}" for name, v in batch.fields.items() if len(v) == batch.sequences)
        learned = sum(map(bool, weights))
        head = f"── document {s}: stream {start}–{end - 1}, {end - start} tokens, {learned} learned, "
        head += f"Σ weight {sum(weights):g}{fields} "
        lines.append((BOLD if colour else "") + head + "─" * max(0, 100 - len(head)) + (OFF if colour else ""))
        lines.append(shown(found.tokenizer, batch.tokens[start:end].tolist(), weights, colour))
    counts = ", ".join(f"{name} {value:g}" for name, value in batch.counts.items())
    lines += ["", f"denominators of this micro-batch: {counts}"]
    lines += [f"chat template: {found.template}"] if found.template else []
    stream = batch.counts["stream"]
    lines.append(f"{len(batch.supervised)} of {stream:g} tokens are learned ({len(batch.supervised) / stream:.1%})")
    return lines + ([found.skipped.summary()] if found.skipped.reasons else [])


def shown(tokenizer: Tokenizer, ids: Sequence[int], weights: Sequence[float], colour: bool) -> str:
    """The text of the tokens, by weight; a newline shows as ⏎ too where it is learned."""
    decoder, runs = tokenizer.incremental(keep_special=True), []
    for id, weight in zip(ids, weights, strict=True):
        text = decoder.push(id)
        if runs and runs[-1][0] == weight:
            runs[-1][1] += text
        else:
            runs.append([weight, text])
    runs[-1][1] += decoder.finish()
    return "".join(painted(text, weight, colour) for weight, text in runs)


def painted(text: str, weight: float, colour: bool) -> str:
    text = "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)  # no escapes from data
    if weight:
        text = text.replace("\n", "⏎\n")
    if not colour:
        mark = "" if weight in (0, 1) else f"{weight:.3g}·"
        return f"⟦{mark}{text}⟧" if weight else text
    return f"{GREY if not weight else GREEN if weight == 1 else YELLOW}{text}{OFF}"


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("inspect"))
