"""Tensor-parallel primitives against the unsharded computation, forward and backward, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from tritium.kernels import linear_logprob
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import copy_to_tp, reduce_from_tp, shard, unshard, vocab_parallel_embedding

T, E, FF, V = 7, 6, 8, 12


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swiglu_mlp(x, gate_up, down, group):
    gate, up = F.linear(copy_to_tp(x, group), gate_up).chunk(2, -1)
    return reduce_from_tp(F.linear(F.silu(gate) * up, down), group)


def mlp_weights():
    return draw(2 * FF, E, seed=1), draw(E, FF, seed=2)


def run_mlp(x, gate_up, down, seed_gradient, group):
    leaves = [w.clone().requires_grad_() for w in (x, gate_up, down)]
    y = swiglu_mlp(*leaves, group)
    return y.detach(), torch.autograd.grad(y, leaves, seed_gradient)


def sharded_mlp(x, seed_gradient):
    mesh = init_mesh(tp=2)
    gate_up, down = mlp_weights()
    gate_up, down = shard(gate_up, 0, mesh, sections=(FF, FF)), shard(down, 1, mesh)
    y, (dx, d_gate_up, d_down) = run_mlp(x, gate_up, down, seed_gradient, mesh.tp_group)
    return y, (dx, unshard(d_gate_up, 0, mesh, sections=(FF, FF)), unshard(d_down, 1, mesh))


def inputs_after_reduction():
    """`reduce_from_tp` must leave its input alone, and both take gradients that are expanded."""
    mesh = init_mesh(tp=2)
    x = torch.full((3,), float(mesh.rank + 1), requires_grad=True)
    reduce_from_tp(copy_to_tp(x, mesh.tp_group), mesh.tp_group).sum().backward()
    return x.detach(), x.grad


def embed(tokens, weight, seed_gradient):
    mesh = init_mesh(tp=2)
    own = shard(weight, 0, mesh).requires_grad_()
    x = vocab_parallel_embedding(tokens, own, mesh.tp_group)
    return x.detach(), unshard(torch.autograd.grad(x, own, seed_gradient)[0], 0, mesh)


def embed_with_a_poisoned_row(tokens, weight):
    mesh = init_mesh(tp=2)
    own = shard(weight, 0, mesh)
    own[0] = torch.nan  # rows 0 and V/2 are the ones that a masked lookup reads instead
    return vocab_parallel_embedding(tokens, own, mesh.tp_group)


def head(hidden, weight, targets, seeds, temperature):
    mesh = init_mesh(tp=2)
    leaves = hidden.clone().requires_grad_(), shard(weight, 0, mesh).requires_grad_()
    result = linear_logprob(
        copy_to_tp(leaves[0], mesh.tp_group), leaves[1], targets, temperature=temperature, group=mesh.tp_group
    )
    d_hidden, d_weight = torch.autograd.grad(result[:3], leaves, seeds)
    return [x.detach() for x in result], d_hidden, unshard(d_weight, 0, mesh)


def cut_and_join(tensor, dim, sections):
    mesh = init_mesh(tp=2)
    own = shard(tensor, dim, mesh, sections)
    return own, unshard(own, dim, mesh, sections)


def join_transposed(tensor):
    mesh = init_mesh(tp=2)
    return unshard(shard(tensor, 0, mesh).t(), 1, mesh)


def cut_wrongly():
    mesh = init_mesh(tp=2)
    sentences = []
    for length, sections in ((7, None), (8, (4, 3)), (8, (5, 3))):
        try:
            shard(torch.zeros(length), 0, mesh, sections)
        except ValueError as error:
            sentences.append(str(error))
    try:
        unshard(torch.zeros(4), 0, mesh, sections=(5, 3))
    except ValueError as error:
        sentences.append(str(error))
    return sentences


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_block_by_rows_then_columns_equals_the_whole_one(pool2):
    x, seed_gradient = draw(T, E), draw(T, E, seed=3)
    y, gradients = run_mlp(x, *mlp_weights(), seed_gradient, None)
    for rank_y, rank_gradients in pool2.run(sharded_mlp, x, seed_gradient):
        assert_close(rank_y, y)
        for actual, expected in zip(rank_gradients, gradients, strict=True):
            assert_close(actual, expected)


def test_an_input_is_left_alone_and_an_expanded_gradient_is_taken(pool2):
    for rank, (x, gradient) in enumerate(pool2.run(inputs_after_reduction)):
        assert x.tolist() == [rank + 1.0] * 3 and gradient.tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [T, 0])
def test_an_embedding_over_ranks_is_exact(pool2, dtype, length):
    tokens = torch.tensor([0, V - 1, 3, 3, 6, 5, 11])[:length]
    weight, seed_gradient = draw(V, E, dtype=dtype), draw(length, E, seed=3, dtype=dtype)
    leaf = weight.clone().requires_grad_()
    x = F.embedding(tokens, leaf)
    (gradient,) = torch.autograd.grad(x, leaf, seed_gradient)
    for rank_x, rank_gradient in pool2.run(embed, tokens, weight, seed_gradient):
        assert torch.equal(rank_x, x) and torch.equal(rank_gradient, gradient)


def test_an_embedding_does_not_see_the_row_that_stands_in_for_a_foreign_token(pool2):
    tokens, weight = torch.tensor([1, 7, 11]), draw(V, E)
    for x in pool2.run(embed_with_a_poisoned_row, tokens, weight):
        assert torch.equal(x, weight[tokens])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_head_over_ranks_equals_the_whole_one(pool2, temperature):
    hidden, weight, targets = draw(T, E), draw(V, E, seed=1), torch.tensor([0, 5, 6, 11, -100, 3, 8])
    targets[1] = (hidden[1] @ weight.t()).argmax()  # a hit, whatever the rest is
    seeds = [draw(T, seed=s) for s in (2, 3, 4)]
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = linear_logprob(*leaves, targets, temperature=temperature)
    gradients = torch.autograd.grad(whole[:3], leaves, seeds)
    assert whole.hit[1] and not whole.hit.all()
    for result, d_hidden, d_weight in pool2.run(head, hidden, weight, targets, seeds, temperature):
        for actual, expected in zip((*result[:3], d_hidden, d_weight), (*whole[:3], *gradients), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=1e-9)
        assert torch.equal(result[3], whole.hit)


def test_fused_sections_are_cut_separately(pool2):
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    fused = torch.cat([q, k, v])[:, None].expand(-1, 3).double()
    for rank, (own, joined) in enumerate(pool2.run(cut_and_join, fused, 0, (8, 4, 4))):
        expected = torch.cat([section.chunk(2)[rank] for section in (q, k, v)])
        assert torch.equal(own[:, 0].long(), expected) and torch.equal(joined, fused)


@pytest.mark.parametrize("dim,sections", [(0, None), (1, None), (-1, (2, 4))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unshard_is_the_inverse_of_shard(pool2, dim, sections, dtype):
    tensor = draw(4, 6, dtype=dtype)
    for own, joined in pool2.run(cut_and_join, tensor, dim, sections):
        assert own.numel() == 12 and own.untyped_storage().nbytes() == 12 * own.element_size()
        assert torch.equal(joined, tensor)


def test_a_shard_that_is_a_strided_view_is_joined(pool2):
    tensor = draw(4, 6)
    assert all(torch.equal(joined, tensor.t()) for joined in pool2.run(join_transposed, tensor))


def test_a_cut_that_does_not_fit_is_refused_with_the_sizes(pool2):
    uneven = "tp=2 does not divide 5 + 3: choose sizes that are multiples"
    for sentences in pool2.run(cut_wrongly):
        assert sentences == [
            "tp=2 does not divide 7: choose sizes that are multiples",
            "sections (4, 3) add up to 7, the dimension is 8",
            uneven,
            uneven,
        ]


def test_without_a_group_nothing_is_done():
    mesh, x, weight = Mesh.single(), draw(4, E), draw(V, E)
    assert copy_to_tp(x, None) is x and reduce_from_tp(x, None) is x
    assert shard(x, 0, mesh) is x and unshard(x, 0, mesh) is x
    tokens = torch.tensor([2, 0, 11])
    assert torch.equal(vocab_parallel_embedding(tokens, weight, None), weight[tokens])
