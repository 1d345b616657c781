"""Beam search on the engine's cache: the beams of a prompt share its pages, and each other's as long as they agree."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tritium.model.cache import cache_pages
from tritium.model.generate import Completion, Engine, Running
from tritium.model.sampling import Options
from tritium.model.transformer import Transformer


@dataclass
class Search:
    """The beams of one prompt, the best first, each with the sum of its log-probs; and those that have ended."""

    beams: list[tuple[float, Running]]
    ended: list[tuple[float, Completion]] = field(default_factory=list)


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    beams: int = 4,
    max_tokens: int = 128,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """The best continuation of each prompt that `beams` beams find, by Σ logp / tokens ** length_penalty.

    As in "Google's NMT" (arXiv 1609.08144, section 7) without coverage: of the 2 · beams best continuations, those that
    stop among the first `beams` have ended, and the best others go on, until none of them can be better than the worst
    of `beams` that have ended. Raises: ValueError as `generate`.
    """
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1")
    if not prompts:
        return []
    options = Options(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids)
    longest = min(model.positions, len(model.virtual_ids) + max(map(len, prompts)) + max_tokens)
    engine = Engine(model, cache_pages(2 * beams * len(prompts), longest), max_batch=len(prompts))
    searches = [Search([(0.0, engine.submit(prompt, options, [(0, 0)])[0])]) for prompt in prompts]
    engine.admit()
    while engine.running:
        unread = [s for s in engine.running if len(s.ids) - s.cached > 1]
        rows, logits = engine.prefill(unread) if unread else engine.decode()
        logps = dict(zip(rows, logits.float().log_softmax(-1), strict=True))  # [V] each
        for search in [s for s in searches if s.beams and s.beams[0][1] in logps]:
            advance(engine, search, logps, beams, length_penalty)
    return [max(search.ended, key=lambda found: found[0])[1] for search in searches]


def advance(engine: Engine, search: Search, logps: dict[Running, Tensor], beams: int, length_penalty: float) -> None:
    """One token more for the beams of a search: some end, some are dropped, some become several."""
    table = torch.stack([logps[sequence] for _, sequence in search.beams])  # [beams, V]
    scores = table + torch.tensor([[score] for score, _ in search.beams], device=table.device)
    best = scores.flatten().topk(min(2 * beams, scores.numel()))
    going: list[tuple[float, Running, int, float]] = []
    for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        row, token = divmod(place, table.shape[1])
        parent, logp = search.beams[row][1], float(table[row, token])
        reason = reason_to_end(engine, parent, token)
        if not reason and len(going) < beams:
            going.append((score, parent, token, logp))
        elif reason and rank < beams:
            ended = extended(parent.completion, token, logp, reason)
            search.ended.append((score / len(ended.tokens) ** length_penalty, ended))
    search.ended = sorted(search.ended, key=lambda found: -found[0])[:beams]
    tokens = len(search.beams[0][1].completion.tokens) + 1
    if len(search.ended) == beams and going and going[0][0] / tokens**length_penalty <= search.ended[-1][0]:
        going = []
    descend(engine, search, going)


def reason_to_end(engine: Engine, parent: Running, token: int) -> str:
    if token in parent.stop_ids:
        return "stop"
    if len(parent.completion.tokens) + 1 >= parent.options.max_tokens:
        return "length"
    return "context" if len(parent.ids) + 1 >= engine.capacity else ""


def extended(completion: Completion, token: int, logp: float, reason: str = "") -> Completion:
    return Completion(
        [*completion.tokens, token], [*completion.logps, logp], reason, [*completion.sampled_logps, 0.0],
        [*completion.weights, 1.0],
    )  # fmt: skip


def descend(engine: Engine, search: Search, going: list[tuple[float, Running, int, float]]) -> None:
    """Let `going` take the beams' place: with their parents' full pages, and copies of those that are being filled."""
    old, search.beams = [sequence for _, sequence in search.beams], []
    for score, parent, token, logp in going:
        full, rest = divmod(parent.cached, engine.cache.page)
        pages = engine.cache.share(parent.pages[:full])
        if rest:
            pages += engine.cache.take(1)
            engine.cache.copy(parent.pages[full : full + 1], pages[full:])
        completion = extended(parent.completion, token, logp)
        child = replace(parent, ids=[*parent.ids, token], pages=pages, completion=completion)
        search.beams.append((score, child))
    for sequence in old:
        engine.release(sequence)
    engine.running += [sequence for _, sequence in search.beams]
