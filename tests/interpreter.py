"""Triton kernels on the CPU, checked: a harness around Triton's interpreter.

    with interpreter.checked(seed=0) as trace:
        y = rms_norm(x, weight)                       # runs the Triton kernel, on CPU tensors
    assert trace.launches[0].loaded["p_x"] == x.nbytes  # bytes, by argument of the kernel

Inside `checked()` each tensor that a launch receives gets an address range of its own, 2^48 bytes from the next, and
every load and store is translated back. That one mechanism gives

- the exact bytes moved, by kernel and argument (lanes that are not masked × element size);
- an address sanitizer: a lane that is not an element of the very tensor its pointer came from (a gap between strided
  rows is none) raises OutOfBounds, whatever lies there in memory;
- shuffled programs: the interpreter is sequential and so hides order dependence; here the order is random, and an
  address that one program writes and another one writes or reads, or that one store writes twice, raises DataRace;
- index range: a tensor on the `meta` device has addresses but no memory, so that strides near 2^31 show int32
  arithmetic as OutOfBounds (its loads give `other`).

A table of addresses (a launch for a list of tensors, `multi_tensor.py`) has an attribute `pointees`, name → tensors:
its last rows hold their addresses, a row for each name. Such tensors are checked like arguments and counted by that
name: the kernel gets a copy of the table with addresses as above. An address that a kernel has from elsewhere is
out of bounds.

`torch.empty` is filled with NaN meanwhile, so that what no program writes shows, and so are masked lanes of a load
without `other` (integers with the largest one).

Beyond tritium.kernels.interpreter, which mends the interpreter's bf16, `tl.dot` on fp32 is TF32 where nothing else is
asked for, as on NVIDIA's hardware, and a sum in bf16 is refused.
"""

import contextlib
import functools
import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from tritium.kernels.interpreter import correct_numerics, internals


class CheckFailed(AssertionError):
    """A kernel did something that the interpreter alone would let pass."""


class OutOfBounds(CheckFailed):
    """A lane that is not masked addresses something else than an element of its tensor."""


class DataRace(CheckFailed):
    """What a program writes, another program of the same launch writes or reads, or the same store once more."""


# Checks of numbers, for good ------------------------------------------------------------------------------------------


@functools.cache
def _internals() -> SimpleNamespace:
    """What tritium.kernels.interpreter wraps, and what is wrapped here."""
    from triton.runtime import jit

    t = internals()
    more = {"Interpreted": t.interpreter.InterpretedFunction, "Error": t.interpreter.InterpreterError, "jit": jit}
    return SimpleNamespace(**vars(t), **more, Executor=t.interpreter.GridExecutor)


def _fp32_to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)  # 10 bits of mantissa


@functools.cache
def _check_numerics() -> None:
    """Patch the interpreter, once: what the hardware does not do as well is not hidden; scans take a moment only."""
    t = _internals()
    correct_numerics()

    def create_dot(self, a, b, d, input_precision, *rest, original=t.Builder.create_dot):
        if a.dtype.scalar == t.tl.float32 and input_precision == t.ir.INPUT_PRECISION.TF32:
            a, b = (t.Handle(_fp32_to_tf32(x.data), t.tl.float32) for x in (a, b))
        return original(self, a, b, d, input_precision, *rest)

    def apply(self, input, *, original=t.interpreter.ReduceScanOpInterface.apply):
        parts = input if isinstance(input, tuple) else (input,)
        if any(part.dtype.scalar == t.tl.bfloat16 for part in parts):
            raise TypeError("a reduction or scan in bf16 loses its sum: cast to fp32 right after the load")
        return original(self, input)

    def generic_scan(self, input):
        """All prefixes at once, in log₂ n steps. Triton's own calls combine_fn once per element: 0.2 ms each."""
        parts = [arg.handle.data for arg in input]
        n = parts[0].shape[self.axis]
        index = np.arange(n).reshape([-1] + [1] * (parts[0].ndim - self.axis - 1))
        for distance in (1 << i for i in range((n - 1).bit_length())):
            pairs = (*(np.roll(x, distance, self.axis) for x in parts), *parts)
            out = self.combine_fn.fn(*(self.to_tensor(x, arg.dtype) for x, arg in zip(pairs, input * 2, strict=True)))
            out = out if isinstance(out, tuple) else (out,)
            parts = [np.where(index < distance, x, y.handle.data) for x, y in zip(parts, out, strict=True)]
        return [self.to_tensor(x, arg.dtype) for x, arg in zip(parts, input, strict=True)]

    t.Builder.create_dot = create_dot
    t.interpreter.ReduceScanOpInterface.apply = apply
    t.interpreter.ScanOps.generic_scan = generic_scan


_MEMORY_METHODS = ("create_masked_load", "create_masked_store", "set_grid_idx")


# What a launch did ----------------------------------------------------------------------------------------------------


@dataclass
class LaunchTrace:
    """One launch: bytes by argument name. Lanes that are masked count nothing; lanes that read twice count twice."""

    kernel: str
    grid: tuple[int, int, int] = (1, 1, 1)
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def bytes_loaded(self) -> int:
        return sum(self.loaded.values())

    @property
    def bytes_stored(self) -> int:
        return sum(self.stored.values())


@dataclass
class Trace:
    """What the kernels inside `checked()` did, launch by launch."""

    launches: list[LaunchTrace] = field(default_factory=list)

    @property
    def bytes_loaded(self) -> int:
        return sum(launch.bytes_loaded for launch in self.launches)

    @property
    def bytes_stored(self) -> int:
        return sum(launch.bytes_stored for launch in self.launches)


# The address space of one launch --------------------------------------------------------------------------------------

_RANGE_BITS = 48  # one tensor's share of the 2^64 addresses; its first element lies in the middle


@dataclass(frozen=True)
class _Region:
    """One tensor argument and its range of addresses."""

    name: str
    tensor: torch.Tensor
    base: int

    def where(self, offset: int) -> str:
        shape, stride = tuple(self.tensor.shape), self.tensor.stride()
        return f"{self.name} (shape {shape}, stride {stride}), {offset} elements from its start"

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Whether each offset, in elements, is one of the tensor's: exact wherever strides nest, as views' do."""
        dims = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        rest = np.where(offsets < 0, -1, offsets) if self.tensor.numel() else np.full_like(offsets, -1)
        for size, stride in sorted(((n, s) for n, s in dims if n > 1 and s > 0), key=lambda dim: -dim[1]):
            rest = rest - np.clip(rest // stride, 0, size - 1) * stride
        return rest == 0


class _AddressSpace:
    """Gives tensors their addresses, translates them back, and keeps who touched what."""

    def __init__(self, launch: LaunchTrace):
        self.launch = launch
        self.regions: list[_Region] = []
        self.program = 0
        self.touched = {"read": [], "write": []}  # kind: [(program, byte addresses, region index)]

    def address(self, name: str, tensor: torch.Tensor) -> int:
        """Where the first element of `tensor` lies from now on."""
        base = ((len(self.regions) + 1) << _RANGE_BITS) + (1 << (_RANGE_BITS - 1))
        self.regions.append(_Region(name, tensor, base))
        return base

    def pointer(self, name: str, tensor: torch.Tensor) -> Any:
        """A Triton pointer to `tensor`, as the interpreter makes them, but at an address of ours."""
        t = _internals()
        if pointees := getattr(tensor, "pointees", None):  # a table: the same one, but with addresses of ours
            rows = [[self.address(kind, x) for x in tensors] for kind, tensors in pointees.items()]
            tensor = torch.cat([tensor[: -len(rows)], torch.tensor(rows)])
        base = self.address(name, tensor)
        kind = t.tl.str_to_ty(t.jit.mangle_type(tensor), None)
        return t.tl.tensor(t.Handle(np.array([base], dtype=np.uint64), kind), kind)

    def translate(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, kind: str) -> np.ndarray | None:
        """Real addresses for the lanes in `mask`; None where there is nothing to touch (no lane, or no memory).

        Raises: OutOfBounds.
        """
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)  # a scalar condition comes as an integer
        active = pointers[mask]
        if not active.size:
            return None
        index = int(active.flat[0] >> _RANGE_BITS) - 1
        if not 0 <= index < len(self.regions):
            raise OutOfBounds(f"{self.launch.kernel}: a {kind} at an address that no argument gave")
        region = self.regions[index]
        offsets = active.astype(np.int64) - region.base  # bytes
        elements, misaligned = np.divmod(offsets, region.tensor.element_size())
        bad = ~region.holds(elements) | (misaligned != 0)
        if bad.any():
            where = region.where(int(elements[bad][0]))
            lanes = f"{int(bad.sum())} of {bad.size} lanes"
            raise OutOfBounds(f"{self.launch.kernel}, program {self.program}: {kind} outside {where} ({lanes})")
        (self.launch.loaded if kind == "read" else self.launch.stored)[region.name] += active.size * itemsize
        once = np.unique(offsets)
        if kind == "write" and once.size < offsets.size:
            where = f"{offsets.size - once.size} addresses of {region.name} more than once"
            raise DataRace(f"{self.launch.kernel}, program {self.program}: a store writes {where}")
        real = 0 if region.tensor.is_meta else region.tensor.data_ptr()
        # Races are looked for at real addresses, because two arguments may be the same memory.
        self.touched[kind].append((self.program, (real or region.base) + once, index))
        if not real:
            return None
        translated = np.zeros_like(pointers)
        translated[mask] = (offsets + real).astype(np.uint64)
        return translated

    def check_races(self) -> None:
        """Raises: DataRace if an address was written by one program and touched by another."""
        if not self.touched["write"]:
            return
        address, program, region = self._flat("write")
        order = np.lexsort((program, address))
        address, program, region = address[order], program[order], region[order]
        twice = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        if twice.any():
            i = int(np.flatnonzero(twice)[0])
            self._race(f"write {self._name(address[i], region[i])}", program[i], program[i + 1], int(twice.sum()))
        if self.touched["read"]:
            read_address, reader, read_region = self._flat("read")
            i_write = np.searchsorted(address, read_address).clip(max=len(address) - 1)
            crossed = (address[i_write] == read_address) & (program[i_write] != reader)
            if crossed.any():
                i = int(np.flatnonzero(crossed)[0])
                what = f"write and read {self._name(read_address[i], read_region[i])}"
                self._race(what, program[i_write[i]], reader[i], int(crossed.sum()))

    def _flat(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records = self.touched[kind]
        address = np.concatenate([addresses for _, addresses, _ in records])
        counts = [len(addresses) for _, addresses, _ in records]
        return address, *(np.repeat([record[i] for record in records], counts) for i in (0, 2))

    def _name(self, address: int, index: int) -> str:
        region = self.regions[index]
        start = region.base if region.tensor.is_meta else region.tensor.data_ptr()
        return region.where((int(address) - start) // region.tensor.element_size())

    def _race(self, what: str, first: int, second: int, count: int) -> None:
        raise DataRace(f"{self.launch.kernel}: programs {first} and {second} both {what} ({count} such addresses)")


# The context ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checked(seed: int = 0) -> Iterator[Trace]:
    """Run every Triton kernel inside on the CPU, programs in an order drawn from `seed`, and check each access.

    Works in any process, whether or not triton was imported with TRITON_INTERPRET=1, and sets TRITIUM_BACKEND=triton.
    Raises: OutOfBounds, DataRace at the launch that is wrong.
    """
    t = _internals()
    _check_numerics()
    trace, rng = Trace(), random.Random(seed)
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", TRITIUM_BACKEND="triton", TRITON_INTERPRET="1"))
        # Kernels that were decorated without TRITON_INTERPRET=1 are compiled ones: interpret their source instead.
        stack.enter_context(mock.patch.object(t.jit.JITFunction, "run", _interpret_launch))
        stack.enter_context(mock.patch.object(t.jit.JITFunction, "__call__", _interpret_call))
        stack.enter_context(mock.patch.object(t.Executor, "__call__", _checked_launch(trace, rng)))
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
        try:
            yield trace
        finally:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


@functools.cache
def _interpreted(fn: Callable) -> Any:
    return _internals().Interpreted(fn)


def _interpret_launch(self, *args, grid, warmup, **kwargs):
    return _interpreted(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


def _interpret_call(self, *args, **kwargs):
    """A kernel's call of another jitted function. InterpretedFunction.__call__ would leave triton.language patched."""
    t = _internals()
    scope = t.interpreter._patch_lang(self.fn)
    try:
        return _interpreted(self.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _checked_launch(trace: Trace, rng: random.Random) -> Callable:
    """GridExecutor.__call__, with tensors at addresses of ours and memory operations that go through them."""
    t = _internals()
    original = t.Executor.__call__

    def launch(self, *args, **kwargs):
        record = LaunchTrace(self.fn.__name__)
        space = _AddressSpace(record)
        names = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = space.pointer(name, value)
        trace.launches.append(record)
        try:
            with mock.patch.multiple(t.Builder, **_checked_builder(space, rng)):
                original(self, **arguments)
        except t.Error as error:
            cause = error
            while isinstance(cause, t.Error) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause  # noqa: B904  the kernel's own error, without the interpreter's wrapping
        space.check_races()

    return launch


def _poison(pointers: Any) -> Any:
    """What no lane should use, in the shape and dtype of what the pointers point to."""
    t = _internals()
    kind = pointers.get_element_ty()
    dtype = np.dtype(t.interpreter._get_np_dtype(kind))
    value = 0x7FC0 if kind == t.tl.bfloat16 else np.nan if dtype.kind == "f" else 1 if dtype.kind == "b" else None
    value = np.iinfo(dtype).max if value is None else value
    return t.Handle(np.full(pointers.data.shape, value, dtype), kind)


def _checked_builder(space: _AddressSpace, rng: random.Random) -> dict[str, Callable]:
    """Replacements for the interpreter's memory operations and its program counter, for one launch."""
    t = _internals()
    original = SimpleNamespace(**{name: getattr(t.Builder, name) for name in _MEMORY_METHODS})
    order: list[int] = []

    def at(pointers: Any, mask: np.ndarray, kind: str) -> Any:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        real = space.translate(pointers.data, mask, itemsize, kind)
        return None if real is None else t.Handle(real, pointers.dtype)

    def create_masked_load(self, pointers, mask, other, *modifiers):
        real = at(pointers, mask.data, "read")
        # A scalar `other` that is 0 is lost on the way here: only of a block is None really none.
        if other is None and pointers.data.size > 1 and not np.all(mask.data):
            other = _poison(pointers)
        if real is None:  # nothing may be touched: every lane takes `other`
            real, mask = pointers, t.Handle(np.zeros_like(pointers.data, dtype=bool), t.tl.int1)
        return original.create_masked_load(self, real, mask, other, *modifiers)

    def create_masked_store(self, pointers, value, mask, *modifiers):
        real = at(pointers, mask.data, "write")
        return None if real is None else original.create_masked_store(self, real, value, mask, *modifiers)

    def no_atomics(self, *operands):
        raise CheckFailed(f"{space.launch.kernel} uses an atomic: its result would depend on the order of programs")

    def set_grid_idx(self, x, y, z):
        """The programs come in canonical order; each is given the number that the shuffled order has in its place."""
        nx, ny, nz = self.grid_dim
        if not order:
            space.launch.grid = self.grid_dim
            order.extend(rng.sample(range(nx * ny * nz), nx * ny * nz))
        space.program = order[(x * ny + y) * nz + z]
        original.set_grid_idx(self, space.program // (ny * nz), space.program // nz % ny, space.program % nz)

    return {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
        "set_grid_idx": set_grid_idx,
    }
