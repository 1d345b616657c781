"""AdamW, in place, on many tensors or on flat shards of them (Loshchilov & Hutter 2017, arXiv 1711.05101).

    g ← grad_scale · g;   p ← p - lr · weight_decay · p
    m ← β₁ m + (1-β₁) g;   v ← β₂ v + (1-β₂) g²
    p ← p - lr · (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)

Must move p, m, v in and out and g in once: 28 bytes an fp32 element, about 14 FLOPs. step, grad_scale and found_inf are
tensors, so that a step needs no host sync.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.kernels.registry import OpSpec, register

CHUNK = 1 << 18  # elements: the scaled copy of a gradient stays in the cache


def _adamw_reference_one(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step):
    p.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g.square())
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    p.sub_(lr * m_hat / (v_hat.sqrt() + eps))


@torch.no_grad()
def adamw_reference_(
    params, grads, exp_avgs, exp_avg_sqs, *, masters=None, lr, beta1, beta2, eps, weight_decay, step, grad_scale=None,
    found_inf=None,
) -> None:  # fmt: skip
    if found_inf is not None and found_inf != 0:
        return
    for i, p in enumerate(params):
        target = p if masters is None else masters[i]
        g = grads[i].to(target.dtype) * (1 if grad_scale is None else grad_scale)
        _adamw_reference_one(target, g, exp_avgs[i], exp_avg_sqs[i], lr, beta1, beta2, eps, weight_decay, step)
        if masters is not None:
            p.copy_(target)


def _check(params, grads, exp_avgs, exp_avg_sqs, masters) -> None:
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params but {len(tensors)} {name}")
        for i, (p, x) in enumerate(zip(params, tensors, strict=True)):
            if p.shape != x.shape:
                raise ValueError(f"params[{i}] is {tuple(p.shape)} but {name}[{i}] is {tuple(x.shape)}")
    for i, (target, m, v) in enumerate(zip(params if masters is None else masters, exp_avgs, exp_avg_sqs, strict=True)):
        if not target.dtype == m.dtype == v.dtype:
            raise ValueError(
                f"tensor {i}: what is updated ({target.dtype}) and its averages ({m.dtype}, {v.dtype}) must have one "
                "dtype; give fp32 masters for low-precision params"
            )


def _chunks(tensors: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    """The tensors of one parameter, cut alike into pieces for the cache; whole on a GPU or if not contiguous."""
    if tensors[0].is_cuda or not all(x is None or x.is_contiguous() for x in tensors):
        return [tensors]
    flat = [None if x is None else x.view(-1) for x in tensors]
    starts = range(0, tensors[0].numel(), CHUNK)
    return [[None if x is None else x[start : start + CHUNK] for x in flat] for start in starts]


@torch.compiler.disable  # already one fused kernel; tracing its in-place update of views fails in torch 2.13
@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    masters: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step in place; grads are read, never written.

    masters: fp32 tensors that are updated instead of params, which become cast copies of them. step: a scalar tensor,
    1 at the first step. grad_scale: a scalar tensor that multiplies the gradients. found_inf: a scalar tensor; where
    it is not 0, nothing changes. Raises ValueError on lists that don't fit each other.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, masters)
    options = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False)
    step = step.to(torch.float32).reshape(())
    found_inf = None if found_inf is None else (found_inf != 0).to(torch.float32).reshape(())
    for whole in zip(params, grads, exp_avgs, exp_avg_sqs, masters or [None] * len(params), strict=True):
        for p, g, m, v, master in _chunks(whole):
            if p.numel():
                _update(p, g, m, v, master, step, grad_scale, found_inf, options)


def _update(p, g, m, v, master, step, grad_scale, found_inf, options) -> None:
    """One fused update. The kernel's own grad_scale would divide, and write the gradient back: scale a copy."""
    target = p if master is None else master
    g = g if grad_scale is None else g.to(target.dtype) * grad_scale
    # the kernel walks memory, not indices: it needs all four in one dense layout
    inputs = [x.contiguous() for x in (target, g.to(target.dtype), m, v)]
    torch._fused_adamw_(*([x] for x in inputs), [], [step], found_inf=found_inf, **options)
    for x, updated in zip((target, m, v), (inputs[0], *inputs[2:]), strict=True):
        if updated is not x:
            x.copy_(updated)
    if master is not None:
        p.copy_(master if found_inf is None else torch.where(found_inf != 0, p.to(master.dtype), master))


def _example(shape, dtype, device):
    N = shape["N"]
    params, grads = ([torch.randn(n, dtype=dtype, device=device) for n in (N, 15)] for _ in "pg")
    m, v = ([torch.rand_like(p, dtype=torch.promote_types(dtype, torch.float32)) for p in params] for _ in "mv")
    masters = [p.to(torch.promote_types(dtype, torch.float32)) for p in params]
    options = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    scalars = dict(step=torch.tensor(3.0, device=device), grad_scale=torch.tensor(0.5, device=device))
    return (params, grads, m, v), dict(masters=masters, **options, **scalars)


register(
    OpSpec(
        name="adamw_",
        function=adamw_,
        reference=adamw_reference_,
        example=_example,
        shapes=({"N": 1}, {"N": 0}, {"N": 1000}, {"N": 1 << 22}),
        flops=lambda s: 14 * s["N"],
        bytes=lambda s, size: s["N"] * (2 * 12 + 2 * size),
        differentiable=False,
    )
)
