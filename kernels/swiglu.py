"""y = silu(gate) · up,   silu(x) = x · σ(x)

gate, up [..., F], or one gate_up [..., 2F]; about 5 FLOPs an element, three elements moved forward, five backward.
(Shazeer 2020, arXiv 2002.05202)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.gated import gated, gated_costs, gated_example, gated_launches
from tritium.kernels.registry import register


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    dtype = gate.dtype
    gate, up = (x.to(torch.promote_types(dtype, torch.float32)) for x in (gate, up))
    return (F.silu(gate) * up).to(dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up [..., F] in the inputs' dtype; with one argument, gate_up [..., 2F] = [gate | up].

    Raises ValueError on shapes or dtypes that differ, and on an odd width of the fused form.
    """
    return gated(gate, up, gelu=False)


register(
    name="swiglu",
    function=swiglu,
    reference=swiglu_reference,
    example=gated_example,
    launches=lambda target: gated_launches(gelu=False),
    **gated_costs(flops=5),
)
