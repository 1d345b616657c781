"""What a training step sends is what `plan` says, to the byte: every collective, its group and its payload."""

import tempfile
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.config import opt
from tritium.core.machines import MACHINES, Work
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.preference import Preference
from tritium.core.optim import OptimConfig
from tritium.core.plan import Plan
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import DTYPES
from tritium.core.trainer import Trainer
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.context import Split
from tritium.parallel.mesh import Mesh, init_mesh

MODEL = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
                    head_dim=8, max_positions=64)  # fmt: skip
TIED = replace(MODEL, tie_embeddings=True, qkv_bias=True)
SHARED = replace(MODEL, num_kv_heads=1, qk_norm=True)
WINDOWED = replace(MODEL, windows=(None, 7, None))
LENGTHS = (5, 30, 9, 6)  # of a micro-batch's documents: two pairs, 50 tokens
MICRO_BATCHES = 2

KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
KINDS |= {"alltoall_base_": "all-to-all", "send": "send", "recv_": "send"}  # counted once, where it is sent
OBJECTS = "allgather_"  # twice: how long they are, and what they are


@dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    schedule: ScheduleConfig = opt(ScheduleConfig, "")


class QuickTrainer(Trainer):
    def measure_peak(self) -> float:
        return 1.0


class Collectives(TorchDispatchMode):
    """Counts (type, group, bytes of the whole tensor) of what runs within, backward passes too."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            (group,) = (dist.ProcessGroup.unbox(x) for x in leaves if is_group(x))
            name, payload = op.name().split("::")[1], max(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
            kind = ("objects", group.group_name, 0) if name == OBJECTS else (KINDS[name], group.group_name, payload)
            self.seen[kind] += name != "recv_"
        return op(*args, **kwargs or {})


def is_group(x) -> bool:
    return isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())


def micro_batch(seed: int) -> PackedBatch:
    rng = np.random.default_rng(seed)
    documents = [Document(rng.integers(0, 32, n, dtype=np.int32), np.ones(n, np.float32)) for n in LENGTHS]
    return pack([documents[:2], documents[2:]], {"pairs": 2.0})


def step(
    config: ModelConfig, tp: int, cp: int, zero: int, dtype: str, stage: str, shard=0, ring=False
) -> tuple[Counter, Counter]:
    """What the second step sends, and what the plan says, on this rank."""
    mesh = init_mesh(tp, cp, zero, device="cpu", shard=shard, ring=ring)
    optim = OptimConfig(kind="muon" if stage == "muon" else "adamw")
    networks, objective = {"policy": Transformer(config, mesh, DTYPES[dtype]).initialize(0)}, CrossEntropy()
    if stage == "dpo":
        networks["reference"] = Transformer(config, mesh, DTYPES[dtype]).initialize(1).requires_grad_(False)
        objective = Preference()
    with tempfile.TemporaryDirectory() as out:
        settings = Settings(RunConfig(out=out, dtype=dtype), optim, ScheduleConfig())
        trainer = QuickTrainer(networks, objective, settings, mesh, name=stage, total_steps=9)
        trainer.step([micro_batch(i) for i in range(MICRO_BATCHES)])
        batches = [micro_batch(MICRO_BATCHES + i) for i in range(MICRO_BATCHES)]  # none that the reference has seen
        with Collectives() as found:
            trainer.step(batches)
        trainer.metrics.close()
    split = Split.of(sum(LENGTHS), mesh)
    own = int((split.place(batches[0].supervised) >= 0).sum())
    work = Work(sum(LENGTHS), 30, MICRO_BATCHES, own, dtype, stage == "muon", frozen=int(stage == "dpo"))
    return found.seen, planned(Plan(config, mesh, work, MACHINES["h100"]), mesh)


def planned(plan: Plan, mesh: Mesh) -> Counter:
    expected = Counter()
    for c in plan.collectives:
        group = dist.group.WORLD if c.axis == "world" else getattr(mesh, f"{c.axis}_group")
        expected[c.kind, group.group_name, c.payload] += c.count * (2 if c.kind == "objects" else 1)
    return expected


RUNS_OF_TWO = [  # model, tp, cp, zero, dtype, stage; the rest is dp
    (MODEL, 2, 1, 0, "fp32", "pretrain"),
    (SHARED, 2, 1, 0, "bf16", "pretrain"),
    (TIED, 1, 2, 0, "bf16", "pretrain"),
    (MODEL, 1, 1, 0, "fp32", "pretrain"),
    (TIED, 1, 1, 1, "bf16", "pretrain"),
    (MODEL, 1, 1, 2, "fp32", "pretrain"),
    (MODEL, 1, 1, 3, "bf16", "pretrain"),
    (TIED, 1, 1, 3, "fp32", "dpo"),
    (MODEL, 1, 2, 3, "fp32", "dpo"),
]
RUNS_OF_FOUR = [
    (MODEL, 2, 1, 0, "fp32", "pretrain"),
    (SHARED, 2, 1, 1, "bf16", "pretrain"),
    (TIED, 2, 1, 3, "fp32", "pretrain"),
    (MODEL, 1, 2, 3, "fp32", "pretrain"),
    (TIED, 4, 1, 0, "fp32", "pretrain"),
    (SHARED, 2, 2, 2, "bf16", "dpo"),
]


@pytest.mark.parametrize("config,tp,cp,zero,dtype,stage", RUNS_OF_TWO)
def test_two_ranks_send_what_the_plan_says(pool2, config, tp, cp, zero, dtype, stage):
    for found, expected in pool2.run(step, config, tp, cp, zero, dtype, stage):
        assert found == expected and found


@pytest.mark.parametrize("config,tp,cp,zero,dtype,stage", RUNS_OF_FOUR)
def test_four_ranks_send_what_the_plan_says(pool4, config, tp, cp, zero, dtype, stage):
    for found, expected in pool4.run(step, config, tp, cp, zero, dtype, stage):
        assert found == expected and found


@pytest.mark.parametrize("tp,cp,zero,shard", [(1, 1, 1, 2), (1, 2, 3, 2), (1, 1, 2, 1), (2, 1, 2, 1)])
def test_hybrid_ranks_send_what_the_plan_says(pool4, tp, cp, zero, shard):
    for found, expected in pool4.run(step, TIED, tp, cp, zero, "fp32", "pretrain", shard):
        assert found == expected and found


@pytest.mark.parametrize("config,cp,dtype,stage", [(MODEL, 2, "bf16", "pretrain"), (WINDOWED, 4, "fp32", "dpo")])
def test_a_ring_sends_what_the_plan_says(pool4, config, cp, dtype, stage):
    for found, expected in pool4.run(step, config, 1, cp, 0, dtype, stage, 0, True):
        assert found == expected and any(kind == "send" for kind, *_ in found)


@pytest.mark.parametrize("config,tp,zero,dtype", [(MODEL, 1, 1, "fp32"), (SHARED, 4, 0, "fp32"), (TIED, 2, 3, "bf16")])
def test_muon_sends_what_the_plan_says(pool4, config, tp, zero, dtype):
    for found, expected in pool4.run(step, config, tp, 1, zero, dtype, "muon"):
        assert found == expected and (zero == 0 or any(kind == "all-to-all" for kind, *_ in found))
