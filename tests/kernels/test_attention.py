"""Packed attention: every option, block and bucket against the reference; edges; precision in bf16."""

import math

import pytest
import torch

from tritium.kernels import attention, attention_backward, attention_torch
from tritium.kernels.attention import attention_reference as reference


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of tiny matmuls
    yield
    torch.set_num_threads(threads)


def make(T, Tk=None, H=4, G=2, D=8, dtype=torch.float64):
    Tk = T if Tk is None else Tk
    return [torch.randn(n, h, D, dtype=dtype).requires_grad_() for n, h in ((T, H), (Tk, G), (Tk, G))]


def cu(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def results(function, inputs, **options):
    """o, lse, and the gradients for random gradients of both."""
    o, lse = function(*inputs, return_lse=True, **options)
    seen = torch.where(lse.isfinite(), lse, 0.0)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in (o, seen)]
    return o, lse, *torch.autograd.grad([o, seen], inputs, seeds)


def check(inputs, **options):
    for a, e in zip(results(attention, inputs, **options), results(reference, inputs, **options), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


OPTIONS = [
    {},
    {"causal": False},
    {"window": 5},
    {"window": 1},
    {"causal": False, "window": 4},
    {"softcap": 2.0, "scale": 0.7},
    {"softcap": 2.0, "causal": False, "window": 9},
]


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ragged_documents_in_small_blocks(options, kept_bytes, monkeypatch):
    """Blocks of 8 queries and 1 pair of (document, head): every boundary of the blocking is crossed."""
    monkeypatch.setattr(attention_torch, "ROWS", 8)
    monkeypatch.setattr(attention_torch, "SCORE_BYTES", 1000)
    monkeypatch.setattr(attention_torch, "KEPT_BYTES", kept_bytes)
    lengths = (3, 17, 0, 20, 1, 17, 40, 0, 9)
    check(make(sum(lengths)), cu_seqlens=cu(*lengths), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_queries_and_keys_of_different_lengths(options):
    """More keys, fewer keys, no keys and no queries; the ends are aligned."""
    lengths, lengths_k = (3, 9, 4, 0, 5), (10, 2, 0, 3, 5)
    inputs = make(sum(lengths), sum(lengths_k), H=3, G=1)
    check(inputs, cu_seqlens=cu(*lengths), cu_seqlens_k=cu(*lengths_k), **options)


def test_queries_that_see_nothing_give_zero():
    inputs = make(4, 2)
    o, lse, *grads = results(attention, inputs, cu_seqlens=cu(4), cu_seqlens_k=cu(2))
    assert (o[:2] == 0).all() and (lse[:2] == -torch.inf).all() and lse[2:].isfinite().all()
    assert (grads[0][:2] == 0).all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("n,m", [(9, 9), (4, 9)])
@pytest.mark.parametrize("causal,window", [(True, None), (True, 3), (False, None), (False, 3)])
def test_who_sees_whom(n, m, causal, window):
    """Against a mask that is spelled out, in torch's own attention."""
    q, k, v = make(n, m, H=2, G=2)

    def sees(i, j):
        if causal:
            return j <= i and (window is None or j > i - window)
        return window is None or abs(i - j) < window

    mask = torch.tensor([[sees(i + m - n, j) for j in range(m)] for i in range(n)])
    heads = (x.transpose(0, 1) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(attention(q, k, v, causal=causal, window=window), expected)


def test_packed_documents_equal_documents_alone():
    lengths = (5, 33, 12)
    inputs = make(sum(lengths))
    packed = attention(*inputs, cu_seqlens=cu(*lengths))
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    torch.testing.assert_close(packed, torch.cat([attention(*part) for part in parts]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_large_scores(kept_bytes, monkeypatch):
    """Scores of thousands: what padding holds must not overflow into the gradients."""
    monkeypatch.setattr(attention_torch, "KEPT_BYTES", kept_bytes)
    lengths = (3, 18)
    q, k, v = make(sum(lengths), dtype=torch.float32)
    with torch.no_grad():
        q *= 1000
    ours = results(attention, [q, k, v], cu_seqlens=cu(*lengths))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for a, e in zip(ours, results(reference, exact, cu_seqlens=cu(*lengths)), strict=True):
        assert (a.double() - e).norm() <= 1e-3 * e.norm()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_fp16_scores_beyond_fp16(kept_bytes, monkeypatch):
    """The largest fp16 number is 65504; here scores are twice that."""
    monkeypatch.setattr(attention_torch, "KEPT_BYTES", kept_bytes)
    q, k, v = inputs = make(20, dtype=torch.float16)
    with torch.no_grad():
        q.fill_(128).add_(torch.randn(q.shape))
        k.fill_(128).add_(torch.randn(k.shape))
    ours = results(attention, inputs, cu_seqlens=cu(9, 11), scale=1.0)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for a, e in zip(ours, results(reference, exact, cu_seqlens=cu(9, 11), scale=1.0), strict=True):
        assert (a.double() - e).norm() <= 3e-3 * e.norm()


def test_a_document_with_nan_leaves_the_others_alone():
    lengths = (6, 7, 5)
    inputs = make(sum(lengths))
    clean = results(attention, inputs, cu_seqlens=cu(*lengths))
    with torch.no_grad():
        for x in inputs:
            x[6:13] = torch.nan
    dirty = results(attention, inputs, cu_seqlens=cu(*lengths))
    others = torch.tensor([*range(6), *range(13, 18)])
    for a, e in zip(dirty, clean, strict=True):
        assert torch.equal(a[others], e[others])


def test_repeated_ends_and_no_tokens():
    inputs = make(6)
    plain, padded = (attention(*inputs, cu_seqlens=ends) for ends in (cu(4, 2), cu(4, 2, 0, 0, 0)))
    assert torch.equal(plain, padded)
    assert attention(*make(0), cu_seqlens=cu(0, 0)).shape == (0, 4, 8)


def test_views_of_one_fused_projection():
    fused = torch.randn(20, 8, 8, dtype=torch.float64)
    views = [x.detach().requires_grad_() for x in fused.split((4, 2, 2), 1)]
    check(views, cu_seqlens=cu(11, 9))


@pytest.mark.parametrize("options", [{}, {"window": 6, "softcap": 3.0}], ids=str)
def test_backward_by_itself(options):
    q, k, v = make(23)
    ends = cu(8, 15)
    o, lse = attention(q, k, v, cu_seqlens=ends, return_lse=True, **options)
    do = torch.randn_like(o)
    expected = torch.autograd.grad(o, (q, k, v), do)
    actual = attention_backward(do, q, k, v, o, lse, cu_seqlens=ends, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_backward_on_parts_of_the_keys_adds_up():
    """As context parallel uses it: o and lse of all keys, gradients part by part."""
    q, k, v = make(6, 10)
    o, lse = attention(q, k, v, causal=False, return_lse=True)
    do = torch.randn_like(o)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    parts = [attention_backward(do, q, k[s], v[s], o, lse, causal=False) for s in (slice(0, 7), slice(7, 10))]
    torch.testing.assert_close(sum(part[0] for part in parts), dq)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), dk)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), dv)


@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_bf16_is_as_precise_as_sdpa(sharpness):
    """Error against fp64 at most 1.5 × that of torch's kernel; scores rounded to bf16 would make it 2 to 6 ×."""
    B, N, D = 4, 96, 32
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in make(B * N, H=2, G=2, D=D, dtype=torch.float32))
    with torch.no_grad():
        q *= sharpness
    do = torch.randn(B * N, 2, D).bfloat16()

    def sdpa(*qkv):
        heads = (x.view(B, N, 2, D).transpose(1, 2) for x in qkv)
        o = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return o.transpose(1, 2).reshape(B * N, 2, D)

    def run(function, inputs):
        o = function(*inputs)
        return o, *torch.autograd.grad(o, inputs, do.to(o.dtype))

    expected = run(sdpa, [x.detach().double().requires_grad_() for x in (q, k, v)])
    ours = run(lambda *x: attention(*x, cu_seqlens=cu(*[N] * B)), (q, k, v))
    for a, t, e in zip(ours, run(sdpa, (q, k, v)), expected, strict=True):
        assert (a.double() - e).norm() <= 1.5 * (t.double() - e).norm()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"cu_seqlens": cu(3)}, "must run from 0 to 4"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "runs from 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "must not decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens is torch.float32, wanted torch.int32 or torch.int64"),
        ({"cu_seqlens": torch.tensor([False, True])}, "cu_seqlens is torch.bool, wanted torch.int32 or torch.int64"),
        ({"cu_seqlens": cu(4)[None]}, r"vector of S \+ 1 integers, got \(1, 2\)"),
        ({"cu_seqlens": cu(2, 2), "cu_seqlens_k": cu(4)}, "cu_seqlens has 2 documents but cu_seqlens_k has 1"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": True}, "window must be an integer of at least 1"),
        ({"window": 2.0}, "window must be an integer of at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": math.inf}, "softcap must be positive and finite or None, got inf"),
        ({"scale": math.nan}, "scale must be positive and finite or None, got nan"),
        ({"q": torch.zeros(4, 4, 8, dtype=torch.int32)}, "q is torch.int32, wanted a floating-point"),
        ({"q": torch.zeros(4, 0, 8)}, "0 query heads do not divide into 2"),
        ({"k": torch.randn(4, 3, 8), "v": torch.randn(4, 3, 8)}, "4 query heads do not divide into 3"),
        ({"k": torch.randn(4, 2, 16)}, "must be"),
        ({"v": torch.randn(4, 2, 8).bfloat16()}, "one dtype"),
        ({x: torch.randn(4, 2, 12) for x in "qkv"}, r"multiple of 8 from 8 to 256, got 12: q \(4, 2, 12\)"),
        ({x: torch.randn(4, 2, 264) for x in "qkv"}, r"multiple of 8 from 8 to 256, got 264: q \(4, 2, 264\)"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"cu_seqlens": torch.tensor([0])}, "no document, but there are 4 queries"),
        ({"cu_seqlens": cu(4), "q": torch.randn(6, 4, 8)}, "6 queries and 4 keys: pass cu_seqlens_k"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = dict(zip("qkv", make(4, dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        attention(**inputs | change)
