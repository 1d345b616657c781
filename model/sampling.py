"""From logits to tokens: what may be asked of a draw, and the draw itself, for all rows of a batch at once.

The likeliest tokens are found, and the cumulative distribution is searched, in two levels, blocks of the vocabulary and
then one block of each row: over 49,152 tokens that takes a fifth of the time of cumsum and argmax. The draw inverts the
distribution at one uniform number of the row's own, so that neither the other rows nor their number matter.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # tokens of the vocabulary
HUGE = 1e30  # beyond it, or beneath its inverse, an option would be infinite or 0 in fp32, and the scores NaN
BANNED = -1e35  # finite, so that a row may be banned whole; no bias makes up for it
CANDIDATES = 256  # a top-p set is looked for among so many of the likeliest tokens, and only then among all


RANGES = {
    "max_tokens": (1, HUGE), "temperature": (0, HUGE), "top_k": (0, (1 << 31) - 1), "top_p": (1 / HUGE, 1),
    "min_p": (0, 1), "repetition_penalty": (1 / HUGE, HUGE), "presence_penalty": (-HUGE, HUGE),
    "frequency_penalty": (-HUGE, HUGE), "no_repeat_ngram": (0, HUGE), "top_logprobs": (0, HUGE),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How the tokens of one request are drawn, and what ends it. Raises: ValueError for an impossible value.

    `temperature` 0 takes the likeliest token. Tails are cut by `top_k` (0: off), then `top_p` (arXiv 1904.09751; 1:
    off), then `min_p`, relative to the likeliest token's probability (arXiv 2407.01082; 0: off). Before these,
    `repetition_penalty` divides the positive, and multiplies the negative logits of tokens in the prompt or the answer
    (arXiv 1909.05858), `presence_penalty` is subtracted from those in the answer, `frequency_penalty` as often as they
    are in it (OpenAI's two), `logit_bias` is added, and no `no_repeat_ngram` tokens in a row come twice (0: off).
    `stop_ids` (None: the model's eos) and the strings `stop` end the answer after `max_tokens` at the latest.
    `top_logprobs` of the likeliest tokens are told with each token, under the policy itself.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: Sequence[int] | None = None
    stop: Sequence[str] = ()
    top_logprobs: int = 0

    def __post_init__(self):
        values = [(name, getattr(self, name)) for name in RANGES]
        values += [("logit_bias", bias) for bias in self.logit_bias.values()]
        for name, value in values:
            least, most = RANGES.get(name, (-HUGE, HUGE))
            if not least <= value <= most:
                words = f"at least {least:g}" if most == HUGE > -least else f"from {least:g} to {most:g}"
                raise ValueError(f"{name}={value} must be {words}")
        if 0 < self.temperature < 1 / HUGE:
            raise ValueError(f"temperature={self.temperature} must be 0 or at least {1 / HUGE}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a list of strings, none of them empty")

    def check_ids(self, vocab_size: int) -> None:
        """Raises: ValueError for a stop id or a biased token that the model does not have."""
        for name, ids in (("stop_ids", self.stop_ids or ()), ("logit_bias", self.logit_bias)):
            for i in ids:
                if not 0 <= i < vocab_size:
                    raise ValueError(f"{name}: there is no token {i} in a vocabulary of {vocab_size}")
        if self.top_logprobs > vocab_size:
            raise ValueError(f"top_logprobs={self.top_logprobs}: the vocabulary has {vocab_size} tokens")

    @property
    def edits(self) -> bool:
        """Whether logits are changed by what stands before."""
        added = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(self.repetition_penalty != 1 or self.no_repeat_ngram or added)


class History:
    """The tokens of a sequence, as its penalties see them."""

    def __init__(self, options: Options, prompt: Sequence[int]):
        self.options, self.ids = options, list(prompt)
        self.seen, self.answered = set(prompt), Counter()
        self.followers: dict[tuple[int, ...], set[int]] = {}  # of each n-1 tokens in a row
        for end in range(len(self.ids)):
            self.follow(end)

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.seen.add(token)
        self.answered[token] += 1
        self.follow(len(self.ids) - 1)

    def follow(self, end: int) -> None:
        n = self.options.no_repeat_ngram
        if n and end >= n - 1:
            self.followers.setdefault(tuple(self.ids[end - n + 1 : end]), set()).add(self.ids[end])

    def edits(self) -> tuple[dict[int, float], dict[int, float]]:
        """What the logits of which tokens are divided by (or multiplied, below 0), and what is then added to which."""
        options, n = self.options, self.options.no_repeat_ngram
        divided = dict.fromkeys(self.seen, options.repetition_penalty) if options.repetition_penalty != 1 else {}
        added = dict(options.logit_bias)
        if options.presence_penalty or options.frequency_penalty:
            for token, count in self.answered.items():
                penalty = options.presence_penalty + options.frequency_penalty * count
                added[token] = added.get(token, 0.0) - penalty
        banned = self.followers.get(tuple(self.ids[len(self.ids) - n + 1 :]), ()) if n else ()
        return divided, added | dict.fromkeys(banned, BANNED)


def edit(scores: Tensor, histories: Sequence[History | None]) -> None:
    """Change the logits [B, V] as each row's history wants; None: not at all. In place."""
    edits = [({}, {}) if history is None else history.edits() for history in histories]
    for kind in (0, 1):
        cells = [(row, *cell) for row, both in enumerate(edits) for cell in both[kind].items()]
        if not cells:
            continue
        *places, numbers = zip(*cells, strict=True)
        at = torch.tensor(places, device=scores.device).unbind()
        old, value = scores[at], torch.tensor(numbers, device=scores.device)
        scores[at] = old + value if kind else torch.where(old > 0, old / value, old * value)


class Drawn(NamedTuple):
    """Tokens [B] int64; their log-probability [B] fp32 under the policy itself (temperature 1, nothing cut or edited),
    and under the distribution that they were drawn from (0 for the likeliest token at temperature 0). `top` and
    `top_logps` [B, K] are the likeliest tokens, for the row that asks for most of them."""

    tokens: Tensor
    logps: Tensor
    sampled_logps: Tensor
    top: Tensor
    top_logps: Tensor


class Sampler:
    """Draws for rows with these options: what they need of tensors is made once."""

    def __init__(self, rows: Sequence[Options], device: torch.device | str = "cpu"):
        def tensor(name: str, kind=torch.float32) -> Tensor:
            return torch.tensor([getattr(o, name) for o in rows], dtype=kind, device=device)

        self.greedy = tensor("temperature") == 0
        self.all_greedy, self.any_greedy = (f(o.temperature == 0 for o in rows) for f in (all, any))
        self.temperature = tensor("temperature").masked_fill(self.greedy, 1.0)[:, None]
        self.tempered = any(o.temperature not in (0, 1) for o in rows)
        self.top = max(o.top_logprobs for o in rows)
        self.min_p = tensor("min_p")[:, None] if any(o.min_p for o in rows) else None
        cut = [i for i, o in enumerate(rows) if o.temperature and (o.top_k or o.top_p < 1)]
        self.cut = torch.tensor(cut, device=device) if cut else None
        self.top_k, self.top_p = tensor("top_k", torch.int64)[cut, None], tensor("top_p")[cut, None]
        self.most = max([o.top_k for o in rows] + [CANDIDATES * any(not rows[i].top_k for i in cut)])

    def __call__(self, logits: Tensor, uniforms: Tensor, histories: Sequence[History | None] = ()) -> Drawn:
        """logits [B, V] and uniforms [B] in [0, 1)."""
        scores = logits.float()
        if scores.shape[1] % BLOCK:
            scores = F.pad(scores, (0, -scores.shape[1] % BLOCK), value=-math.inf)  # [B, V'], a multiple of BLOCK
        weights = scores.softmax(-1)  # each row is read once from memory: maximum, exponentials and sum are one op
        peak = likeliest(weights)[:, None]
        lse = scores.gather(1, peak) - weights.gather(1, peak).log()  # [B, 1]
        top_logps, top = scores.topk(self.top) if self.top else (lse[:, :0], peak[:, :0])
        if edited := any(histories):
            edit(scores := scores.clone(), histories)
        if self.all_greedy:
            tokens = likeliest(scores)
            sampled = torch.zeros_like(lse[:, 0])
        else:
            tokens, sampled = self.draw(scores, weights, uniforms, edited)
        logps = logits.gather(1, tokens[:, None]).float() - lse
        return Drawn(tokens, logps[:, 0], sampled, top, top_logps - lse)

    def draw(self, scores: Tensor, weights: Tensor, uniforms: Tensor, edited: bool) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probabilities; weights [B, V'] are the probabilities of the scores as they were."""
        if self.tempered or edited:
            above = scores - scores.amax(-1, keepdim=True)  # a temperature near 0 would make them infinite
            weights = above.div_(self.temperature).softmax(-1)
        kept = None if self.cut is None else self.candidates(weights)
        least = None if self.min_p is None else self.min_p * weights.amax(-1, keepdim=True)
        tokens, sampled = invert(weights if least is None else weights.masked_fill(weights < least, 0.0), uniforms)
        if kept is not None:
            values, ids = kept
            if least is not None:
                values = values.masked_fill(values < least[self.cut], 0.0)
            place, logps = invert(F.pad(values, (0, -values.shape[1] % BLOCK)), uniforms[self.cut])
            tokens[self.cut] = ids.gather(1, place[:, None])[:, 0]
            sampled[self.cut] = logps
        if self.any_greedy:
            tokens = torch.where(self.greedy, likeliest(scores), tokens)
            sampled = sampled.masked_fill(self.greedy, 0.0)
        return tokens, sampled

    def candidates(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [rows to cut, K] of the likeliest tokens, the likeliest first; 0 for those that are cut."""
        weights = weights[self.cut]
        total = weights.sum(-1, keepdim=True)
        no_limit = self.top_k == 0
        for size in (self.most, weights.shape[1]):
            values, ids = weights.topk(min(size, weights.shape[1]), -1)  # descending
            values = values.masked_fill((torch.arange(values.shape[1], device=ids.device) >= self.top_k) & ~no_limit, 0)
            mass = torch.where(no_limit, total, values.sum(-1, keepdim=True))
            wanted = self.top_p * mass
            through = values.cumsum(-1)
            if not bool((no_limit & (self.top_p < 1) & (through[:, -1:] < wanted)).any()):
                break
        return values.masked_fill((through - values >= wanted) & (self.top_p < 1), 0.0), ids


def likeliest(scores: Tensor) -> Tensor:
    """The argmax [B] of scores [B, V'], the first of equals: the block with the highest, then the place in it."""
    blocks = scores.unflatten(-1, (-1, BLOCK))  # [B, V' / BLOCK, BLOCK]
    block = blocks.amax(-1).argmax(-1)
    return block * BLOCK + blocks[torch.arange(len(block), device=block.device), block].argmax(-1)


def invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token [B] at which the cumulative sum of the row's weights [B, V'] passes uniform · total, and its log-prob.

    Each search is for less than the last sum: so it ends on a token with a weight, whatever was rounded.
    """
    sums = weights.unflatten(-1, (-1, BLOCK)).sum(-1)  # [B, V' / BLOCK]
    through = rising(sums)
    total = through[:, -1:]
    target = (uniforms[:, None] * total).minimum(torch.nextafter(total, total.new_zeros(())))
    block = torch.searchsorted(through, target, right=True).clamp_max_(sums.shape[1] - 1)  # [B, 1]
    target = target - (through.gather(1, block) - sums.gather(1, block))
    inner = weights.unflatten(-1, (-1, BLOCK))[torch.arange(len(block), device=block.device), block[:, 0]]
    through = rising(inner)  # [B, BLOCK]
    target = target.clamp_min_(0).minimum(torch.nextafter(through[:, -1:], total.new_zeros(())))
    place = torch.searchsorted(through, target, right=True).clamp_max_(BLOCK - 1)
    logps = (inner.gather(1, place) / total).log()
    return (block * BLOCK + place)[:, 0], logps[:, 0]


def rising(weights: Tensor) -> Tensor:
    """The cumulative sums [B, N] of weights ≥ 0, above the one before only where there is a weight: a GPU adds up each
    in an order of its own, so that its sums over zeros differ, and a draw between them took a token that was cut."""
    return weights.cumsum(-1).masked_fill_(weights == 0, 0.0).cummax(-1).values
