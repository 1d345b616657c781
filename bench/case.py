"""One op on one shape in one dtype, with all its providers: checked against fp64, then timed in turn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tritium.bench.measure import PASSES, Call, Ceilings, Memory, memory_of, time_in_turn
from tritium.bench.providers import BARE, EAGER, LONGEST_LOOP, LOOPS, OPTIONS, RESULT, Provider
from tritium.kernels.registry import OpSpec, Shape

Row = dict[str, Any]  # of the JSONL file; see `measure`

CHECK_FLOPS = {"cpu": 1e10, "cuda": 2e11}  # above, the check takes fewer tokens: fp64 is slow, and its logits are large


@dataclass(frozen=True)
class Case:
    spec: OpSpec
    shape: Shape
    dtype: torch.dtype
    device: str
    providers: tuple[Provider, ...]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.spec.name}  {' '.join(f'{k}={v}' for k, v in self.shape.items())}  {self.dtype_name}"


def measure(case: Case, seconds: float) -> list[Row]:
    """A row for each provider and pass (forward, backward, both); a number that there is not is None.

    status: ok; failed (wrong: no speed-up); unchecked (it computes something else); error, with its reason.
    ms, ms_p20, ms_p80, rounds; gbps, tflops and of_ceiling from what the op must move and compute at the least, not
    from what a provider does; bound: which ceiling limits this pass, copy_gbps or matmul_tflops; memory_bytes: the
    peak above the inputs; working_bytes: the same without outputs and gradients; error: relative, of the worst output
    or gradient of `checked_shape`; speedup: against torch eager; of_bare: time as a multiple of the bare matmuls'.
    """
    checked_shape, verdicts = check(case)
    ceilings = Ceilings(case.device, case.dtype)
    calls, memory = _prepare(case, verdicts)
    timings, limits = time_in_turn(calls, ceilings, case.device, seconds)
    copy, matmul = ceilings.rates(limits)
    rows = []
    for kind in PASSES if case.spec.differentiable else PASSES[:1]:
        for name in (provider.name for provider in case.providers):
            row = {"op": case.spec.name, "shape": case.shape, "dtype": case.dtype_name, "provider": name, "pass": kind}
            row |= {"checked_shape": checked_shape, **verdicts[name], **dict.fromkeys(_NUMBERS)}
            row |= {"copy_gbps": copy, "matmul_tflops": matmul}
            if name in calls:
                row |= timings[name][kind]._asdict() | _rates(_work(case, kind), timings[name][kind].ms, copy, matmul)
                row |= memory[name][kind]._asdict() if memory[name][kind] else {}
            rows.append(row)
    return _compared(rows)


IMPOSSIBLE = 4  # times the ceiling: nothing runs so fast that has its work still before it
_NUMBERS = ("ms", "ms_p20", "ms_p80", "rounds", "gbps", "tflops", "bound", "of_ceiling")
_NUMBERS += ("memory_bytes", "working_bytes", "speedup", "of_bare")


def _prepare(case: Case, verdicts: dict[str, Row]) -> tuple[dict[str, Call], dict[str, dict[str, Memory | None]]]:
    """A warm call of each provider that can do this shape, and its memory; who can't has a verdict instead."""
    calls, memory = {}, {}
    for provider in case.providers:
        if verdicts[provider.name]["status"] == "error":
            continue
        try:
            if provider.name == EAGER and case.shape.get(LOOPS.get(case.spec.name), 0) > LONGEST_LOOP:
                raise NotImplementedError("a loop that takes minutes")
            call = _call(case, case.shape, provider)
            call.results()  # compiles, where something compiles, and makes the gradients' seeds
            memory[provider.name] = memory_of(call, case.device)
            calls[provider.name] = call
        except Exception as error:  # out of memory, not supported, does not compile: the finding
            call, verdicts[provider.name] = None, _error(error)
            _free(case.device)
    return calls, memory


def _work(case: Case, kind: str) -> tuple[int, int] | None:
    """(FLOPs, bytes) that a pass must spend and move at the least, where the registry says so."""
    spec, itemsize = case.spec, case.dtype.itemsize
    forward = spec.flops(case.shape), spec.bytes(case.shape, itemsize)
    if kind == "forward":
        return forward
    if spec.backward_flops is None or spec.backward_bytes is None:
        return None
    backward = spec.backward_flops(case.shape), spec.backward_bytes(case.shape, itemsize)
    return backward if kind == "backward" else (forward[0] + backward[0], forward[1] + backward[1])


def _rates(work: tuple[int, int] | None, ms: float, copy: float, matmul: float) -> Row:
    """The rates in GB/s and TFLOP/s; the ceiling that takes longer for this work is the one that limits it."""
    if work is None:
        return {}
    flops, moved = work
    gbps, tflops = moved / ms / 1e6, flops / ms / 1e9
    bound = "matmul" if tflops / matmul > gbps / copy else "memory"
    return {"gbps": gbps, "tflops": tflops, "bound": bound, "of_ceiling": max(tflops / matmul, gbps / copy)}


def _compared(rows: list[Row]) -> list[Row]:
    """The rows with speed-ups for whom the check passed, and multiples of the bare matmuls' time.

    Of who makes the gradients in the forward pass, which shows in a backward pass that no machine could do in this
    time, only "both" is compared.
    """
    times = {(row["provider"], row["pass"]): row["ms"] for row in rows}
    early = {row["provider"] for row in rows if row["pass"] == "backward" and (row["of_ceiling"] or 0) > IMPOSSIBLE}
    for row in rows:
        if row["provider"] in early and row["pass"] != "both":
            row |= dict.fromkeys(("gbps", "tflops", "bound", "of_ceiling"))
            row["reason"] = row["reason"] or "its gradients are made forward: see both"
        elif row["status"] == "ok" and row["ms"]:
            eager, bare = (times.get((name, row["pass"])) for name in (EAGER, BARE))
            row["speedup"] = eager and eager / row["ms"]
            row["of_bare"] = bare and row["ms"] / bare
    return rows


# The check ------------------------------------------------------------------------------------------------------------


def check(case: Case) -> tuple[Shape, dict[str, Row]]:
    """The shape that was checked, and {provider: {status, reason, error}}."""
    shape = dict(case.shape)
    while shape.get("T", 1) > 1 and (
        case.spec.flops(shape) > CHECK_FLOPS[case.device] or shape.get(LOOPS.get(case.spec.name), 0) > LONGEST_LOOP
    ):
        shape["T"] //= 2
    reference = Provider("reference", lambda args, kwargs: case.spec.reference)
    try:
        plain, exact = _call(case, shape, reference), _call(case, shape, reference, _widened)
        eager = plain.results()
        exact.seeds = [seed.double() for seed in plain.seeds or ()]
        expected = exact.results()
    except Exception as error:  # too large, even for torch eager
        return shape, {provider.name: _error(error, "the reference: ") for provider in case.providers}
    verdicts = {}
    for provider in case.providers:
        if not provider.computes_the_op:
            verdicts[provider.name] = {"status": "unchecked", "reason": None, "error": None}
            continue
        try:
            call = _call(case, shape, provider)
            call.seeds = [seed.clone() for seed in plain.seeds or ()]  # some overwrite them
            verdicts[provider.name] = _verdict(call.results(), eager, expected, torch.finfo(case.dtype).eps)
        except Exception as error:
            verdicts[provider.name] = _error(error)
            _free(case.device)
    return shape, verdicts


def _verdict(results: list[Tensor], eager: list[Tensor], expected: list[Tensor], eps: float) -> Row:
    """Each error against the allowed one; `eps` of the RMS is 2 ulp of what lies in the middle of its binade."""
    if [x.shape for x in results] != [x.shape for x in expected]:
        seen, wanted = ([tuple(x.shape) for x in tensors] for tensors in (results, expected))
        return {"status": "failed", "reason": f"shapes {seen}, wanted {wanted}", "error": None}
    errors = [(_rms(x.double() - e), _rms(e)) for x, e in zip(results, expected, strict=True)]
    allowed = [1.5 * _rms(x.double() - e) + eps * _rms(e) for x, e in zip(eager, expected, strict=True)]
    if not all(math.isfinite(error) for error, _ in errors):
        return {"status": "failed", "reason": "it is not finite", "error": None}
    passed = all(error <= limit for (error, _), limit in zip(errors, allowed, strict=True))
    worst = max((error / size if size else error for error, size in errors), default=0.0)
    return {"status": "ok" if passed else "failed", "reason": None if passed else "it is wrong", "error": worst}


def _call(case: Case, shape: Shape, provider: Provider, change: Callable[[Tensor], Tensor] = lambda x: x) -> Call:
    """A provider on the example of `shape`: the same numbers each time, in memory of their own."""
    torch.manual_seed(0)
    args, kwargs = case.spec.example(shape, case.dtype, case.device)
    kwargs = OPTIONS.get(case.spec.name, kwargs)

    def leaf(x: Any) -> Any:
        return change(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    args, kwargs = tree_map(leaf, (args, kwargs))
    function, select = provider.make(args, kwargs), RESULT.get(case.spec.name)
    if select and provider.computes_the_op:
        called = function
        function = lambda *args, **kwargs: select(called(*args, **kwargs))  # noqa: E731
    return Call(function, args, kwargs, in_place=case.spec.name.endswith("_"))


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _error(error: Exception, whose: str = "") -> Row:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"status": "error", "reason": f"{whose}{type(error).__name__}: {text}"[:200], "error": None}


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
