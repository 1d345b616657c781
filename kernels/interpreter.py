"""Triton's interpreter with the numbers of the hardware: what `TRITIUM_BACKEND=triton` on a CPU needs.

The interpreter of triton 3.6.0 and 3.7.1 computes arithmetic and `tl.dot` on the raw bits of bf16, and truncates where
the hardware rounds fp32 to bf16. `correct_numerics()` mends both, for the whole process. The checks that the tests make
of addresses, traffic and the order of programs are built on top of it, in tests/interpreter.py.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

KNOWN_VERSIONS = "3.6.0 and 3.7.1"
_FCMP = [f"create_fcmp{order}{name}" for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE")]
_BINARY = ["fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "fma", "clampf"]
_BINARY += ["minimumf", "minnumf", "maximumf", "maxnumf"]
_UNARY = ["exp", "exp2", "log", "log2", "sin", "cos", "erf", "sqrt", "precise_sqrt", "rsqrt", "floor", "ceil"]
_FLOAT_OPS = (*_FCMP, *(f"create_{name}" for name in (*_BINARY, *_UNARY)))


@functools.cache
def internals() -> SimpleNamespace:
    """The parts of Triton's interpreter that are wrapped below. RuntimeError, with their names, where some are gone."""
    import triton
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    wanted = [(builder, name) for name in (*_FLOAT_OPS, "cast_impl", "create_fp_to_fp", "create_dot")]
    wanted += [(interpreter, name) for name in ("TensorHandle", "_patch_lang_tensor", "_get_np_dtype")]
    missing = [name for owner, name in wanted if not hasattr(owner, name)]
    if not missing and interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        missing = ["bf16 as raw bits in uint16"]
    if missing:
        raise RuntimeError(
            f"triton {triton.__version__}'s interpreter lacks {', '.join(missing)}; tritium knows that of triton "
            f"{KNOWN_VERSIONS}: install one of these, or adapt tritium/kernels/interpreter.py"
        )
    names = {"triton": triton, "tl": tl, "ir": ir, "interpreter": interpreter}
    return SimpleNamespace(**names, Builder=builder, Handle=interpreter.TensorHandle)


@torch.compiler.assume_constant_result
def require() -> None:
    """Make sure that kernels can be launched on CPU tensors, with right numbers.

    Raises: RuntimeError if `TRITON_INTERPRET=1` is not in effect.
    """
    if not internals().triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITIUM_BACKEND=triton with a tensor on the CPU: set TRITON_INTERPRET=1 before triton is imported, "
            "move the tensor to a GPU, or use TRITIUM_BACKEND=auto"
        )
    correct_numerics()


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as every GPU does; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widened(x: Any) -> Any:
    """A bf16 handle as one in fp32; anything else as it is."""
    t = internals()
    is_bf16 = isinstance(x, t.Handle) and x.dtype.scalar == t.tl.bfloat16
    return t.Handle(_bf16_to_fp32(x.data), t.tl.float32) if is_bf16 else x


def _in_fp32(method: Callable) -> Callable:
    """An elementwise operation of the interpreter, for bf16 in fp32 and then rounded."""
    t = internals()

    @functools.wraps(method)
    def run(self, *operands):
        wide = [_widened(x) for x in operands]
        out = method(self, *wide)
        rounds = out.data.dtype == np.float32 and any(a is not b for a, b in zip(wide, operands, strict=True))
        return t.Handle(_fp32_to_bf16(out.data), t.tl.bfloat16) if rounds else out

    return run


@functools.cache
def correct_numerics() -> None:
    """Patch the interpreter, once and for the whole process: bf16 in fp32 with rounding, casts and tl.dot too."""
    t = internals()
    bf16 = t.tl.bfloat16

    def cast_impl(self, src, dst_type, *, original=t.Builder.cast_impl):
        src = _widened(src)
        if dst_type.scalar != bf16:
            return original(self, src, dst_type)
        return t.Handle(_fp32_to_bf16(src.data.astype(np.float32)), bf16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode, *, original=t.Builder.create_fp_to_fp):
        if bf16 not in (src.dtype.scalar, dst_type.scalar):
            return original(self, src, dst_type, rounding_mode)
        if rounding_mode == t.ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("bf16 with fp_downcast_rounding='rtz' is not part of the harness")
        return self.cast_impl(src, dst_type)

    def create_dot(self, a, b, *rest, original=t.Builder.create_dot):
        return original(self, _widened(a), _widened(b), *rest)

    def patch_lang_tensor(tensor, scope, *, original=t.interpreter._patch_lang_tensor):
        original(tensor, scope)
        # Triton 3.6's own, int(data), fails with NumPy 2.4 for arrays of one element, which all its scalars are.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for name in _FLOAT_OPS:
        setattr(t.Builder, name, _in_fp32(getattr(t.Builder, name)))
    t.Builder.cast_impl, t.Builder.create_fp_to_fp, t.Builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    t.Builder.get_bf16 = lambda self, value: t.Handle(_fp32_to_bf16(np.array([value], dtype=np.float32)), bf16)
    t.interpreter._patch_lang_tensor = patch_lang_tensor
