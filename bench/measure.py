"""Time from a cold cache, peak memory, and the ceilings of the machine: the same for a CPU and a GPU.

Everything that is to be compared is timed in turn, round after round, with the ceilings among it: what disturbs the
machine for a while disturbs all alike, and a percentage has both its numbers from the same minute.
"""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PASSES = ("forward", "backward", "both")
_CACHE_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}  # more than the last cache of any: read to evict what is there
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_AHEAD_CYCLES = 2_000_000  # the GPU waits for about a millisecond, in which the host queues what is timed


class Timing(NamedTuple):
    """Milliseconds: the median, and between which the middle three fifths of the rounds lie."""

    ms: float
    ms_p20: float
    ms_p80: float
    rounds: int


class Memory(NamedTuple):
    """Peak bytes above the inputs; and of these, what are neither outputs nor gradients."""

    memory_bytes: int
    working_bytes: int


def floating(tree: Any) -> list[Tensor]:
    """The floating tensors of a tree of arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass
class Call:
    """A function with arguments of its own: `args` that require a gradient make it differentiable.

    `in_place`: it returns nothing, its results are its arguments. `seeds`: the gradients of its outputs.
    """

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    in_place: bool = False
    seeds: list[Tensor] | None = None

    def __post_init__(self):
        self.inputs = [x for x in floating(self.args) if x.requires_grad]

    def forward(self) -> list[Tensor]:
        outputs = self.function(*self.args, **self.kwargs)
        return floating((self.args, self.kwargs) if self.in_place else outputs)

    def backward(self, outputs: list[Tensor]) -> list[Tensor]:
        through = [y for y in outputs if y.requires_grad]
        if self.seeds is None:
            self.seeds = [torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in through]
        return list(torch.autograd.grad(through, self.inputs, self.seeds))

    def results(self) -> list[Tensor]:
        """Outputs, then gradients."""
        outputs = self.forward()
        return [y.detach() for y in outputs] + (self.backward(outputs) if self.inputs else [])


class Stopwatch:
    """Times one call at a time on a device, from a cold cache: `result, ms = stopwatch(function)`."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.evict = torch.ones(_CACHE_BYTES[device] // 4, device=device)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        self.evict.sum()
        if not self.cuda:
            start = time.perf_counter()
            result = function()
            return result, 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD_CYCLES)  # without it, short kernels would be timed at the speed of their launches
        start.record()
        result = function()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)


class Ceilings:
    """What the machine does at most: a copy that no cache holds, and a square matmul of this dtype."""

    def __init__(self, device: str, dtype: torch.dtype):
        source = torch.randn(_COPY_BYTES[device] // 4, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(_MATMUL_SIZE[device], _MATMUL_SIZE[device], device=device).to(dtype) for _ in range(2))
        self.functions = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        self.bytes, self.flops = 2 * source.nbytes, 2 * len(a) ** 3

    def rates(self, timings: Mapping[str, Timing]) -> tuple[float, float]:
        """GB/s of the copy and TFLOP/s of the matmul."""
        return self.bytes / timings["copy"].ms / 1e6, self.flops / timings["matmul"].ms / 1e9


def time_in_turn(
    calls: Mapping[str, Call], ceilings: Ceilings, device: str, seconds: float, least: int = 5
) -> tuple[dict[str, dict[str, Timing]], dict[str, Timing]]:
    """({name: {pass: Timing}}, {ceiling: Timing}): all in turn, for about `seconds` and at least `least` rounds.

    Forward and backward are timed apart, each from a cold cache; "both" is their sum, round by round.
    """
    stopwatch = Stopwatch(device)
    found = {name: {kind: [] for kind in (PASSES if call.inputs else PASSES[:1])} for name, call in calls.items()}
    limits = {name: [] for name in ceilings.functions}
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < deadline:
        first = rounds % max(1, len(calls))  # each is first once, so that none always follows the same one
        for name in [*calls, *calls][first : first + len(calls)]:
            call, times = calls[name], found[name]
            outputs, forward = stopwatch(call.forward)
            times["forward"].append(forward)
            if call.inputs:
                _, backward = stopwatch(lambda call=call, outputs=outputs: call.backward(outputs))
                times["backward"].append(backward)
                times["both"].append(forward + backward)
            del outputs
        for name, function in ceilings.functions.items():
            limits[name].append(stopwatch(function)[1])
        rounds += 1
    timings = {name: {kind: timing(times) for kind, times in kinds.items()} for name, kinds in found.items()}
    return timings, {name: timing(times) for name, times in limits.items()}


def timing(times: list[float]) -> Timing:
    low, *_, high = statistics.quantiles(times if len(times) > 1 else times * 2, n=5, method="inclusive")
    return Timing(statistics.median(times), low, high, len(times))


def memory_of(call: Call, device: str) -> dict[str, Memory | None]:
    """{pass: Memory} of one call; None where the system doesn't tell (CPUs outside Linux)."""
    before = _settle(device)
    outputs = call.forward()
    peaks = {"forward": _peak(device)}
    needed = {"forward": 0 if call.in_place else sum(y.nbytes for y in outputs)}
    if call.inputs:
        _restart_peak(device)
        gradients = call.backward(outputs)
        peaks["backward"] = _peak(device)
        needed["backward"] = needed["both"] = needed["forward"] + sum(x.nbytes for x in gradients)
    if before is None:
        return dict.fromkeys(PASSES)
    peaks["both"] = max(peaks.values())
    above = {kind: max(0, peaks[kind] - before) for kind in needed}
    return {kind: Memory(above[kind], max(0, above[kind] - needed[kind])) for kind in needed}


def _settle(device: str) -> int | None:
    """The bytes in use now, where the peak starts again."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system: else the next peak would hide in it
        _restart_peak(device)
        return _status("VmRSS")
    except (AttributeError, OSError, TypeError):
        return None


def _restart_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", file.read())[1])
