"""The switch between backends, and what surrounds every operator: the device of its tensors, no autocast."""

import contextlib
import importlib

import interpreter
import pytest
import torch
from shapes import SHAPES
from torch.utils._pytree import tree_leaves, tree_map

from tritium.kernels import all_ops, rms_norm
from tritium.kernels.backend import HAS_TRITON, TARGETS, use_triton

OPS = all_ops()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def results(spec, shape):
    """Of the example in fp32: outputs, arguments (an op may change them), gradients."""
    torch.manual_seed(0)
    args, kwargs = spec.example(shape, torch.float32, "cpu")
    args = tree_map(lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x, args)
    outputs = [y for y in tree_leaves(spec.function(*args, **kwargs)) if isinstance(y, torch.Tensor)]
    through = [y for y in outputs if y.requires_grad]
    inputs = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    seeds = [torch.cos(torch.arange(y.numel())).view(y.shape) for y in through]
    wanted = [x for x in inputs if x.requires_grad]
    return [*outputs, *inputs, *(torch.autograd.grad(through, wanted, seeds) if through else ())]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_bit(name, backend, monkeypatch):
    if backend == "triton" and not OPS[name].launches(TARGETS["sm_80"]):
        pytest.skip("no kernel")
    monkeypatch.setenv("TRITIUM_BACKEND", backend)
    with interpreter.checked() if backend == "triton" else contextlib.nullcontext():
        expected = results(OPS[name], SHAPES[name][1])
        with torch.autocast("cpu", torch.bfloat16):
            actual = results(OPS[name], SHAPES[name][1])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@needs_triton
@pytest.mark.parametrize("name", [name for name, spec in OPS.items() if spec.launches(TARGETS["sm_80"])])
def test_kernels_are_launched_on_the_device_of_their_tensors(name, monkeypatch):
    """Triton takes the current device, whatever its tensors are on."""
    entered = []

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x.device)
        yield
        entered.pop()

    class Trace(interpreter.LaunchTrace):
        def __init__(self, kernel):
            assert entered, f"{kernel} is launched on the current device"
            super().__init__(kernel)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter, "LaunchTrace", Trace)
    with interpreter.checked() as trace:
        results(OPS[name], SHAPES[name][1])
    assert trace.launches


@needs_triton
def test_fp64_anywhere_takes_the_torch_path():
    x = torch.zeros(2)
    with interpreter.checked():
        assert use_triton(x, None, x.bfloat16(), x.int())
        assert not use_triton(x.double()) and not use_triton(x, None, x.double())


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "segment_sum", "gae", "lora_linear", "adamw"])
def test_tensors_on_several_devices_are_named(name):
    spec = OPS["adamw_" if name == "adamw" else name]
    (first, *rest), kwargs = spec.example(SHAPES[spec.name][1], torch.float32, "cpu")
    moved = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, rest)
    with pytest.raises(ValueError, match="tensors on cpu and on meta"):
        spec.function(first, *moved, **kwargs)


INT = torch.ones(4, 8).long()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("rms_norm", (INT, torch.ones(8))),
        ("rms_norm", (INT.float(), torch.ones(8).int())),
        ("swiglu", (INT,)),
        ("geglu", (INT, INT)),
        ("rope", (INT[:, None], INT[:, None], torch.ones(4, 4), torch.ones(4, 4))),
        ("segment_sum", (INT[0], torch.tensor([0, 8]))),
        ("gae", (torch.ones(8), INT[0], torch.tensor([0, 8]), 0.9, 0.9)),
        ("lora_linear", (INT, INT, INT[:1], INT[:, :1], 1.0)),
        ("global_norm", ([INT],)),
    ],
)
def test_integers_are_refused(name, arguments):
    with pytest.raises(ValueError, match=r"is torch.int\d\d, wanted a floating-point dtype"):
        OPS[name].function(*arguments)


@pytest.mark.parametrize(
    "name, arguments, options, message",
    [
        ("attention", (torch.ones(4, 2, 8),) * 3, {"cu_seqlens": [0, 4]}, "cu_seqlens is a list and no tensor, wanted"),
        ("segment_sum", (torch.ones(4), [0, 4]), {}, "cu_seqlens is a list and no tensor, wanted torch.int32"),
        ("gae", (torch.ones(4), torch.ones(4), (0, 4), 0.9, 0.9), {}, "cu_seqlens is a tuple and no tensor"),
        ("rms_norm", ([1.0, 2.0], torch.ones(2)), {}, "x is a list and no tensor, wanted a floating-point dtype"),
        (
            "linear_logprob",
            (torch.ones(2, 8), torch.ones(3, 8), [0, 1]),
            {},
            r"got a list \(\[0, 1\]\), wanted a tensor",
        ),
        ("cross_entropy", (torch.ones(2, 8), [0, 1]), {}, r"got a list \(\[0, 1\]\), wanted a tensor on cpu"),
    ],
)
def test_python_lists_are_refused_by_name(name, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        OPS[name].function(*arguments, **options)


def test_autocast_gives_way_where_it_is_nested(monkeypatch):
    """fp32 stays fp32, also in a backward that runs under autocast."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    x, weight = torch.randn(64, 128), torch.randn(128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rms_norm(x, weight).square().sum().backward()
        assert (x @ x.t()).dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    importlib.import_module("tritium.kernels.rms_norm").rms_norm_reference(x.double(), exact).square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
