"""One stream over several ranks, and what they send each other: for any documents, what one process computes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model.config import ModelConfig
from tritium.model.generate import generate
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer
from tritium.parallel.context import Split
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import shard

pytestmark = pytest.mark.usefixtures("quick")

CONFIG = ModelConfig(32, 16, 24, 2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64, init_std=0.3)

# Lengths of the documents. Over two ranks: chunks of 6, 10, 8, 1 and 8 tokens.
STREAMS = {
    "documents shorter than a chunk, across its borders": [5, 1, 4, 2, 5, 3, 4],
    "one document over all chunks": [40],
    "a length that four chunks can't share": [3, 20, 6],
    "fewer tokens than chunks": [3],
    "empty documents": [0, 7, 0, 0, 16, 9, 0],
}


def stream(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """tokens, targets [T], the tokens that matter [N] (in no order), cu_seqlens."""
    random, total = torch.Generator().manual_seed(len(lengths)), sum(lengths)
    tokens, targets = (torch.randint(0, 32, (total,), generator=random) for _ in range(2))
    index = torch.randperm(total, generator=random)[: -(-total // 3)]
    return tokens, targets, index, torch.tensor([0, *lengths]).cumsum(0).int()


def networks(mesh: Mesh, shared: bool) -> torch.nn.ModuleList:
    more = {"num_kv_heads": 1, "qk_norm": True, "windows": (None, 6), "attention_softcap": 2.0, "query_scalar": 20.0}
    config = CONFIG if not shared else ModelConfig(**vars(CONFIG) | more)
    policy, backbone = (Transformer(config, mesh, torch.float64).initialize(seed) for seed in (0, 1))
    return torch.nn.ModuleList([policy, ScalarModel(backbone).initialize(2)])


def passes(mesh: Mesh, lengths: list[int], shared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs, values, logits and scores, the same on every rank; and the gradients, as they are on this one."""
    policy, critic = models = networks(mesh, shared)
    tokens, targets, index, cu = stream(lengths)
    seeds = torch.randn(4, len(tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = policy.hidden(tokens, cu)
    some = policy.logprob(hidden, targets, index, temperature=0.8)
    every = policy.logprob(hidden, targets)
    results = [*some[:3], *every[:3], critic.values(tokens, cu)]
    torch.autograd.backward(results, [seeds[0, : len(index)]] * 3 + list(seeds))
    with torch.no_grad():
        results += [some.hit.double(), every.hit.double(), policy.logits(tokens, cu)]
        results += [critic.scores(tokens, cu.unique_consecutive())]
    return [r.detach() for r in results], [p.grad for p in models.parameters()]


def all_streams(tp: int, cp: int, shared: bool, ring: bool = False) -> tuple:
    mesh = init_mesh(tp, cp, ring=ring)
    return mesh.tp_rank, [passes(mesh, lengths, shared) for lengths in STREAMS.values()]


def assert_as_alone(ranks: list[tuple], tp: int, shared: bool) -> None:
    meshes = [Mesh(world_size=tp, tp=tp, tp_rank=rank) for rank in range(tp)]
    parameters = list(networks(meshes[0], shared).named_parameters())
    for i, (name, lengths) in enumerate(STREAMS.items()):
        results, gradients = passes(Mesh.single(), lengths, shared)
        for _, streams in ranks:
            for actual, expected in zip(streams[i][0], results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        parts = [sum_of(streams[i][1] for tp_rank, streams in ranks if tp_rank == r) for r in range(tp)]
        assert_parts(parts, gradients, parameters, meshes)


def sum_of(ranks) -> list[torch.Tensor]:
    """The gradients of the ranks that hold the same shard, added."""
    return [sum(gradients) for gradients in zip(*ranks, strict=True)]


def assert_parts(parts, gradients, parameters, meshes) -> None:
    """What is cut has its part of the whole gradient; the rest has it when the tensor-parallel ranks' are added."""
    for k, (name, p) in enumerate(parameters):
        runs = p.sharding.runs(p) if p.sharding else [(p.numel(), False, p.partial)]
        wanted = [shard(gradients[k], p.sharding, mesh).flatten() for mesh in meshes]
        start = 0
        for n, cut, partial in runs:
            assert cut != partial
            found = [part[k].flatten()[start : start + n] for part in parts]
            for actual, expected in zip(found if cut else [sum(found)], wanted, strict=cut):
                torch.testing.assert_close(
                    actual, expected[start : start + n], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )
            start += n


@pytest.mark.parametrize("tp,cp", [(1, 2), (2, 1)])
def test_two_ranks_compute_what_one_does(pool2, tp, cp):
    assert_as_alone(pool2.run(all_streams, tp, cp, False), tp, shared=False)


@pytest.mark.parametrize("tp,cp", [(2, 2), (1, 4), (4, 1)])
def test_four_ranks_compute_what_one_does(pool4, tp, cp):
    assert_as_alone(pool4.run(all_streams, tp, cp, True), tp, shared=True)


@pytest.mark.parametrize("tp,cp", [(1, 2), (2, 2), (1, 4)])
def test_a_ring_computes_what_one_rank_does(pool2, pool4, tp, cp):
    pool = pool2 if tp * cp == 2 else pool4
    assert_as_alone(pool.run(all_streams, tp, cp, tp * cp == 4, True), tp, shared=tp * cp == 4)


@pytest.mark.parametrize("cp", [2, 3, 8])
def test_every_rank_has_as_many_pairs_of_a_causal_document(cp):
    meshes = [Mesh(cp=cp, cp_rank=r, cp_group=object()) for r in range(cp)]
    queries = [Split.of(48, mesh).take(torch.arange(48)) for mesh in meshes]
    assert torch.cat(queries).sort().values.tolist() == list(range(48))
    assert len({int((q + 1).sum()) for q in queries}) == 1


def logits_of_one_document(tp: int, cp: int) -> torch.Tensor:
    model = Transformer(CONFIG, init_mesh(tp, cp) if tp * cp > 1 else None, torch.float64).initialize(0)
    with torch.no_grad():
        return model.logits(stream([8])[0])


def test_one_document_that_fills_the_chunks_needs_no_cu_seqlens(pool2):
    expected = logits_of_one_document(1, 1)
    for actual in pool2.run(logits_of_one_document, 1, 2):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------- what is sent


class Collectives(TorchDispatchMode):
    """Counts (collective, bytes of the whole tensor) of what runs within, backward passes too."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.seen[op.name().split("::")[1].strip("_"), max(x.nbytes for x in tensors)] += 1
        return op(*args, **kwargs or {})


def traffic(tp: int, cp: int, layers: int) -> tuple[Counter, Counter]:
    """Of a forward and of a backward pass, over 44 tokens."""
    model = Transformer(ModelConfig(**vars(CONFIG) | {"num_layers": layers}), init_mesh(tp, cp)).initialize(0)
    tokens, targets, index, cu = stream([5, 30, 9])
    with Collectives() as forward:
        loss = model.logprob(model.hidden(tokens, cu), targets, index).logp.sum()
    with Collectives() as backward:
        loss.backward()
    return forward.seen, backward.seen


def of_a_layer(pool, tp: int, cp: int) -> list[Counter]:
    """What one layer more sends, forward and backward."""
    one, two = (pool.run(traffic, tp, cp, layers) for layers in (1, 2))
    found = [b - a for a, b in zip(one[0], two[0], strict=True)]
    assert all(rank == two[0] for rank in two)
    return found


GATHER, SCATTER, REDUCE = "allgather_base", "reduce_scatter_base", "allreduce"
HIDDEN = 44 * 16 * 4  # [T, E] fp32
KEYS = 48 * 2 * 2 * 8 * 4  # K and V, [T', 2, G, D] fp32: the next multiple of 2·cp·tp = 4, or of 8, is 44 or 48


def test_a_tensor_parallel_layer_gathers_twice_and_scatters_twice(pool2):
    expected = Counter({(GATHER, HIDDEN): 2, (SCATTER, HIDDEN): 2})
    assert of_a_layer(pool2, 2, 1) == [expected, expected]


def test_a_context_parallel_layer_gathers_keys_and_values_once(pool2):
    size = KEYS * 44 // 48
    assert of_a_layer(pool2, 1, 2) == [Counter({(GATHER, size): 1}), Counter({(SCATTER, size): 1})]


def test_both_together_send_what_each_does_of_its_part(pool4):
    """A tensor-parallel rank has the keys of half of the heads, a context-parallel one half of the hidden states."""
    blocks = Counter({(GATHER, 48 * 16 * 4 // 2): 2, (SCATTER, 48 * 16 * 4 // 2): 2})
    forward, backward = of_a_layer(pool4, 2, 2)
    assert forward == blocks + Counter({(GATHER, KEYS // 2): 1})
    assert backward == blocks + Counter({(SCATTER, KEYS // 2): 1})


def test_beside_the_layers_only_the_embedding_the_head_and_the_results_are_sent(pool4):
    forward, backward = pool4.run(traffic, 2, 2, 1)[0]
    assert sum(n for (op, _), n in forward.items() if op == GATHER) == 2 + 1 + 1 + 1  # layer, keys, hidden, results
    assert forward[GATHER, 48 * 4 * 4] == 1  # logp, lse, entropy, hit of each token
    assert sum(n for (op, _), n in forward.items() if op == SCATTER) == 2 + 1  # layer, embedding
    assert sum(n for (op, _), n in backward.items() if op == GATHER) == 2 + 1
    assert sum(n for (op, _), n in backward.items() if op == SCATTER) == 2 + 1 + 1
    assert backward[REDUCE, 0] == 0 and not any(op == REDUCE for op, _ in backward)  # dH is scattered, not reduced


# ---------------------------------------------------------------------------------------------- generation


def continuations(tp: int, cp: int) -> list[list[int]]:
    model = Transformer(CONFIG, init_mesh(tp, cp) if tp * cp > 1 else None).initialize(0)
    return [c.tokens for c in generate(model, [[3, 1, 4], [1, 5]], max_tokens=6, n=2, seed=5)]


def test_generation_is_the_same_on_any_mesh(pool2, pool4):
    expected = continuations(1, 1)
    for pool, tp, cp in ((pool2, 2, 1), (pool2, 1, 2), (pool4, 4, 1), (pool4, 2, 2)):
        assert all(tokens == expected for tokens in pool.run(continuations, tp, cp)), (tp, cp)
