"""Every registered op, in whichever backends it has, against its own reference in fp64."""

import contextlib
import copy

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from tritium.kernels import all_ops, interpreter
from tritium.kernels import backend as switch
from tritium.kernels.backend import HAS_TRITON, TARGETS
from tritium.kernels.registry import OPS, register

SPECS = all_ops()
BACKENDS = {
    "torch": (),
    "triton": (),  # interpreted
    "cuda": (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
}
CASES = [
    pytest.param(backend, spec, shape, marks=marks, id=f"{backend}-{spec.name}-{shape}".replace(" ", ""))
    for spec in SPECS.values()
    for backend, marks in BACKENDS.items()
    if backend == "torch" or (HAS_TRITON and spec.launches(TARGETS["sm_90"]))
    for shape in spec.shapes[:-1]  # the last one is for benchmarks
]


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


def tensors(values):
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def results(function, args, kwargs):
    """What a call returns, what it leaves in its arguments (the name_ ops), and its gradients."""
    outputs = tensors(function(*args, **kwargs))
    inputs = [x for x in tensors(args) if x.requires_grad]
    through = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randint(-32, 33, y.shape, generator=generator).to(y) / 16 for y in through]
    gradients = torch.autograd.grad(through, inputs, seeds) if through else ()
    return [*outputs, *(x.detach() for x in tensors((args, kwargs))), *gradients]


def assert_close(actual, expected, tolerance):
    """Relative to the expected norm, or to 0.01 where that is less: what cancels has the error of its terms."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if e.is_floating_point():
            error = (a.detach().double() - e.detach()).norm() / e.detach().norm().clamp_min(1e-2)
            assert error <= tolerance  # false for NaN too
        else:
            assert torch.equal(a, e)


@pytest.mark.parametrize("backend, spec, shape", CASES)
def test_fp32_agrees_with_the_reference_in_fp64(backend, spec, shape, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch" if backend == "torch" else "triton")
    device = "cuda" if backend == "cuda" else "cpu"
    expected = results(spec.reference, *arguments(spec, shape, torch.float32, device, widened))
    with interpreter.checked() if backend == "triton" else contextlib.nullcontext():
        actual = results(spec.function, *arguments(spec, shape, torch.float32, device))
    assert_close(actual, expected, spec.tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_entry_is_complete(spec):
    assert spec.dtypes and len(spec.shapes) >= 2
    for shape in spec.shapes:
        assert spec.flops(shape) >= 0 and spec.bytes(shape, 2) >= 0
    assert spec.bytes(spec.shapes[-1], 4) > spec.bytes(spec.shapes[-1], 2) > 0 and spec.flops(spec.shapes[-1]) > 0
    differentiable = [x for x in tensors(arguments(spec, spec.shapes[0], torch.float32)) if x.requires_grad]
    assert bool(differentiable) == spec.differentiable


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_launches_name_every_argument_of_their_kernel(spec):
    for launch in spec.launches(TARGETS["sm_90"]):
        assert {*launch.signature, *launch.constexprs} == set(launch.kernel.arg_names), launch.name
        assert set(launch.divisible) <= set(launch.signature)
    names = [(launch.kernel.__name__, launch.name) for launch in spec.launches(TARGETS["sm_90"])]
    assert len(set(names)) == len(names)


def test_registering_twice_is_refused():
    before = dict(OPS)
    with pytest.raises(ValueError, match="'rms_norm' is registered twice: import it as tritium.kernels"):
        register(SPECS["rms_norm"])
    assert before == OPS


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_a_tensor_on_the_cpu_takes_the_torch_path(monkeypatch, setting):
    monkeypatch.setenv("TRITIUM_BACKEND", setting)
    assert not switch.use_triton(torch.ones(1))


def test_a_backend_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TRITIUM_BACKEND='cuda': expected one of auto, triton, torch"):
        switch.use_triton(torch.ones(1))
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    monkeypatch.setattr(switch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        switch.use_triton(torch.ones(1))
