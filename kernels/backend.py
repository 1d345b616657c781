"""Which implementation of an op runs, and the one import of Triton.

`TRITIUM_BACKEND=auto|triton|torch`: auto is Triton for tensors on a GPU and torch for tensors on a CPU. `triton` on
CPU tensors needs Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported). An op that has no Triton
kernel yet runs its torch path under every setting; `tritium doctor` says which op uses what, and why.

Files with kernels write `from tritium.kernels.backend import tl, triton`: where triton is not installed (it exists on
Linux only) the two names are stand-ins, with which kernels can be defined but not launched.
"""

import os
from importlib.util import find_spec

import torch

CHOICES = ("auto", "triton", "torch")
HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:

    class triton:
        jit = staticmethod(lambda fn: fn)

    class tl:
        constexpr = None


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op with a Triton kernel should launch it for `x`. Called outside the registered op.

    Raises: ValueError for an unknown TRITIUM_BACKEND; RuntimeError if Triton is asked for and can't run on `x`.
    """
    choice = os.environ.get("TRITIUM_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"TRITIUM_BACKEND={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and not (HAS_TRITON and x.is_cuda)):
        return False
    if not HAS_TRITON:
        raise RuntimeError("TRITIUM_BACKEND=triton, but triton is not installed: pip install triton, or unset it")
    if x.device.type == "cpu":
        from tritium.kernels import interpreter

        interpreter.require()
    return True
