"""What is minimised. Each objective is a few lines of torch over one primitive, `model.logprob`.

An objective has three parts:

    prepare(networks, batches)   before the first backward, no gradient: reference or old log-probs → batch.fields
    outputs(networks, batch)     the forward pass
    loss(outputs, batch)         {term: Term(sum, denominator, coefficient)}, {metric: Metric(sum, denominator)}

A term is a *sum* over the batch and the name of a count in `batch.counts`. The trainer adds the counts up over
micro-batches and data-parallel ranks and minimises Σ coefficient · sum / global count: there is no mean of means.

To add one: write it in the file of its kind, name it in its stage's driver, and hold it to its formula in
tests/core/test_objectives*.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.kernels import segment_sum
from tritium.kernels.linear_logprob import LogProb
from tritium.model.transformer import Transformer


class Term(NamedTuple):
    sum: Tensor  # scalar with a gradient
    denominator: str  # a name in batch.counts
    coefficient: float = 1.0


class Metric(NamedTuple):
    sum: Tensor  # scalar, detached
    denominator: str


Loss = tuple[dict[str, Term], dict[str, Metric]]
Networks = nn.ModuleDict  # "policy", and what else the stage has


class Objective:
    """The protocol; `prepare` may stay empty."""

    frozen_networks: tuple[str, ...] = ()  # frozen networks that `outputs` runs, after the trained ones

    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        """Fill `batch.fields`, without a gradient, with what must be fixed before the parameters move."""

    def outputs(self, networks: Networks, batch: PackedBatch) -> Any:
        """The forward pass; by default the policy's log-probs at the supervised tokens."""
        return supervised_logprob(networks["policy"], batch)

    def loss(self, outputs: Any, batch: PackedBatch) -> Loss:
        raise NotImplementedError

    def unused_networks(self, batch: PackedBatch) -> tuple[str, ...]:
        """The trained networks that `outputs` does not run on a batch of this kind."""
        return ()


def supervised_logprob(model: Transformer, batch: PackedBatch, temperature: float = 1.0) -> LogProb:
    """LogProb of the supervised tokens, [N] each."""
    hidden = model.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
    return model.logprob(hidden, batch.targets, batch.supervised, temperature=temperature)


def sequence_sum(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sum values of the supervised tokens, [N], within each document: [S]."""
    spread = values.new_zeros(len(batch.tokens)).index_copy(0, batch.supervised, values)  # [T]
    return segment_sum(spread, batch.cu_seqlens)[: batch.sequences]


def supervised(values: Tensor, batch: PackedBatch, like: Tensor) -> Tensor:
    """A per-token field [T] at the supervised tokens, [N], in the dtype of `like`."""
    return values.index_select(0, batch.supervised).to(like.dtype)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 − p) of log p ≤ 0; p = 1, where it is not finite and has no gradient, counts as 1 − 10⁻⁶."""
    return (-torch.expm1(logp.clamp(max=-1e-6))).log()


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x)"""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
