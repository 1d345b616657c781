"""The kernel library: one file per op, usable on its own (`from tritium.kernels import attention`).

An op's name here is its function, also after `import tritium.kernels.attention`; the file is reached by
`from tritium.kernels.attention import …`. To vendor the library, copy this folder to `tritium/kernels/` beside an empty
`tritium/__init__.py`: it imports nothing else of ours.
"""

from tritium.kernels.adamw import adamw_
from tritium.kernels.attention import attention, attention_backward
from tritium.kernels.cross_entropy import cross_entropy
from tritium.kernels.decode_attention import decode_attention
from tritium.kernels.divergence import TopK
from tritium.kernels.gae import gae
from tritium.kernels.geglu import geglu
from tritium.kernels.global_norm import global_norm
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.kernels.linear_kl import linear_kl
from tritium.kernels.linear_logprob import LogProb, linear_logprob
from tritium.kernels.lora_linear import lora_linear
from tritium.kernels.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from tritium.kernels.registry import OPS, OpSpec
from tritium.kernels.rms_norm import rms_norm
from tritium.kernels.rope import rope
from tritium.kernels.segment_sum import segment_sum
from tritium.kernels.swiglu import swiglu


def all_ops() -> dict[str, OpSpec]:
    """Every op by name."""
    return OPS
