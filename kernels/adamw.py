"""AdamW, in place, on many tensors or on flat shards of them (Loshchilov & Hutter 2017, arXiv 1711.05101).

    g ← grad_scale · g;   p ← p - lr · weight_decay · p
    m ← β₁ m + (1-β₁) g;   v ← β₂ v + (1-β₂) g²
    p ← p - lr · (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)

With fp32 masters, the update is applied to them, and p becomes their cast copy. Without, bf16 p can be rounded
stochastically (up or down, unbiased) with Philox4x32-10 (Salmon et al. 2011), which gives the same bits on every
backend, from

    key = seed,   counter = (element // 4, place of the tensor in the list, step)

Minimum traffic: m, v and p (or its master) in and out, g in, and with masters p out: 28 bytes per fp32 element, for
about 14 FLOPs. The table of `multi_tensor.py` adds 8 · (4 + K + log₂ N) bytes per program of 2048 elements. step,
grad_scale, found_inf, seed and optionally lr are tensors, so that a step needs no host sync.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.kernels.backend import Target, graph_break, operator, require_one_device, target_of, tl, triton, use_triton
from tritium.kernels.blocks import require_float
from tritium.kernels.multi_tensor import find_block, groups, in_memory_order, load_pointer
from tritium.kernels.registry import Launch, Shape, launch_of, register


def _adamw_reference_one(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step):
    p.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g.square())
    step = step.double()  # in fp32 1 - β₂ᵗ has few digits left
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


# Triton ---------------------------------------------------------------------------------------------------------------
@triton.jit
def _one_minus_power(log_beta, t):
    """1 - βᵗ = -expm1(t ln β), by its series where it is small: for β near 1 the difference would lose all digits."""
    x = t * log_beta
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(x > -0.3, -x * series, 1 - tl.exp(x))


@triton.jit
def _round_stochastically(b, seed, step, i_place, i_start, BLOCK: tl.constexpr):
    """fp32 b [BLOCK] (elements from i_start, int64, on) as bf16, by adding 16 random bits below bf16's last bit."""
    i_four = i_start // 4 + tl.arange(0, BLOCK // 4)  # a counter gives four numbers of 32 bits
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    place, step = zero + i_place.to(tl.uint32), zero + step.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, i_four.to(tl.uint32), (i_four >> 32).to(tl.uint32), place, step)
    b_random = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK)  # r0 r1 r2 r3, r0 …
    b_bits = (b.to(tl.uint32, bitcast=True) + (b_random & 0xFFFF)) & 0xFFFF0000
    # The hardware's NaN is all ones: the addition would carry it over into a zero.
    return tl.where(b == b, b_bits.to(tl.float32, bitcast=True), b).to(tl.bfloat16)


@triton.jit
def _update(pointers, rates, i_start, m, seed, step, i_place, MASTER: tl.constexpr, BLOCK: tl.constexpr):
    """The formulas above for the elements from i_start on. The mask m and the seed may be None."""
    p_param, p_grad, p_avg, p_square, p_target = pointers
    scale, decay, step_size, root, beta1, beta2, rest1, rest2, eps = rates
    i = i_start + tl.arange(0, BLOCK)
    b_g = tl.load(p_grad + i, mask=m).to(tl.float32) * scale  # [BLOCK], as all below
    b_p = tl.load(p_target + i, mask=m).to(tl.float32)
    b_avg = beta1 * tl.load(p_avg + i, mask=m).to(tl.float32) + rest1 * b_g
    b_square = beta2 * tl.load(p_square + i, mask=m).to(tl.float32) + rest2 * b_g * b_g
    b_p = b_p - decay * b_p - step_size * b_avg / (tl.sqrt(b_square) * root + eps)
    tl.store(p_avg + i, b_avg.to(p_avg.dtype.element_ty), mask=m)
    tl.store(p_square + i, b_square.to(p_square.dtype.element_ty), mask=m)
    if MASTER is not None:
        tl.store(p_target + i, b_p.to(p_target.dtype.element_ty), mask=m)
    if seed is not None:
        b_p = _round_stochastically(b_p, seed, step, i_place, i_start, BLOCK)
    tl.store(p_param + i, b_p.to(p_param.dtype.element_ty), mask=m)


@triton.jit
def _adamw(
    p_table, p_lr, p_step, p_grad_scale, p_found_inf, p_seed, N,
    lr, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, AVERAGE: tl.constexpr, MASTER: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one of N tensors in place; rest = 1 - β. Scalars that are not given are None. Grid: (programs,)."""
    if p_found_inf is not None:  # noqa: SIM102 - in one condition, Triton would compile the load of None
        if tl.load(p_found_inf) != 0:
            return
    i_tensor, i_block = find_block(p_table, N)
    n, i_place = tl.load(p_table + N + i_tensor), tl.load(p_table + 2 * N + i_tensor)
    p_param = load_pointer(p_table, i_tensor, N, 0, PARAM, ALIGNED)
    p_grad = load_pointer(p_table, i_tensor, N, 1, GRAD, ALIGNED)
    p_avg = load_pointer(p_table, i_tensor, N, 2, AVERAGE, ALIGNED)
    p_square = load_pointer(p_table, i_tensor, N, 3, AVERAGE, ALIGNED)
    p_target = load_pointer(p_table, i_tensor, N, 4, MASTER, ALIGNED) if MASTER is not None else p_param

    step = tl.load(p_step)
    t = step.to(tl.float32)
    lr = tl.load(p_lr).to(tl.float32) if p_lr is not None else lr
    scale = tl.load(p_grad_scale).to(tl.float32) if p_grad_scale is not None else 1.0
    seed = tl.load(p_seed) if p_seed is not None else None
    step_size = lr / _one_minus_power(log_beta1, t)
    root = 1 / tl.sqrt(_one_minus_power(log_beta2, t))
    pointers = (p_param, p_grad, p_avg, p_square, p_target)
    rates = (scale, lr * weight_decay, step_size, root, beta1, beta2, rest1, rest2, eps)
    i_start = i_block * BLOCK
    if i_start + BLOCK <= n:  # without a mask, whose end may lie anywhere, loads are 16 bytes wide
        _update(pointers, rates, i_start, None, seed, step, i_place, MASTER, BLOCK)
    else:
        m = i_start + tl.arange(0, BLOCK) < n
        _update(pointers, rates, i_start, m, seed, step, i_place, MASTER, BLOCK)


def _config(target: Target) -> dict:
    """4 elements per thread: with 8, a thread takes 120 registers, and an SM holds 16 warps instead of 48."""
    return {"BLOCK": 2048, "num_warps": 512 // target.warp_size}


def _nothing(*arguments):
    return None


@operator("adamw_", _nothing, ("params", "exp_avgs", "exp_avg_sqs", "masters"))
def _launch(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    masters: list[Tensor], lr_tensor: Tensor | None, step: Tensor, grad_scale: Tensor | None,
    found_inf: Tensor | None, seed: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """`masters` may be empty, the other tensors None; `lr_tensor` takes precedence over `lr`."""
    config = _config(target_of(step.device))
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"masters": masters} if masters else {}
    views = [in_memory_order(tensors) for tensors in zip(*lists.values(), strict=True)]  # of each parameter's tensors
    dense = [[x.contiguous() for x in tensors] for tensors in views]
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    for group in groups(dict(zip(lists, zip(*dense, strict=True), strict=True)), config["BLOCK"]):
        dtypes = group.dtypes
        is_random = seed is not None and dtypes["params"] == tl.bfloat16
        _adamw[(group.programs,)](
            group.table, lr_tensor, step, grad_scale, found_inf, seed if is_random else None, group.table.shape[1],
            lr, beta1, beta2, 1 - beta1, 1 - beta2, *logs, eps, weight_decay,
            dtypes["params"], dtypes["grads"], dtypes["exp_avgs"], dtypes.get("masters"), group.aligned, **config,
        )  # fmt: skip
    _copy_back(views, dense)


def _copy_back(views, dense) -> None:
    """Copy back what was updated in a contiguous copy; each parameter's second tensor is its gradient, read only."""
    for tensors, copies in zip(views, dense, strict=True):
        for i, (x, copy) in enumerate(zip(tensors, copies, strict=True)):
            if copy is not x and i != 1:
                x.copy_(copy)


# Torch ----------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 18  # elements: the scaled copy of a gradient stays in the cache


def _philox(counter: Sequence[Tensor], seed: Tensor) -> Tensor:
    """[n, 4] 32-bit numbers (as int64) from four 32-bit counters [n] or []: `tl.philox` in torch."""
    low = 0xFFFFFFFF  # 64-bit products wrap around: mask off the sign that the shift copies into the upper half
    c0, c1, c2, c3 = counter
    for i in range(10):
        key0, key1 = (seed + i * 0x9E3779B9) & low, ((seed >> 32) + i * 0xBB67AE85) & low
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ key0, b & low, (a >> 32 & low) ^ c3 ^ key1, a & low
    return torch.stack([c0, c1, c2, c3], -1)


def _round_stochastically_torch(x: Tensor, seed: Tensor, step: Tensor, place: int, start: int) -> Tensor:
    """x [n] fp32 as bf16, with the bits of `_round_stochastically`."""
    i_four = torch.arange(start // 4, (start + len(x) + 3) // 4, device=x.device)
    counter = (i_four & 0xFFFFFFFF, i_four >> 32, torch.full_like(i_four, place), step.long().expand_as(i_four))
    random = _philox(counter, seed.reshape(())).flatten()[: len(x)] & 0xFFFF
    bits = (x.view(torch.int32) + random.int()) & ~0xFFFF
    return torch.where(x.isnan(), x, bits.view(torch.float32)).bfloat16()


@graph_break  # already one fused kernel; tracing its in-place update of views fails in torch 2.13
def _torch_adamw_(lists, step, grad_scale, found_inf, seed, options) -> None:
    step = step.to(torch.float32).reshape(())
    found_inf = None if found_inf is None else (found_inf != 0).to(torch.float32).reshape(())
    grad_scale = None if grad_scale is None else grad_scale.reshape(())
    for place, tensors in enumerate(zip(*lists, strict=True)):
        views = in_memory_order(tensors)
        dense = [x.contiguous() for x in views]
        flat = [x.view(-1) for x in dense]
        N = flat[0].numel()
        size = max(N, 1) if flat[0].is_cuda else CHUNK
        for start in range(0, N, size):
            chunk = [x[start : start + size] for x in flat]
            is_random = seed is not None and flat[0].dtype == torch.bfloat16
            noise = (seed, step, place, start) if is_random else None
            _update_torch(*chunk, step=step, grad_scale=grad_scale, found_inf=found_inf, noise=noise, options=options)
        _copy_back([views], [dense])


def _update_torch(p, g, m, v, master=None, *, step, grad_scale, found_inf, noise, options) -> None:
    """One fused update. torch's own grad_scale divides, and overwrites the gradient: scale a copy instead."""
    target = p if master is None else master
    compute = target.dtype if noise is None else torch.float32
    g = g.to(compute) if grad_scale is None else g.to(compute) * grad_scale
    wide = [x.to(compute) for x in (target, m, v)]
    inputs = [[x] for x in (wide[0], g, *wide[1:])]
    torch._fused_adamw_(*inputs, [], [step], found_inf=found_inf, amsgrad=False, maximize=False, **options)
    if noise is not None:
        wide[0] = _round_stochastically_torch(wide[0], *noise)
    for x, updated in zip((target, m, v), wide, strict=True):
        if updated is not x:
            x.copy_(updated)
    if master is not None:
        p.copy_(master if found_inf is None else torch.where(found_inf != 0, p.to(master.dtype), master))


# Public ---------------------------------------------------------------------------------------------------------------
def _check_distinct(updated: dict[str, Sequence[Tensor]]) -> None:
    places = {}
    for name, i, x in ((name, i, x) for name, tensors in updated.items() for i, x in enumerate(tensors) if x.numel()):
        place, address = f"{name}[{i}]", (x.device, x.data_ptr())
        if places.setdefault(address, place) != place and not x.is_meta:
            raise ValueError(f"adamw_: {places[address]} and {place} are the same tensor: list each tensor once")


def _check(params, grads, exp_avgs, exp_avg_sqs, masters, scalars) -> None:
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params but {len(tensors)} {name}")
        for i, (p, x) in enumerate(zip(params, tensors, strict=True)):
            require_float("adamw_", **{f"{name}[{i}]": x})
            if p.shape != x.shape:
                raise ValueError(f"params[{i}] is {tuple(p.shape)} but {name}[{i}] is {tuple(x.shape)}")
    if not torch.compiler.is_compiling():
        _check_distinct({name: tensors for name, tensors in lists.items() if name != "grads" and tensors is not None})
    is_random = scalars["seed"] is not None
    if is_random and masters is not None:
        raise ValueError("a seed is for params without masters: cast copies of fp32 masters are rounded to nearest")
    for i, (target, m, v) in enumerate(zip(params if masters is None else masters, exp_avgs, exp_avg_sqs, strict=True)):
        wide = is_random and target.dtype == torch.bfloat16 and m.dtype == v.dtype == torch.float32
        if not wide and not target.dtype == m.dtype == v.dtype:
            raise ValueError(
                f"tensor {i}: what is updated ({target.dtype}) and its averages ({m.dtype}, {v.dtype}) must have one "
                "dtype; give fp32 masters for low-precision params, or a seed for bf16 ones"
            )
    for name, scalar in scalars.items():
        if scalar is not None and not (isinstance(scalar, Tensor) and scalar.numel() == 1):
            raise ValueError(f"{name} is {tuple(getattr(scalar, 'shape', ())) or scalar}, wanted a scalar tensor ()")
    if is_random and scalars["seed"].dtype != torch.int64:
        raise ValueError(f"seed is {scalars['seed'].dtype}, wanted torch.int64")


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *,
    masters: Sequence[Tensor] | None = None, lr: float | Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, step: Tensor, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:  # fmt: skip
    """One AdamW step in place; grads are read, never written.

    masters: fp32 tensors that are updated instead of params, which become their cast copies. step, grad_scale,
    found_inf and seed are scalar tensors. step counts from 1; gradients are multiplied by grad_scale; if found_inf is
    not 0, nothing changes. With a seed (int64), bf16 params without masters are rounded stochastically, and may have
    fp32 averages; the same seed, step and list give the same bits. Under torch.compile the kernel is one operator of
    the graph; the torch path breaks the graph.
    Raises: ValueError for lists that don't fit each other, and for a tensor that is listed twice.
    """
    lr_tensor = lr if isinstance(lr, Tensor) else None
    scalars = {"step": step, "grad_scale": grad_scale, "found_inf": found_inf, "seed": seed, "lr": lr_tensor}
    _check(params, grads, exp_avgs, exp_avg_sqs, masters, scalars)
    if not len(params):
        return
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, masters or [])]
    tensors = [x for kind in lists for x in kind]
    require_one_device(params[0], *scalars.values())
    if use_triton(*tensors):
        value = 0.0 if lr_tensor is not None else lr
        _launch(*lists, lr_tensor, step, grad_scale, found_inf, seed, value, beta1, beta2, eps, weight_decay)
    else:
        options = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        _torch_adamw_([kind for kind in lists if kind], step, grad_scale, found_inf, seed, options)


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    N = shape["N"]
    params, grads = ([torch.randn(n, dtype=dtype, device=device) for n in (N, 15)] for _ in "pg")
    target = torch.promote_types(dtype, torch.float32) if shape.get("masters", 1) else dtype
    m, v = ([torch.rand_like(p, dtype=target) for p in params] for _ in "mv")
    masters = [p.to(target, copy=True) for p in params] if shape.get("masters", 1) else None
    options = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    scalars = dict(step=torch.tensor(3.0, device=device), grad_scale=torch.tensor(0.5, device=device))
    return (params, grads, m, v), dict(masters=masters, **options, **scalars)


def _bytes(shape: Shape, itemsize: int) -> int:
    return shape["N"] * (2 * 12 + 2 * itemsize if shape.get("masters", 1) else 7 * itemsize)


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(name, absent, param, grad, average, master):
        config = {"PARAM": param, "GRAD": grad, "AVERAGE": average, "MASTER": master, "ALIGNED": True}
        config |= _config(target) | dict.fromkeys(absent)
        return launch_of(_adamw, name, config, {"p_table": "*i64", "p_seed": "*i64"}, ("N",))

    bf16, fp32 = tl.bfloat16, tl.float32
    return (
        launch("bf16, fp32 masters", ("p_lr", "p_seed"), bf16, fp32, fp32, fp32),
        launch("fp32, lr a tensor", ("p_seed",), fp32, fp32, fp32, None),
        launch("bf16, stochastic", ("p_lr", "p_grad_scale", "p_found_inf"), bf16, bf16, fp32, None),
    )


register(
    name="adamw_",
    function=adamw_,
    reference=adamw_reference_,
    example=_example,
    shape={"N": 1 << 27},
    flops=lambda s: 14 * s["N"],
    bytes=_bytes,
    launches=_launches,
    differentiable=False,
)
