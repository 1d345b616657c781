"""Weights as a CPU multiplies fastest with them, for generation: laid out once, used at every step.

    rows ≤ NARROW    the model's own dtype: what counts is how many bytes of weights are read. oneDNN's own layout reads
                     them at the speed of memory, where a matmul with [out, in] takes three times as long
    more             fp32, where the CPU multiplies that faster than bf16 (avx512_bf16 without AMX: 160 GFLOP/s a core
                     against 84): the products are the same, their sums are rounded once

Both are made when they are first wanted, stay with the model, and are made again where a weight has changed since. The
ops are those that torch.compile uses on a CPU.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.kernels.backend import fp32_is_faster
from tritium.model.transformer import Transformer

NARROW = 12  # rows; on the CPU above both ways take the same time there
WIDE_BYTES = 4 << 30  # of fp32 weights that are kept beside bf16 ones, at most


class PackedWeights:
    """`linear(x, weight, bias)` is F.linear's, for [rows, in] and the weights of a model; others are F.linear's."""

    def __init__(self, model: Transformer):
        self.own = own_of(model)
        few = 4 * sum(p.numel() for p in self.own.values()) <= WIDE_BYTES
        self.wide = torch.float32 if few and fp32_is_faster(model.dtype) else model.dtype
        self.packs: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}
        self.sums: dict[int, int] = {}  # of what was packed

    @staticmethod
    def of(model: Transformer) -> "PackedWeights | None":
        """Those of this model as its weights are now; None but on a CPU with oneDNN, in a dtype that it has there.

        An optimizer may write where a weight lies without telling its version: the bits are added up, which takes a
        twentieth of the time that packing takes.
        """
        if model.mesh.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return None
        bf16 = model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not (bf16 or model.dtype == torch.float32):
            return None
        packed = _PACKED.get(model)
        if packed is None or packed.own.keys() != own_of(model).keys():  # merged, quantised, or with another adapter
            packed = _PACKED[model] = PackedWeights(model)
        changed = {i for i, total in packed.sums.items() if total != bits(packed.own[i])}
        packed.packs = {key: pack for key, pack in packed.packs.items() if key[0] not in changed}
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.product(x, weight, bias).to(x.dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same, in the dtype that it was multiplied in: fp32 logits are not rounded to be widened again."""
        if id(weight) not in self.own:
            return F.linear(x, weight, bias)
        few = x.shape[0] <= NARROW
        dtype = weight.dtype if few else self.wide
        version, pack = self.packs.get((id(weight), dtype), (None, None))
        if version != weight._version:
            rows = 1 if few else 32  # a hint
            pack = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
            self.packs[id(weight), dtype], self.sums[id(weight)] = (weight._version, pack), bits(weight)
        bias = None if bias is None else bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), pack, bias, "none", [], "")


_PACKED: WeakKeyDictionary[Transformer, PackedWeights] = WeakKeyDictionary()


def own_of(model: Transformer) -> dict[int, Tensor]:
    """Its matrices, by id."""
    return {id(p): p for p in model.parameters() if p.dim() == 2}


def bits(weight: Tensor) -> int:
    """The sum of its bytes, eight at a time where that goes."""
    whole = (weight.storage_offset() | weight.shape[-1]) * weight.element_size() % 8 == 0  # both are multiples
    return int(weight.detach().view(torch.int64 if whole else torch.int16).sum())
