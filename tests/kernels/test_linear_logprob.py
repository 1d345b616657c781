"""Log-probabilities by tiles in torch, each output's gradient, ignored targets, ties. (The head: test_head.py.)"""

import importlib

import pytest
import torch

from tritium.kernels import linear_logprob

head = importlib.import_module("tritium.kernels.head")
head_triton = importlib.import_module("tritium.kernels.head_triton")
reference = importlib.import_module("tritium.kernels.linear_logprob").linear_logprob_reference


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 tokens and 4 words, with a ragged last row and column."""
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 3 * 4 * 4)


def make(T=7, V=18, E=6, dtype=torch.float64, ignored=True):
    hidden, weight = (torch.randn(n, E, dtype=dtype).requires_grad_() for n in (T, V))
    targets = torch.randint(0, V, (T,))
    if ignored:
        targets[::3] = -100
    return hidden, weight, targets


def results(function, hidden, weight, targets, **options):
    out = function(hidden, weight, targets, **options)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in out[:3]]
    return *out, *torch.autograd.grad(out[:3], (hidden, weight), seeds)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"softcap": 1.5, "temperature": 1.7}], ids=str)
def test_tiles_equal_the_whole(options, small_tiles):
    inputs = make()
    torch.testing.assert_close(results(linear_logprob, *inputs, **options), results(reference, *inputs, **options))


@pytest.mark.parametrize("of", ["logp", "lse", "entropy"])
def test_each_output_alone_has_the_right_gradient(of, small_tiles):
    hidden, weight, targets = make()
    ours, expected = (
        torch.autograd.grad(getattr(f(hidden, weight, targets), of).sum(), (hidden, weight))
        for f in (linear_logprob, reference)
    )
    torch.testing.assert_close(ours, expected)


def test_nothing_supervised():
    hidden, weight, targets = make()
    out = linear_logprob(hidden, weight, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert (out.logp == 0).all() and not out.hit.any() and all((g == 0).all() for g in gradients)


def test_ties_count_as_hits():
    out = linear_logprob(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([3]))
    assert out.hit.item() and out.entropy.item() == pytest.approx(torch.tensor(4.0).log().item())
