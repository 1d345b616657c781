"""Models made of models: deeper, with another vocabulary, or averaged. On one process, on whole weights."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.model.transformer import Transformer

EPSILON = 1e-12


@torch.no_grad()
def layer_similarities(model: Transformer, tokens: Tensor, cu_seqlens: Tensor | None = None, span: int = 1) -> Tensor:
    """The mean cosine similarity between what enters layer i and what leaves layer i + span - 1: [L - span + 1].

    Where it is high, `span` layers change little: those are the ones to duplicate (or to drop; arXiv 2403.17887).
    """
    states: list[Tensor] = []

    def note(module, inputs, outputs=None):
        x, residual = outputs or inputs[:2]
        states.append((x if residual is None else x + residual).float())  # the residual stream, [T, E]

    hooks = [layer.register_forward_pre_hook(note) for layer in model.layers[:1]]
    hooks += [layer.register_forward_hook(note) for layer in model.layers]
    try:
        model.hidden(tokens, cu_seqlens)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(states[:-span], states[span:], strict=True)
    return torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])


@torch.no_grad()
def with_layers(model: Transformer, order: Sequence[int]) -> Transformer:
    """A model of copies of the layers `order` names, in that order, and all the rest as it is.

    Depth up-scaling (SOLAR, arXiv 2312.15166) of 32 layers to 48: [*range(24), *range(8, 32)].
    Raises: ValueError for a layer that is not there.
    """
    config = model.config
    if not order or not all(0 <= i < config.num_layers for i in order):
        raise ValueError(f"layers {list(order)} of a model whose layers are 0 to {config.num_layers - 1}")
    windows = tuple(config.windows[i] for i in order) if config.windows else ()
    made = Transformer(replace(config, num_layers=len(order), windows=windows), model.mesh, model.dtype)
    for name, p in made.named_parameters():
        if name.startswith("layers."):
            _, place, rest = name.split(".", 2)
            name = f"layers.{order[int(place)]}.{rest}"
        p.copy_(model.get_parameter(name))
    return made


@torch.no_grad()
def with_wider_mlps(model: Transformer, times: int) -> Transformer:
    """A model whose MLPs are `times` as wide, and that computes the same (Net2WiderNet, arXiv 1511.05641, eq. 2).

    Each unit is there `times` times, and what it adds is shared among its copies unevenly: equal ones would have equal
    gradients, and stay equal. On one process.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    wider = replace(config, intermediate_size=times * config.intermediate_size)
    made = Transformer(wider, model.mesh, model.dtype)
    for name, p in made.named_parameters():
        old = model.get_parameter(name)
        if name.endswith("gate_up"):
            old = torch.cat([half.repeat(times, 1) for half in old.chunk(2)])  # [2 · times · F, E]
        elif name.endswith("mlp.down"):
            shares = torch.rand(times, config.intermediate_size, generator=generator).add_(0.5)  # [times, F]
            old = old.repeat(1, times) * (shares / shares.sum(0)).flatten().to(old)
        p.copy_(old)
    return made


@torch.no_grad()
def with_vocabulary(model: Transformer, rows: Sequence[int], new: int = 0) -> Transformer:
    """A model whose token i is `rows[i]` of this one's, and `new` more tokens after them, each the mean of the others.

    Special tokens move along; one that is gone is None. Raises: ValueError for a row that is not there.
    """
    config, place = model.config, {row: i for i, row in enumerate(rows)}
    if odd := [row for row in rows if not 0 <= row < config.vocab_size]:
        raise ValueError(f"row {odd[0]} of a vocabulary of {config.vocab_size}")
    special = {"bos_id": place.get(config.bos_id), "eos_id": place.get(config.eos_id)}
    special["more_eos_ids"] = tuple(place[i] for i in config.more_eos_ids if i in place)
    made = Transformer(replace(config, vocab_size=len(rows) + new, **special), model.mesh, model.dtype)
    for name, p in made.named_parameters():
        old = model.get_parameter(name)
        if name in ("embedding", "head"):
            kept = old[torch.as_tensor(rows, device=old.device)]
            old = torch.cat([kept, kept.float().mean(0, keepdim=True).to(old.dtype).expand(new, -1)])
        p.copy_(old)
    return made


@torch.no_grad()
def averaged(
    models: Sequence[Transformer], weights: Sequence[float], fishers: Sequence[dict[str, Tensor]] = ()
) -> Transformer:
    """Σ w_i θ_i / Σ w_i, in place in the first model; w_i may be multiplied by a Fisher information per parameter
    (arXiv 2111.09832, eq. 4). Raises: ValueError for models of different shapes, or weights that add up to nothing.
    """
    first = models[0]
    if len(weights) != len(models) or not sum(weights) > 0:
        raise ValueError(f"weights {list(weights)} for {len(models)} models: one each, with a positive sum")
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    if odd := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(f"model {odd[0]} has other parameters than model 0")
    for name, p in first.named_parameters():
        total, scale = torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)
        for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
            importance = weight * (fishers[i][name] + EPSILON if fishers else torch.ones_like(scale))
            total += importance * model.get_parameter(name).float()
            scale += importance
        p.copy_(total / scale)
    return first


def ema_weights(count: int, decay: float) -> list[float]:
    """An exponential moving average over `count` checkpoints, the newest last: it begins with the first of them.

    Raises: ValueError for a decay outside of [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema={decay} must be at least 0 and below 1")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def fisher(model: Transformer, documents: Iterable[Tensor]) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: E[(∂ log p(document) / ∂θ)²], fp32, by parameter."""
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    count = 0
    for tokens in documents:
        targets = F.pad(tokens[1:], (0, 1), value=-100)
        logp = model.logprob(model.hidden(tokens), targets).logp.sum()
        gradients = torch.autograd.grad(logp, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
            found[name] += g.float().square()
        count += 1
    return {name: value / max(count, 1) for name, value in found.items()}
