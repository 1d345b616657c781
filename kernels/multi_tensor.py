"""One launch for a list of tensors, which a kernel finds through a table of their addresses on the device.

    table [3 + K, N] int64, a column for each tensor i (or tuple of K tensors: parameter, gradient, …)
      row 0      how many programs come before tensor i's
      row 1      its elements: a program of tensor i has the next block of them, in the order of memory
      row 2      its place in the caller's list
      row 3 + k  the address of tensor i of kind k

A table is made once for the same addresses and kept, so that a training step with fixed buffers makes none; a new one
is copied from pinned memory, and the host does not wait. Kept are the 64 used last and, for ever, those that a CUDA
graph was captured with: it knows their addresses. Warm up before capturing, as always: making one can't be captured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritium.kernels.backend import tl, triton

Key = tuple[int, ...]


@triton.jit
def find_block(p_table, N):
    """The tensor and the block of it (int64) that are this program's: bisection of the table's first row."""
    i_low, i_high = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + N
    while i_high - i_low > 1:
        i_middle = (i_low + i_high) // 2
        is_before = tl.load(p_table + i_middle) <= tl.program_id(0)
        i_low, i_high = tl.where(is_before, i_middle, i_low), tl.where(is_before, i_high, i_middle)
    return i_low, tl.program_id(0) - tl.load(p_table + i_low)


@triton.jit
def load_pointer(p_table, i_tensor, N, KIND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = tl.load(p_table + (3 + KIND) * N + i_tensor).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(p, 16) if ALIGNED else p  # bytes: without the hint loads are one element wide


@dataclass(frozen=True)
class Group:
    """Tensors that one launch can take: `dtypes` (Triton's, by kind) are the same for all."""

    table: Tensor  # [3 + K, N]
    programs: int
    dtypes: dict[str, Any]
    aligned: bool  # all addresses are multiples of 16


def groups(kinds: dict[str, Sequence[Tensor]], block: int) -> list[Group]:
    """Launches for all tensors that are not empty. kinds: name → list, all of the same length, dense and of one device.

    Tensors of different kinds at the same place have the same number of elements, in the same order of memory.
    """
    columns: dict[tuple, list[int]] = {}
    for i, tensors in enumerate(zip(*kinds.values(), strict=True)):
        if tensors[0].numel():
            aligned = not any(x.data_ptr() % 16 for x in tensors)
            columns.setdefault((aligned, *(x.dtype for x in tensors)), []).append(i)
    return [_group(kinds, block, aligned, dtypes, chosen) for (aligned, *dtypes), chosen in columns.items()]


def _group(kinds, block, aligned, dtypes, chosen: list[int]) -> Group:
    tensors = {name: [kind[i] for i in chosen] for name, kind in kinds.items()}
    first = next(iter(tensors.values()))
    addresses = tuple(tuple(x.data_ptr() for x in row) for row in tensors.values())
    table, programs = _table(tuple(x.numel() for x in first), tuple(chosen), addresses, block, first[0].device)
    if not table.is_cuda:  # for the interpreter, which gives these tensors addresses of its own
        table.pointees = tensors
    names = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Group(table, programs, {kind: getattr(tl, name) for kind, name in zip(kinds, names, strict=True)}, aligned)


@dataclass
class _Table:
    data: Tensor
    programs: int
    stream: Any = None  # where it was copied, and when; None on a CPU
    copied: Any = None
    captured: bool = False


KEPT = 64
_TABLES: dict[tuple, _Table] = {}  # the one used last is the last


def _table(sizes: Key, places: Key, addresses: tuple[Key, ...], block: int, device: torch.device) -> tuple[Tensor, int]:
    key = sizes, places, addresses, block, device
    captures = _captures(device)
    if key not in _TABLES and captures:
        raise RuntimeError("a CUDA graph is captured over tensors that no call had before: run one with them first")
    table = _TABLES.pop(key, None) or _new_table(*key)
    table.captured |= captures
    _TABLES[key] = table
    if device.type == "cuda" and not captures:  # a capture begins with a wait for the whole device
        _wait_for(table, torch.cuda.current_stream(device))
    for old in [key for key, each in _TABLES.items() if not each.captured][:-KEPT]:
        del _TABLES[old]
    return table.data, table.programs


def _wait_for(table: _Table, stream: Any) -> None:
    """Let `stream` use a table that another one has copied, perhaps not yet."""
    if stream != table.stream:
        stream.wait_event(table.copied)
        table.data.record_stream(stream)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _new_table(sizes: Key, places: Key, addresses: tuple[Key, ...], block: int, device: torch.device) -> _Table:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + triton.cdiv(size, block))
    data = torch.tensor((starts[:-1], sizes, places, *addresses))
    if device.type != "cuda":
        return _Table(data, starts[-1])
    stream = torch.cuda.current_stream(device)
    data = data.pin_memory().to(device, non_blocking=True)
    return _Table(data, starts[-1], stream, stream.record_event())


def in_memory_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of tensors of one shape with their dims in the order of the first one's strides: contiguous if dense."""
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    return [x.permute(order) for x in tensors]
