"""What a training step costs, counted and not timed: FLOPs, launches, new and kept memory, breaks of its graph.

The budgets are what was counted when they were committed, and a little air. A change that costs more must say why it
is worth it, by raising one; a change that costs less should lower it.
"""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tritium.bench import contenders, train
from tritium.kernels import wide
from tritium.model.transformer import Transformer

T, CONTEXT = 512, 128
FLOPS = 1.22  # × 6 per parameter and token, causal attention's triangle and the head on learned tokens
LAUNCHES, LAYER_LAUNCHES = 215, 260  # dispatched ops of a step: without layers, and of a layer
MADE, LAYER_MADE = 16_500, 20_500  # bytes of new tensors a token: the same two
KEPT = 43  # bytes of a layer a token between forward and backward, over the width E
BREAKS = 2  # of a layer's graph, around attention, whose work depends on the documents


class Counter(TorchDispatchMode):
    """Ops that reach a kernel, and the bytes of tensors whose memory is new."""

    def __init__(self):
        super().__init__()
        self.launches = self.made = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        known = {x.untyped_storage().data_ptr() for x in _tensors((arguments, options or {}))}
        new = [x for x in _tensors(found) if x.untyped_storage().data_ptr() not in known]
        self.launches += bool(new) or function._schema.is_mutable
        self.made += sum(x.untyped_storage().nbytes() for x in new)
        return found


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch):
    """Counts that do not depend on the machine."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(wide, "fp32_is_faster", lambda dtype: False)
    monkeypatch.setattr(contenders, "DEVICE", "cpu")


def work_of(tmp_path, layers: int) -> contenders.Work:
    shape = replace(train.SMALL, layers=layers, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, head_dim=16)
    config = train.Config(model=shape, vocab_size=512, bin_tokens=T, context=CONTEXT)
    return train.make_work(config, "pretrain", tmp_path)


def counted(tmp_path, layers: int, mode):
    """A whole step of the trainer under `mode`, the second: the first builds what later ones find."""
    steps = contenders.tritium(work_of(tmp_path, layers))
    next(steps)
    with mode:
        next(steps)
    return mode


def test_flops_are_those_of_the_formula(tmp_path):
    work = work_of(tmp_path, 2)
    total = counted(tmp_path, 2, FlopCounterMode(display=False)).get_total_flops()
    ratio = total / T / train.flops_per_token(work)
    assert 1.0 <= ratio <= FLOPS, f"{ratio:.3f}"


def test_launches_and_new_memory_of_a_step(tmp_path):
    one, three = (counted(tmp_path, layers, Counter()) for layers in (1, 3))
    layer, made = (three.launches - one.launches) / 2, (three.made - one.made) / 2 / T
    assert layer <= LAYER_LAUNCHES and one.launches - layer <= LAUNCHES, (layer, one.launches - layer)
    assert made <= LAYER_MADE and one.made / T - made <= MADE, (made, one.made / T - made)


def test_what_a_layer_keeps_for_its_backward(tmp_path):
    kept = {}
    for layers in (1, 3):
        model = Transformer(work_of(tmp_path, layers).shape, dtype=torch.bfloat16).initialize(0)
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(x, storages=storages, own=own):
            memory = x.untyped_storage()
            if memory.data_ptr() not in own:
                storages[memory.data_ptr()] = memory.nbytes()
            return x

        with saved_tensors_hooks(note, lambda x: x):
            hidden = model.hidden(torch.arange(T) % 512, torch.arange(0, T + 1, CONTEXT, dtype=torch.int32))
        kept[layers] = sum(storages.values())
        del hidden
    assert (kept[3] - kept[1]) / 2 / T / 64 <= KEPT, (kept[3] - kept[1]) / 2 / T / 64


def test_graph_breaks_of_a_layer(tmp_path):
    breaks = []
    tokens, cu = torch.arange(T) % 512, torch.arange(0, T + 1, CONTEXT, dtype=torch.int32)
    for layers in (1, 2):
        torch._dynamo.reset()
        model = Transformer(work_of(tmp_path, layers).shape, dtype=torch.bfloat16).initialize(0)
        breaks.append(torch._dynamo.explain(model.hidden)(tokens, cu).graph_break_count)
    torch._dynamo.reset()
    assert breaks[1] - breaks[0] <= BREAKS, breaks
