"""Attention's Triton kernels, interpreted and checked: what test_all_ops.py does not ask of every op."""

import importlib
import itertools

import interpreter
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import attention, attention_backward
from tritium.kernels.backend import HAS_TRITON, TARGETS

file = importlib.import_module("tritium.kernels.attention")
masks = importlib.import_module("tritium.kernels.attention_mask")
reference = file.attention_reference
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OPTIONS = [
    {},
    {"causal": False},
    {"window": 5},
    {"window": 1},
    {"causal": False, "window": 4},
    {"softcap": 2.0, "scale": 0.7},
    {"softcap": 50.0, "causal": False, "window": 9},
]
LENGTHS = {  # of queries and of keys
    "ragged": ((3, 17, 0, 20, 1, 5), None),
    "cross": ((3, 19, 4, 0, 5), (20, 2, 0, 3, 5)),  # more keys, fewer keys, no keys, no queries
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16: every boundary of the blocking is crossed, and documents straddle blocks. No group is divided."""

    def config(kernel, D, dtype, target):
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32 if kernel == "dkv" else 16}
        return {"D": D, "BLOCK_D": max(16, 1 << (D - 1).bit_length()), "num_warps": 4, "num_stages": 1} | blocks

    monkeypatch.setattr(file, "_config", config)
    monkeypatch.setattr(file, "PROGRAMS", 0)


def make(T, Tk=None, H=2, G=1, D=16, dtype=torch.float32):
    Tk = T if Tk is None else Tk
    return [torch.randn(n, h, D).to(dtype).requires_grad_() for n, h in ((T, H), (Tk, G), (Tk, G))]


def cu(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def results(function, inputs, **options):
    """o, lse, and the gradients for random gradients of both."""
    o, lse = function(*inputs, return_lse=True, **options)
    seen = torch.where(lse.isfinite(), lse, 0.0)
    generator = torch.Generator().manual_seed(1)
    seeds = [(torch.randint(-32, 33, y.shape, generator=generator) / 16).to(y.dtype) for y in (o, seen)]
    return o, lse, *torch.autograd.grad([o, seen], inputs, seeds)


def check(inputs, **options):
    """At most 1.5 × the error of the reference in the same dtype, plus 2 ulp of the RMS; the trace."""
    with interpreter.checked(seed=1) as trace:
        actual = results(attention, inputs, **options)
    plain = results(reference, inputs, **options)
    exact = results(reference, [x.detach().double().requires_grad_() for x in inputs], **options)
    for name, a, p, e in zip(("o", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        known = e.isfinite()
        assert a.dtype == p.dtype and torch.equal(a.isfinite(), known), name
        error, own, rms = (float(x[known].detach().double().square().mean().sqrt()) for x in (a - e, p - e, e))
        # Where p = 1, do·v and delta cancel: what is rounded is scale · (do·v) · k. Of one token that is one draw.
        rms = max(rms, 2.0 if len(inputs[0]) == 1 else 0.5) if name in ("dq", "dk") else rms
        assert error <= 1.5 * own + 2 * ULP[a.dtype] * rms, f"{name}: {error:.2e}, torch {own:.2e}, of {rms:.2e}"
    return trace


@pytest.mark.parametrize(
    "option, lengths, dtype",
    [
        pytest.param(option, lengths, dtype, marks=() if dtype == [*ULP][option % 3] else pytest.mark.long)
        for option, lengths, dtype in itertools.product(range(len(OPTIONS)), LENGTHS, ULP)
    ],
)
def test_every_mask_in_every_dtype(small_blocks, option, lengths, dtype):
    n, m = LENGTHS[lengths]
    inputs = make(sum(n), sum(m or n), dtype=dtype)
    check(inputs, cu_seqlens=cu(*n), cu_seqlens_k=m and cu(*m), **OPTIONS[option])


@pytest.mark.parametrize("T, D", [(1, 256), (2, 8), (17, 96), (127, 40), (129, 80), (64, 128)])
def test_awkward_sizes(T, D):
    """One document without cu_seqlens, in the blocks of a real launch."""
    check(make(T, H=1, D=D))


@pytest.mark.long
@pytest.mark.parametrize("T, D", [*itertools.product((2, 17, 127, 129, 1000), (8, 40, 64, 80, 96, 128, 256))])
def test_all_awkward_sizes(T, D):
    check(make(T, H=2, D=D, dtype=torch.bfloat16))


def test_any_strides_of_inputs_and_gradients(small_blocks):
    """Heads first in memory, keys expanded over heads, values whose rows are columns, do and dlse transposed."""
    ends = cu(11, 9)
    q = torch.randn(4, 20, 16).transpose(0, 1)
    k, v = torch.randn(20, 1, 16).expand(20, 2, 16), torch.randn(16, 2, 20).permute(2, 1, 0)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    do, dlse = torch.randn(4, 20, 16).transpose(0, 1), torch.randn(4, 20).t()

    def gradients(function, inputs):
        o, lse = function(*inputs, cu_seqlens=ends, return_lse=True)
        for seeds in ((do, dlse), (torch.ones(()).expand(o.shape), torch.ones(()).expand(lse.shape))):
            yield from torch.autograd.grad([o, lse], inputs, [x.to(o.dtype) for x in seeds], retain_graph=True)

    with interpreter.checked():
        actual = list(gradients(attention, inputs))
        o, lse = attention(*inputs, cu_seqlens=ends, return_lse=True)
        backward = attention_backward(do, *inputs, o, lse, cu_seqlens=ends)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for a, e in zip(actual, gradients(reference, wide), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    o = reference(*wide, cu_seqlens=ends)
    for a, e in zip(backward, torch.autograd.grad(o, wide, do.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_backward_on_parts_of_the_keys_adds_up(small_blocks):
    """As context parallel uses it: o and lse of all keys, gradients part by part."""
    q, k, v = make(20, 50)
    with interpreter.checked():
        o, lse = attention(q, k, v, causal=False, return_lse=True)
        do = torch.randn_like(o)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
        parts = [attention_backward(do, q, k[s], v[s], o, lse, causal=False) for s in (slice(0, 35), slice(35, 50))]
    torch.testing.assert_close(sum(part[0] for part in parts), dq)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), dk)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), dv)


def test_queries_that_see_nothing_give_zero_whatever_their_gradient_holds(small_blocks):
    """Those in the midst of the stream are walked with the first document's, for the same keys."""
    q, k, v = make(40, 24)
    with interpreter.checked():
        o, lse = attention(q, k, v, cu_seqlens=cu(20, 20), cu_seqlens_k=cu(20, 4), return_lse=True)
        dlse = torch.where(lse.isfinite(), 1.0, torch.nan)
        grads = torch.autograd.grad([o, lse], (q, k, v), [torch.ones_like(o), dlse])
    assert (o[20:36] == 0).all() and (lse[20:36] == -torch.inf).all() and lse[36:].isfinite().all()
    assert (grads[0][20:36] == 0).all() and all(g.isfinite().all() for g in grads)


def test_a_document_with_nan_reaches_no_further_than_its_block(small_blocks):
    """The second document has tokens 20 to 26, and shares a block of 16 with parts of the others; keys one of 32."""
    inputs = make(64, H=1)
    ends = cu(20, 7, 37)
    with interpreter.checked():
        clean = results(attention, inputs, cu_seqlens=ends)
        with torch.no_grad():
            for x in inputs:
                x[20:27] = torch.nan
        dirty = results(attention, inputs, cu_seqlens=ends)
    for name, a, e in zip(("o", "lse", "dq", "dk", "dv"), dirty, clean, strict=True):
        first, last = (0, 32) if name in ("dk", "dv") else (16, 32)
        assert a[20:27].isnan().all(), name
        assert torch.equal(a[:first], e[:first]) and torch.equal(a[last:], e[last:]), name


def test_bf16_gradients_are_as_precise_as_sdpa():
    """Of sharp softmaxes, where do·v and delta cancel: delta rounded to bf16 makes the error of dq 1.25 ×."""
    N, D = 96, 32
    q, k, v = (x.detach().requires_grad_() for x in make(2 * N, H=2, G=2, D=D, dtype=torch.bfloat16))
    with torch.no_grad():
        q *= 6
    do = torch.randn(2 * N, 2, D).bfloat16()

    def sdpa(*qkv):
        heads = (x.view(2, N, 2, D).transpose(1, 2) for x in qkv)
        o = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return o.transpose(1, 2).reshape(2 * N, 2, D)

    def run(function, inputs):
        o = function(*inputs)
        return o, *torch.autograd.grad(o, inputs, do.to(o.dtype))

    exact = run(sdpa, [x.detach().double().requires_grad_() for x in (q, k, v)])
    with interpreter.checked():
        ours = run(lambda *x: attention(*x, cu_seqlens=cu(N, N)), (q, k, v))
    for a, t, e in zip(ours, run(sdpa, (q, k, v)), exact, strict=True):
        assert (a.double() - e).norm() <= 1.05 * (t.double() - e).norm()


# Launches -------------------------------------------------------------------------------------------------------------


class First:
    """A kernel of which only the first programs run."""

    def __init__(self, kernel, count):
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid):
        return self.kernel[(self.count,)]


def test_heavy_blocks_of_all_heads_start_first(small_blocks, monkeypatch):
    """Of 4 heads, 2 of keys: the first programs have the last queries, or the first keys, of every head."""
    q, k, v = make(64, H=4, G=2)
    launch = {"forward": file._attention_forward, "dq": file._attention_dq, "dkv": file._attention_dkv}
    with interpreter.checked():
        o, lse = attention(q, k, v, return_lse=True)
        found = {}
        for name, count in (("forward", 4), ("dq", 4), ("dkv", 2)):
            monkeypatch.setattr(file, f"_attention_{name}", First(launch[name], count))
            found[name] = attention(q, k, v) if name == "forward" else attention_backward(o, q, k, v, o, lse)
            monkeypatch.setattr(file, f"_attention_{name}", launch[name])
    written = found["forward"], found["dq"][0], *found["dkv"][1:]
    for x, rows in zip(written, (slice(48, 64), slice(48, 64), slice(0, 32), slice(0, 32)), strict=True):
        done = torch.zeros(64, dtype=torch.bool)
        done[rows] = True
        assert x[done].isfinite().all() and x[~done].isnan().all()


@pytest.mark.parametrize("H, G, programs, parts", [(4, 1, 3, 2), (4, 2, 5, 2), (3, 1, 5, 3), (2, 2, 99, 1)])
def test_few_keys_divide_the_heads_of_a_group(small_blocks, monkeypatch, H, G, programs, parts):
    """40 keys in blocks of 32: 2 programs for each key head, or as many times more as it takes and heads allow."""
    inputs = make(40, H=H, G=G, dtype=torch.bfloat16)
    whole = check(inputs, cu_seqlens=cu(23, 17)).launches[-1]
    monkeypatch.setattr(file, "PROGRAMS", programs)
    divided = check(inputs, cu_seqlens=cu(23, 17)).launches[-1]
    assert (whole.grid[0], divided.grid[0]) == (2 * G, 2 * G * parts)
    assert divided.stored["p_dk"] == (whole.stored["p_dk"] if parts == 1 else 40 * G * parts * 16 * 4)


@pytest.mark.parametrize(
    "needed, stored", [("q", "p_dq"), ("k", "p_dk"), ("v", "p_dk"), ("qv", "p_dq p_dk"), ("kv", "p_dk")]
)
def test_gradients_that_nobody_needs_are_not_computed(small_blocks, needed, stored):
    inputs = dict(zip("qkv", make(20), strict=True))
    expected = torch.autograd.grad(reference(**inputs).square().sum(), list(inputs.values()))
    expected = dict(zip("qkv", expected, strict=True))
    for name, x in inputs.items():
        x.requires_grad_(name in needed)
    with interpreter.checked() as trace:
        grads = torch.autograd.grad(attention(**inputs).square().sum(), [inputs[name] for name in needed])
    for name, grad in zip(needed, grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)
    seen = {name for launch in trace.launches for name in launch.stored}
    assert seen & {"p_dq", "p_dk"} == set(stored.split())
    if "p_dq" not in stored:
        assert "p_k" not in trace.launches[-2].loaded  # delta alone


def test_bounds_of_one_document_are_made_once(small_blocks):
    class Made(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.count += op is torch.ops.aten.arange.default
            return op(*args, **kwargs or {})

    for Tk, count in ((9, 1), (12, 2)):
        q, k, _ = make(9, Tk)
        with interpreter.checked(), Made() as made:
            masks.intervals(None, None, q, k, True, None, True)
        assert made.count == count


@pytest.mark.parametrize("T, Tk", [(0, 0), (3, 0), (0, 3)])
def test_no_queries_or_no_keys(T, Tk):
    inputs = make(T, Tk)
    with interpreter.checked():
        o, lse, *grads = results(attention, inputs)
    assert o.shape == inputs[0].shape and not o.any() and (lse == -torch.inf).all()
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, inputs, strict=True))


def test_large_scores_and_hidden_ones_that_overflow(small_blocks):
    """Scores of thousands; those between the two documents are e^thousands times larger than any that is seen."""
    q, k, v = make(24)
    with torch.no_grad():
        q *= 300
        k[:12] *= 30
    ends = cu(12, 12)
    with interpreter.checked():
        ours = results(attention, [q, k, v], cu_seqlens=ends)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for a, e in zip(ours, results(reference, exact, cu_seqlens=ends), strict=True):
        assert (a.double() - e).norm() <= 1e-3 * e.norm()


# Who sees whom --------------------------------------------------------------------------------------------------------


def intervals(ends, ends_k, causal, window, T, Tk):
    q, k = torch.empty(T, 1, 8), torch.empty(Tk, 1, 8)
    with interpreter.checked():
        return masks.intervals(ends, ends_k, q, k, causal, window, True)


@pytest.mark.parametrize("causal, window", [*itertools.product((True, False), (None, 1, 4, 2**40))])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_intervals_are_the_mask_from_both_sides(lengths, causal, window):
    n, m = LENGTHS[lengths]
    m = m or n
    keys, queries = intervals(cu(*n), cu(*m), causal, window, sum(n), sum(m))
    blocks = []
    for a, b in zip(n, m, strict=True):
        options = masks.Options(causal, window, None, 1.0)
        blocks.append(masks.visible(slice(0, a), slice(0, b), b - a, options, torch.device("cpu")))
    mask = torch.block_diag(*blocks).bool()
    i, j = torch.arange(sum(n)), torch.arange(sum(m))
    assert torch.equal((keys[0][:, None] <= j) & (j < keys[1][:, None]), mask)
    assert torch.equal((queries[0] <= i[:, None]) & (i[:, None] < queries[1]), mask)


@pytest.mark.parametrize("ends", [[0, 300, -5, 7], [2, 5, 6], [-9, -8, 2**31 - 1], [9, 4, 0]])
def test_no_cu_seqlens_leads_out_of_the_tensors(ends, monkeypatch):
    """On a GPU their values are not checked: tokens outside of them see nothing, and nothing else is addressed."""
    monkeypatch.setattr(masks, "documents", lambda *_: None)
    ends = torch.tensor(ends, dtype=torch.int32)
    for own, other in itertools.product((ends, ends.flip(0)), repeat=2):
        for seen, size in zip(intervals(own, other, True, None, 8, 9), (9, 8), strict=True):
            some = seen[0] < seen[1]
            assert (seen[0][some] >= 0).all() and (seen[1] <= size).all() and (seen[1][~some] == 0).all()
    q, k, v = make(8)
    with interpreter.checked():
        o, lse, *grads = results(attention, [q, k, v], cu_seqlens=ends)
    assert all(x.isfinite().all() for x in (o, *grads))
    if ends.tolist() == [2, 5, 6]:
        assert (lse[2:6].isfinite().all() and (lse[[0, 1, 6, 7]] == -torch.inf).all()) and not grads[1][6:].any()


def test_values_of_cu_seqlens_are_checked_on_the_cpu():
    with (
        interpreter.checked(),
        pytest.raises(ValueError, match="from 0 to 3, but must run from 0 to 4"),
    ):
        attention(*make(4), cu_seqlens=cu(3))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_hidden_blocks_are_not_read(small_blocks):
    """Two documents of 32 in blocks of 16 (dk, dv: of 32): a block of queries reads its document up to itself."""
    row, head = 2 * 16, 64 * 2 * 16  # bytes of a row, and of a head
    q, k, v = make(64, dtype=torch.bfloat16)
    with interpreter.checked() as trace:
        torch.autograd.grad(attention(q, k, v, cu_seqlens=cu(32, 32)).sum(), (q, k, v))
    _, forward, _, dq, dkv = trace.launches
    walk = 2 * 2 * (16 + 32) * row  # heads × documents × keys of the first and of the second block
    assert forward.loaded == {"p_keys": 2 * 64 * 8, "p_q": 2 * head, "p_k": walk, "p_v": walk}
    assert forward.stored == {"p_o": 2 * head, "p_lse": 2 * 64 * 4}
    lines = {"p_keys": 2 * 64 * 8, "p_lse": 2 * 64 * 4}
    assert dq.loaded == {"p_q": 2 * head, "p_do": 2 * head, "p_o": 2 * head, "p_k": walk, "p_v": walk} | lines
    assert dq.stored == {"p_dq": 2 * head, "p_delta": 2 * 64 * 4}
    once = {"p_q": 2 * head, "p_do": 2 * head, "p_k": head, "p_v": head, "p_queries": 64 * 8}
    assert dkv.loaded == once | {"p_lse": 2 * 64 * 4, "p_delta": 2 * 64 * 4}
    assert dkv.stored == {"p_dk": head, "p_dv": head}


def test_a_window_bounds_what_is_read(small_blocks):
    q, k, v = make(96, H=1, dtype=torch.bfloat16)
    with interpreter.checked() as trace:
        attention(q, k, v, window=9)
    assert trace.launches[1].loaded["p_k"] == (16 + 5 * 24) * 32  # a block's own 16 keys and the 8 before


def test_offsets_are_64_bits_wide():
    """Tokens 2^30 elements apart, heads 2^33: the third token is out of an int32's reach."""
    T, D, strides = 5, 8, (2**30, 2**33)

    def far(heads=2):
        return torch.empty_strided((T, heads, D), (*strides, 1), device="meta")

    keys = torch.tensor([[0] * T, [1, 2, 3, 4, 5]], dtype=torch.int32)
    queries = torch.tensor([[0, 1, 2, 3, 4], [T] * T], dtype=torch.int32)
    lse = torch.empty_strided((2, T), (2**33, 2**30), device="meta")
    near, delta = torch.empty(T, 2, D, device="meta"), torch.empty(2, T, device="meta")
    sizes = {"SOFTCAP": False, "D": D, "BLOCK_D": 16, "BLOCK_M": 16, "BLOCK_N": 16}
    with interpreter.checked() as trace:
        file._attention_forward[(2,)](
            far(), far(1), far(1), keys, near, delta, *strides, *strides, *strides, T, 2, 2, 1.0, 1.0, **sizes
        )
        file._attention_dq[(2,)](
            far(), lse, far(), far(1), far(1), keys, far(), lse, near, delta, *strides, *lse.stride()[::-1],
            *strides, *strides, *strides, *strides, *lse.stride()[::-1], T, 2, 2, 1.0, 1.0,
            HAS_DLSE=True, NEEDS_DQ=True, **sizes,
        )  # fmt: skip
        file._attention_dkv[(1,)](
            far(), far(), far(1), far(1), queries, lse, delta, near[:, :1].contiguous(), near[:, :1].contiguous(),
            *strides, *strides, *strides, *strides, *lse.stride()[::-1], T, T, 2, 2, 2, 1.0, 1.0, **sizes,
        )  # fmt: skip
        N = 2**31 - 1  # tokens: the second row of the intervals begins beyond an int32
        ends, seen = torch.tensor([0, N], dtype=torch.int32), torch.empty(2, N, dtype=torch.int32, device="meta")
        masks._attention_intervals[(1, 2)](ends, ends, seen, seen.clone(), N, N, 1, 1, N, 0, BLOCK=16)
    forward, dq, dkv, intervals = trace.launches
    assert forward.loaded["p_v"] == 2 * T * D * 4 and dq.loaded["p_k"] == 2 * T * D * 4
    assert dkv.loaded["p_do"] == 2 * T * D * 4 and intervals.stored == {"p_keys": 128, "p_queries": 128}


# With torch -----------------------------------------------------------------------------------------------------------


def test_registered_ops_pass_opcheck(small_blocks):
    q, k, v = make(9, 12)
    options = (True, 5, 2.0, 0.3)
    with interpreter.checked():
        torch.library.opcheck(file._forward, (q, k, v, None, None, *options))
        o, lse = (x.detach() for x in file._forward(q, k, v, None, None, *options))
        inputs = [x.detach() for x in (q, k, v)]
        for dlse, needs in ((None, (True, True)), (lse, (False, True))):
            torch.library.opcheck(file._backward, (o, dlse, *inputs, o, lse, cu(4, 5), cu(6, 6), *options, *needs))


def test_compiles_as_one_graph_with_lse_and_options(small_blocks):
    inputs = make(20)
    torch._dynamo.reset()
    with interpreter.checked():
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for options in ({"window": 6, "softcap": 3.0}, {"cu_seqlens": cu(9, 11)}):
            for a, e in zip(results(compiled, inputs, **options), results(attention, inputs, **options), strict=True):
                assert torch.equal(a, e)


def test_configurations_fit_every_head_dim():
    """Blocks are powers of two that the matmuls take, whatever the head dim."""
    dtypes = (torch.bfloat16, torch.float32)
    for target, D, dtype in itertools.product(TARGETS.values(), range(8, 257, 8), dtypes):
        for kernel in ("forward", "dq", "dkv"):
            config = file._config(kernel, D, dtype, target)
            blocks = [config[name] for name in ("BLOCK_D", "BLOCK_M", "BLOCK_N")]
            assert all(block >= 16 and block & (block - 1) == 0 for block in blocks) and D <= blocks[0] < max(2 * D, 17)
