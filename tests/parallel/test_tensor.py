"""Tensor-parallel primitives against the unsharded computation, forward and backward, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from tritium.kernels import linear_logprob
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import (
    Sharding,
    embedding_part,
    gather_tokens,
    part_of_gradient,
    scatter_tokens,
    shard,
    unshard,
)

T, E, FF, V = 8, 6, 8, 12
ROWS, COLUMNS, GATE_UP = Sharding(0), Sharding(1), Sharding(0, (FF, FF))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swiglu_mlp(x, gate_up, down, group):
    gate, up = F.linear(gather_tokens(x, group), gate_up).chunk(2, -1)
    return scatter_tokens(F.linear(F.silu(gate) * up, down), group)


def mlp_weights():
    return draw(2 * FF, E, seed=1), draw(E, FF, seed=2)


def run_mlp(x, gate_up, down, seed_gradient, group):
    leaves = [w.clone().requires_grad_() for w in (x, gate_up, down)]
    y = swiglu_mlp(*leaves, group)
    return y.detach(), torch.autograd.grad(y, leaves, seed_gradient)


def sharded_mlp(x, seed_gradient):
    """Each rank has half of the tokens between the blocks."""
    mesh = init_mesh(tp=2)
    weights = [shard(w, cut, mesh) for w, cut in zip(mlp_weights(), (GATE_UP, COLUMNS), strict=True)]
    y, (dx, d_gate_up, d_down) = run_mlp(
        shard(x, ROWS, mesh), *weights, shard(seed_gradient, ROWS, mesh), mesh.tp_group
    )
    gradients = unshard(dx, ROWS, mesh), unshard(d_gate_up, GATE_UP, mesh), unshard(d_down, COLUMNS, mesh)
    return unshard(y, ROWS, mesh), gradients


def inputs_after_a_block():
    """Inputs are left alone, and gradients that are expanded are taken."""
    mesh = init_mesh(tp=2)
    x = torch.full((3,), float(mesh.rank + 1), requires_grad=True)
    y = scatter_tokens(gather_tokens(x, mesh.tp_group), mesh.tp_group)
    y.sum().backward()
    return x.detach(), y.detach(), x.grad


def replicated_use(x, weight):
    """All ranks compute the same of what they have gathered."""
    mesh = init_mesh(tp=2)
    own, weight = shard(x, ROWS, mesh).requires_grad_(), weight.clone().requires_grad_()
    part_of_gradient(gather_tokens(own, mesh.tp_group) @ weight, mesh.tp_group).square().sum().backward()
    return unshard(own.grad, ROWS, mesh), unshard(weight.grad[None], ROWS, mesh).sum(0)


def embed(tokens, weight, seed_gradient):
    mesh = init_mesh(tp=2)
    own = shard(weight, ROWS, mesh).requires_grad_()
    x = scatter_tokens(embedding_part(tokens, own, mesh.tp_group), mesh.tp_group)
    (gradient,) = torch.autograd.grad(x, own, shard(seed_gradient, ROWS, mesh))
    return unshard(x.detach(), ROWS, mesh), unshard(gradient, ROWS, mesh)


def embed_with_a_poisoned_row(tokens, weight):
    mesh = init_mesh(tp=2)
    own = shard(weight, ROWS, mesh)
    own[0] = torch.nan  # rows 0 and V/2 are the ones that a masked lookup reads instead
    return unshard(scatter_tokens(embedding_part(tokens, own, mesh.tp_group), mesh.tp_group), ROWS, mesh)


def head(hidden, weight, targets, seeds, temperature):
    mesh = init_mesh(tp=2)
    leaves = shard(hidden, ROWS, mesh).requires_grad_(), shard(weight, ROWS, mesh).requires_grad_()
    result = linear_logprob(
        gather_tokens(leaves[0], mesh.tp_group), leaves[1], targets, temperature=temperature, group=mesh.tp_group
    )
    gradients = torch.autograd.grad(result[:3], leaves, seeds)
    return [x.detach() for x in result], *(unshard(gradient, ROWS, mesh) for gradient in gradients)


def cut_and_join(tensor, sharding, tp=2):
    mesh = init_mesh(tp)
    own = shard(tensor, sharding, mesh)
    return own, unshard(own, sharding, mesh)


def join_transposed(tensor):
    mesh = init_mesh(tp=2)
    return unshard(shard(tensor, ROWS, mesh).t(), COLUMNS, mesh)


def cut_wrongly():
    mesh = init_mesh(tp=2)
    sentences = []
    for length, sections in ((7, None), (8, (4, 3)), (8, (5, 3))):
        try:
            shard(torch.zeros(length), Sharding(0, sections), mesh)
        except ValueError as error:
            sentences.append(str(error))
    try:
        unshard(torch.zeros(4), Sharding(0, (5, 3)), mesh)
    except ValueError as error:
        sentences.append(str(error))
    return sentences


def refused(**changes):
    """What a model says whose sizes the ranks can't share."""
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=12, num_kv_heads=6)
    config = ModelConfig(**sizes | changes, head_dim=8)
    try:
        Transformer(config, init_mesh(tp=4))
    except ValueError as error:
        return str(error)
    return None


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
    for rank, (x, y, gradient) in enumerate(pool2.run(inputs_after_a_block)):
        assert x.tolist() == [rank + 1.0] * 3 and y.tolist() == [2.0 * (rank + 1)] * 3
        assert gradient.tolist() == [2.0] * 3


def test_what_ranks_compute_alike_counts_once_in_the_gradient(pool2):
    leaves = draw(T, E).requires_grad_(), draw(E, seed=1).requires_grad_()
    (leaves[0] @ leaves[1]).square().sum().backward()
    for gradients in pool2.run(replicated_use, *(leaf.detach() for leaf in leaves)):
        for actual, leaf in zip(gradients, leaves, strict=True):
            assert_close(actual, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [T, 0])
def test_an_embedding_over_ranks_is_exact(pool2, dtype, length):
    tokens = torch.tensor([0, V - 1, 3, 3, 6, 5, 11, 0])[:length]
    weight, seed_gradient = draw(V, E, dtype=dtype), draw(length, E, seed=3, dtype=dtype)
    leaf = weight.clone().requires_grad_()
    x = F.embedding(tokens, leaf)
    (gradient,) = torch.autograd.grad(x, leaf, seed_gradient)
    for rank_x, rank_gradient in pool2.run(embed, tokens, weight, seed_gradient):
        assert torch.equal(rank_x, x) and torch.equal(rank_gradient, gradient)


def test_an_embedding_does_not_see_the_row_that_stands_in_for_a_foreign_token(pool2):
    tokens, weight = torch.tensor([1, 7, 11, 8]), draw(V, E)
    for x in pool2.run(embed_with_a_poisoned_row, tokens, weight):
        assert torch.equal(x, weight[tokens])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_head_over_ranks_equals_the_whole_one(pool2, temperature):
    hidden, weight, targets = draw(T, E), draw(V, E, seed=1), torch.tensor([0, 5, 6, 11, -100, 3, 8, 1])
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
    for rank, (own, joined) in enumerate(pool2.run(cut_and_join, fused, Sharding(0, (8, 4, 4)))):
        expected = torch.cat([section.chunk(2)[rank] for section in (q, k, v)])
        assert torch.equal(own[:, 0].long(), expected) and torch.equal(joined, fused)


def test_replicated_sections_are_whole_on_every_rank(pool4):
    q, k, v = torch.arange(8), torch.arange(100, 102), torch.arange(200, 202)
    fused = torch.cat([q, k, v])[:, None].expand(-1, 3).double()
    sharding = Sharding(0, (8, 2, 2), (False, True, True))
    for rank, (own, joined) in enumerate(pool4.run(cut_and_join, fused, sharding, 4)):
        assert own[:, 0].tolist() == [2 * rank, 2 * rank + 1, 100, 101, 200, 201] and torch.equal(joined, fused)
        assert sharding.runs(own) == [(6, True, False), (6, False, True), (6, False, True)]
    assert ROWS.runs(own) == [(18, True, False)]


@pytest.mark.parametrize("dim,sections", [(0, None), (1, None), (-1, (2, 4))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unshard_is_the_inverse_of_shard(pool2, dim, sections, dtype):
    tensor = draw(4, 6, dtype=dtype)
    for own, joined in pool2.run(cut_and_join, tensor, Sharding(dim, sections)):
        assert own.numel() == 12 and own.untyped_storage().nbytes() == 12 * own.element_size()
        assert torch.equal(joined, tensor)


def test_a_shard_that_is_a_strided_view_is_joined(pool2):
    tensor = draw(4, 6)
    assert all(torch.equal(joined, tensor.t()) for joined in pool2.run(join_transposed, tensor))


def test_a_cut_that_does_not_fit_is_refused_with_the_sizes(pool2):
    uneven = "tp=2 does not divide 5 + 3: choose multiples of it"
    for sentences in pool2.run(cut_wrongly):
        assert sentences == [
            "tp=2 does not divide 7: choose multiples of it",
            "sections (4, 3) add up to 7, the dimension is 8",
            uneven,
            uneven,
        ]


def test_a_model_that_the_ranks_cannot_share_is_refused_on_every_rank(pool4):
    assert (
        pool4.run(refused_models)
        == [
            [
                "mesh.tp=4 does not divide num_kv_heads=6",
                "mesh.tp=4 does not divide num_kv_heads=3",
                "mesh.tp=4 does not divide num_heads=6, intermediate_size=26",
                "mesh.tp=4 does not divide vocab_size=30",
                None,
            ]
        ]
        * 4
    )


def refused_models():
    changes = [{}, {"num_kv_heads": 3}, {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 26}]
    changes += [{"num_kv_heads": 12, "vocab_size": 30}, {"num_kv_heads": 2}]
    return [refused(**change) for change in changes]


def test_without_a_group_nothing_is_done():
    mesh, x, weight = Mesh.single(), draw(4, E), draw(V, E)
    assert gather_tokens(x, None) is x and scatter_tokens(x, None) is x and part_of_gradient(x, None) is x
    assert shard(x, ROWS, mesh) is x and unshard(x, ROWS, mesh) is x
    tokens = torch.tensor([2, 0, 11])
    assert torch.equal(embedding_part(tokens, weight, None), weight[tokens])
