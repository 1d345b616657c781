"""What must hold for every op of the registry besides agreement in fp32 (test_registry.py): dtypes, layouts, edges."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from tritium.kernels import all_ops

OPS = all_ops()
IN_PLACE = {"adamw_"}  # returns nothing; see test_adamw.py
FUNCTIONAL = sorted(set(OPS) - IN_PLACE)
CASES = [(name, i) for name in FUNCTIONAL for i in range(len(OPS[name].shapes) - 1)]  # the last is for benchmarks
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


def floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def cast(tree, dtype):
    """Copies of all floating tensors in `dtype`, requiring a gradient where the originals did."""
    return tree_map(lambda x: x.detach().to(dtype).requires_grad_(x.requires_grad) if floating(x) else x, tree)


def run(function, args, kwargs, contiguous=True):
    """Floating outputs of a call, then the gradients of all inputs that require one, for fixed output gradients."""
    outputs = [y for y in tree_flatten(function(*args, **kwargs))[0] if floating(y)]
    leaves = [x for x in tree_flatten(args)[0] if floating(x) and x.requires_grad]
    if not leaves:
        return outputs
    generator = torch.Generator().manual_seed(1)
    # a multiple of 1/16, the same number in every dtype; expanded ones have stride 0, as after .sum()
    seeds = [(torch.randint(-32, 33, y.shape, generator=generator) / 16).to(y.dtype) for y in outputs]
    if not contiguous:
        seeds = [torch.full((), 0.5, dtype=y.dtype).expand(y.shape) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, seeds))


def rms_error(actual, expected):
    return (actual.detach().double() - expected.detach()).square().mean().sqrt().item() if actual.numel() else 0.0


def rms(x):
    return x.detach().square().mean().sqrt().item() if x.numel() else 0.0


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("name,i", [case for case in CASES if case[1] == min(1, len(OPS[case[0]].shapes) - 2)])
def test_half_precision_is_as_good_as_plain_torch(name, i, dtype):
    """Against fp64 on the same inputs: at most 1.5 × the reference's own error in that dtype, plus 2 ulp of the RMS."""
    spec = OPS[name]
    args, kwargs = cast(spec.example(spec.shapes[i], torch.float32, "cpu"), dtype)
    actual, plain = run(spec.function, args, kwargs), run(spec.reference, args, kwargs)
    expected = run(spec.reference, *cast((args, kwargs), torch.float64))
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert rms_error(a, e) <= 1.5 * rms_error(p, e) + 2 * ULP[dtype] * rms(e)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_any_layout_of_inputs_and_gradients(name):
    """Transposed inputs and gradients of stride 0 give what contiguous ones give."""
    spec = OPS[name]
    args, kwargs = spec.example(spec.shapes[1], torch.float64, "cpu")

    def strided(x):
        """The same values with the memory of a transposed tensor, or every second element of a longer one."""
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        if x.dim() == 1:
            return x.detach().repeat_interleave(2)[::2].requires_grad_(x.requires_grad)
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(x.requires_grad)

    actual = run(spec.function, *tree_map(strided, (args, kwargs)), contiguous=False)
    expected = run(spec.reference, *cast((args, kwargs), torch.float64), contiguous=False)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(name for name in FUNCTIONAL if OPS[name].differentiable))
def test_gradcheck(name):
    spec = OPS[name]
    args, kwargs = spec.example(spec.shapes[1], torch.float64, "cpu")
    places = [i for i, x in enumerate(args) if floating(x) and x.requires_grad]

    def function(*leaves):
        filled = list(args)
        for i, leaf in zip(places, leaves, strict=True):
            filled[i] = leaf
        return tuple(y for y in tree_flatten(spec.function(*filled, **kwargs))[0] if floating(y))

    assert torch.autograd.gradcheck(function, [args[i] for i in places], fast_mode=True)


@pytest.mark.parametrize("name", sorted(OPS))
def test_costs_are_positive_and_grow_with_the_shape(name):
    spec = OPS[name]
    small, large = spec.shapes[0], spec.shapes[-1]
    assert 0 < spec.flops(small) < spec.flops(large)
    assert 0 < spec.bytes(small, 2) < spec.bytes(large, 2) < spec.bytes(large, 4)


@pytest.mark.parametrize("name", ["linear_logprob", "lora_linear", "rope", "swiglu"])  # what a training step calls
def test_torch_compile_sees_through(name):
    spec = OPS[name]
    args, kwargs = spec.example(spec.shapes[1], torch.float64, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: spec.function(*args, **kwargs), backend="aot_eager", fullgraph=True)
    for a, e in zip(run(compiled, args, {}), run(spec.function, args, kwargs), strict=True):
        torch.testing.assert_close(a, e)
