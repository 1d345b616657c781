"""Decoding on a paged cache: equal to the reference and to training attention, whatever unused slots hold.

Below the line, as Triton kernels in the harness: options, traffic, addresses.
"""

import contextlib
import importlib

import interpreter
import pytest
import torch

from tritium.kernels import attention, decode_attention
from tritium.kernels.backend import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
file = importlib.import_module("tritium.kernels.decode_attention")


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


def make(B=5, N=3, page=4, H=4, G=2, D=8, dtype=torch.float64):
    q = torch.randn(B, H, D, dtype=dtype)
    k_pages, v_pages = (torch.randn(B * N, page, G, D, dtype=dtype) for _ in range(2))
    return q, k_pages, v_pages, torch.randperm(B * N).view(B, N).int()


def ran(backend, *inputs, seed=1, **options):
    with interpreter.checked(seed) if backend == "triton" else contextlib.nullcontext():
        return decode_attention(*inputs, **options)


@pytest.mark.parametrize("copy_bytes", [1, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.5}], ids=str)
def test_agrees_with_the_reference(options, copy_bytes, monkeypatch):
    monkeypatch.setattr(file, "COPY_BYTES", copy_bytes)  # 1: one sequence at a time
    inputs = (*make(), torch.tensor([0, 1, 4, 7, 12], dtype=torch.int32))
    expected = file.decode_attention_reference(*inputs, **options)
    torch.testing.assert_close(decode_attention(*inputs, **options), expected)
    assert (expected[0] == 0).all()


@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_very_different_lengths_each_see_their_own_keys(window):
    """These are computed in parts of about the same length."""
    inputs = (*make(B=9, N=40), torch.tensor([100, 3, 160, 0, 31, 158, 1, 16, 99], dtype=torch.int32))
    expected = file.decode_attention_reference(*inputs, window=window)
    torch.testing.assert_close(decode_attention(*inputs, window=window), expected)


def test_equals_the_last_row_of_training_attention():
    q, k_pages, v_pages, table = make(B=1, N=2, page=8)
    k, v = (x[table[0].long()].flatten(0, 1)[:11] for x in (k_pages, v_pages))
    queries = torch.cat([torch.randn(10, 4, 8, dtype=q.dtype), q])
    expected = attention(queries, k, v)[-1:]
    torch.testing.assert_close(decode_attention(q, k_pages, v_pages, table, torch.tensor([11]).int()), expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_past_the_length_may_hold_anything(dtype, backend):
    q, k_pages, v_pages, table = make(N=1, page=8, dtype=dtype)
    lengths = torch.tensor([0, 1, 3, 7, 8], dtype=torch.int32)
    clean = ran(backend, q, k_pages, v_pages, table, lengths)
    for b, n in enumerate(lengths.tolist()):
        for pages in (k_pages, v_pages):
            pages[table[b, 0], n:] = torch.nan
    assert torch.equal(ran(backend, q, k_pages, v_pages, table, lengths), clean)


def test_the_cache_is_left_alone():
    inputs = (*make(), torch.tensor([2, 1, 4, 7, 12], dtype=torch.int32))
    before = [x.clone() for x in inputs]
    decode_attention(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def sized(D):
    return {"q": torch.randn(5, 4, D)} | {x: torch.randn(15, 4, 2, D) for x in ("k_pages", "v_pages")}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("window", [12, 2**31 - 1, 2**31 + 5, 10**12])
def test_a_window_over_everything_hides_nothing(window, backend):
    inputs = (*make(dtype=torch.float32), torch.tensor([0, 1, 4, 7, 12], dtype=torch.int32))
    assert torch.equal(ran(backend, *inputs, window=window), ran(backend, *inputs))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lengths": torch.tensor([13] * 5)}, "over the 12 tokens of 3 pages"),
        ({"lengths": torch.ones(4).int()}, "page_table and lengths must be"),
        ({"q": torch.randn(5, 3, 8)}, "3 query heads do not divide into 2"),
        ({"q": torch.randn(5, 4, 16)}, "must be"),
        ({"q": torch.randn(5, 4, 8).bfloat16()}, "one dtype, got torch.bfloat16, torch.float32"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": True}, "window must be an integer of at least 1"),
        ({"softcap": 0.0}, "softcap must be positive and finite or None, got 0.0"),
        ({"softcap": -2.0}, "softcap must be positive and finite or None, got -2.0"),
        ({"scale": -0.5}, "scale must be positive and finite or None, got -0.5"),
        ({"page_table": torch.zeros(5, 3)}, "page_table is torch.float32, wanted torch.int32 or torch.int64"),
        ({"lengths": torch.ones(5)}, "lengths is torch.float32, wanted torch.int32 or torch.int64"),
        ({x: torch.ones(5, 4, 2, 8).int() for x in ("k_pages", "v_pages")} | {"q": torch.ones(5, 4, 8).int()}, "q is"),
        ({x: torch.randn(15, 4, 0, 8) for x in ("k_pages", "v_pages")}, "4 query heads do not divide into 0"),
        (sized(12), r"the head dim must be a multiple of 8 from 8 to 256, got 12: q \(5, 4, 12\)"),
        (sized(264), "a multiple of 8 from 8 to 256, got 264"),
        ({"v_pages": torch.randn(15, 4, 2, 8, device="meta")}, "tensors on cpu and on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k_pages, v_pages, table = make(dtype=torch.float32)
    inputs = dict(q=q, k_pages=k_pages, v_pages=v_pages, page_table=table, lengths=torch.ones(5).int())
    with pytest.raises(ValueError, match=message):
        decode_attention(**inputs | change)


# Triton only ----------------------------------------------------------------------------------------------------------


def as_good_as_torch(inputs, options, seed=1):
    """Errors against fp64: at most 1.5 × those of plain torch in that dtype, plus 2 ulp of the result's RMS."""
    q, k_pages, v_pages, *others = inputs
    expected = file.decode_attention_reference(q.double(), k_pages.double(), v_pages.double(), *others, **options)
    plain, actual = file.decode_attention_reference(*inputs, **options), ran("triton", *inputs, **options, seed=seed)
    error, own = ((x.double() - expected).square().mean().sqrt() for x in (actual, plain))
    assert actual.dtype == q.dtype
    assert error <= 1.5 * own + 2 * torch.finfo(q.dtype).eps * expected.square().mean().sqrt()


CASES = [  # (N, page, R, D), options
    ((1, 1, 1, 8), {}),
    ((3, 100, 2, 40), {}),
    ((150, 2, 3, 64), {"softcap": 2.0, "scale": 0.5}),
    ((1, 300, 16, 80), {"window": 1}),
    ((9, 33, 17, 96), {"window": 170}),
    ((3, 127, 4, 128), {"window": 10_000, "softcap": 20.0}),
    ((2, 40, 2, 64), {"softcap": 1e3}),  # 1 - exp would cancel
    ((1, 20, 65, 64), {}),  # more query heads than a tile has rows
    ((2, 129, 1, 256), {"scale": 0.2}),
]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@needs_triton
@pytest.mark.parametrize(
    "shape, options, dtype",
    [
        pytest.param(*case, dtype, marks=() if i % 3 == j else pytest.mark.long, id=f"{case}-{str(dtype)[6:]}")
        for i, case in enumerate(CASES)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_kernels_agree_with_fp64(shape, options, dtype):
    """Sequences of no key, of one, of a block and one more, and of all; inputs that are slices of something wider."""
    N, page, R, D = shape
    q, k_pages, v_pages, table = make(5, N, page, 2 * R, 2, D, dtype=torch.float32)
    caches = torch.stack([k_pages, v_pages]).transpose(2, 3).contiguous().transpose(2, 3).to(dtype)
    wide_q, wide_table = torch.randn(5, 2 * R, 2 * D).to(dtype), torch.cat([table, table], 1)
    lengths = torch.tensor([0, 1, 128, 129, N * page]).clamp(max=N * page).int()
    as_good_as_torch((wide_q[..., :D], *caches, wide_table[:, :N], lengths), options)


@needs_triton
@pytest.mark.parametrize("programs", [1, 8, 100])  # one share, whole ones, and shares with nothing left
def test_kernels_agree_however_the_keys_are_shared(programs, monkeypatch):
    monkeypatch.setattr(file, "PROGRAMS", programs)
    monkeypatch.setattr(file, "MIN_SHARE", 8)
    inputs = (*make(2, 3, 70, dtype=torch.float32), torch.tensor([140, 209]).int())
    with interpreter.checked() as trace:
        o = decode_attention(*inputs)
    assert [launch.kernel for launch in trace.launches] == ["_decode", "_merge"][: 1 + (programs > 1)]
    assert trace.launches[0].grid == (4, -(-programs // 4), 1)
    torch.testing.assert_close(o, file.decode_attention_reference(*inputs), rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("window", [None, 45])
def test_kernels_read_each_visible_key_and_value_once(window):
    q, k_pages, v_pages, table = make(3, 40, 10, 4, 2, 24, dtype=torch.bfloat16)
    lengths = [0, 17, 391]
    with interpreter.checked() as trace:
        decode_attention(q, k_pages, v_pages, table, torch.tensor(lengths).int(), window=window)
    decode, merge = trace.launches if window is None else (*trace.launches, None)
    seen = 2 * sum(min(n, window or n) for n in lengths)  # by two key heads
    shares = 1 if merge is None else 4
    table_bytes, programs = 4 * seen, 6 * shares
    assert decode.grid == (6, shares, 1)
    assert decode.loaded == {"p_q": q.nbytes * shares, "p_k": 48 * seen, "p_v": 48 * seen} | {
        "p_table": table_bytes, "p_lengths": 4 * programs
    }  # fmt: skip
    if merge is None:
        assert decode.stored == {"p_o": q.nbytes, "p_lse": 4 * 12}
    else:
        used = 4 * (1 + 4)  # heads × shares with a key: 17 keys are one block, 391 are four
        assert decode.stored == {"p_o": 2 * q.nbytes * shares, "p_lse": 4 * 12 * shares}
        assert merge.loaded == {"p_parts": used * 24 * 4, "p_lse": 4 * 12 * shares} and merge.stored == {
            "p_o": q.nbytes
        }


def far(*shape):
    """A tensor without memory: its rows lie 2^30 elements apart, and what holds them further still."""
    outer = (2 ** (30 + 3 * i) for i in reversed(range(len(shape) - 1)))
    return torch.empty_strided(shape, (*outer, 1), device="meta")


@needs_triton
def test_kernels_address_in_64_bits():
    """Rows of D = 2^30 elements, of which 16 are there."""
    B, H, G, S, page = 4, 6, 3, 2, 4
    q, k, v, o, lse = far(B, H, 16), far(8, page, G, 16), far(8, page, G, 16), far(B * H * S, 16), torch.ones(B * H * S)
    table, lengths = torch.randperm(8).view(B, 2).int(), torch.tensor([5, 8, 0, 3]).int()
    sizes = {"D": 2**30, "BLOCK_D": 16}
    with interpreter.checked() as trace:
        file._decode[(B * G, S)](
            q, k, v, table, lengths, o, lse, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], 2,
            page, 2 * page, 100, 1.0, 0.0, G=G, R=H // G, SOFTCAP=False, BLOCK_R=16, BLOCK_N=16, **sizes,
        )  # fmt: skip
        file._merge[(B * H, 1)](o, torch.zeros(B * H * S), far(B * H, 16), S, BLOCK_S=2, **sizes)
    decode, merge = trace.launches
    assert (
        decode.loaded["p_k"] == decode.loaded["p_v"] == G * 16 * 16 * 4 and decode.loaded["p_q"] == S * B * H * 16 * 4
    )
    assert decode.stored["p_o"] == merge.loaded["p_parts"] == B * H * S * 16 * 4 == S * merge.stored["p_o"]


@needs_triton
def test_order_of_programs_changes_no_bit():
    inputs = (*make(2, 3, 200, dtype=torch.bfloat16), torch.tensor([1, 590]).int())
    assert torch.equal(ran("triton", *inputs, seed=0), ran("triton", *inputs, seed=1))


@needs_triton
def test_operator_passes_opcheck():
    inputs = (*make(2, 3, 4, dtype=torch.float32), torch.tensor([1, 12]).int())
    with interpreter.checked():
        for options in [(None, None, 1.0), (5, 2.0, 0.5)]:
            torch.library.opcheck(file._attend_triton, (*inputs, *options))
