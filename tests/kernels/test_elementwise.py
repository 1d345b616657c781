"""swiglu, geglu and rope: equal to the usual torch code, in both forms, and undone by what undoes them."""

import pytest
import torch
import torch.nn.functional as F

from tritium.kernels import geglu, rope, swiglu


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
    + [(torch.ones(4, 2, 8), torch.ones(4, 1, 8), 5)],
)
def test_rope_bad_shapes_are_named(q, k, T):
    with pytest.raises(ValueError, match="must be"):
        rope(q, k, *angles(T, 8))
