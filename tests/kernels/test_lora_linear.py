"""LoRA on dense and NF4 bases, on the torch path and as Triton kernels, interpreted.

Dropout, bias, frozen parts, leading dimensions, bad input; traffic, addresses, compilation. (Also: test_all_ops.py.)
"""

import contextlib
import itertools

import interpreter
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tritium.kernels import dequantize_nf4, lora_linear, quantize_nf4
from tritium.kernels.backend import HAS_TRITON, TARGETS
from tritium.kernels.lora_linear import _config, _dropped, _lora_dropped, _lora_matmul, _matmul
from tritium.kernels.lora_linear import lora_linear_reference as reference
from tritium.kernels.nf4 import CODES

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def make(*leading, E=6, F=5, R=2, dtype=torch.float32, requires_grad=True):
    """x, weight, a, b, bias; the sizes of a product's terms such that each matters."""
    shapes = ((*leading, E), (F, E), (R, E), (F, R), (F,))
    return [(torch.randn(s) / s[-1] ** 0.5).to(dtype).requires_grad_(requires_grad) for s in shapes]


def gradients(y, inputs):
    """y, and the gradients of `inputs`, for one fixed gradient of y: multiples of 1/16, the same in every dtype."""
    dy = torch.randint(-32, 33, y.shape, generator=torch.Generator().manual_seed(1)) / 16
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y))]


def rms(x):
    return x.double().square().mean().sqrt().item()


def agree(actual, expected, tolerance=2e-6):
    return all(rms(a - e) <= tolerance * rms(e) for a, e in zip(actual, expected, strict=True))


def test_bias_and_leading_dimensions(backend):
    x, weight, a, b, bias = inputs = make(2, 3)
    actual = gradients(lora_linear(x, weight, a, b, 0.5, bias=bias), inputs)
    assert agree(actual, gradients(x @ weight.t() + bias + 0.5 * x @ a.t() @ b.t(), inputs))
    assert actual[0].shape == (2, 3, 5) and actual[1].shape == x.shape
    assert lora_linear(x[0, 0], weight, a, b, 0.5).shape == (5,)


def test_bias_and_factors_of_any_strides(backend):
    x, weight, a, b, bias = make(7, E=64, F=70, R=3, requires_grad=False)
    wide = [t.repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in (x, weight, a, b, bias)]
    wide[0] = x[:1].expand(7, 64).requires_grad_()
    same = [t.detach().clone().requires_grad_() for t in wide]
    packed = quantize_nf4(weight)
    for base in (False, True):
        (x, w, a, b, bias), (x_, w_, a_, b_, bias_) = wide, same
        w, w_ = (packed, dequantize_nf4(packed)) if base else (w, w_)
        actual = gradients(lora_linear(x, w, a, b, 2.0, bias=bias), (x, a, b, bias))
        assert agree(actual, gradients(reference(x_, w_, a_, b_, 2.0, bias=bias_), (x_, a_, b_, bias_)))


def test_the_torch_path_drops_the_adapter_s_input_only(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    x, weight, a, b, _ = make(64, dtype=torch.float64)
    torch.manual_seed(3)
    ours = lora_linear(x, weight, a, b, 0.5, dropout=0.4)
    torch.manual_seed(3)
    dropped, _ = torch.native_dropout(x, 0.4, True)
    expected = x @ weight.t() + 0.5 * dropped @ a.t() @ b.t()
    torch.testing.assert_close(gradients(ours, (x, weight, a, b)), gradients(expected, (x, weight, a, b)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nf4_base_acts_as_its_dense_form(backend, dropout):
    x, weight, a, b, _ = make(9, E=64, F=80, dtype=torch.bfloat16)
    packed = quantize_nf4(weight)
    actual, expected = [], []
    for base, results in ((packed, actual), (dequantize_nf4(packed), expected)):
        torch.manual_seed(3)
        results += gradients(lora_linear(x, base, a, b, 2.0, dropout=dropout), (x, a, b))
    assert all(torch.equal(p, q) for p, q in zip(actual, expected, strict=True))


def test_nf4_is_dequantised_to_the_dtype_of_x(backend):
    x, weight, a, b, _ = make(3, E=64)
    packed = quantize_nf4(weight.bfloat16())
    exact = reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in (x, packed, a, b)), 1.0)
    assert agree([lora_linear(x, packed, a, b, 1.0).detach()], [exact.detach()])


def test_only_what_requires_a_gradient_gets_one(backend):
    x, weight, a, b, _ = make(4)
    y = lora_linear(x.detach(), weight.detach(), a, b, 1.0)
    y.sum().backward()
    assert x.grad is None and weight.grad is None and a.grad.norm() > 0 and b.grad.norm() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_tokens_give_no_rows_and_zero_gradients(backend, dropout):
    x, weight, a, b, bias = inputs = make(2, 0)
    y = lora_linear(x, weight, a, b, 1.0, bias=bias, dropout=dropout)
    assert y.shape == (2, 0, 5)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, inputs, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"a": torch.randn(2, 7)},
            r"x \(4, 6\), weight \(5, 6\), a \(2, 7\).*wanted x \[..., in\], weight",
        ),
        ({"b": torch.randn(5, 3)}, r"b \(5, 3\); wanted"),
        (
            {"x": torch.ones(4, 0), "weight": torch.ones(5, 0), "a": torch.ones(2, 0)},
            r"a \(2, 0\).*wanted .*in ≥ 1",
        ),
        ({"x": torch.tensor(1.0)}, r"x \(\),.*; wanted"),
        ({"weight": torch.randn(6)}, r"weight \(6,\),.*; wanted"),
        ({"bias": torch.zeros(6)}, r"bias \(6,\); wanted"),
        ({"a": torch.randn(257, 6), "b": torch.randn(5, 257)}, r"a has shape \(257, 6\), wanted a rank of 1 to 256"),
        ({"a": torch.randn(0, 6), "b": torch.randn(5, 0)}, r"a has shape \(0, 6\), wanted a rank of 1 to 256"),
        ({"b": torch.randn(5, 2).bfloat16()}, "x torch.float32,.* b torch.bfloat16; wanted one floating dtype"),
        ({"dropout": 1.0}, "dropout is 1.0, wanted 0 <= dropout < 1"),
        ({"weight": quantize_nf4(torch.randn(5, 7))}, r"weight \(5, 7\),.*; wanted"),
        ({"x": torch.randn(4, 6, device="meta")}, "tensors on meta and on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, a, b, _ = make(4)
    with pytest.raises(ValueError, match=message):
        lora_linear(**dict(x=x, weight=weight, a=a, b=b, scale=1.0) | change)


# Triton only ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 64, 1, 1), (2, 17, 127, 7), (17, 128, 144, 16), (65, 192, 64, 100), (129, 64, 48, 256), (200, 100, 3, 2)]
CASES = [  # T, E, F, R; NF4; dropout; dtype
    pytest.param(*case, marks=() if i % 9 == i // 18 % 9 else pytest.mark.long)
    for i, case in enumerate(itertools.product(SHAPES, (False, True), (0.0, 0.3), ULP))
]


def kept(x, seed, dropout):
    """The mask that the kernels draw, [T, E] bool: Philox 4×32 of ten rounds, four neighbours from a counter."""
    T, E = x.shape
    low, seed = np.uint64(0xFFFFFFFF), np.uint64(seed)
    counter = np.arange(T * -(-E // 4), dtype=np.uint64)
    c, key = [counter & low, counter >> np.uint64(32), 0 * counter, 0 * counter], [seed & low, seed >> np.uint64(32)]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> np.uint64(32)) ^ c[1] ^ key[0], q & low, (p >> np.uint64(32)) ^ c[3] ^ key[1], p & low]
        key = [(k + np.uint64(step)) & low for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    bits = np.stack([c[i].astype(np.uint32).view(np.int32) for i in (0, 2, 1, 3)], 1).reshape(T, -1)[:, :E]
    uniform = np.where(bits < 0, ~bits, bits).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform >= np.float32(dropout))


@needs_triton
@pytest.mark.parametrize("shape, nf4, dropout, dtype", CASES)
def test_as_good_as_plain_torch_with_the_same_mask(shape, nf4, dropout, dtype):
    T, E, F, R = shape
    x, weight, a, b, bias = make(T, E=E, F=F, R=R, dtype=dtype)
    base = quantize_nf4(weight) if nf4 else weight
    weight = dequantize_nf4(base).requires_grad_() if nf4 else weight
    with interpreter.checked():
        torch.manual_seed(7)
        y = lora_linear(x, base, a, b, 0.75, bias=bias, dropout=dropout)
        inputs = (x, a, b, bias, *(() if nf4 else (weight,)))
        actual = gradients(y, inputs)
        torch.manual_seed(7)
        keep = kept(x, torch.randint(2**63 - 1, (1,)).item(), dropout)

    def plain(dtype):
        x, w, a, b, bias = (t.detach().to(dtype).requires_grad_() for t in (*inputs[:1], weight, *inputs[1:4]))
        dropped = x * keep / (1 - dropout) if dropout else x
        y = x @ w.t() + 0.75 * (dropped @ a.t() @ b.t()) + bias
        return gradients(y, (x, a, b, bias, *(() if nf4 else (w,))))

    for mine, torchs, exact in zip(actual, plain(dtype), plain(torch.float64), strict=True):
        assert rms(mine - exact) <= 1.5 * rms(torchs - exact) + 2 * ULP[dtype] * rms(exact)


@needs_triton
def test_the_mask_is_random_and_its_seed_decides():
    x = torch.ones(300, 130)
    first, other = kept(x, 2**40 + 1, 0.3).float(), kept(x, 2**40 + 2, 0.3).float()
    # 39,000 draws: the mean of a mask, and of what two have in common, to five standard deviations
    assert first.mean() == pytest.approx(0.7, abs=0.012)
    for p, q in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert (p * q).mean() == pytest.approx(0.49, abs=0.013)
    with interpreter.checked():  # the kernels draw this one
        drawn = _dropped(x, torch.eye(130), torch.tensor([2**40 + 1]), 0.3, False)
    torch.testing.assert_close(drawn, first / 0.7)


@needs_triton
def test_manual_seed_repeats_a_mask_and_a_checkpoint_recomputes_it():
    x, weight, a, b, _ = inputs = make(40)

    def run(with_checkpoint):
        def layer(*tensors):
            return lora_linear(*tensors, 1.0, dropout=0.5)

        y = checkpoint(layer, x, weight, a, b, use_reentrant=False) if with_checkpoint else layer(x, weight, a, b)
        return gradients(y, inputs[:4])

    with interpreter.checked():
        results = []
        for with_checkpoint in (False, True):
            torch.manual_seed(5)
            results.append(run(with_checkpoint))
        other = run(False)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    assert not torch.equal(other[0], results[0][0])


@needs_triton
@pytest.mark.parametrize("nf4", [False, True])
def test_traffic_is_that_of_the_tiles(nf4):
    """Two rows and two columns of tiles; with dropout, its kernels read x and a once."""
    T, E, F, R, size = 130, 192, 144, 16, 2
    x, weight, a, b, bias = make(T, E=E, F=F, R=R, dtype=torch.bfloat16)
    with interpreter.checked() as trace:
        y = lora_linear(x, quantize_nf4(weight) if nf4 else weight, a, b, 1.0, bias=bias, dropout=0.1)
        gradients(y, (x, a, b))
    inner, forward, dx, da = trace.launches
    blocks = E * F // 64
    for launch, K, N in ((forward, E, F), (dx, F, E)):
        assert launch.kernel == "_lora_matmul" and launch.grid == (4, 1, 1)
        assert launch.loaded["p_x"] == 2 * T * K * size and launch.loaded["p_inner"] == 2 * T * R * size
        assert launch.loaded["p_w"] == 2 * (32 * blocks if nf4 else E * F * size)
        assert launch.loaded["p_absmax"] == (2 * blocks if nf4 else 0)
        assert launch.loaded["p_b"] == 2 * N * R * size
        assert launch.stored == {"p_y": T * N * size}
    assert forward.loaded["p_bias"] == 2 * F * size and forward.loaded["p_seed"] == 0 and dx.loaded["p_seed"] == 4 * 8
    assert inner.kernel == da.kernel == "_lora_dropped"
    assert inner.loaded["p_x"] == da.loaded["p_x"] == x.nbytes
    assert inner.stored == {"p_out": T * R * size} and da.stored == {"p_out": E * R * size}


TINY = {"BM": 16, "BN": 16, "BK": 16, "BR": 16, "GROUP": 8, "CODES": CODES}


@needs_triton
@pytest.mark.parametrize("E, F, step, tiles", [(64, 128, 1, 2), (60, 128, 1, 6), (64, 130, 1, 9), (64, 128, 2, 2)])
def test_rows_that_are_loaded_element_by_element_have_small_tiles(E, F, step, tiles):
    """Large ones would spill: an address for each element. 130 tokens are two large tiles, or three small ones."""
    x, weight, a, b, _ = make(130, E=step * E, F=F, dtype=torch.bfloat16, requires_grad=False)
    x, weight, a = (t[:, ::step] for t in (x, weight, a))
    with interpreter.checked() as trace:
        y = lora_linear(x, weight, a, b, 1.0)
    assert trace.launches[-1].grid[0] == (tiles if step == 1 else 6)
    assert agree([y], [reference(x.double(), weight.double(), a.double(), b.double(), 1.0)], 2**-8)


@needs_triton
@pytest.mark.parametrize("rows, columns", [(3, 5), (8, 2), (19, 3)])  # less than a group, one, two and a part
def test_each_tile_is_some_program_s(rows, columns):
    x, weight, a, b, _ = make(16 * rows - 1, E=24, F=16 * columns - 1, requires_grad=False)
    inner, y = x @ a.t(), torch.empty(len(x), len(b))
    strides = (x.stride(0), *weight.stride(), inner.stride(0), *b.stride())
    with interpreter.checked():
        _lora_matmul[(rows * columns,)](
            x, weight, weight, weight, weight, inner, b, None, None, y, *strides, *y.shape, 24, 0.5, 0.0,
            NF4=None, HAS_BIAS=False, DROPOUT=False, R=2, **TINY,
        )  # fmt: skip
    assert agree([y], [reference(x, weight, a, b, 0.5)])


def far(*shape, stride, dtype=torch.bfloat16):
    return torch.empty_strided(shape, stride, device="meta", dtype=dtype)


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_the_matmul_are_64_bits_wide(transposed):
    """Rows 2^30 elements apart: the third is out of an int32's reach."""
    T, K, N, R, stride = 5, 18, 17, 5, 2**30
    order = (1, stride) if transposed else (stride, 1)
    x, inner, y = far(T, K, stride=(stride, 1)), far(T, R, stride=(stride, 1)), far(T, N, stride=(N, 1))
    weight, b = far(N, K, stride=order), far(N, R, stride=order)
    seed = torch.zeros(1, dtype=torch.int64)
    with interpreter.checked() as trace:
        _lora_matmul[(2,)](
            x, weight, weight, weight, weight, inner, b, None, seed, y, stride, *order, stride, *order, T, N, K, 1, 0.5,
            NF4=None, HAS_BIAS=False, DROPOUT=True, R=R, **TINY,
        )  # fmt: skip
    (launch,) = trace.launches
    assert launch.stored["p_y"] == T * N * 2 and launch.loaded["p_w"] == N * K * 2 and launch.loaded["p_b"] == N * R * 2


@needs_triton
def test_offsets_of_the_result_and_of_nf4_weights_are_64_bits_wide():
    """A row of 2^31 features; only the first tile of it is launched. (By rows, i_out does it: see the test before.)"""
    T, K, N = 3, 128, 2**31 - 64
    x, inner, b, y = (far(*s, stride=(s[1], 1)) for s in ((T, K), (T, 2), (N, 2), (T, N)))
    codes, absmax = (torch.empty(K * N // n, device="meta", dtype=torch.uint8) for n in (2, 64))
    absmax_scale, mean = torch.empty(K * N // 64 // 256, device="meta"), torch.zeros(())
    sizes = TINY | {"BN": 64, "BK": 64}
    with interpreter.checked() as trace:
        _lora_matmul[(1,)](
            x, codes, absmax, absmax_scale, mean, inner, b, None, None, y, K, 0, 0, 2, 2, 1, T, N, K, 1.0, 0.0,
            NF4="columns", HAS_BIAS=False, DROPOUT=False, R=2, **sizes,
        )  # fmt: skip
    (launch,) = trace.launches
    assert launch.stored["p_y"] == T * 64 * 2 and launch.loaded["p_w"] == K * 32 and launch.loaded["p_absmax"] == K


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_the_dropped_product_are_64_bits_wide(transposed):
    T, K, R, stride = 5, 7, 3, 2**30
    rows, inner = (K, T) if transposed else (T, K)
    x, seed = far(T, K, stride=(stride, 1)), torch.zeros(1, dtype=torch.int64)
    for split, order in ((2**34, (stride, 1)), (2**34, (1, stride)), (stride, (R, 1))):
        f, out = far(inner, R, stride=order), far(3, rows, R, stride=(split, *order))
        with interpreter.checked() as trace:
            _lora_dropped[(1, 3)](
                x, f, seed, out, stride, *order, split, *order, T, K, 4, 0.5,
                R=R, TRANSPOSED=transposed, BT=16, BK=16, BR=16,
            )  # fmt: skip
        (launch,) = trace.launches
        assert launch.stored["p_out"] == 3 * rows * R * 2 and launch.loaded["p_f"] >= inner * R * 2


@needs_triton
def test_a_long_sum_is_split():
    """Of the tokens, for da, and of the features, for u; the parts are fp32, then summed."""
    seed = torch.tensor([3])
    for transposed, T, E in ((False, 20, 1030), (True, 1030, 20)):
        x, f = torch.randn(T, E).bfloat16(), torch.randn(1030, 3).bfloat16()
        with interpreter.checked() as trace:
            actual = _dropped(x, f, seed, 0.3, transposed)
        dropped = x.double() * kept(x, 3, 0.3) / 0.7
        exact = f.t().double() @ dropped if transposed else dropped @ f.double()
        assert trace.launches[0].grid == (1, 2, 1) and actual.dtype == torch.bfloat16
        assert rms(actual - exact) < 2**-8 * rms(exact)


@needs_triton
def test_order_of_programs_changes_no_bit():
    inputs = make(130, E=128, F=144, dtype=torch.bfloat16)

    def run(seed):
        torch.manual_seed(0)
        with interpreter.checked(seed):
            y = lora_linear(inputs[0], quantize_nf4(inputs[1]), *inputs[2:4], 1.0, bias=inputs[4], dropout=0.2)
            return gradients(y, (inputs[0], *inputs[2:]))

    assert all(torch.equal(p, q) for p, q in zip(run(0), run(1), strict=True))


@needs_triton
def test_registered_ops_pass_opcheck():
    x, weight, a, b, bias = make(5, E=64, F=16, requires_grad=False)
    packed, seed = quantize_nf4(weight.bfloat16()), torch.tensor([1])
    wide, low = [t.bfloat16() for t in (x, a, b, bias)], torch.randn(5, 2)
    with interpreter.checked():
        torch.library.opcheck(_matmul, (x, [weight], low, b, bias, None, 0.5, 0.0, False))
        x, a, b, bias = wide
        torch.library.opcheck(_matmul, (x, list(packed.parts), low.bfloat16(), b, bias, None, 0.5, 0.0, False))
        dy, a = torch.randn(5, 16).bfloat16(), a.t()
        torch.library.opcheck(_matmul, (dy, list(packed.parts), low.bfloat16(), a, None, seed, 1.0, 0.1, True))
        torch.library.opcheck(_dropped, (x, a, seed, 0.1, False))
        torch.library.opcheck(_dropped, (x, low.bfloat16(), seed, 0.1, True))


def test_compiles_as_one_graph_with_an_nf4_base_and_dropout(backend):
    x, weight, a, b, bias = make(2, 3, E=64)
    packed = quantize_nf4(weight)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lora_linear):
        torch.manual_seed(2)
        results.append(gradients(function(x, packed, a, b, 0.5, bias=bias, dropout=0.5), (x, a, b, bias)))
    assert agree(*results)


@needs_triton
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_blocks_of_nf4_fit_the_tiles(target):
    for T, R, dropout in itertools.product((1, 40, 500), (1, 256), (False, True)):
        config = _config(T, R, torch.bfloat16, True, dropout, False, target)
        assert config["BK"] % 64 == config["BN"] % 64 == 0 and config["num_stages"] >= 2
