"""Cross-entropy of logits and of a linear head: one formula, two ways to its statistics."""

import contextlib
import importlib

import interpreter
import pytest
import torch
import torch.nn.functional as F

from tritium.kernels import cross_entropy, linear_cross_entropy
from tritium.kernels.backend import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
module = importlib.import_module("tritium.kernels.cross_entropy")
head = importlib.import_module("tritium.kernels.head")
head_triton = importlib.import_module("tritium.kernels.head_triton")
reference = module.cross_entropy_reference


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 3 * 4 * 4)
    torch.manual_seed(0)


def from_logits(hidden, weight, targets, **options):
    return cross_entropy(hidden @ weight.t(), targets, **options)


def make(T=8, V=11, E=6, dtype=torch.float64):
    hidden, weight = (torch.randn(n, E, dtype=dtype).requires_grad_() for n in (T, V))
    targets = torch.randint(0, V, (T,))
    targets[::4] = -100
    return hidden, weight, targets


BOTH = pytest.mark.parametrize("function", [linear_cross_entropy, from_logits])


@BOTH
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"softcap": 2.0}], ids=str)
def test_agrees_with_the_reference(function, reduction, options):
    hidden, weight, targets = make()
    options = dict(options, weights=torch.rand(8, dtype=torch.float64), reduction=reduction)
    ours, expected = function(hidden, weight, targets, **options), reference(hidden @ weight.t(), targets, **options)
    torch.testing.assert_close(ours, expected)
    seed = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, (hidden, weight), seed) for y in (ours, expected)))


@BOTH
def test_all_options_together_with_softcap(function):
    hidden, weight, targets = make()
    options = dict(label_smoothing=0.1, z_loss=0.05, softcap=1.5)
    ours, expected = function(hidden, weight, targets, **options), reference(hidden @ weight.t(), targets, **options)
    torch.testing.assert_close(*(torch.autograd.grad(y, (hidden, weight)) for y in (ours, expected)))


@BOTH
def test_is_the_cross_entropy_of_torch(function):
    hidden, weight, targets = make()
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(function(hidden, weight, targets, label_smoothing=0.1), expected)


@BOTH
def test_ignored_tokens_may_hold_anything(function):
    """NaN in the hidden state of an ignored token reaches neither the loss nor the other tokens' gradients."""
    hidden, weight, targets = make()
    clean = torch.autograd.grad(function(hidden, weight, targets), hidden)[0]
    poisoned = hidden.detach().clone()
    poisoned[::4] = torch.nan
    poisoned.requires_grad_()
    loss = function(poisoned, weight, targets)
    torch.testing.assert_close(loss, function(hidden, weight, targets))
    kept = targets != -100
    torch.testing.assert_close(torch.autograd.grad(loss, poisoned)[0][kept], clean[kept])


@BOTH
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trained", [False, True])
def test_weights_of_ignored_tokens_may_hold_anything(function, reduction, trained):
    hidden, weight, targets = make()
    weights = torch.where(targets == -100, torch.nan, 2.0).requires_grad_(trained)
    loss, half = (function(hidden, weight, targets, weights=w, reduction=reduction).sum() for w in (weights, None))
    torch.testing.assert_close(loss, 2 * half)
    inputs = hidden, weight, *([weights] if trained else [])
    ours, expected = torch.autograd.grad(loss, inputs), torch.autograd.grad(2 * half, (hidden, weight))
    torch.testing.assert_close(ours[:2], expected)
    assert all(g.isfinite().all() for g in ours)


@BOTH
def test_gradient_of_a_single_token_without_reduction(function):
    """The first token's gradient must not scale the others'."""
    hidden, weight, targets = make()
    losses = function(hidden, weight, targets, reduction="none")
    gradient = torch.autograd.grad(losses[5], hidden)[0]
    assert gradient[5].norm() > 0 and (gradient[:5] == 0).all() and (gradient[6:] == 0).all()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"reduction": "mean"}, "divide by a known count"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"weights": torch.ones(3)}, r"weights must be \[8\], one per token, got \[3\]"),
    ],
)
@BOTH
def test_bad_options_are_named(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(*make(), **options)


# Triton, interpreted --------------------------------------------------------------------------------------------------


def logits_and_targets(T, V, dtype=torch.float32, scale=3.0):
    logits = (scale * torch.randn(T, V)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (T,))
    targets[1::3] = -100
    return logits, targets


def loss_and_gradient(function, logits, targets, **options):
    losses = function(logits, targets, reduction="none", **options)
    upstream = torch.linspace(-2, 2, len(losses)).to(losses)  # not 1
    return losses.detach(), torch.autograd.grad(losses, logits, upstream)[0]


@needs_triton
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 17), (129, 129), (5, 4099)], ids=str)
def test_kernels_agree_with_fp64(shape, options):
    logits, targets = logits_and_targets(*shape)
    with interpreter.checked():
        actual = loss_and_gradient(cross_entropy, logits, targets, **options)
    wide = logits.detach().double().requires_grad_()
    for a, e in zip(actual, loss_and_gradient(reference, wide, targets, **options), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6)


@needs_triton
def test_kernels_give_zeros_where_nothing_counts():
    """All ignored, and what they hold is not a number; no tokens at all; targets out of range, unchecked on a GPU."""
    poison = torch.full((3, 9), torch.nan, requires_grad=True)
    with interpreter.checked():
        losses, gradient = loss_and_gradient(cross_entropy, poison, torch.full((3,), -100), z_loss=0.1, softcap=5.0)
        assert torch.equal(losses, torch.zeros(3)) and torch.equal(gradient, torch.zeros(3, 9))
        empty = torch.zeros(0, 9, requires_grad=True)
        losses, gradient = loss_and_gradient(cross_entropy, empty, torch.zeros(0, dtype=torch.int64))
        assert losses.shape == (0,) and gradient.shape == (0, 9)
        statistics = module._statistics(poison.detach().expand(3, 9), torch.tensor([-1, 9, 2**40]), None)
        assert all(torch.equal(x, torch.zeros(3)) for x in statistics)


@needs_triton
def test_logits_of_minus_infinity_have_probability_zero():
    logits, targets = logits_and_targets(4, 40)
    targets[:] = 1
    masked = logits.detach().clone()
    masked[:, 20:] = -torch.inf
    masked.requires_grad_()
    with interpreter.checked():
        losses, gradient = loss_and_gradient(cross_entropy, masked, targets)
    expected = loss_and_gradient(reference, logits.detach()[:, :20].requires_grad_(), targets)
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(gradient, F.pad(expected[1], (0, 20)))


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
def test_logits_of_ignored_tokens_may_hold_anything(kernels):
    logits, targets = logits_and_targets(7, 40)
    clean = loss_and_gradient(cross_entropy, logits, targets)
    poisoned = logits.detach().clone()
    poisoned[1::3] = torch.nan
    with interpreter.checked() if kernels else contextlib.nullcontext():
        ours = loss_and_gradient(cross_entropy, poisoned.requires_grad_(), targets)
    for a, e in zip(ours, clean, strict=True):
        torch.testing.assert_close(a, e)  # zeros where they are ignored


@needs_triton
@pytest.mark.parametrize("scale", [1.0, 3.0e4])
def test_kernels_keep_the_gradient_of_a_confident_target(scale):
    """p > 0.999 in bf16, where p - 1 rounds to 0; and logits whose exponentials would overflow."""
    logits = (torch.randn(6, 64) * scale).bfloat16()
    logits[:, 5] = logits.amax() + 10
    targets = torch.full((6,), 5)
    with interpreter.checked():
        losses, gradient = loss_and_gradient(cross_entropy, logits.requires_grad_(), targets)
    wide = logits.detach().double().requires_grad_()
    exact = loss_and_gradient(reference, wide, targets)
    torch.testing.assert_close(losses.double(), exact[0], rtol=0.01, atol=1e-6)
    torch.testing.assert_close(gradient[:, 5].double(), exact[1][:, 5], rtol=0.01, atol=1e-9)  # 1 - p from 5e-5 on


@needs_triton
@pytest.mark.parametrize("T, V", [(7, 4100), (40, 96)])  # rows split among programs, and several rows in one
def test_kernels_read_and_write_each_logit_once(T, V):
    logits, targets = logits_and_targets(T, V, torch.bfloat16)
    with interpreter.checked() as trace:
        loss_and_gradient(cross_entropy, logits, targets, label_smoothing=0.1)
    forward, backward = trace.launches
    kept = int((targets >= 0).sum())
    assert forward.loaded["p_logits"] == 2 * (kept * V + kept)  # and the targets' once more
    part = 4 * T * forward.grid[1]
    assert forward.stored == {"p_top": part, "p_sum": part, "p_total": part, "p_picked": 4 * T}
    assert backward.loaded["p_logits"] == 2 * kept * V and backward.stored == {"p_dlogits": 2 * T * V}
    assert forward.bytes_loaded + forward.bytes_stored < 1.05 * 2 * T * V
    assert backward.bytes_loaded + backward.bytes_stored < 1.05 * 4 * T * V


@needs_triton
def test_offsets_of_logits_are_64_bits_wide():
    """Rows 2^30 elements apart, and 2^30 elements long: the third is out of an int32's reach."""
    config = module._config(40)
    logits = torch.empty_strided((5, 40), (2**30, 1), device="meta")
    targets, gradient = torch.arange(5), torch.ones(5)
    with interpreter.checked() as trace:
        module._cross_entropy_forward[(1, 1)](
            logits, targets, *(torch.empty(5) for _ in range(4)), 2**30, 5, 40, 4096, 0.0, HAS_CAP=False, **config,
        )  # fmt: skip
        wide = torch.empty_strided((5, 2**30), (2**30, 1), device="meta")
        module._cross_entropy_backward[(5, 1)](
            wide, targets, *5 * [gradient], wide, 2**30, 5, 2**30, 0.0, HAS_CAP=False, ROWS=1, BLOCK=16, num_warps=1
        )
    forward, backward = trace.launches
    assert forward.loaded["p_logits"] == 4 * (5 * 40 + 5) and backward.stored["p_dlogits"] == 4 * 5 * 16


@needs_triton
def test_any_strides_of_logits_and_gradients():
    logits = torch.randn(33, 8).t()  # columns apart
    targets, weights = torch.arange(16)[::2], torch.rand(16, requires_grad=True)
    expanded = torch.randn(33).expand(8, 33)
    for x in (logits, expanded):
        results = []
        for dtype, function in ((torch.float32, cross_entropy), (torch.float64, reference)):
            given = x.to(dtype).detach().requires_grad_()
            assert given.stride() == x.stride() or dtype != torch.float32
            with interpreter.checked() as trace:
                loss = function(given, targets, weights=weights[::2].to(dtype), reduction="none")
                results.append([loss, *torch.autograd.grad(loss.sum(), (given, weights))])
            assert len(trace.launches) == (2 if function is cross_entropy else 0)
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a.double(), e.double(), rtol=2e-6, atol=2e-6)
