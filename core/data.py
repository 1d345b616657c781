"""From files to packed batches: a deterministic, endless sequence of *bins*, the same on any number of ranks.

    sources    files, each with a weight: how often it is read per epoch (2: twice; 0.5: a random half)
    items      windows of a text's token stream, or atomic groups of documents (a conversation, a pair, a ranking)
    epoch      all items, shuffled or sorted by difficulty; the order depends only on (seed, epoch)
    bins       items packed, in order, into streams of at most `bin_tokens` tokens (a micro-batch each)
    step s     bins s·n … s·n + n − 1 of the endless sequence of epochs; rank r of dp takes bins r, r + dp, …

So the data of a step is a function of (config, step), and a resumed run needs no other state.
"""

import hashlib
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tritium.core.batch import Convert, Document, Group, PackedBatch, pack, plan_bins
from tritium.core.chat import THINKING
from tritium.core.code import fill_in_the_middle, hole_markers
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.files import DataError, Skipped, read_documents, read_records, read_text
from tritium.core.formats import FORMS, RecordError, fill, of_form, usable
from tritium.core.output import write_array
from tritium.core.schedule import BatchRamp, ScheduleConfig
from tritium.core.tokenizer import Tokenizer
from tritium.parallel.mesh import Mesh

TURNS, NORMALIZE = ("all", "last", "unrolled"), ("token", "turn", "sequence")


@dataclass
class SourcesConfig:
    """Which files, and how long their micro-batches are."""

    sources: list[str] = opt([], "files")
    bin_tokens: int = opt(4096, "tokens per micro-batch (a bin)", least=2)
    template: str = opt("", "name of the chat template (empty: the model's own)")
    on_error: str = opt("skip", "skip bad records, or stop at the first", choices=("skip", "raise"))

    def __post_init__(self):
        check_ranges(self, "data.")

    @property
    def quantum(self) -> int:
        """Streams are padded to a multiple of this, so that there are at most eight shapes."""
        return max(self.bin_tokens // 8, 1)


@dataclass
class DataConfig(SourcesConfig):
    """Which files, and how they become batches."""

    sources: list[str] = opt([], "files; FILE@W is read W times per epoch")
    bins_per_step: int = opt(1, "micro-batches per step, over all ranks", least=1)
    holdout: float = opt(0.01, "fraction of each source that is held out for evaluation", least=0, below=1)
    difficulty: str = opt("", "curriculum: sort records by this numeric key, easiest first (empty: shuffle)")
    on_overlong: str = opt("skip", "what to do with records longer than the context", choices=("skip", "truncate"))
    turns: str = opt("all", "sft: train on all answers at once, the last one, or each by itself", choices=TURNS)
    normalize: str = opt("token", "sft: give every token, turn or sequence equal weight", choices=NORMALIZE)
    thinking: str = opt("", "sft: keep <think> parts, drop earlier turns', or mask (empty: as usual)", choices=THINKING)
    form: str = opt("", "record format (empty: detected from the keys)", choices=("", *FORMS))
    variables: list[str] = opt([], "NAME=VALUE: replaces {{NAME}} in the records' texts")
    fim: float = opt(0.0, "text: fraction of documents rearranged for fill-in-the-middle", least=0, most=1)
    fim_spm: float = opt(0.5, "text: fraction of these in the order suffix, prefix, middle", least=0, most=1)
    repositories: bool = opt(False, "text: join the files of one repository into one document, imported files first")

    def __post_init__(self):
        super().__post_init__()
        if wrong := [text for text in self.variables if "=" not in text]:
            raise ConfigError(f"data.variables: {wrong[0]!r} is not NAME=VALUE")

    def told(self, record: dict) -> dict:
        """The record read as `form`, with its `variables` replaced. Raises: RecordError."""
        record = of_form(record, self.form) if self.form else record
        return fill(record, dict(text.split("=", 1) for text in self.variables)) if self.variables else record


def parse_sources(sources: Sequence[str], key: str = "data.sources") -> list[tuple[str, float]]:
    """["a.txt", "b.txt@0.5"] → [("a.txt", 1.0), ("b.txt", 0.5)]. Raises: ConfigError, also for a missing file."""
    if not sources:
        raise ConfigError(f"{key} is empty: give at least one file")
    parsed = []
    for text in sources:
        path, at, weight = text.rpartition("@")
        if not at:
            path, weight = text, "1"
        try:
            parsed.append((path, float(weight)))
        except ValueError:
            parsed.append((text, 1.0))  # an @ in the file's name
        if not (file := Path(parsed[-1][0])).is_file():
            raise DataError(f"{key}: {file} {'is a folder: name its files' if file.is_dir() else 'does not exist'}")
        if not 0 < parsed[-1][1] < math.inf:
            raise ConfigError(f"{key}: the weight of {path} must be positive, not {weight}")
    return parsed


class Source(Protocol):
    """Items with known lengths."""

    lengths: np.ndarray  # [n] tokens of each item
    difficulty: np.ndarray | None  # [n]

    def __getitem__(self, index: int) -> Group: ...


# ---------------------------------------------------------------------------------------------- text


class Windows:
    """A token stream, cut between documents into windows of about `context` tokens.

    Windows are small compared with a bin, so that a bin mixes sources. Only documents longer than `context` are cut.
    """

    difficulty = None

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, context: int, capacity: int):
        piece = min(context, capacity)
        size = min(piece, capacity - piece)  # no window is longer than size + piece
        self.tokens, self.cuts = tokens, cut_points(starts, len(tokens), piece)
        at = np.arange(0, len(tokens), size) if size else self.cuts
        edges = np.unique(self.cuts[np.searchsorted(self.cuts, at, side="right") - 1]) if len(tokens) else at
        self.edges = np.append(edges, len(tokens))
        self.lengths = np.diff(self.edges)

    def __getitem__(self, index: int) -> Group:
        first, last = self.edges[index], self.edges[index + 1]
        inner = self.cuts[slice(*np.searchsorted(self.cuts, [first, last]))]
        pieces = np.split(np.asarray(self.tokens[first:last], np.int32), inner[1:] - first)
        return [Document(ids, np.ones(len(ids), np.float32)) for ids in pieces]


def cut_points(starts: np.ndarray, length: int, piece: int) -> np.ndarray:
    """Where documents begin, and where those longer than `piece` tokens are cut."""
    counts = -(-np.diff(np.append(starts, length)) // piece)  # pieces of each document
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + piece * within


def text_sources(config: DataConfig, tokenizer: Tokenizer, context: int, cache: str, skipped: Skipped):
    """Training and held-out windows of every text file: ([Windows], [Windows], [weight])."""
    train, heldout, weights = [], [], []
    for path, weight in parse_sources(config.sources):
        tokens, starts = token_shard(path, tokenizer, cache, skipped, config)
        kept = split_point(starts, len(tokens), config.holdout)
        rest = np.append(0, starts[starts > kept] - kept) if kept < len(tokens) else starts[:0]
        train.append(Windows(tokens[:kept], starts[starts < kept], context, config.bin_tokens))
        heldout.append(Windows(tokens[kept:], rest, context, config.bin_tokens))
        weights.append(weight)
    return train, heldout, weights


def split_point(starts: np.ndarray, length: int, holdout: float) -> int:
    """Where the held-out end of the stream begins: between two documents, or within the only one."""
    at = round(length * (1 - holdout))
    after = starts[starts >= at]
    return int(after[0]) if len(after) else at


def token_shard(
    path: str, tokenizer: Tokenizer, cache: str, skipped: Skipped, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The file's tokens as a memory-mapped stream, and where its documents start; tokenised once, cached in `cache`.

    The output of `curate` (FILE.tokens.npy) is used as it is. Raises: DataError for a file without text, or, as
    `packed_shard` does, with another tokenizer's tokens.
    """
    if path.endswith(".tokens.npy"):
        return packed_shard(path, tokenizer)
    stat = os.stat(path)
    code = [config.fim, config.fim_spm, config.repositories]
    key = json.dumps([os.path.abspath(path), stat.st_size, stat.st_mtime_ns, tokenizer.fingerprint, *code])
    base = Path(cache) / f"{Path(path).stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    tokens_file, starts_file = base.with_suffix(".tokens.npy"), base.with_suffix(".starts.npy")
    if not starts_file.exists():
        streams = encode_documents(list(read_documents(path, skipped, config.repositories)), tokenizer, config)
        if not streams:
            raise DataError(f"{path} contains no text\n{skipped.summary()}")
        starts = np.cumsum([0, *map(len, streams)])[:-1]
        write_array(tokens_file, np.concatenate(streams))
        write_array(starts_file, starts)  # written last: if it exists, both are complete
    return np.load(tokens_file, mmap_mode="r"), np.load(starts_file)


def packed_shard(path: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The same for FILE.tokens.npy, which `curate` has packed. Raises: DataError for another tokenizer's tokens."""
    base = path.removesuffix(".tokens.npy")
    if json.loads(read_text(f"{base}.json"))["tokenizer"] != tokenizer.fingerprint:
        raise DataError(f"{path} was packed with another tokenizer: run `tritium curate` again with this one")
    return np.load(path, mmap_mode="r"), np.load(f"{base}.starts.npy")


def encode_documents(texts: list[str], tokenizer: Tokenizer, config: DataConfig) -> list[np.ndarray]:
    """Each text as [bos] + text + [eos], as far as the tokenizer has these tokens.

    A fraction `config.fim` is rearranged for fill-in-the-middle, by a generator seeded with the text's index.
    """
    before, after = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    markers = hole_markers(tokenizer) if config.fim else None
    draws = [np.random.default_rng([2207, 14255, i]) for i in range(len(texts))] if markers else []
    holed = {i for i, rng in enumerate(draws) if rng.random() < config.fim}
    encoded = tokenizer.encode_batch(["" if i in holed else text for i, text in enumerate(texts)])
    for i in holed:
        rng = draws[i]
        encoded[i] = fill_in_the_middle(tokenizer, texts[i], markers, rng, rng.random() < config.fim_spm)
    return [np.array(before + ids + after, dtype) for ids in encoded]


# ---------------------------------------------------------------------------------------------- records


@dataclass
class Examples:
    """Groups of documents in memory."""

    groups: list[Group] = field(default_factory=list)
    difficulty: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([sum(map(len, group)) for group in self.groups], dtype=np.int64)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]


def record_sources(
    config: DataConfig, convert: Convert, context: int, seed: int, skipped: Skipped, atomic: bool = True
) -> tuple[list[Examples], list[Examples], list[float]]:
    """Training and held-out examples of every file, and the files' weights; `convert` turns a record into a group.

    If not `atomic`, the documents of a record need not share a batch. Records for which `convert` raises RecordError
    are skipped and counted.
    Raises: DataError for a file without a usable record.
    """
    train, heldout, weights = [], [], []
    for number, (path, weight) in enumerate(parse_sources(config.sources)):
        groups, difficulty = [], []
        for place, record in read_records(path, skipped):
            with usable(skipped, place):
                made = convert(config.told(record))
                made = [fit(g, context, config.on_overlong) for g in ([made] if atomic else [[d] for d in made])]
                difficulty += [float(record[config.difficulty]) if config.difficulty else 0.0] * len(made)
                groups += made
        if not groups:
            raise DataError(f"{path} holds no usable record\n{skipped.summary()}")
        order = np.random.default_rng([seed, number]).permutation(len(groups))
        aside = math.ceil(len(groups) * config.holdout)  # at least one, so that there is an evaluation
        kept = np.sort(order[aside:]) if aside < len(groups) else order
        aside = np.setdiff1d(order, kept)
        levels = np.array(difficulty) if config.difficulty else None
        train.append(Examples([groups[i] for i in kept], None if levels is None else levels[kept]))
        heldout.append(Examples([groups[i] for i in aside]))
        weights.append(weight)
    return train, heldout, weights


def fit(group: Group, context: int, on_overlong: str) -> Group:
    """The group, truncated to the context if `on_overlong` says so.

    Raises: RecordError for a document that is too long, or that has no supervised token within the context.
    """
    longest = max(map(len, group))
    if longest > context:
        if on_overlong == "skip":
            raise RecordError(f"a record longer than the context of {context} tokens (data.on_overlong=truncate cuts)")
        group = [d.first(context) for d in group]
    if any(not d.weights[1:].any() for d in group):
        raise RecordError("a record without a supervised token within the context")
    return group


# ---------------------------------------------------------------------------------------------- bins


class Bins:
    """The endless sequence of bins, and this rank's part of each step. See the module's docstring.

    `group_name` is the name of the denominator that counts atomic groups ("pairs", "rankings").
    Raises: ConfigError if a step has fewer bins than there are data-parallel ranks.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        config: DataConfig,
        mesh: Mesh,
        seed: int,
        group_name: str = "groups",
    ):
        if config.bins_per_step < mesh.dp:
            raise ConfigError(
                f"data.bins_per_step={config.bins_per_step} leaves some of the {mesh.dp} data-parallel ranks without "
                f"work: set data.bins_per_step={mesh.dp} or a multiple of it (and perhaps a smaller data.bin_tokens)"
            )
        self.sources, self.weights, self.config, self.mesh = sources, weights, config, mesh
        self.seed, self.group_name = seed, group_name
        self.epoch_bins = lru_cache(maxsize=2)(self.plan_epoch)
        self.ends = [0]  # ends[e]: bins before epoch e

    def plan_epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The bins of an epoch, each a list of (source, item)."""
        rng = np.random.default_rng([self.seed, epoch])
        items, lengths, difficulty = [], [], []
        for number, (source, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
            count = len(source.lengths)
            whole, part = int(weight), weight - int(weight)
            chosen = np.concatenate([*[np.arange(count)] * whole, rng.permutation(count)[: round(part * count)]])
            chosen = chosen.astype(np.int64)
            items += [(number, i) for i in chosen.tolist()]
            lengths.append(source.lengths[chosen])
            difficulty.append(np.zeros(len(chosen)) if source.difficulty is None else source.difficulty[chosen])
        lengths = np.concatenate(lengths)
        order = rng.permutation(len(items))
        order = order[np.argsort(np.concatenate(difficulty)[order], kind="stable")]  # ties stay shuffled
        bins = plan_bins(lengths[order].tolist(), self.config.bin_tokens)
        return [[items[order[i]] for i in members] for members in bins]

    def steps_in(self, epochs: float, schedule: ScheduleConfig) -> int:
        """Steps for `epochs` passes, judged by the first epoch's size, with the smaller batches of a ramp."""
        wanted, full = math.ceil(epochs * len(self.epoch_bins(0))), self.config.bins_per_step
        steps = max(1, math.ceil(wanted / full))
        if not schedule.batch_ramp:
            return steps

        def bins(steps: int) -> int:
            return BatchRamp(schedule, full, self.mesh.dp, steps, {}).span(steps)[0]

        most = math.ceil(wanted / max(1, int(schedule.batch_start * full)))  # no step has fewer bins than the first
        return steps + bisect_left(range(steps, most), wanted, key=bins)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return int(sum(w * s.lengths.sum() for s, w in zip(self.sources, self.weights, strict=True)))

    def bin(self, index: int) -> PackedBatch:
        """Bin `index` ≥ 0 of the endless sequence. Raises: DataError if an epoch has no bin."""
        while index >= self.ends[-1]:
            count = len(self.epoch_bins(len(self.ends) - 1))
            if not count:
                raise DataError("an epoch of these sources is empty: raise the weights W (FILE@W), or add files")
            self.ends.append(self.ends[-1] + count)
        epoch = bisect_right(self.ends, index) - 1
        return self.packed([self.sources[s][i] for s, i in self.epoch_bins(epoch)[index - self.ends[epoch]]])

    def packed(self, groups: list[Group]) -> PackedBatch:
        return pack(groups, {self.group_name: float(len(groups))}, self.config.quantum).to(self.mesh.device)

    def step(self, step: int, ramp: BatchRamp | None = None) -> list[PackedBatch]:
        """This rank's bins of step `step`; a `ramp` replaces `bins_per_step`."""
        count = self.config.bins_per_step
        first, count = ramp.span(step) if ramp else (step * count, count)
        return [self.bin(first + i) for i in range(self.mesh.dp_rank, count, self.mesh.dp)]

    def all(self, limit: int | None = None) -> list[PackedBatch]:
        """This rank's share of the first epoch's bins, or of the first `limit` of them, for evaluation."""
        count = min(len(self.epoch_bins(0)), limit or len(self.epoch_bins(0)))
        return [self.bin(i) for i in range(self.mesh.dp_rank, count, self.mesh.dp)]


def open_bins(
    train: Sequence[Source],
    held_out: Sequence[Source],
    weights: Sequence[float],
    settings: Any,
    mesh: Mesh,
    group_name: str = "groups",
) -> tuple[Bins, list[PackedBatch]]:
    """(bins to train on, this rank's evaluation batches); `settings` is a stage's config, with `data` and `run`."""
    bins = Bins(train, weights, settings.data, mesh, settings.run.seed, group_name)
    evaluation = Bins(held_out, [1.0] * len(held_out), settings.data, mesh, 0, group_name)
    return bins, evaluation.all(settings.run.eval_bins)
