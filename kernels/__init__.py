"""The kernel library: one file per op, usable on its own (`from tritium.kernels import attention`).

The public names are loaded when they are first used (PEP 562). To vendor the library, copy this folder to
`tritium/kernels/` beside an empty `tritium/__init__.py`: it imports nothing else of ours.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritium.kernels.adamw import adamw_
    from tritium.kernels.attention import attention, attention_backward
    from tritium.kernels.cross_entropy import cross_entropy
    from tritium.kernels.decode_attention import decode_attention
    from tritium.kernels.gae import gae
    from tritium.kernels.geglu import geglu
    from tritium.kernels.global_norm import global_norm
    from tritium.kernels.linear_cross_entropy import linear_cross_entropy
    from tritium.kernels.linear_kl import TopK, linear_kl
    from tritium.kernels.linear_logprob import LogProb, linear_logprob
    from tritium.kernels.lora_linear import lora_linear
    from tritium.kernels.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
    from tritium.kernels.registry import OpSpec
    from tritium.kernels.rms_norm import rms_norm
    from tritium.kernels.rope import rope
    from tritium.kernels.segment_sum import segment_sum
    from tritium.kernels.swiglu import swiglu

__all__ = [
    "LogProb",
    "NF4Tensor",
    "TopK",
    "adamw_",
    "all_ops",
    "attention",
    "attention_backward",
    "cross_entropy",
    "decode_attention",
    "dequantize_nf4",
    "gae",
    "geglu",
    "global_norm",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "lora_linear",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "segment_sum",
    "swiglu",
]
_ELSEWHERE = {  # the names whose file is called otherwise
    "LogProb": "linear_logprob",
    "NF4Tensor": "nf4",
    "TopK": "linear_kl",
    "adamw_": "adamw",
    "attention_backward": "attention",
    "dequantize_nf4": "nf4",
    "quantize_nf4": "nf4",
}
_FILE_OF = {name: _ELSEWHERE.get(name, name) for name in __all__ if name != "all_ops"}


def all_ops() -> dict[str, "OpSpec"]:
    """Every op by name, after importing the file of each."""
    for file in sorted(set(_FILE_OF.values())):
        import_module(f"{__name__}.{file}")
    return import_module(f"{__name__}.registry").OPS


def __getattr__(name: str) -> Any:
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _FunctionsWin(ModuleType):
    """This package, where `attention` is the function even after `import tritium.kernels.attention`.

    Importing a submodule ends with `setattr(package, "attention", module)`; for a name that the submodule exports the
    export is stored instead. The modules stay reachable by `from tritium.kernels.attention import …`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _FILE_OF:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FunctionsWin
