"""swiglu, geglu and rope: equal to the usual torch code, in both forms, and undone by what undoes them.

Below the line, as Triton kernels in the harness: layouts, traffic, addresses. (Dtypes and the rest: test_all_ops.py.)
"""

import interpreter
import pytest
import torch
import torch.nn.functional as F

from tritium.kernels import geglu, rope, swiglu
from tritium.kernels.backend import HAS_TRITON
from tritium.kernels.gated import _backward, _forward, _gated_backward, _gated_forward
from tritium.kernels.rope import _rope, rope_reference

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


ACTIVATIONS = [(swiglu, F.silu), (geglu, lambda x: F.gelu(x, approximate="tanh"))]


@pytest.mark.parametrize("function,activation", ACTIVATIONS, ids=["swiglu", "geglu"])
def test_gated_in_one_tensor_or_two(function, activation):
    gate, up = (torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    fused = torch.cat([gate, up], -1)
    results = [function(gate, up), function(fused), activation(gate) * up]
    seed = torch.randn_like(results[0])
    *ours, expected = ((y, *torch.autograd.grad(y, (gate, up), seed, retain_graph=True)) for y in results)
    for each in ours:
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_gated_extremes_stay_finite(function):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).requires_grad_()
    y = function(gate, torch.ones(5))
    assert y.tolist() == [0.0, 0.0, 0.0, 100.0, 1e4]
    assert torch.autograd.grad(y.sum(), gate)[0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("arguments", [(torch.ones(3, 5),), (torch.ones(3, 4), torch.ones(3, 5))])
def test_gated_bad_shapes_are_named(arguments):
    with pytest.raises(ValueError, match="gate"):
        swiglu(*arguments)


def angles(T, D):
    angle = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(D // 2) / (D // 2))
    return angle.cos(), angle.sin()


def test_rope_products_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 8).expand(9, 1, 8), torch.randn(1, 1, 8).expand(9, 1, 8)
    q, k = rope(q.double(), k.double(), *angles(9, 8))
    products = q[:, 0] @ k[:, 0].t()
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=1e-6, atol=1e-6)


def test_rope_by_the_negative_angle_undoes_it():
    q, k = torch.randn(9, 4, 8, dtype=torch.float64), torch.randn(9, 2, 8, dtype=torch.float64)
    cos, sin = angles(9, 8)
    back = rope(*rope(q, k, cos, sin), cos, -sin)
    torch.testing.assert_close(back, (q, k), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "q,k,T",
    [(torch.ones(4, 2, 7), torch.ones(4, 1, 7), 4), (torch.ones(4, 2, 8), torch.ones(3, 1, 8), 4)]
    + [(torch.ones(4, 2, 8), torch.ones(4, 1, 8), 5), (torch.ones(4, 2, 8), torch.ones(4, 1, 8).half(), 4)],
)
def test_rope_bad_shapes_are_named(q, k, T):
    with pytest.raises(ValueError, match="must be"):
        rope(q, k, *angles(T, 8))


def test_rope_says_that_its_angles_are_not_learned():
    cos, sin = angles(4, 8)
    with pytest.raises(ValueError, match="cos or sin requires a gradient"):
        rope(torch.ones(4, 2, 8), torch.ones(4, 1, 8), cos.requires_grad_(), sin)


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("function,activation", ACTIVATIONS, ids=["swiglu", "geglu"])
def test_gated_with_one_frozen_half(function, activation, trained):
    gate, up = inputs = [torch.randn(5, 3).requires_grad_(i == trained) for i in range(2)]
    results = function(gate, up), activation(gate) * up
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), inputs[trained]) for y in results))


# Triton only ----------------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def covered(cases):
    """Each case in one dtype; the others are long."""
    crossed = [(i, j, case) for i, case in enumerate(cases) for j in range(3)]
    return [pytest.param(*case, DTYPES[j], marks=() if i % 3 == j else pytest.mark.long) for i, j, case in crossed]


def as_good_as_torch(actual, plain, expected, dtype):
    """Errors against fp64: at most 1.5 × those of plain torch in that dtype, plus 2 ulp of the result's RMS."""
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert a.shape == e.shape and a.dtype == dtype
        error, own = ((x.detach().double() - e).square().mean().sqrt() for x in (a, p))
        assert error <= 1.5 * own + torch.finfo(dtype).eps * 2 * e.square().mean().sqrt()


def with_gradients(function, inputs, seeds, *others):
    outputs = function(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(seeds, outputs, strict=True)])


def in_fp64(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


@needs_triton
@pytest.mark.parametrize("T,F,dtype", covered([(2, 1), (1, 127), (17, 129), (3, 1000), (5, 2049)]))
@pytest.mark.parametrize("function,activation", ACTIVATIONS, ids=["swiglu", "geglu"])
def test_gated_kernels_at_any_width(function, activation, T, F, dtype):
    """gate and up are slices of a wider tensor, the gradient is expanded; the fused form gives the same bits."""
    wide = 3 * torch.randn(T, 2 * F + 3).to(dtype)
    gate, up = (wide[:, i : i + F].requires_grad_() for i in (0, F + 1))
    seeds = [torch.randint(-32, 33, (T, 1)).expand(T, F) / 16]

    def plain(gate, up):
        return activation(gate) * up

    with interpreter.checked(seed=1):
        actual = with_gradients(function, (gate, up), seeds)
    expected = with_gradients(plain, in_fp64((gate, up)), seeds)
    as_good_as_torch(actual, with_gradients(plain, (gate, up), seeds), expected, dtype)
    with interpreter.checked(seed=2):
        y, gradient = with_gradients(function, (torch.cat([gate, up], -1).detach().requires_grad_(),), seeds)
    assert torch.equal(y, actual[0]) and torch.equal(gradient, torch.cat(actual[1:], -1))


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow")  # of a square, meant to
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_gated_kernels_stay_finite_at_extremes(function):
    gate = torch.tensor([-3e38, -100.0, -0.0, 100.0, 3e38]).requires_grad_()
    with interpreter.checked():
        y = function(gate, torch.ones(5))
        (gradient,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, gate.clamp_min(0))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@needs_triton
@pytest.mark.parametrize("fused", [False, True])
def test_gated_kernels_move_each_byte_once_from_slices(fused):
    wide = torch.randn(9, 2 * 130 + 8).bfloat16()
    inputs = [wide[:, 8:]] if fused else [wide[:, :130], wide[:, 138:]]
    with interpreter.checked() as trace:
        with_gradients(swiglu, [x.requires_grad_() for x in inputs], [torch.ones(9, 130)])
    forward, backward = trace.launches
    once = 9 * 130 * 2
    assert forward.loaded == {"p_gate": once, "p_up": once} and forward.stored == {"p_y": once}
    assert backward.loaded == {"p_dy": once, "p_gate": once, "p_up": once}
    assert backward.stored == {"p_dgate": once, "p_dup": once}


@needs_triton
def test_gated_kernels_address_in_64_bits():
    """Rows 2^30 elements apart: the third is out of an int32's reach."""
    far, far_fp16 = (torch.empty_strided((5, 21), (2**30, 1), device="meta", dtype=d) for d in (None, torch.float16))
    sizes = {"GELU": True, "ROWS": 2, "BLOCK": 16}
    with interpreter.checked() as trace:
        _gated_forward[(6,)](far, far_fp16, far, *(3 * [2**30]), 5, 21, **sizes)
        _gated_backward[(6,)](far, far, far, far, far_fp16, *(5 * [2**30]), 5, 21, **sizes)
    forward, backward = trace.launches
    assert forward.stored["p_y"] == backward.stored["p_dgate"] == 2 * backward.stored["p_dup"] == 5 * 21 * 4


@needs_triton
def test_gated_operators_pass_opcheck_without_up():
    gate_up = torch.randn(3, 10)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    with interpreter.checked():
        torch.library.opcheck(_forward, (gate_up, None, False), test_utils=checks)
        torch.library.opcheck(_backward, (torch.ones(3, 5), gate_up, None, False), test_utils=checks)


@needs_triton
@pytest.mark.parametrize(
    "T,H,G,D,dtype", covered([(17, 1, 1, 2), (2, 5, 1, 80), (1, 40, 8, 128), (129, 2, 2, 6), (3, 33, 3, 256)])
)
def test_rope_kernel_on_slices_of_a_projection(T, H, G, D, dtype):
    """And with gradients that are transposed and expanded; no copies, and cos and sin are read once per token."""
    qkv = torch.randn(T, H + 2 * G, D).to(dtype).requires_grad_()
    q, k, _ = qkv.split([H, G, G], 1)
    inputs, (cos, sin) = [q.detach().requires_grad_(), k.detach().requires_grad_()], angles(T, D)
    seeds = [torch.randint(-32, 33, (D, H, T)).transpose(0, 2) / 16, torch.tensor([0.5]).expand(T, G, D)]
    with interpreter.checked(seed=1) as trace:
        actual = with_gradients(rope, inputs, seeds, cos, sin)
    plain, expected = (with_gradients(rope_reference, x, seeds, cos, sin) for x in (inputs, in_fp64(inputs)))
    as_good_as_torch(actual, plain, expected, dtype)
    angle = T * D // 2 * 4
    for launch in trace.launches:
        assert launch.loaded == {"p_q": q.nbytes, "p_k": k.nbytes, "p_cos": angle, "p_sin": angle}
        assert launch.stored == {"p_q_out": q.nbytes, "p_k_out": k.nbytes}
    assert len(trace.launches) == 2


@needs_triton
def test_rope_kernel_where_one_output_goes_unused_or_all_is_one_column_apart():
    q, k = torch.randn(8, 3, 9).transpose(0, 2).requires_grad_(), torch.randn(9, 1, 8)
    with interpreter.checked():
        actual = torch.autograd.grad(rope(q, k, *angles(9, 8))[0].sum(), q)
    wide = q.detach().double().requires_grad_()
    expected = torch.autograd.grad(rope_reference(wide, k.double(), *angles(9, 8))[0].sum(), wide)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("which", [0, 1])
def test_rope_kernel_rotates_only_the_gradients_that_are_needed(which):
    inputs = [torch.randn(9, 4, 8), torch.randn(9, 2, 8)]
    inputs[which].requires_grad_()
    with interpreter.checked() as trace:
        q, k = rope(*inputs, *angles(9, 8))
        (gradient,) = torch.autograd.grad((q, k)[which].sum(), inputs[which])
    cos, sin = angles(9, 8)
    torch.testing.assert_close(gradient, rope_reference(*(2 * [torch.ones_like(gradient)]), cos, -sin)[0])
    assert list(trace.launches[1].stored) == [("p_q_out", "p_k_out")[which]]


@needs_triton
def test_rope_kernel_addresses_in_64_bits():
    """Tokens, heads and columns 2^29 elements apart or more."""
    T, H, G, half = 5, 6, 1, 3
    q = torch.empty_strided((T, H, 2 * half), (2**35, 2**32, 2**29), device="meta")
    k = torch.empty_strided((T, G, 2 * half), (2**30, 2 * half, 1), device="meta")
    out = [torch.empty_strided((T, heads, 2 * half), (2**30, 2 * half, 1), device="meta") for heads in (H, G)]
    cos = torch.empty_strided((T, half), (2**30, 1), device="meta")
    sizes = {"BLOCK_T": 2, "BLOCK_H": 4, "BLOCK_G": 1, "BLOCK_D": 4}
    with interpreter.checked() as trace:
        _rope[(3,)](
            q, k, cos, cos, *out, *q.stride(), *k.stride(), 2**30, 2**30, 2**30, T,
            H=H, G=G, HALF=half, INVERSE=True, **sizes,
        )  # fmt: skip
    assert trace.launches[0].stored == {"p_q_out": T * H * 2 * half * 4, "p_k_out": T * G * 2 * half * 4}


@needs_triton
@pytest.mark.parametrize("function", [swiglu, geglu, rope])
def test_order_of_programs_changes_no_bit(function):
    inputs = [torch.randn(70, 2, 72).bfloat16().requires_grad_() for _ in range(2)]
    others, seeds = (angles(70, 72), inputs) if function is rope else ((), inputs[:1])

    def run(seed):
        with interpreter.checked(seed):
            return with_gradients(function, inputs, seeds, *others)

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(1), strict=True))
