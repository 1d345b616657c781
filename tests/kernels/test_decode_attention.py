"""Decoding on a paged cache: equal to the reference and to training attention, whatever unused slots hold."""

import importlib

import pytest
import torch

from tritium.kernels import attention, decode_attention

file = importlib.import_module("tritium.kernels.decode_attention")


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


def make(B=5, N=3, page=4, H=4, G=2, D=8, dtype=torch.float64):
    q = torch.randn(B, H, D, dtype=dtype)
    k_pages, v_pages = (torch.randn(B * N, page, G, D, dtype=dtype) for _ in range(2))
    return q, k_pages, v_pages, torch.randperm(B * N).view(B, N).int()


@pytest.mark.parametrize("copy_bytes", [1, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.5}], ids=str)
def test_agrees_with_the_reference(options, copy_bytes, monkeypatch):
    monkeypatch.setattr(file, "COPY_BYTES", copy_bytes)  # 1: one sequence at a time
    inputs = (*make(), torch.tensor([0, 1, 4, 7, 12], dtype=torch.int32))
    expected = file.decode_attention_reference(*inputs, **options)
    torch.testing.assert_close(decode_attention(*inputs, **options), expected)
    assert (expected[0] == 0).all()


def test_equals_the_last_row_of_training_attention():
    q, k_pages, v_pages, table = make(B=1, N=2, page=8)
    k, v = (x[table[0].long()].flatten(0, 1)[:11] for x in (k_pages, v_pages))
    queries = torch.cat([torch.randn(10, 4, 8, dtype=q.dtype), q])
    expected = attention(queries, k, v)[-1:]
    torch.testing.assert_close(decode_attention(q, k_pages, v_pages, table, torch.tensor([11]).int()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_past_the_length_may_hold_anything(dtype):
    q, k_pages, v_pages, table = make(N=1, page=8, dtype=dtype)
    lengths = torch.tensor([0, 1, 3, 7, 8], dtype=torch.int32)
    clean = decode_attention(q, k_pages, v_pages, table, lengths)
    for b, n in enumerate(lengths.tolist()):
        for pages in (k_pages, v_pages):
            pages[table[b, 0], n:] = torch.nan
    assert torch.equal(decode_attention(q, k_pages, v_pages, table, lengths), clean)


def test_the_cache_is_left_alone():
    inputs = (*make(), torch.tensor([2, 1, 4, 7, 12], dtype=torch.int32))
    before = [x.clone() for x in inputs]
    decode_attention(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lengths": torch.tensor([13] * 5)}, "over the 12 tokens of 3 pages"),
        ({"lengths": torch.ones(4).int()}, "page_table and lengths must be"),
        ({"q": torch.randn(5, 3, 8)}, "3 query heads do not divide into 2"),
        ({"q": torch.randn(5, 4, 16)}, "must be"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k_pages, v_pages, table = make(dtype=torch.float32)
    inputs = dict(q=q, k_pages=k_pages, v_pages=v_pages, page_table=table, lengths=torch.ones(5).int())
    with pytest.raises(ValueError, match=message):
        decode_attention(**inputs | change)
