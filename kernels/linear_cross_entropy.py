"""Cross-entropy of a linear head without its logits.

    Σ_t w_t [(1-ε)(lse - z_y) + ε (lse - mean_v z) + ζ lse²],   z = softcap(hidden @ weight.T)

Must spend 2·T·V·E FLOPs forward and 4·T·V·E backward (2 more to make the logits again), and move hidden, weight and
a few vectors of T. The statistics come from head.py, the formula from cross_entropy.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels.cross_entropy import check_loss_options, cross_entropy_reference, token_loss
from tritium.kernels.head import HeadOptions, check_head, check_targets, head_statistics, vocab_size
from tritium.kernels.registry import OpSpec, register


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    return cross_entropy_reference(hidden @ weight.t(), targets, **options)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weighted cross-entropy of hidden [T, E] @ weight [V, E].T and targets [T]; fp32 (fp64 for fp64 inputs).

    A scalar with reduction="sum", [T] with "none"; weights [T] multiply each token's loss; ignored targets give 0,
    loss and gradient. `group` as in `linear_logprob`: the weight is a shard of the vocabulary.
    Raises ValueError on shapes that don't fit, unknown reductions and (on a CPU) targets outside the vocabulary.
    """
    vocab = vocab_size(weight, group)
    check_head(hidden, weight)
    check_targets(targets, hidden.shape[0], vocab, ignore_index)
    check_loss_options(hidden.shape[0], weights, label_smoothing, softcap, reduction)
    kept = targets != ignore_index
    ids = torch.where(kept, targets, 0).long()[:, None]
    options = HeadOptions(softcap=softcap, total=label_smoothing > 0)
    lse, picked, _, total, _ = head_statistics(hidden, weight, ids, options, group)
    return token_loss(
        lse,
        picked[:, 0],
        total,
        kept,
        vocab=vocab,
        weights=weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
    )


def _example(shape, dtype, device):
    hidden = torch.randn(shape["T"], shape["E"], dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(shape["V"], shape["E"], device=device) / shape["E"] ** 0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, shape["V"], (shape["T"],), device=device)
    targets[::5] = -100
    options = dict(weights=torch.rand(shape["T"], device=device), label_smoothing=0.1, z_loss=1e-3)
    return (hidden, weight, targets), options


register(
    OpSpec(
        name="linear_cross_entropy",
        function=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        example=_example,
        shapes=(
            {"T": 1, "E": 8, "V": 2},
            {"T": 13, "E": 24, "V": 101},
            {"T": 0, "E": 8, "V": 5},
            {"T": 4096, "E": 256, "V": 8192},
        ),
        flops=lambda s: 2 * s["T"] * s["V"] * s["E"],
        bytes=lambda s, size: size * s["E"] * (s["T"] + s["V"]) + s["T"] * (8 + 4),
    )
)
