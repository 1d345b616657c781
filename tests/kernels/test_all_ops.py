"""What must hold for every op of the registry, on each backend that it has: values, dtypes, layouts, safety, traffic.

An op's shapes, the dtypes and the layouts are covered together, not crossed; the full cross is long. Kernels run in the
harness of tests/interpreter.py: each address is checked, programs come in a random order, torch.empty is poisoned.
"""

import contextlib
import copy
import itertools
import json
import os
import pathlib

import interpreter
import pytest
import torch
import traffic
from shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tritium.kernels import (
    all_ops,
    attention,
    geglu,
    linear_cross_entropy,
    linear_logprob,
    lora_linear,
    rms_norm,
    rope,
    swiglu,
)
from tritium.kernels.backend import HAS_TRITON, TARGETS

OPS = all_ops()
KERNELS = {name: spec for name, spec in OPS.items() if HAS_TRITON and spec.launches(TARGETS["sm_80"])}
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CANCELLED = {torch.float32: 0.25, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # terms of order 1 leave their error
LAYOUTS = ("dense", "strided", "expanded")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
BUDGETS = pathlib.Path(__file__).with_name("budgets.json")  # written by TRITIUM_UPDATE_BUDGETS=1
SLACK = 1.25


# Arguments and results ------------------------------------------------------------------------------------------------


def arguments(spec, shape, dtype, device="cpu", change=lambda tensor: tensor):
    """The example's arguments, the same ones each time, with `change` applied to the tensors."""
    torch.manual_seed(0)
    given = spec.example(shape, dtype, device)

    def leaf(value):
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        return change(value.detach().clone()).requires_grad_(value.requires_grad)

    return tree_map(leaf, given)


def widened(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def strided(x):
    """The same values with the memory of a transposed tensor, or every second element of a longer one."""
    if x.dim() < 2:
        return x.repeat_interleave(2)[::2] if x.dim() else x
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def tensors(values):
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def results(function, args, kwargs, layout="dense"):
    """What a call returns, what it leaves in its arguments (the name_ ops), and its gradients, named."""
    outputs = tensors(function(*args, **kwargs))
    inputs = [x for x in tensors(args) if x.requires_grad]
    through = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    # multiples of 1/16 are the same numbers in every dtype; expanded ones have stride 0, as after .sum()
    seeds = [(torch.randint(-32, 33, y.shape, generator=generator) / 16).to(y) for y in through]
    if layout == "expanded":
        seeds = [torch.full((), 0.5).to(y).expand(y.shape) for y in through]
    elif layout == "strided":
        seeds = [strided(seed) for seed in seeds]
    gradients = torch.autograd.grad(through, inputs, seeds) if through else ()
    left = [x.detach() for x in tensors((args, kwargs)) if not x.requires_grad]
    named = {"output": outputs, "argument": left, "gradient": gradients}
    return {f"{kind} {i}": x.detach() for kind, values in named.items() for i, x in enumerate(values)}


@contextlib.contextmanager
def running_on(backend, seed=0):
    """(device, trace) of a backend: torch, triton (interpreted and checked) or cuda."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITIUM_BACKEND", "torch" if backend == "torch" else "triton")
        with interpreter.checked(seed) if backend == "triton" else contextlib.nullcontext() as trace:
            yield "cuda" if backend == "cuda" else "cpu", trace


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


# Values ---------------------------------------------------------------------------------------------------------------


def cases():
    """Each op, backend and shape once, with dtypes and layouts that go round; the rest of the cross is long."""
    for name, backend in itertools.product(OPS, ("torch", "triton", "cuda")):
        if backend != "torch" and name not in KERNELS:
            continue
        spec = OPS[name]
        shapes = SHAPES[name]
        full = [i for i, shape in enumerate(shapes) if all(shape.values())]
        rounds = range(max(len(full), len(spec.dtypes), len(LAYOUTS)))
        cover = {(full[-1 - i % len(full)], i % len(spec.dtypes), (i + i // 3) % len(LAYOUTS)) for i in rounds}
        cover |= {(i, 0, 0) for i in range(len(shapes)) if i not in full}  # empty ones
        for i, j, k in itertools.product(range(len(shapes)), range(len(spec.dtypes)), range(len(LAYOUTS))):
            marks = () if (i, j, k) in cover else (pytest.mark.long,)
            marks += needs_gpu if backend == "cuda" else ()
            letters = "".join(f"{letter}{size}" for letter, size in shapes[i].items())
            label = f"{name}-{backend}-{letters}-{str(spec.dtypes[j])[6:]}-{LAYOUTS[k]}"
            yield pytest.param(name, backend, shapes[i], spec.dtypes[j], LAYOUTS[k], marks=marks, id=label)


@pytest.fixture(scope="module")
def budgets():
    """The largest error of each op and dtype under the interpreter, relative to the RMS of the result, and 25 %."""
    committed = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    measured = {}
    yield committed, measured
    if os.environ.get("TRITIUM_UPDATE_BUDGETS"):
        for name, errors in measured.items():
            kept = committed.setdefault(name, {})
            kept |= {dtype: max(float(f"{SLACK * error:.3g}"), kept.get(dtype, 0)) for dtype, error in errors.items()}
        BUDGETS.write_text(json.dumps(committed, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name, backend, shape, dtype, layout", list(cases()))
def test_as_good_as_plain_torch_in_that_dtype(name, backend, shape, dtype, layout, budgets):
    """Against fp64 on the same inputs: at most 1.5 × the reference's own error, plus 2 ulp of the result's RMS."""
    spec = OPS[name]
    change = strided if layout == "strided" else lambda x: x
    with running_on(backend) as (device, _):
        actual = results(spec.function, *arguments(spec, shape, dtype, device, change), layout)
    plain = results(spec.reference, *arguments(spec, shape, dtype, device), layout)
    expected = results(spec.reference, *arguments(spec, shape, dtype, device, widened), layout)
    assert actual.keys() == expected.keys()
    worst = 0.0
    for key, e in expected.items():
        a, p = actual[key], plain[key]
        assert a.shape == e.shape and a.dtype == p.dtype, key
        if not e.is_floating_point():
            assert torch.equal(a, e) or dtype != torch.float32, key  # an argmax may tie once it is rounded
            continue
        known = e.isfinite()  # the lse of a row that sees nothing is -inf
        assert torch.equal(a.isfinite(), known), key
        scale = max(rms(e[known]), CANCELLED[dtype])
        error, own = rms(a[known].double() - e[known]), rms(p[known].double() - e[known])
        assert error <= 1.5 * own + 2 * ULP[dtype] * scale, f"{key}: {error / scale:.2e}, torch {own / scale:.2e}"
        worst = max(worst, error / scale)
    if backend == "triton":
        committed, measured = budgets
        errors, letter = measured.setdefault(name, {}), str(dtype)[6:]
        errors[letter] = max(errors.get(letter, 0.0), worst)
        if not os.environ.get("TRITIUM_UPDATE_BUDGETS"):
            assert worst <= committed[name][letter], "worse than tests/kernels/budgets.json"


@pytest.mark.parametrize("name", sorted(name for name in OPS if OPS[name].differentiable))
def test_gradcheck(name, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)
    spec = OPS[name]
    args, kwargs = spec.example(SHAPES[spec.name][1], torch.float64, "cpu")
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*leaves):
        filled = list(args)
        for i, leaf in zip(places, leaves, strict=True):
            filled[i] = leaf
        return tuple(y for y in tensors(spec.function(*filled, **kwargs)) if y.is_floating_point())

    assert torch.autograd.gradcheck(function, [args[i] for i in places], fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_exact_in_fp64_with_any_layout(name, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    spec = OPS[name]
    actual = results(spec.function, *arguments(spec, SHAPES[spec.name][1], torch.float64, change=strided), "strided")
    expected = results(spec.reference, *arguments(spec, SHAPES[spec.name][1], torch.float64), "strided")
    for key, e in expected.items():
        torch.testing.assert_close(actual[key].double(), e.double(), rtol=1e-9, atol=1e-9, msg=key)


# Safety and traffic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_gpu)])
def test_the_same_bits_again_and_in_any_order_of_programs(name, backend):
    spec = OPS[name]
    shape = max(SHAPES[spec.name], key=spec.flops)

    def run(seed):
        with running_on(backend, seed) as (device, _):
            return results(spec.function, *arguments(spec, shape, spec.dtypes[-1], device))

    first, again = run(1), run(2)
    assert all(torch.equal(x, again[key]) for key, x in first.items())


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_move_what_they_must(name):
    spec = OPS[name]
    dtype = torch.bfloat16
    shape, forward, backward = traffic.allowed(name, dtype.itemsize)
    with running_on("triton") as (_, trace):
        args, kwargs = arguments(spec, shape, dtype)
        outputs = [y for y in tensors(spec.function(*args, **kwargs)) if y.requires_grad]
        launches = len(trace.launches)
        if outputs:
            torch.autograd.grad(outputs, [x for x in tensors(args) if x.requires_grad], outputs)
    moved = [
        sum(launch.bytes_loaded + launch.bytes_stored for launch in part)
        for part in (trace.launches[:launches], trace.launches[launches:])
    ]
    print(f"{name}: forward {moved[0] / forward:.3f}", f"backward {moved[1] / backward:.3f}" if backward else "")
    assert 0 < moved[0] <= 1.05 * forward and moved[1] <= 1.05 * backward
    assert bool(moved[1]) == spec.differentiable


# With torch -----------------------------------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Keeps the calls of tritium's own operators."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritium":
            self.kept.append((function, tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name):
    """Of each operator that a call and its gradient use: schema, shapes without data, tracing."""
    spec = OPS[name]
    with running_on("triton"):
        with _Calls() as calls:
            results(spec.function, *arguments(spec, SHAPES[spec.name][1], torch.float32))
        assert calls.kept, "no operator of namespace tritium was called"
        for operator, args in {call[0]: call for call in calls.kept}.values():
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
            torch.library.opcheck(operator, args, test_utils=checks)


@pytest.mark.parametrize("name", KERNELS)
def test_torch_compile_sees_one_graph(name):
    spec = OPS[name]
    torch._dynamo.reset()
    with running_on("triton"):
        compiled = torch.compile(spec.function, backend="aot_eager", fullgraph=True)
        actual = results(compiled, *arguments(spec, SHAPES[spec.name][1], torch.float32))
        expected = results(spec.function, *arguments(spec, SHAPES[spec.name][1], torch.float32))
    for key, e in expected.items():
        torch.testing.assert_close(actual[key], e, msg=key)


DYNAMIC = [name for name in KERNELS if "T" in SHAPES[name][0] and OPS[name].differentiable]


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_new_number_of_tokens_is_no_new_graph(name):
    spec, graphs, shape = OPS[name], [], SHAPES[name][1] | ({"N": 100} if name == "attention" else {})
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with running_on("triton"):
        compiled = torch.compile(spec.function, backend=backend, fullgraph=True)
        for tokens in (40, 41, 50, 63, 72):
            args, kwargs = arguments(spec, shape | {"T": tokens}, torch.float32)
            compiled(*args, **kwargs)
    assert len(graphs) <= 2  # one with the first number, one for any other


@pytest.mark.parametrize("name", ["linear_logprob", "lora_linear", "rope", "swiglu"])  # what a training step calls
def test_torch_compile_sees_through_the_torch_path(name, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    spec = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, backend="aot_eager", fullgraph=True)
    actual = results(compiled, *arguments(spec, SHAPES[spec.name][1], torch.float64))
    expected = results(spec.function, *arguments(spec, SHAPES[spec.name][1], torch.float64))
    for key, e in expected.items():
        torch.testing.assert_close(actual[key], e, msg=key)


@pytest.mark.parametrize("name", OPS)
def test_costs_are_positive_and_grow_with_the_shape(name):
    spec = OPS[name]
    small, large = SHAPES[spec.name][0], spec.shape
    assert 0 < spec.flops(small) < spec.flops(large)
    assert 0 < spec.bytes(small, 2) < spec.bytes(large, 2) < spec.bytes(large, 4)
    if spec.differentiable:
        assert spec.backward_flops(large) > spec.flops(small) and spec.backward_bytes(large, 2) > spec.bytes(small, 2)


TWICE = {  # a tensor that a caller may well give twice
    "attention": lambda q, w: attention(q, q, q),
    "geglu": lambda q, w: geglu(q, q),
    "linear_cross_entropy": lambda q, w: linear_cross_entropy(w, w, torch.arange(16)),
    "linear_logprob": lambda q, w: linear_logprob(w, w, torch.arange(16)).logp,
    "lora_linear": lambda q, w: lora_linear(w, w, w, w, 0.5),
    "rms_norm": lambda q, w: rms_norm(q, w[0, :8], residual=q)[0],
    "rope": lambda q, w: sum(rope(q, q, w[:6, :4].detach(), w[:6, 4:8].detach())),
    "swiglu": lambda q, w: swiglu(q, q),
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", TWICE)
def test_torch_compile_takes_one_tensor_twice(name, backend):
    if (name, backend) == ("attention", "torch"):
        pytest.skip("the torch path of attention is a break in the graph")
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, w = torch.randn(6, 2, 8, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    with running_on(backend):
        compiled = torch.compile(TWICE[name], backend="aot_eager", fullgraph=True)
        outputs = [function(q, w) for function in (TWICE[name], compiled)]
        gradients = [torch.autograd.grad(y.sum(), (q, w), allow_unused=True) for y in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    for expected, actual in zip(*gradients, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", sorted(name for name in OPS if OPS[name].differentiable))
def test_a_second_backward_is_refused_though_the_first_came_from_a_sum(name, monkeypatch):
    """A gradient penalty would go untrained: the incoming gradient is a constant, with no graph to differentiate."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    spec = OPS[name]
    args, kwargs = spec.example(SHAPES[spec.name][1], torch.float32, "cpu")
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    first = next(y for y in tensors(spec.function(*args, **kwargs)) if y.requires_grad)
    gradients = torch.autograd.grad(first.sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.square().sum() for g in gradients if g is not None).backward()
