"""The head's statistics: chunked = whole, shards = whole, ignored targets, confident targets, ties."""

import importlib

import pytest
import torch

from tritium.kernels import linear_logprob

head = importlib.import_module("tritium.kernels.head")
reference = importlib.import_module("tritium.kernels.linear_logprob").linear_logprob_reference


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 tokens and 4 words, with a ragged last row and column."""
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 3 * 4 * 4)


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


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = make()
    logp = linear_logprob(hidden, weight.detach(), targets).logp
    (ours,) = torch.autograd.grad(logp.sum(), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(reference(hidden, weight, targets).logp.sum(), hidden)[0])


def test_nothing_supervised():
    hidden, weight, targets = make()
    out = linear_logprob(hidden, weight, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert (out.logp == 0).all() and not out.hit.any() and all((g == 0).all() for g in gradients)


def test_ties_count_as_hits():
    out = linear_logprob(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([3]))
    assert out.hit.item() and out.entropy.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_logits_of_any_size_stay_finite():
    hidden = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    weight = torch.tensor([[1e4], [-1e4], [0.0]]).requires_grad_()
    out = linear_logprob(hidden, weight, torch.tensor([0, 0]))
    assert out.logp.tolist() == [0.0, -2e4] and out.entropy.tolist() == [0.0, 0.0]
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight)))


@pytest.mark.parametrize("of", ["logp", "entropy"])
def test_bf16_keeps_the_gradient_of_a_confident_target(of):
    """p = 0.9989 rounds to 1 in bf16: p - 1 must be formed before the rounding."""
    weight = torch.eye(16).bfloat16()
    hidden = torch.zeros(1, 16).bfloat16()
    hidden[0, 3] = 9.5
    low, high = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    ours, expected = (
        torch.autograd.grad(getattr(f(h, w, torch.tensor([3])), of).sum(), h)[0][0, 3].item()
        for f, h, w in ((linear_logprob, low, weight), (reference, high, weight.double()))
    )
    assert ours == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"expected": True, "total": True}], ids=str)
def test_shards_of_the_vocabulary_merge_to_the_whole(options, monkeypatch):
    """Both ranks of a group of two, one after the other: the collectives are computed from the ranks' own shards."""
    hidden, weight, targets = make(V=18)
    statistics = head.HeadOptions(temperature=0.8, **options)
    whole = head.head_statistics(hidden, weight, targets[:, None], statistics)
    shards = [
        head.HeadStatistics(*head._Head.apply(hidden, rows, targets[:, None] - start, statistics))
        for start, rows in ((0, weight[:9]), (9, weight[9:]))
    ]
    high = torch.stack([s.lse for s in shards]).amax(0).detach()

    def parts(s):
        share = (s.lse - high).exp()
        columns = [share[:, None], s.picked]
        columns += [] if s.expected is None else [(share * s.expected)[:, None], s.total[:, None]]
        return torch.cat(columns, 1)

    def all_reduce(x, op=None, group=None):
        if op is None:
            x.copy_(sum(parts(s) for s in shards))
        else:
            x.copy_(torch.stack([torch.stack([s.lse, s.top]) for s in shards]).amax(0))

    monkeypatch.setattr(head.dist, "all_reduce", all_reduce)
    for shard in shards:
        for merged, expected in zip(head._merge_shards(shard, None), whole, strict=True):
            if expected is not None:
                torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"targets": torch.tensor([0, 18, 0, 0, 0, 0, 0])}, r"targets hold 18: ids must be in \[0, 18\)"),
        ({"targets": torch.tensor([0, -1, 0, 0, 0, 0, 0])}, "targets hold -1"),
        ({"targets": torch.zeros(6, dtype=torch.long)}, "one id for each of 7 tokens"),
        ({"weight": torch.randn(18, 5, dtype=torch.float64)}, "hidden and weight must be"),
        ({"weight": torch.randn(18, 6)}, "cast one of them"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match=message):
        linear_logprob(**dict(hidden=hidden, weight=weight, targets=targets) | change)
