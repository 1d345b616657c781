"""Log-probabilities of targets under a linear head, without logits: the one loss primitive.

    z = softcap(hidden @ weight.T) / temperature
    logp = z_y - lse,   lse = log Σ_v exp z_v,   entropy = lse - Σ_v p_v z_v,   hit = (z_y = max_v z_v)

Must spend 2·T·V·E FLOPs forward and 4·T·V·E backward (2 more to make the logits again), and move hidden, weight,
targets and four vectors of T; the T × V logits are never stored. The work is in head.py; what the Triton kernels read
is derived in head_triton.py.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels.backend import Target, require_one_device
from tritium.kernels.head import HeadOptions, check_head, check_targets, head_statistics, vocab_size
from tritium.kernels.head_triton import head_launches
from tritium.kernels.registry import Launch, Shape, register


class LogProb(NamedTuple):
    """Per token, [T]: fp32 (fp64 for fp64 inputs), `hit` bool. `entropy` and `lse` are those of the tempered logits."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    hit: Tensor


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
    ignore_index: int = -100,
) -> LogProb:  # fmt: skip
    z = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))  # [T, V]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    kept = targets != ignore_index
    lse = z.logsumexp(-1)
    z_target = z.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    entropy = lse - (z.softmax(-1) * z).sum(-1)
    return LogProb(torch.where(kept, z_target - lse, 0.0), lse, entropy, kept & (z_target == z.amax(-1)))


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
    ignore_index: int = -100, group: dist.ProcessGroup | None = None,
) -> LogProb:  # fmt: skip
    """Per-token log-probability, log-sum-exp, entropy and hit of `targets`; see the module's formula.

    hidden [T, E] and weight [V, E] of one float dtype, targets [T] int32 or int64, all on one device, any strides.
    At ignored targets logp = 0 and hit = False; what is not differentiated there adds 0 to the gradients, so that
    hidden must be finite there too. Differentiable in logp, lse and entropy, for hidden and weight.
    With `group`, weight holds the rank's V / world_size rows in rank order, targets are global ids, the result is the
    same on every rank, and dhidden is this shard's part of the gradient.
    Targets outside the vocabulary raise on a CPU; on a GPU, where looking would make the host wait, they are ignored
    and counted (`head.invalid_targets`), or stop the program with TRITIUM_DEBUG=1.
    Raises: ValueError for shapes, dtypes or devices that don't fit, and for a temperature or softcap ≤ 0.
    Source: the online log-sum-exp of arXiv 1805.02867; logits that are never stored, arXiv 2411.09009.
    """
    options = HeadOptions(temperature, softcap, expected=True)
    check_head("linear_logprob", hidden=hidden, weight=weight)
    require_one_device(hidden, weight, targets)
    ids = check_targets("linear_logprob", targets, hidden.shape[:1], vocab_size(weight, group), ignore_index)
    s = head_statistics(hidden, weight, ids[:, None], options, group)  # -1 is on no shard
    kept, z_target = ids >= 0, s.picked[:, 0]
    return LogProb(torch.where(kept, z_target - s.lse, 0.0), s.lse, s.lse - s.expected, kept & (z_target >= s.top))


def example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Hidden states, a head and targets, a fifth of them ignored; also for `linear_cross_entropy`."""
    hidden = torch.randn(shape["T"], shape["E"], dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(shape["V"], shape["E"], device=device) / shape["E"] ** 0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, shape["V"], (shape["T"],), device=device)
    targets[1::5] = -100
    options = {name: float(shape[name]) for name in ("temperature", "softcap") if name in shape}
    return (hidden, weight, targets), options


def _launches(target: Target) -> tuple[Launch, ...]:
    return (
        *head_launches(target, "bf16", "EXPECTED"),  # the backward of an entropy bonus; that of logp is the other op's
        *head_launches(target, "bf16", "EXPECTED", "HAS_CAP"),
        *head_launches(target, "fp32", "EXPECTED"),
    )


register(
    name="linear_logprob",
    function=linear_logprob,
    reference=linear_logprob_reference,
    example=example,
    shape={"T": 8192, "E": 4096, "V": 128256},
    flops=lambda s: 2 * s["T"] * s["V"] * s["E"],
    bytes=lambda s, size: size * s["E"] * (s["T"] + s["V"]) + s["T"] * (8 + 3 * 4 + 1),
    backward_flops=lambda s: 6 * s["T"] * s["V"] * s["E"],
    backward_bytes=lambda s, size: 2 * size * s["E"] * (s["T"] + s["V"]) + s["T"] * (8 + 3 * 4),
    launches=_launches,
)
