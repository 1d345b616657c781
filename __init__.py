"""Tritium: a small, readable LLM trainer built around hand-written Triton kernels.

Importing it runs nothing: the names below are loaded when they are first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritium.core.tokenizer import Tokenizer
    from tritium.model.generate import generate
    from tritium.model.hf import load

__version__ = "0.1.0"
__all__ = ["Tokenizer", "generate", "load"]

_LAZY = {"Tokenizer": "tritium.core.tokenizer", "generate": "tritium.model.generate", "load": "tritium.model.hf"}
PACKAGES = ("bench", "core", "kernels", "model", "parallel", "stages")


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in PACKAGES:
        return import_module(f"tritium.{name}")
    raise AttributeError(f"module 'tritium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *PACKAGES])
