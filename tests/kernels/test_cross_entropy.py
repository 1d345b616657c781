"""Cross-entropy of logits and of a linear head: one formula, two ways to its statistics."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from tritium.kernels import cross_entropy, linear_cross_entropy

head = importlib.import_module("tritium.kernels.head")
reference = importlib.import_module("tritium.kernels.cross_entropy").cross_entropy_reference


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 3 * 4 * 4)
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
def test_gradient_of_a_single_token_without_reduction(function):
    """The first token's gradient must not scale the others'."""
    hidden, weight, targets = make()
    losses = function(hidden, weight, targets, reduction="none")
    gradient = torch.autograd.grad(losses[5], hidden)[0]
    assert gradient[5].norm() > 0 and (gradient[:5] == 0).all() and (gradient[6:] == 0).all()


def test_bf16_logits_keep_the_gradient_of_a_confident_target():
    logits = torch.zeros(1, 16).bfloat16()
    logits[0, 3] = 9.5
    gradient = torch.autograd.grad(cross_entropy(logits.requires_grad_(), torch.tensor([3])), logits)[0]
    exact = logits.double().softmax(-1)[0, 3] - 1
    assert gradient[0, 3].item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"reduction": "mean"}, "divide by a known count"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"weights": torch.ones(3)}, "one per token"),
    ],
)
@BOTH
def test_bad_options_are_named(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(*make(), **options)
