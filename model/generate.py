"""Generation by the training model itself: the same weights, the same kernels, a paged cache instead of a stream.

    admit     waiting sequences, while there are rows and pages; the samples of a prompt share its pages
    prefill   what they have that is not in the cache yet, packed into streams of at most PREFILL_TOKENS
    decode    one token for every running sequence, each at its own length
    leave     a finished sequence frees its pages. Where none is left, the youngest sequence gives its own back, and
              comes again later, with all its tokens

Tokens in, tokens out. A sequence's randomness depends on its own seed and nothing else: the same request gives the
same tokens (up to rounding) in any company, on any number of ranks, and after giving way.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.model.cache import PagedCache, Prefill, cache_pages
from tritium.model.graphs import DecodeGraphs, advance
from tritium.model.packed import PackedWeights
from tritium.model.sampling import History, Options, Sampler
from tritium.model.stops import Text
from tritium.model.transformer import Transformer

PREFILL_TOKENS = 2048  # the longest stream of a prefill: its activations stay small
ROWS = 32  # streams are filled up to a multiple: oneDNN builds a matmul kernel for every shape it meets


@dataclass
class Completion:
    """What came after one prompt. `finish_reason` is "stop" (a stop token or string, kept at the end of `tokens`),
    "length" (max_tokens), "context" (the model's positions, or the cache, are full) or "cancelled". `logps[i]` is the
    log-probability of `tokens[i]` under the policy itself (temperature 1, nothing cut off), `sampled_logps[i]` under
    what it was drawn from, fp32. `weights[i]` is 0 for a token that a tool said (its log-probs are 0), else 1."""

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""
    sampled_logps: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """The samples of one prompt. The first is read for all; the others, when they come, share these pages of it."""

    waiting: int
    leader: "Running | None" = None
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Running:
    """A sequence, from its request to its end; `index` counts the samples of a request."""

    prompt: list[int]
    options: Options
    index: int
    draws: np.ndarray  # [max_tokens] uniform numbers
    group: Group | None
    history: History | None
    text: Text | None
    stop_ids: frozenset[int]
    completion: Completion = field(default_factory=Completion)
    ids: list[int] = field(default_factory=list)  # the prompt and what came after
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # how many of `ids` are in the cache
    drawn: int = 0


class Event(NamedTuple):
    """A token that a sequence drew, the text that it completes ("" without a decoder), and why it was the last.

    None for a token: the sequence ended without one, with what a tool had to say. `top` are the likeliest tokens in its
    place and their log-probs, as many as its options ask for.
    """

    sequence: Running
    token: int | None
    text: str
    logp: float
    finish_reason: str
    top: tuple[tuple[int, float], ...] = ()


Extend = Callable[[Running], Callable[[], Sequence[int]] | None]


class Engine:
    """Requests in, tokens out, all that run advancing together.

    `pages` of the cache (see PagedCache) bound its memory, `max_batch` how many run at once. `decoder` makes the
    incremental decoder of an answer (`Tokenizer.incremental`): with it events carry text, and stop strings work.
    `extend(sequence)` is asked when an answer stops by itself. None ends it; a function is called in a thread while the
    other sequences go on, and the tokens that it returns follow the answer, which then goes on, too.
    """

    def __init__(
        self,
        model: Transformer,
        pages: int,
        max_batch: int = 256,
        decoder: Callable | None = None,
        extend: Extend | None = None,
    ):
        self.model, self.cache, self.max_batch = model, PagedCache(model, pages), max_batch
        self.decoder, self.extend = decoder, extend
        self.capacity = min(model.positions, self.cache.usable * self.cache.page + 1)  # of a sequence
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # the oldest first
        self.calling: dict[Running, Future] = {}  # those that wait for a tool, with their pages
        self.calls = model.mesh.tp_rank == 0  # whether tools run here: the other ranks are told
        self.threads = ThreadPoolExecutor(thread_name_prefix="tool") if extend and self.calls else None
        self.groups: list[Group] = []  # those that hold pages
        self.sampled: tuple[list[Running], Sampler | None] = [], None
        packed = PackedWeights.of(model)
        self.linear, self.head = (packed.linear, packed.product) if packed else (F.linear, F.linear)
        self.graphs = DecodeGraphs(model, self.cache) if DecodeGraphs.possible(model) else None

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self.calling)

    def submit(
        self, prompt: Sequence[int], options: Options, seeds: Sequence[tuple[int, int]], decoder: Callable | None = None
    ) -> list[Running]:
        """One sample of `prompt` for each seed, a Philox key; `decoder` in place of the engine's.

        Raises: ValueError for what can't be done.
        """
        decoder = decoder or self.decoder
        config, prompt = self.model.config, list(prompt)
        check_prompt(prompt, config.max_positions, config.vocab_size)
        options.check_ids(config.vocab_size)
        ids = [*self.model.virtual_ids, *prompt]
        longest = min(len(ids) + options.max_tokens, self.model.positions)
        if longest > self.capacity:
            raise ValueError(
                f"{len(prompt)} tokens and up to {options.max_tokens} new ones do not fit the cache, which holds "
                f"{self.capacity - 1}"
            )
        if options.stop and decoder is None:
            raise ValueError(f"stop={list(options.stop)!r} needs a decoder: give generate(…, decoder=…)")
        stops = options.stop_ids
        if stops is None:
            stops = config.stop_ids
        keys = np.array(seeds, np.uint64).reshape(-1, 2)  # left to itself, numpy would round them through float64
        group = Group(len(seeds)) if len(seeds) > 1 and len(ids) > 1 else None
        made = []
        most = min(options.max_tokens, config.max_positions)  # a client may ask for any number
        for i, key in enumerate(keys):
            draws = np.random.Generator(np.random.Philox(key=key)).random(most, np.float32)
            history = History(options, prompt) if options.edits else None
            text = Text(decoder(), options.stop) if decoder else None
            made.append(Running(ids, options, i, draws, group, history, text, frozenset(stops), ids=list(ids)))
        self.waiting += made
        return made

    def cancel(self, sequence: Running) -> None:
        """End a sequence that waits or runs; a tool that it called comes to its end for nothing."""
        if sequence in self.running or sequence in self.calling:
            self.leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.joined(sequence)
        sequence.completion.finish_reason = sequence.completion.finish_reason or "cancelled"

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Advance: read waiting prompts, or give every running sequence one more token."""
        ended = self.hear() if self.calling else []
        self.admit()
        if self.calling and not self.running and self.calls:
            wait(self.calling.values(), return_when=FIRST_COMPLETED)
        unread = [s for s in self.running if len(s.ids) - s.cached > 1]
        rows, logits = self.prefill(unread) if unread else self.decode()
        if not rows:
            return ended
        uniforms = torch.tensor([s.draws[s.drawn] for s in rows], device=logits.device)
        if self.sampled[0] != rows:
            self.sampled = rows, Sampler([s.options for s in rows], logits.device)
        drawn = self.sampled[1](logits, uniforms, [s.history for s in rows])
        return ended + [self.push(*row) for row in zip(rows, *(x.tolist() for x in drawn), strict=True)]

    def push(
        self, sequence: Running, token: int, logp: float, sampled_logp: float, top: list[int], top_logps: list[float]
    ) -> Event:
        """Add a token to a sequence; end it where it ends."""
        completion = sequence.completion
        sequence.drawn += 1
        self.append(sequence, [token], [logp], [sampled_logp], 1.0)
        text = sequence.text.push(token) if sequence.text else ""
        stopped = token in sequence.stop_ids or (sequence.text is not None and sequence.text.stopped)
        full = len(sequence.ids) >= self.capacity  # the token just drawn counts, though it is not fed yet
        completion.finish_reason = (
            "stop" if stopped else "length" if sequence.drawn >= sequence.options.max_tokens else "context" * full
        )
        ask = stopped and self.extend is not None and sequence.drawn < sequence.options.max_tokens
        if ask and (call := self.extend(sequence)) is not None:
            completion.finish_reason = ""
            self.running.remove(sequence)
            self.calling[sequence] = self.threads.submit(call) if self.calls else Future()
        elif completion.finish_reason:
            text += self.end(sequence)
        top = tuple(zip(top, top_logps, strict=True))[: sequence.options.top_logprobs]
        return Event(sequence, token, text, logp, completion.finish_reason, top)

    def end(self, sequence: Running) -> str:
        """The sequence leaves; what was held back of its text."""
        self.leave(sequence)
        return sequence.text.finish() if sequence.text else ""

    def hear(self) -> list[Event]:
        """Let those go on whose tools have spoken; the ends of those that can't. All ranks raise what a tool raised."""
        ended, calling = [], list(self.calling)
        said = {i: c.exception() or list(c.result()) for i, c in enumerate(self.calling.values()) if c.done()}
        for i, more in self.model.mesh.broadcast_object(said, ("tp",)).items():
            sequence = calling[i]
            if isinstance(more, BaseException):
                raise more
            if not more or len(sequence.ids) + len(more) >= self.capacity:
                sequence.completion.finish_reason = "context" if more else "stop"
                ended.append(Event(sequence, None, self.end(sequence), 0.0, sequence.completion.finish_reason))
            else:
                del self.calling[sequence]
                self.append(sequence, more, [0.0] * len(more), [0.0] * len(more), 0.0)
                self.running.append(sequence)
        return ended

    def append(self, sequence: Running, tokens: list[int], logps: list, sampled_logps: list, weight: float) -> None:
        sequence.ids += tokens
        sequence.completion.tokens += tokens
        sequence.completion.logps += logps
        sequence.completion.sampled_logps += sampled_logps
        sequence.completion.weights += [weight] * len(tokens)
        for token in tokens if sequence.history is not None else ():
            sequence.history.push(token)

    # Pages ------------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let waiting sequences in, in order, while there are rows and pages; samples whose prompt is being read wait.

        Every running sequence should find another page: else those that join would soon have to leave again.
        """
        passed: list[Running] = []
        while self.waiting and len(self.running) + len(self.calling) < self.max_batch:
            sequence = self.waiting.popleft()
            group = sequence.group
            if group and group.leader and not group.pages:
                passed.append(sequence)
                continue
            shared = (len(sequence.prompt) - 1) // self.cache.page if group and group.pages else 0
            needed = self.cache.needed(len(sequence.ids)) - shared
            if needed + (len(self.running) if self.running else 0) > len(self.cache.free):
                passed.append(sequence)
                if self.running or not self.reclaim():
                    break
                continue
            if group and group.pages:
                self.fork(sequence, group.pages)
            elif group:
                group.leader = sequence
            sequence.pages += self.cache.take(self.cache.needed(len(sequence.ids)) - len(sequence.pages))
            self.running.append(sequence)
            self.joined(sequence)
        self.waiting.extendleft(passed[::-1])

    def fork(self, sequence: Running, pages: list[int]) -> None:
        """Give a sequence all of its prompt but the last token: full pages shared, what is left of the last one copied.

        Its last token is then fed like any that was drawn.
        """
        sequence.cached = len(sequence.prompt) - 1
        full, rest = divmod(sequence.cached, self.cache.page)
        sequence.pages = self.cache.share(pages[:full])
        if rest:
            sequence.pages += self.cache.take(1)
            self.cache.copy(pages[full : full + 1], sequence.pages[full:])

    def joined(self, sequence: Running) -> None:
        """One sample fewer waits for its group's pages; the last lets them go."""
        group = sequence.group
        if group is None:
            return
        group.waiting -= 1
        if sequence is not group.leader:
            sequence.group = None
        if not group.waiting:
            self.drop(group)

    def read(self, sequence: Running) -> None:
        """Its prompt is in the cache: keep the pages for the other samples that wait."""
        group, sequence.group = sequence.group, None
        if group is not None and group.waiting:
            group.pages = self.cache.share(sequence.pages[: self.cache.needed(len(sequence.prompt) - 1)])
            self.groups.append(group)

    def drop(self, group: Group) -> None:
        self.cache.release(group.pages)
        group.pages, group.leader = [], None
        if group in self.groups:
            self.groups.remove(group)

    def reclaim(self) -> bool:
        """Take back pages that are only kept for samples that wait; whether there were any."""
        if not self.groups:
            return False
        self.drop(self.groups[-1])
        return True

    def leave(self, sequence: Running) -> None:
        if self.calling.pop(sequence, None) is None:
            self.running.remove(sequence)
        self.cache.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0
        if sequence.group is not None:  # it led, and was not read to its end
            sequence.group.leader, sequence.group = None, None

    def room_for(self, sequence: Running, tokens: int) -> bool:
        """Pages for so many tokens; where there are none, the youngest gives way. Whether the sequence still runs."""
        while sequence in self.running and (missing := self.cache.needed(tokens) - len(sequence.pages)) > 0:
            if missing <= len(self.cache.free):
                sequence.pages += self.cache.take(missing)
            elif not self.reclaim():
                youngest = self.running[-1]
                self.leave(youngest)
                self.waiting.appendleft(youngest)
        return sequence in self.running

    # Forward passes -----------------------------------------------------------------------------------------------

    def prefill(self, unread: list[Running]) -> tuple[list[Running], Tensor]:
        """Read tokens that are not in the cache, as one packed stream; who has read all, and logits after, [B, V]."""
        parts, budget = [], PREFILL_TOKENS
        for sequence in unread:
            count = min(budget, len(sequence.ids) - sequence.cached)
            missing = self.cache.needed(sequence.cached + count) - len(sequence.pages)  # what a tool said
            if missing > len(self.cache.free) and parts:
                break
            if self.room_for(sequence, sequence.cached + count):
                parts.append((sequence, count))
                budget -= count
            if not budget:
                break
        parts = [(s, count) for s, count in parts if s in self.running]
        if not parts:
            return [], torch.empty(0)
        hidden, ends = self.stream(parts)
        done = []
        for (sequence, count), end in zip(parts, ends, strict=True):
            sequence.cached += count
            if sequence.cached >= len(sequence.prompt):
                self.read(sequence)
            if sequence.cached == len(sequence.ids):
                done.append((sequence, end - 1))
        last = F.pad(torch.tensor([i for _, i in done], dtype=torch.int64), (0, fill(len(done))))
        return [s for s, _ in done], self.model.project(hidden[last.to(hidden.device)], self.head)[: len(done)]

    def stream(self, parts: list[tuple[Running, int]]) -> tuple[Tensor, list[int]]:
        """Hidden states of the next tokens of each sequence, packed, and where each ends."""
        device, page = self.model.mesh.device, self.cache.page
        lengths = [count for _, count in parts]
        filler = -sum(lengths) % ROWS  # one more document, whose keys go to page 0
        starts = [s.cached for s, _ in parts]
        tokens = [t for s, count in parts for t in s.ids[s.cached : s.cached + count]] + [0] * filler
        positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)] + [[0] * filler])
        slots = [slots_of(s.pages, a, n, page) for (s, n), a in zip(parts, starts, strict=True)]
        slots.append(np.zeros(filler, np.int64))
        view = Prefill(self.cache.pages, torch.from_numpy(np.concatenate(slots)).to(device), self.linear)
        if any(starts):
            keys = [slots_of(s.pages, 0, a + n, page) for (s, n), a in zip(parts, starts, strict=True)] + slots[-1:]
            view.key_slots = torch.from_numpy(np.concatenate(keys)).to(device)
            view.cu_seqlens_k = bounds([len(k) for k in keys]).to(device)
        hidden = self.model.hidden(
            torch.tensor(tokens, device=device),
            bounds([*lengths, filler]).to(device),
            positions=torch.from_numpy(positions.astype(np.int64)).to(device),
            cache=view,
        )
        return hidden, np.cumsum(lengths).tolist()

    def decode(self) -> tuple[list[Running], Tensor]:
        """Feed each running sequence its last token: the sequences, and the logits of the next, [B, V]."""
        for sequence in list(self.running):
            self.room_for(sequence, sequence.cached + 1)
        rows, page = list(self.running), self.cache.page
        if not rows:
            return rows, torch.empty(0)
        size, width = len(rows) + fill(len(rows)), max(len(s.pages) for s in rows)
        positions = np.zeros(size, np.int64)
        positions[: len(rows)] = [s.cached for s in rows]
        tokens = np.zeros(size, np.int64)
        tokens[: len(rows)] = [s.ids[-1] for s in rows]
        table = np.zeros((size, width), np.int32)
        for row, sequence in enumerate(rows):
            table[row, : len(sequence.pages)] = sequence.pages
        slots = table[np.arange(size), positions // page].astype(np.int64) * page + positions % page
        slots[len(rows) :] = 0
        inputs = [torch.from_numpy(x).to(self.model.mesh.device) for x in (tokens, positions, slots, table)]
        logits = (
            self.graphs(*inputs)
            if self.graphs
            else advance(self.model, self.cache.pages, *inputs, self.linear, self.head)
        )
        for sequence in rows:
            sequence.cached += 1
        return rows, logits[: len(rows)]


def fill(count: int) -> int:
    """Rows to add to a batch: few different sizes, so few kernels or graphs to build."""
    return -count % (1 if count <= 2 else 4 if count <= 16 else 8 if count <= 64 else ROWS)


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)  # [S+1]


def slots_of(pages: Sequence[int], start: int, count: int, page: int) -> np.ndarray:
    """Where in the cache a sequence's tokens start … start + count - 1 are: [count] int64."""
    at = np.arange(start, start + count)
    return np.asarray(pages, np.int64)[at // page] * page + at % page


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context is {context}")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(f"the prompt's ids go from {min(prompt)} to {max(prompt)}; the vocabulary has {vocab_size}")


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    options: Options | None = None,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    max_batch: int = 256,
    pages: int | None = None,
    decoder: Callable | None = None,
    extend: Extend | None = None,
    on_token: Callable[[int, int], None] | None = None,
    **given: Any,
) -> list[Completion]:
    """Continue each prompt `n` times: completions [len(prompts) · n], the samples of a prompt side by side.

    How is said by `options`, or by the fields of `Options` as keywords (max_tokens=…, temperature=…). `seed` is a
    number, from which every sample derives its own, or one per sample.
    `max_batch` sequences run at once at most, and share a cache of `pages` pages of PAGE tokens (None: as many as they
    can need). `decoder` and `extend` are the Engine's. `on_token(sample_index, token)` is called as tokens appear.
    Raises: ValueError for an empty prompt, one that fills the context, or an impossible option.
    """
    options, total = replace(options or Options(), **given), len(prompts) * n
    if n < 1 or max_batch < 1:
        raise ValueError(f"n={n} and max_batch={max_batch} must be at least 1")
    seeds = [(seed, i) for i in range(total)] if isinstance(seed, int) else [(s, 0) for s in seed]  # Philox keys
    if len(seeds) != total:
        raise ValueError(f"{len(seeds)} seeds for {total} samples")
    if not total:
        return []
    if pages is None:
        longest = min(model.positions, len(model.virtual_ids) + max(map(len, prompts)) + options.max_tokens)
        longest = model.positions if extend else longest
        pages = cache_pages(min(max_batch, total), longest)
    engine = Engine(model, pages, max_batch, decoder, extend)
    places: dict[Running, int] = {}
    for i, prompt in enumerate(prompts):
        try:
            made = engine.submit(prompt, options, seeds[i * n : i * n + n])
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        places |= {sequence: i * n + j for j, sequence in enumerate(made)}
    for event in run(engine):
        if on_token is not None and event.token is not None:
            on_token(places[event.sequence], event.token)
    return [sequence.completion for sequence in places]


def run(engine: Engine) -> Iterator[Event]:
    """All events until everything is done."""
    while engine.busy:
        yield from engine.step()
