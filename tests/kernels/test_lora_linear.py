"""LoRA on dense and NF4 bases: dropout, bias, frozen parts, leading dimensions."""

import pytest
import torch

from tritium.kernels import dequantize_nf4, lora_linear, quantize_nf4


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


def make(*leading, dtype=torch.float64):
    shapes = ((*leading, 6), (5, 6), (2, 6), (5, 2), (5,))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def test_bias_and_leading_dimensions():
    x, weight, a, b, bias = make(2, 3)
    ours = lora_linear(x, weight, a, b, 0.5, bias=bias)
    expected = x @ weight.t() + bias + 0.5 * x @ a.t() @ b.t()
    torch.testing.assert_close(ours, expected)
    seed = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight, a, b, bias), seed) for y in (ours, expected)))


def test_dropout_is_on_the_adapter_s_input_only():
    x, weight, a, b, _ = make(64)
    torch.manual_seed(3)
    ours = lora_linear(x, weight, a, b, 0.5, dropout=0.4)
    torch.manual_seed(3)
    dropped, _ = torch.native_dropout(x, 0.4, True)
    expected = x @ weight.t() + 0.5 * dropped @ a.t() @ b.t()
    torch.testing.assert_close(ours, expected)
    seed = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight, a, b), seed) for y in (ours, expected)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nf4_base_acts_as_its_dense_form(dropout):
    x, weight, a, b, _ = make(9)
    packed = quantize_nf4(weight)
    torch.manual_seed(3)
    ours = lora_linear(x, packed, a, b, 2.0, dropout=dropout)
    torch.manual_seed(3)
    expected = lora_linear(x, dequantize_nf4(packed), a, b, 2.0, dropout=dropout)
    assert torch.equal(ours, expected)
    seed = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, a, b), seed) for y in (ours, expected)))


def test_only_what_requires_a_gradient_gets_one():
    x, weight, a, b, _ = make(4)
    y = lora_linear(x.detach(), weight.detach(), a, b, 1.0)
    y.sum().backward()
    assert x.grad is None and weight.grad is None and a.grad.norm() > 0 and b.grad.norm() > 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"a": torch.randn(2, 7)}, "lora_linear needs"),
        ({"b": torch.randn(5, 3)}, "lora_linear needs"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"bias": torch.zeros(6)}, r"bias must be \[5\]"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, a, b, _ = make(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        lora_linear(**dict(x=x, weight=weight, a=a, b=b, scale=1.0) | change)
