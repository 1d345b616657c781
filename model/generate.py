"""Sampling from the training model itself: the same weights, the same kernels, a key/value cache instead of a stream.

    prefill   the waiting prompts that fit, packed into one stream; their keys and values go to a slot each
    decode    one token for every running sequence, each at its own length
    leave     a finished sequence frees its slot, and a waiting one takes it at the next step

Tokens in, tokens out. A sequence's randomness depends on its own seed and nothing else: the same request gives the
same tokens (up to rounding) in any company and on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tritium.kernels import attention, decode_attention
from tritium.model.transformer import Transformer

PREFILL_TOKENS = 8192  # the longest stream of a prefill, unless one prompt alone is longer
ROWS = 32  # streams and batches are filled up to a multiple: oneDNN builds a matmul kernel for every shape it meets


@dataclass
class Completion:
    """What the model added to one prompt. `finish_reason` is "stop" (a stop token, kept as the last of `tokens`),
    "length" (max_tokens) or "context" (prompt and completion fill the model's positions). `logps[i]` is the
    log-probability of `tokens[i]` under the policy itself (temperature 1, nothing cut off), fp32."""

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    max_batch: int = 256,
    on_token=None,
) -> list[Completion]:
    """Continue each prompt `n` times: completions [len(prompts) · n], the samples of a prompt side by side.

    `temperature` 0 takes the likeliest token. `top_k` (0: off) and `top_p` (1: off) cut the distribution's tail
    (top-p: arXiv 1904.09751). `stop_ids` end a sequence (default: the model's eos). `seed` is a number, from which
    every sample derives its own, or one per sample. `max_batch` bounds the cache to that many sequences of
    len(prompt) + max_tokens. `on_token(sample_index, token)` is called as tokens appear.
    Raises: ValueError for an empty prompt, a prompt that fills the context, or an impossible option.
    """
    check_options(model, prompts, max_tokens, temperature, top_k, top_p, n)
    if stop_ids is None:
        stop_ids = [] if model.config.eos_id is None else [model.config.eos_id]
    total = len(prompts) * n
    seeds = [(seed, i) for i in range(total)] if isinstance(seed, int) else [(s, 0) for s in seed]  # Philox keys
    if len(seeds) != total:
        raise ValueError(f"{len(seeds)} seeds for {total} samples")
    if not total:
        return []
    context = model.config.max_positions
    batch = Batch(model, min(max_batch, total), min(context, max(map(len, prompts)) + max_tokens))
    sampler = Sampler(temperature, top_k, top_p)
    keys = np.array(seeds, np.uint64)  # [samples, 2]; left to itself, numpy would round them through float64
    draws = np.stack([np.random.Generator(np.random.Philox(key=key)).random(max_tokens, np.float32) for key in keys])
    completions = [Completion() for _ in range(total)]
    waiting = list(range(total))[::-1]
    while waiting or batch.running:
        joined = batch.admit(waiting, lambda i: prompts[i // n])
        logits = batch.prefill(joined) if joined else batch.decode()  # [B, V] of the sequences just advanced
        rows = joined or list(batch.running)
        uniforms = torch.tensor([draws[s.index, len(completions[s.index].tokens)] for s in rows])
        tokens, logps = sampler(logits, uniforms.to(logits.device))
        for sequence, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            completion = completions[sequence.index]
            completion.tokens.append(token)
            completion.logps.append(logp)
            sequence.last = token
            completion.finish_reason = finish_reason(sequence, completion, stop_ids, max_tokens, context)
            if on_token is not None:
                on_token(sequence.index, token)
            if completion.finish_reason:
                batch.leave(sequence)
    return completions


def check_options(model, prompts, max_tokens, temperature, top_k, top_p, n) -> None:
    context = model.config.max_positions
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if len(prompt) >= context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model's context is {context}")
    if max_tokens < 1 or n < 1:
        raise ValueError(f"max_tokens={max_tokens} and n={n} must be at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: want ≥ 0, ≥ 0, and 0 < top_p ≤ 1")


def finish_reason(sequence, completion: Completion, stop_ids, max_tokens: int, context: int) -> str:
    if completion.tokens[-1] in stop_ids:
        return "stop"
    if len(completion.tokens) >= max_tokens:
        return "length"
    # What is trained on must fit the model: the token just drawn counts, though it is not fed yet.
    return "context" if len(sequence.prompt) + len(completion.tokens) >= context else ""


@dataclass
class Sampler:
    """Logits and one uniform number per row → a token and its log-probability under the untouched distribution."""

    temperature: float
    top_k: int
    top_p: float

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()  # [B, V]
        raw = logits.log_softmax(-1)
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probs = (raw if self.temperature == 1 else (logits / self.temperature)).softmax(-1)
            cumulative = self.truncate(probs).cumsum(-1)
            # Scaling by the last entry instead of dividing the row keeps the draw inside the kept tokens.
            threshold = uniforms[:, None].float() * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
        return tokens, raw.gather(-1, tokens[:, None])[:, 0]

    def truncate(self, probs: Tensor) -> Tensor:
        """Zero the tokens outside the top k, then outside the smallest set that holds top_p."""
        if self.top_k and self.top_k < probs.shape[-1]:
            kept = probs.topk(self.top_k, -1)
            probs = torch.zeros_like(probs).scatter(-1, kept.indices, kept.values)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p * ordered.sum(-1, keepdim=True), 0.0)
            probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        return probs


@dataclass(eq=False)
class Running:
    """A running sequence: which sample it is, its slot in the cache, how many tokens that holds, the last drawn."""

    index: int
    slot: int
    prompt: Sequence[int]
    length: int = 0
    last: int = 0


class Batch:
    """The running sequences and their key/value cache: one page per slot and layer, and a spare slot."""

    def __init__(self, model: Transformer, slots: int, limit: int):
        config, dtype, device = model.config, model.dtype, model.mesh.device
        shape = (config.num_layers, 2, slots + 1, limit, model.layers[0].attention.kv_heads, config.head_dim)
        self.model, self.limit, self.spare = model, limit, slots
        self.pages = torch.zeros(shape, dtype=dtype, device=device)  # [L, 2, slots + 1, limit, G, D]
        self.free = list(range(slots))[::-1]
        self.running: list[Running] = []

    def admit(self, waiting: list[int], prompt_of) -> list[Running]:
        """Move waiting samples into free slots, as many as one prefill takes."""
        joined, tokens = [], 0
        while waiting and self.free:
            prompt = prompt_of(waiting[-1])
            tokens += len(prompt)
            if joined and tokens > PREFILL_TOKENS:
                break
            joined.append(Running(waiting.pop(), self.free.pop(), prompt))
        self.running += joined
        return joined

    def leave(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self.free.append(sequence.slot)

    def prefill(self, joined: list[Running]) -> Tensor:
        """Run the prompts as one packed stream, keep their keys and values; the logits after each, [B, V]."""
        device = self.pages.device
        filler = -sum(len(s.prompt) for s in joined) % ROWS  # one more document, whose keys go to the spare slot
        lengths = torch.tensor([len(s.prompt) for s in joined] + [filler])
        ends = lengths.cumsum(0)
        tokens = torch.tensor([t for s in joined for t in s.prompt] + [0] * filler, device=device)
        slots = torch.tensor([s.slot for s in joined] + [self.spare]).repeat_interleave(lengths)
        positions = torch.arange(len(tokens)) - (ends - lengths).repeat_interleave(lengths)
        positions[len(tokens) - filler :] = 0  # it fits in any context
        cache = Prefill(self.pages, slots.to(device), positions.to(device))
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int().to(device)
        hidden = self.model.hidden(tokens, cu_seqlens, positions=positions.to(device), cache=cache)
        for sequence in joined:
            sequence.length = len(sequence.prompt)
        last = torch.nn.functional.pad(ends[:-1] - 1, (0, -len(joined) % ROWS))
        return self.model.project(hidden[last.to(device)])[: len(joined)]

    def decode(self) -> Tensor:
        """Feed each running sequence its last token; the logits of the next, [B, V]."""
        device = self.pages.device
        idle = -len(self.running) % ROWS if len(self.running) > 1 else 0  # rows that play on the spare slot
        positions = torch.tensor([s.length for s in self.running] + [0] * idle, device=device)
        slots = torch.tensor([s.slot for s in self.running] + [self.spare] * idle, device=device)
        tokens = torch.tensor([s.last for s in self.running] + [0] * idle, device=device)
        hidden = self.model.hidden(tokens, positions=positions, cache=Decode(self.pages, slots, positions))
        for sequence in self.running:
            sequence.length += 1
        return self.model.project(hidden)[: len(self.running)]


@dataclass
class Prefill:
    """The cache as the layers see it while prompts are read."""

    pages: Tensor  # [L, 2, slots, limit, G, D]
    slots: Tensor  # [T]
    positions: Tensor  # [T]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        self.pages[layer, 0, self.slots, self.positions] = k
        self.pages[layer, 1, self.slots, self.positions] = v
        return attention(q, k, v, cu_seqlens=cu_seqlens)


@dataclass
class Decode:
    """The cache as the layers see it while each sequence adds one token."""

    pages: Tensor  # [L, 2, slots, limit, G, D]
    slots: Tensor  # [B]
    positions: Tensor  # [B]

    def __post_init__(self):
        self.table = self.slots.int()[:, None]  # [B, 1]: a slot is one page
        self.lengths = (self.positions + 1).int()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: None) -> Tensor:
        keys, values = self.pages[layer]
        keys[self.slots, self.positions] = k
        values[self.slots, self.positions] = v
        return decode_attention(q, keys, values, self.table, self.lengths)
