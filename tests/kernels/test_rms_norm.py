"""RMSNorm on the torch path and as Triton kernels, interpreted: values, gradients, traffic, addresses, compilation."""

import contextlib
import importlib

import interpreter
import pytest
import torch
import torch.nn.functional as F

from tritium.kernels import rms_norm
from tritium.kernels.backend import HAS_TRITON
from tritium.kernels.rms_norm import _backward, _forward, _rms_norm_backward, _rms_norm_forward, _rms_norm_mean
from tritium.kernels.rms_norm import rms_norm_reference as reference

file = importlib.import_module("tritium.kernels.rms_norm")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def make(*shape, dtype=torch.float32, residual=True):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    tensors = [x, weight, torch.randn(*shape, dtype=dtype)] if residual else [x, weight]
    return [t.requires_grad_() for t in tensors]


def outputs_and_gradients(function, inputs, **options):
    """Outputs, then gradients by each input, for one fixed random gradient of every output."""
    x, weight, residual = (*inputs, None)[:3]
    outputs = function(x, weight, residual=residual, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    # Multiples of 1/16 are the same numbers in every dtype.
    seeds = [torch.randint(-32, 33, y.shape, generator=generator).to(y.dtype) / 16 for y in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, seeds))


def errors(actual, expected):
    return [float((a.double() - e).norm().detach() / e.norm().detach()) for a, e in zip(actual, expected, strict=True)]


def in_fp64(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 33), (300, 16), (3, 17001)])  # 17001: wider than a block, and odd
def test_fp32_agrees_with_fp64(backend, shape, residual):
    inputs = make(*shape, residual=residual)
    actual = outputs_and_gradients(rms_norm, inputs, offset=1.0, eps=1e-3)
    expected = outputs_and_gradients(reference, in_fp64(inputs), offset=1.0, eps=1e-3)
    assert max(errors(actual, expected)) < 2e-6  # fp32 sums of up to 17001 terms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_it_stores(backend, dtype):
    inputs = make(40, 129, dtype=dtype)
    actual = outputs_and_gradients(rms_norm, inputs)
    expected = outputs_and_gradients(reference, in_fp64(inputs))
    # One rounding of the sum, which feeds the rest, and one of each result: 1.5 of them, over √12 as they are uniform.
    assert max(errors(actual, expected)) < 1.5 * torch.finfo(dtype).eps / 12**0.5
    assert [t.dtype for t in actual] == [dtype] * len(actual)


def test_what_is_normalised_is_the_sum_that_is_returned(backend):
    x, weight, residual = make(3, 64, dtype=torch.bfloat16)
    y, summed = rms_norm(x, weight, residual=residual)
    assert torch.equal(summed, x + residual) and torch.equal(y, rms_norm(summed, weight))


def test_fp64_gradients_are_exact(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    x, weight, residual = make(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, offset=1.0), (x, weight, residual))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))


def test_weight_may_have_another_dtype(backend):
    x, weight = make(4, 24, dtype=torch.bfloat16, residual=False)
    weight = weight.detach().float().requires_grad_()
    y, dx, dweight = outputs_and_gradients(rms_norm, [x, weight])
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert errors([dweight], outputs_and_gradients(reference, in_fp64([x, weight]))[2:])[0] < 1e-6


def test_any_strides_of_inputs_and_gradients(backend):
    x = torch.randn(12, 7).t()  # columns apart
    residual = torch.randn(12).expand(7, 12)  # rows on top of each other
    inputs = [x.requires_grad_(), torch.randn(24)[::2].requires_grad_(), residual.requires_grad_()]

    def gradients(inputs):
        y, summed = (rms_norm if inputs[0].dtype == torch.float32 else reference)(*inputs[:2], residual=inputs[2])
        return torch.autograd.grad(y.sum() + summed.t()[::3].sum(), inputs)  # a gradient of strides (0, 0)

    assert max(errors(gradients(inputs), gradients(in_fp64(inputs)))) < 1e-6


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_may_go_unused(backend, used):
    inputs = make(5, 8)
    x, weight, residual = inputs
    grads = torch.autograd.grad(rms_norm(x, weight, residual=residual)[used].sum(), inputs, allow_unused=True)
    wide = in_fp64(inputs)
    outputs = reference(*wide[:2], residual=wide[2])
    expected = torch.autograd.grad(outputs[used].sum(), wide, allow_unused=True)
    assert (grads[1] is None) == (expected[1] is None) == (used == 1)
    pairs = [(g, e) for g, e in zip(grads, expected, strict=True) if g is not None]
    assert max(errors(*zip(*pairs, strict=True))) < 1e-6


@pytest.mark.filterwarnings("error")  # torch warns of a norm in two dtypes
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_gradient_few_rows_are_the_same(dtype, offset):
    """A model's log-probs in generation and in training: an fp32 weight is not rounded in one of them."""
    x, weight = (t.detach() for t in make(5, 64, residual=False))
    x, expected = x.to(dtype), rms_norm(x.to(dtype).requires_grad_(), weight, offset=offset)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, offset=offset), expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_costs_none(backend):
    x, weight, residual = make(5, 8)
    gradients = outputs_and_gradients(rms_norm, [x, weight, residual])[2:]
    generator, (y, summed) = torch.Generator().manual_seed(1), rms_norm(x, weight.detach(), residual=residual)
    seeds = [torch.randint(-32, 33, z.shape, generator=generator).to(z.dtype) / 16 for z in (y, summed)]
    frozen = torch.autograd.grad((y, summed), (x, residual), seeds)
    assert torch.equal(frozen[0], gradients[0]) and torch.equal(frozen[1], gradients[2])


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in rows that are masked
def test_rows_whose_rstd_cubed_overflows(backend):
    x, weight = (t.detach() for t in make(4, 32, residual=False))
    inputs = [(1e-15 * x).requires_grad_(), weight.requires_grad_()]
    expected = outputs_and_gradients(reference, in_fp64(inputs), eps=0.0)
    assert max(errors(outputs_and_gradients(rms_norm, inputs, eps=0.0), expected)) < 2e-6


def test_no_rows_give_no_rows_and_zero_gradients(backend):
    x, weight, residual = make(0, 8)
    y, summed = rms_norm(x, weight, residual=residual)
    (y.sum() + summed.sum()).backward()
    assert y.shape == summed.shape == (0, 8)
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_a_row_of_zeros_or_of_one_element(backend):
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight).sum().backward()
    assert torch.allclose(x.grad, (weight * 1e3).expand(2, 8))  # rstd = 1 / sqrt(eps)
    assert torch.allclose(rms_norm(torch.tensor([[-3.0]]), torch.tensor([2.0])), torch.tensor([[-2.0]]))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(15,\).*\(4, 16\)"):
        rms_norm(torch.randn(4, 16), torch.randn(15))
    with pytest.raises(ValueError, match=r"\(16,\).*\(4, 16\)"):
        rms_norm(torch.randn(4, 16), torch.randn(16), residual=torch.randn(16))
    with pytest.raises(ValueError, match="bfloat16"):
        rms_norm(torch.randn(4, 16), torch.randn(16), residual=torch.randn(4, 16).bfloat16())


def test_compiles_as_one_graph(backend):
    inputs = make(6, 16)
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    actual = outputs_and_gradients(compiled, inputs)
    assert max(errors(actual, outputs_and_gradients(reference, in_fp64(inputs)))) < 1e-6


def test_agrees_with_torch(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    x, weight = make(9, 32, residual=False)
    assert torch.allclose(rms_norm(x, weight, 1e-5), F.rms_norm(x, (32,), weight, 1e-5), atol=1e-6)


# Triton only ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_registered_ops_pass_opcheck():
    x, weight, residual = (t.detach() for t in make(5, 12))
    with interpreter.checked():
        for arguments in [(x, weight, None), (x, weight, residual)]:
            torch.library.opcheck(_forward, (*arguments, 1e-6, 0.0))
        for ds in (None, x):
            for needs_weight in (True, False):
                torch.library.opcheck(_backward, (x, ds, x, weight, torch.rand(5), 1.0, needs_weight))


@needs_triton
@pytest.mark.parametrize("shape, programs", [((5, 48), (1, 1)), ((9, 1030), (4, 2))])  # one tile each, and several
def test_moves_each_byte_once(shape, programs, monkeypatch):
    monkeypatch.setattr(file, "FORWARD_LEAST", 4)
    monkeypatch.setattr(file, "BACKWARD_LEAST", 2)
    x, weight, residual = make(*shape, dtype=torch.bfloat16)
    with interpreter.checked() as trace:
        outputs_and_gradients(rms_norm, [x, weight, residual])
    forward, backward = trace.launches
    assert [launch.kernel for launch in trace.launches] == ["_rms_norm_forward", "_rms_norm_backward"]
    assert (forward.grid[0], backward.grid[0]) == programs
    assert forward.loaded == {"p_x": x.nbytes, "p_residual": x.nbytes, "p_weight": weight.nbytes * forward.grid[0]}
    assert forward.stored == {"p_y": x.nbytes, "p_sum": x.nbytes, "p_rstd": 4 * len(x)}
    once = {name: x.nbytes for name in ("p_dy", "p_ds", "p_s")}
    assert backward.loaded == once | {"p_weight": weight.nbytes * backward.grid[0], "p_rstd": 4 * len(x)}
    assert backward.stored == {"p_dx": x.nbytes, "p_partial": 2 * weight.nbytes * backward.grid[0]}


@needs_triton
def test_a_frozen_weight_has_no_partial_sums():
    x, weight = make(5, 48, residual=False)
    with interpreter.checked() as trace:
        rms_norm(x, weight.detach()).sum().backward()
    assert set(trace.launches[1].stored) == {"p_dx"}


@needs_triton
def test_partial_sums_are_little_even_with_torch_s_second_look():
    x, weight = make(2048, 64, dtype=torch.bfloat16, residual=False)
    with interpreter.checked() as trace:
        outputs_and_gradients(rms_norm, [x, weight])
    backward = trace.launches[1]
    moved = backward.bytes_loaded + backward.bytes_stored
    assert moved <= 1.055 * 3 * x.nbytes  # rstd counts twice as much as with E = 128
    assert moved + backward.stored["p_partial"] <= 1.085 * 3 * x.nbytes


@needs_triton
def test_rows_wider_than_a_block_are_read_twice():
    x, weight = make(3, 16400, dtype=torch.bfloat16, residual=False)
    with interpreter.checked() as trace:
        outputs_and_gradients(rms_norm, [x, weight])
    forward, mean, backward = trace.launches
    assert [launch.kernel[10:] for launch in trace.launches] == ["forward", "mean", "backward"]
    assert forward.loaded["p_x"] == 2 * x.nbytes and forward.stored["p_y"] == x.nbytes
    assert mean.loaded["p_s"] == backward.loaded["p_s"] == mean.loaded["p_dy"] == backward.loaded["p_dy"] == x.nbytes
    assert backward.stored["p_dx"] == x.nbytes


@needs_triton
@pytest.mark.parametrize("E, block", [(6, 8), (13, 8)])  # in one block, and in two
def test_offsets_are_64_bits_wide(E, block):
    """Rows 2^30 elements apart: the third is out of an int32's reach."""
    sizes = {"E": E, "ROWS": 2, "BLOCK": block}

    def far():
        return torch.empty_strided((5, E), (2**30, 1), device="meta")

    row, weight, stride = torch.ones(5, device="meta"), torch.ones(E, device="meta"), 2**30
    with interpreter.checked() as trace:
        _rms_norm_forward[(3,)](
            far(), far(), weight, far(), far(), row, *(4 * [stride]), 5, 1e-6, 0.0, HAS_RESIDUAL=True, **sizes
        )
        _rms_norm_backward[(3, -(-E // block))](
            far(), far(), far(), weight, row, row, far(), far()[:3], *(5 * [stride]), 5, 0.0,
            HAS_DS=True, HAS_DWEIGHT=True, **sizes,
        )  # fmt: skip
        _rms_norm_mean[(5,)](far(), far(), weight, row, row, stride, stride, 0.0, E=E, BLOCK=block)
    forward, backward, mean = trace.launches
    assert forward.stored["p_y"] == forward.stored["p_sum"] == backward.stored["p_dx"] == 5 * E * 4
    assert backward.stored["p_partial"] == 3 * E * 4 and mean.loaded["p_dy"] == 5 * E * 4


@needs_triton
def test_order_of_programs_changes_no_bit():
    inputs = make(300, 16)

    def run(seed):
        with interpreter.checked(seed):
            return outputs_and_gradients(rms_norm, inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(1), strict=True))
