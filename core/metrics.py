"""What a run says about itself: a line per step in metrics.jsonl, one live line for the reader, and the machine.

Names that the live line knows how to show: loss, tokens_per_second, mfu (a fraction), memory (bytes). Other values
follow as name=value while there is room; names with a slash (`time/forward`, `gpu/power`) go to the file only.
"""

import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

import tritium
from tritium.core.config import UserError
from tritium.kernels.backend import fp32_is_faster
from tritium.kernels.doctor import cpu, version_of

_PLAIN_INTERVAL = 10.0  # seconds between lines where the stream is a file


class Metrics:
    """Writes `folder/metrics.jsonl` and shows progress; a rank other than the main one keeps silent.

    `folder` None writes no file. `total_steps` and `name` are for the display; `stream` is stderr by default.
    """

    def __init__(
        self, folder: str | os.PathLike | None, *, main: bool, total_steps: int, name: str, stream: TextIO | None = None
    ):
        self._main, self._total, self._name = main, total_steps, name
        self._stream = sys.stderr if stream is None else stream
        self._path = Path(folder) / "metrics.jsonl" if main and folder is not None else None
        self._file = None
        self._started: tuple[int, float] | None = None  # the first step logged, and when: for the time that is left
        self._shown_at, self._live_width = -math.inf, 0
        self._warned = False  # that the file can't be written

    def resume(self, step: int) -> None:
        """Drop the lines at or after `step`, which a resumed run will write again; 0 starts the file afresh.

        Raises: UserError where the file can't be written.
        """
        if self._path is None or not self._path.exists():
            return
        self._close_file()
        kept = [line.rstrip("\n") + "\n" for line, values in read_lines(self._path) if values["step"] < step]
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            raise UserError(f"{self._path} can't be written: {error.strerror}; free some space") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to the file and bring the display up to date. Values may be 0-d tensors."""
        if not self._main:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        self._append({"step": step} | {name: _json_number(value) for name, value in numbers.items()})
        now = time.monotonic()
        self._started = self._started or (step, now)
        line = f"{self._name}  " + "  ".join(self._parts(step, numbers, now))
        if self._stream.isatty():
            self._show_live(line)
        elif now - self._shown_at >= _PLAIN_INTERVAL or step >= self._total:
            print(line, file=self._stream, flush=True)
            self._shown_at = now

    def message(self, text: str) -> None:
        """Print lines for the reader, above the live one."""
        if self._main and text:
            if self._live_width:
                print(file=self._stream)
                self._live_width = 0
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the file and leave the live line standing."""
        self._close_file()
        if self._live_width:
            print(file=self._stream, flush=True)
            self._live_width = 0

    def _append(self, record: dict) -> None:
        if self._path is None:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end the run; the file's buffer is written when there is room
            if not self._warned:
                self.message(f"{self._path} can't be written: {error.strerror}; the run continues")
            self._warned = True

    def _parts(self, step: int, values: Mapping[str, float], now: float) -> list[str]:
        """The phrases of the display, the most wanted first."""
        parts = [f"step {step}/{self._total}"]
        for name, show in _SHOWN.items():
            if name in values:
                parts.append(show(values[name]))
        first, started = self._started
        if first < step < self._total:
            parts.append(f"ETA {_duration((now - started) / (step - first) * (self._total - step))}")
        parts += [f"{name}={value:.4g}" for name, value in values.items() if name not in _SHOWN and "/" not in name]
        return parts

    def _show_live(self, line: str) -> None:
        """Write over the line before, cut to the terminal's width so that it stays one line."""
        line = line[: shutil.get_terminal_size().columns - 1]
        print("\r" + line.ljust(self._live_width), end="", file=self._stream, flush=True)
        self._live_width = len(line)

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # it has been told of
                self._file.close()
            self._file = None


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Each whole line of a metrics file and its numbers; a line that a killed run left unfinished is passed over, also
    where a loss of power left other bytes there."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            yield line, {k: float(v) if isinstance(v, str) else v for k, v in values.items()}  # see `_json_number`


class Numbers:
    """Metrics of a step, on their way to the host: `read` waits for their copy, and not for what a GPU was given to do
    since. float(tensor) would wait for all of that."""

    def __init__(self, values: Mapping[str, float | Tensor]):
        self.values = dict(values)
        self.names = [name for name, value in values.items() if isinstance(value, Tensor) and value.is_cuda]
        if self.names:
            stacked = torch.stack([values[name].detach().double().reshape(()) for name in self.names])
            self.host, self.copied = stacked.to("cpu", non_blocking=True), torch.cuda.Event()  # to pinned memory
            self.copied.record()

    def read(self) -> dict[str, float]:
        if self.names:
            self.copied.synchronize()
            self.values |= dict(zip(self.names, self.host.tolist(), strict=True))
        return {name: float(value) for name, value in self.values.items()}


class Clock:
    """Where the time of a step goes: `with clock("forward"): …`, then `clock.take()` once per step.

    Wall time of the host: on a GPU, work that is only queued is counted where the host next waits for it.
    """

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by name since the last take."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Pace:
    """How fast a run is: tokens/s and MFU of a step, and of all steps of this process.

    MFU is relative to what the machine reaches in matmuls, the mean of `peaks` (FLOP/s), and covers forward, backward
    and optimizer. Where the host only queues these, on a GPU, it is of all that passed since the last step: waiting,
    evaluating and sampling included.
    """

    def __init__(self, peak: float, queued: bool):
        self.peaks, self.queued = [peak], queued
        self.sums = [0.0] * 4  # as the arguments of `rates`
        self.start()

    def start(self) -> None:
        """From here on the time is that of steps."""
        self.since = time.perf_counter()

    def step(self, tokens: float, work: float, spent: Mapping[str, float]) -> dict[str, float]:
        """The numbers of a step that has just ended: its tokens and FLOPs, and where its seconds went (`Clock`)."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        trained = seconds if self.queued else sum(spent.get(k, 0.0) for k in ("forward", "backward", "optimizer"))
        done = tokens, seconds, work, trained
        self.sums = [a + b for a, b in zip(self.sums, done, strict=True)]
        values = {"tokens": tokens} | self.rates(*done) | {"memory": float(peak_memory()), "time/step": seconds}
        return values | {f"time/{k}": v for k, v in spent.items()} | (gpu_stats() if self.queued else {})

    def rates(self, tokens: float, seconds: float, work: float, trained: float) -> dict[str, float]:
        mfu = work / trained / statistics.fmean(self.peaks) if trained else 0.0
        return {"tokens_per_second": tokens / seconds, "mfu": mfu}

    def total(self) -> dict[str, float]:
        """The rates over all steps; nothing before the first one."""
        return self.rates(*self.sums) if self.sums[1] else {}


def peak_memory() -> int:
    """The most bytes that this process has held: the CUDA allocator's peak if CUDA is in use, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there and kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_stats() -> dict[str, float]:
    """What NVML says of this process's GPU; empty without an NVIDIA GPU in use.

    Power [W], memory in use by anyone [bytes], utilization [0, 1], and a 1 for each reason that holds its clock back.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized() and torch.version.cuda):
        return {}
    import pynvml

    try:
        handle = _nvml_handle(torch.cuda.current_device())
        stats = {
            "gpu/power": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu/memory": float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            "gpu/utilization": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        }
        held_back = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError:  # e.g. a container without access to it
        return {}
    reasons = {
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "hw_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hw_power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return stats | {f"gpu/throttle_{name}": 1.0 for name, bit in reasons.items() if held_back & bit}


def matmul_rate(
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int, int]],
    seconds: float = 0.3,
    device: torch.device | str | None = None,
) -> float:
    """FLOP/s of matmuls [M, K] x [N, K]ᵀ for the given (M, N, K), in turn: a ceiling for MFU from the same machine.

    `device` is the GPU if there is one, else the CPU. Runs for about `seconds`, after one round to warm up.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" and fp32_is_faster(dtype) else dtype  # as kernels/wide.py multiplies
    pairs = [
        (torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
        for m, n, k in shapes
    ]
    flops = sum(2 * m * n * k for m, n, k in shapes)

    def run(rounds: int) -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            for a, b in pairs:
                a @ b.t()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run(1)
    rounds = max(1, round(seconds / max(run(1), 1e-6)))
    return rounds * flops / run(rounds)


def machine() -> dict[str, str | int]:
    """The machine and the versions, for reports and benchmark rows."""
    facts = {
        "cpu": cpu()["model"],
        "cores": os.cpu_count() or 1,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tritium": tritium.__version__,
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    optional = {"triton": version_of("triton"), "commit": _commit()}
    return facts | {name: value for name, value in optional.items() if value}


def _json_number(value: float) -> float | str:
    """JSON knows no nan and inf: as strings they stay valid and float() reads them back."""
    return value if math.isfinite(value) else str(value)


def _count(value: float) -> str:
    """1234567 as 1.23M."""
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


_SHOWN = {
    "loss": lambda value: f"loss {value:.4f}",
    "tokens_per_second": lambda value: f"{_count(value)} tok/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "memory": lambda value: f"{value / 2**30:.2f} GiB",
}


@cache
def _nvml_handle(index: int):
    import pynvml

    pynvml.nvmlInit()
    # By UUID: NVML does not know CUDA_VISIBLE_DEVICES.
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def _commit() -> str | None:
    """The commit of this checkout, marked -dirty if files differ from it; None where it is not a checkout."""
    root = Path(tritium.__file__).parent
    if not (root / ".git").exists():  # else git would answer for a repository around the virtual environment
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
