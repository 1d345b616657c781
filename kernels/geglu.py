"""y = gelu(gate) · up,   gelu(x) = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))

gate, up [..., F], or one gate_up [..., 2F]; about 10 FLOPs an element, three elements moved forward, five backward.
(Shazeer 2020, arXiv 2002.05202, with the tanh form of Gemma)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.gated import gated, gated_costs, gated_example, gated_launches
from tritium.kernels.registry import register


def geglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    dtype = gate.dtype
    gate, up = (x.to(torch.promote_types(dtype, torch.float32)) for x in (gate, up))
    return (F.gelu(gate, approximate="tanh") * up).to(dtype)


def geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """gelu(gate) · up [..., F] in the inputs' dtype; with one argument, gate_up [..., 2F] = [gate | up].

    Raises ValueError on shapes or dtypes that differ, and on an odd width of the fused form.
    """
    return gated(gate, up, gelu=True)


register(
    name="geglu",
    function=geglu,
    reference=geglu_reference,
    example=gated_example,
    launches=lambda target: gated_launches(gelu=True),
    **gated_costs(flops=10),
)
