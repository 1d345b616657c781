"""Generation with the training model itself: the same weights and kernels, with a paged KV cache (continuous batching).

    admit     let waiting sequences in while there is room in the batch and the cache; samples of a prompt share pages
    prefill   tokens that are not in the cache yet, packed into streams of at most PREFILL_TOKENS
    decode    one token for every running sequence, each at its own length
    release   a finished sequence frees its pages. If the cache is full, the youngest sequence is preempted: it frees
              its pages, and is prefilled again later, with all its tokens

Token ids in, token ids out. A sequence's randomness depends only on its own seed: the same request gives the same
tokens (up to rounding) in any batch, on any number of ranks, and after preemption.
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

PREFILL_TOKENS = 2048  # longest prefill stream: bounds its activations
ROWS = 32  # streams are padded to a multiple of this: oneDNN builds a matmul kernel for every new shape


@dataclass
class Completion:
    """The continuation of one prompt.

    `finish_reason` is "stop" (a stop token or string, kept at the end of `tokens`), "length" (max_tokens), "context"
    (the context or the cache is full) or "cancelled". `logps[i]` is the log-prob of `tokens[i]` under the policy itself
    (temperature 1, no truncation), `sampled_logps[i]` under the distribution it was sampled from; both fp32.
    `weights[i]` is 0 for a token of a tool's output (its log-probs are 0), else 1.
    """

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""
    sampled_logps: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """The samples of one prompt. Only the first, the leader, is prefilled; the others share the prompt's pages."""

    waiting: int
    leader: "Running | None" = None
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Running:
    """A sequence, from request to end; `index` is its place among the samples of its request."""

    prompt: list[int]
    options: Options
    index: int
    draws: np.ndarray  # [max_tokens] uniform random numbers
    group: Group | None
    history: History | None
    text: Text | None
    stop_ids: frozenset[int]
    completion: Completion = field(default_factory=Completion)
    ids: list[int] = field(default_factory=list)  # prompt and continuation
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # how many of `ids` are in the cache
    drawn: int = 0  # tokens sampled so far (tool output does not count)


class Event(NamedTuple):
    """A sampled token, the text that it completes ("" without a decoder) and, if it is the last, the finish reason.

    The token is None if the sequence ended with a tool's output. `top`: the likeliest tokens in its place with their
    log-probs, as many as the options ask for.
    """

    sequence: Running
    token: int | None
    text: str
    logp: float
    finish_reason: str
    top: tuple[tuple[int, float], ...] = ()


Extend = Callable[[Running], Callable[[], Sequence[int]] | None]


class Engine:
    """Takes requests and advances all running sequences together, one token per step.

    `pages` bounds the cache's memory (see PagedCache), `max_batch` the number of running sequences. `decoder` makes an
    answer's incremental decoder (`Tokenizer.incremental`), which gives events text and makes stop strings work.
    `extend(sequence)` is called when an answer stops by itself. If it returns a function, that is called in a thread
    while other sequences go on; the tokens it returns are appended to the answer, which then continues. None ends it.
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
        self.capacity = min(model.positions, self.cache.usable * self.cache.page + 1)  # longest sequence
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # oldest first
        self.calling: dict[Running, Future] = {}  # sequences that wait for a tool; they keep their pages
        self.runs_tools = model.mesh.tp_rank == 0  # rank 0 runs the tools and broadcasts their output
        self.threads = ThreadPoolExecutor(thread_name_prefix="tool") if extend and self.runs_tools else None
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
        """Request one sample of `prompt` per seed (a Philox key); `decoder` replaces the engine's.

        Raises: ValueError for an impossible prompt or option, and for a request that can't fit the cache.
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
                f"{self.capacity - 1}: lower max_tokens, or enlarge the cache"
            )
        if options.stop and decoder is None:
            raise ValueError(f"stop={list(options.stop)!r} needs a decoder: pass generate(…, decoder=…)")
        stops = options.stop_ids
        if stops is None:
            stops = config.stop_ids
        keys = np.array(seeds, np.uint64).reshape(-1, 2)  # by default numpy would round large ones to float64
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
        """End a waiting or running sequence; the result of a tool that it has called is dropped."""
        if sequence in self.running or sequence in self.calling:
            self.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.leave_group(sequence)
        sequence.completion.finish_reason = sequence.completion.finish_reason or "cancelled"

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Advance: prefill admitted prompts if there are any, else sample one token for every running sequence."""
        ended = self.collect_tool_results() if self.calling else []
        self.admit()
        if self.calling and not self.running and self.runs_tools:
            wait(self.calling.values(), return_when=FIRST_COMPLETED)
        unread = [s for s in self.running if len(s.ids) - s.cached > 1]
        rows, logits = self.prefill(unread) if unread else self.decode()
        if not rows:
            return ended
        uniforms = torch.tensor([s.draws[s.drawn] for s in rows], device=logits.device)
        if self.sampled[0] != rows:
            self.sampled = rows, Sampler([s.options for s in rows], logits.device)
        drawn = self.sampled[1](logits, uniforms, [s.history for s in rows])
        numbers = torch.column_stack([x.double() for x in drawn]).tolist()  # one copy from the device
        return ended + [self.push(sequence, *row) for sequence, row in zip(rows, numbers, strict=True)]

    def push(self, sequence: Running, token: float, logp: float, sampled_logp: float, *top: float) -> Event:
        """Append a sampled token; end the sequence or call its tool if due. `top`: likeliest tokens, then log-probs."""
        completion, options, token = sequence.completion, sequence.options, int(token)
        sequence.drawn += 1
        self.append(sequence, [token], [logp], [sampled_logp], 1.0)
        text = sequence.text.push(token) if sequence.text else ""
        stopped = token in sequence.stop_ids or (sequence.text is not None and sequence.text.stopped)
        if stopped:
            completion.finish_reason = "stop"
        elif sequence.drawn >= options.max_tokens:
            completion.finish_reason = "length"
        elif len(sequence.ids) >= self.capacity:  # counts the token just sampled, which is not in the cache yet
            completion.finish_reason = "context"
        ask = stopped and self.extend is not None and sequence.drawn < options.max_tokens
        if ask and (call := self.extend(sequence)) is not None:
            completion.finish_reason = ""
            self.running.remove(sequence)
            self.calling[sequence] = self.threads.submit(call) if self.runs_tools else Future()
        elif completion.finish_reason:
            text += self.end(sequence)
        half = len(top) // 2
        likeliest = tuple(zip(map(int, top[:half]), top[half:], strict=True))[: options.top_logprobs]
        return Event(sequence, token, text, logp, completion.finish_reason, likeliest)

    def end(self, sequence: Running) -> str:
        """Release the sequence's pages; returns the text that its decoder held back."""
        self.release(sequence)
        return sequence.text.finish() if sequence.text else ""

    def collect_tool_results(self) -> list[Event]:
        """Continue the sequences whose tools are done; returns the events of those that end instead. Raises, on all
        ranks: what a tool raised."""
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
        """Let waiting sequences in, in order, while there is room; samples whose prompt is being prefilled wait for it.

        A free page is kept for every running sequence: otherwise those admitted would soon be preempted again.
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
            self.leave_group(sequence)
        self.waiting.extendleft(passed[::-1])

    def fork(self, sequence: Running, pages: list[int]) -> None:
        """Give a sequence the cache of its prompt but for the last token: full pages are shared, a partial one copied.
        The last token is then decoded like a sampled one, which gives the first logits."""
        sequence.cached = len(sequence.prompt) - 1
        full, rest = divmod(sequence.cached, self.cache.page)
        sequence.pages = self.cache.share(pages[:full])
        if rest:
            sequence.pages += self.cache.take(1)
            self.cache.copy(pages[full : full + 1], sequence.pages[full:])

    def leave_group(self, sequence: Running) -> None:
        """One sample fewer waits for its group's pages; after the last one they are released."""
        group = sequence.group
        if group is None:
            return
        group.waiting -= 1
        if sequence is not group.leader:
            sequence.group = None
        if not group.waiting:
            self.release_group(group)

    def share_prompt(self, sequence: Running) -> None:
        """Once its prompt is in the cache: keep the pages for the samples of its group that still wait."""
        group, sequence.group = sequence.group, None
        if group is not None and group.waiting:
            group.pages = self.cache.share(sequence.pages[: self.cache.needed(len(sequence.prompt) - 1)])
            self.groups.append(group)

    def release_group(self, group: Group) -> None:
        self.cache.release(group.pages)
        group.pages, group.leader = [], None
        if group in self.groups:
            self.groups.remove(group)

    def reclaim(self) -> bool:
        """Free the pages of a prompt that are kept only for waiting samples; whether there were any."""
        if not self.groups:
            return False
        self.release_group(self.groups[-1])
        return True

    def release(self, sequence: Running) -> None:
        if self.calling.pop(sequence, None) is None:
            self.running.remove(sequence)
        self.cache.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0
        if sequence.group is not None:  # a leader whose prefill was not finished
            sequence.group.leader, sequence.group = None, None

    def reserve(self, sequence: Running, tokens: int) -> bool:
        """Get the sequence pages for this many tokens, preempting the youngest sequences if there are none left;
        returns whether the sequence itself still runs."""
        while sequence in self.running and (missing := self.cache.needed(tokens) - len(sequence.pages)) > 0:
            if missing <= len(self.cache.free):
                sequence.pages += self.cache.take(missing)
            elif not self.reclaim():
                youngest = self.running[-1]
                self.release(youngest)
                self.waiting.appendleft(youngest)
        return sequence in self.running

    # Forward passes -----------------------------------------------------------------------------------------------

    def prefill(self, unread: list[Running]) -> tuple[list[Running], Tensor]:
        """Process tokens that are not in the cache, as one packed stream.

        Returns the sequences that are complete now, and the logits after their last tokens, [B, V].
        """
        parts, budget = [], PREFILL_TOKENS
        for sequence in unread:
            count = min(budget, len(sequence.ids) - sequence.cached)
            missing = self.cache.needed(sequence.cached + count) - len(sequence.pages)  # above 0 after tool output
            if missing > len(self.cache.free) and parts:
                break
            if self.reserve(sequence, sequence.cached + count):
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
                self.share_prompt(sequence)
            if sequence.cached == len(sequence.ids):
                done.append((sequence, end - 1))
        last = F.pad(torch.tensor([i for _, i in done], dtype=torch.int64), (0, padding_rows(len(done))))
        return [s for s, _ in done], self.model.project(hidden[last.to(hidden.device)], self.head)[: len(done)]

    def stream(self, parts: list[tuple[Running, int]]) -> tuple[Tensor, list[int]]:
        """Hidden states [T, E] of the next tokens of each sequence, packed, and the end of each in the stream."""
        device, page = self.model.mesh.device, self.cache.page
        lengths = [count for _, count in parts]
        filler = -sum(lengths) % ROWS  # a padding document, whose keys go to page 0
        starts = [s.cached for s, _ in parts]
        tokens = [t for s, count in parts for t in s.ids[s.cached : s.cached + count]] + [0] * filler
        positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)] + [[0] * filler])
        slots = [slots_of(s.pages, a, n, page) for (s, n), a in zip(parts, starts, strict=True)]
        slots.append(np.zeros(filler, np.int64))
        view = Prefill(self.cache.pages, torch.from_numpy(np.concatenate(slots)).to(device), self.linear)
        if any(starts):
            keys = [slots_of(s.pages, 0, a + n, page) for (s, n), a in zip(parts, starts, strict=True)] + slots[-1:]
            view.key_slots = torch.from_numpy(np.concatenate(keys)).to(device)
            view.cu_seqlens_k = cu_seqlens_of([len(k) for k in keys]).to(device)
        hidden = self.model.hidden(
            torch.tensor(tokens, device=device),
            cu_seqlens_of([*lengths, filler]).to(device),
            positions=torch.from_numpy(positions.astype(np.int64)).to(device),
            cache=view,
        )
        return hidden, np.cumsum(lengths).tolist()

    def decode(self) -> tuple[list[Running], Tensor]:
        """Feed each running sequence its last token; returns the sequences and their next tokens' logits, [B, V]."""
        for sequence in list(self.running):
            self.reserve(sequence, sequence.cached + 1)
        rows, page = list(self.running), self.cache.page
        if not rows:
            return rows, torch.empty(0)
        size, width = len(rows) + padding_rows(len(rows)), max(len(s.pages) for s in rows)
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


def padding_rows(count: int) -> int:
    """Padding rows for a batch: few different batch sizes mean few kernels or CUDA graphs to build."""
    return -count % (1 if count <= 2 else 4 if count <= 16 else 8 if count <= 64 else ROWS)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)  # [S+1]


def slots_of(pages: Sequence[int], start: int, count: int, page: int) -> np.ndarray:
    """The cache slots of a sequence's tokens start … start + count - 1: [count] int64."""
    at = np.arange(start, start + count)
    return np.asarray(pages, np.int64)[at // page] * page + at % page


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context is {context}")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(f"the prompt's ids are {min(prompt)} to {max(prompt)}; the vocabulary has {vocab_size} tokens")


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
    """Continue each prompt `n` times; returns completions [len(prompts) · n], the samples of a prompt side by side.

    Sampling options are given as `options`, or as keywords (fields of `Options`: max_tokens=…, temperature=…). `seed`
    is one number, from which every sample's own seed is derived, or one number per sample. At most `max_batch`
    sequences run at once, sharing a cache of `pages` pages of PAGE tokens (None: as many as they can need). `decoder`
    and `extend` are as in Engine. `on_token(sample_index, token)` is called as tokens appear.
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
    """Step the engine until all requests are done; yields all events."""
    while engine.busy:
        yield from engine.step()
