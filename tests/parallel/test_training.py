"""Training does not depend on the mesh: losses, gradients and weights of dp2, tp2 and both equal one process's.

The comparison is between what a run leaves on disk: its metrics, and the checkpoints of every step, which hold whole
tensors whatever the mesh. The first step's `exp_avg` is its clipped gradient times 1 - beta1.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.config import opt
from tritium.core.objectives import CrossEntropy
from tritium.core.optim import OptimConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.trainer import RunConfig, Trainer
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import init_mesh

STEPS = 5
SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 32, "init_std": 0.2}
MODELS = {
    "tied head, biases": ModelConfig(**SHAPE, **HEADS, tie_embeddings=True, qkv_bias=True),
    "own head, normed heads": ModelConfig(**SHAPE, **HEADS, qk_norm=True),
}


@dataclasses.dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    schedule: ScheduleConfig = opt(ScheduleConfig, "")


def bins_of(step: int) -> list[PackedBatch]:
    """The step's bins over all ranks: uneven, and in step 2 a single one, so that a rank has none."""
    rng = np.random.default_rng(step)
    bins = []
    for _ in range(1 if step == 2 else 3):
        lengths = rng.integers(2, 12, size=rng.integers(1, 4))
        documents = [
            Document(rng.integers(0, 32, n, dtype=np.int32), rng.random(n, np.float32).round()) for n in lengths
        ]
        documents[0].weights[1] = 1.0
        bins.append(pack([[document] for document in documents]))
    return bins


def train(out: str, config: ModelConfig, tp: int) -> None:
    mesh = init_mesh(tp=tp, device="cpu")
    run = RunConfig(out=out, steps=STEPS, dtype="fp64", save_every=1, keep=STEPS)
    settings = Settings(run, OptimConfig(lr=1e-2, clip=0.5), ScheduleConfig(warmup=0.0))
    model = Transformer(config, mesh, torch.float64).initialize(seed=1)
    trainer = Trainer({"policy": model}, CrossEntropy(), settings, mesh, name="pretrain", total_steps=STEPS)
    for step in trainer.steps():
        trainer.step(bins_of(step)[mesh.dp_rank :: mesh.dp])
    mesh.close()


def left_behind(out: pathlib.Path) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    states = [load_file(folder / "trainer" / "policy.safetensors") for folder in sorted(out.glob("step-*"))]
    return [m for m in metrics if "loss" in m], states


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What each model leaves behind when one process trains it."""
    results = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, config in MODELS.items():
        out = tmp_path_factory.mktemp(name)
        train(str(out), config, 1)
        results[name] = left_behind(out)
    torch.set_num_threads(threads)
    return results


def assert_same_run(out: pathlib.Path, expected: tuple) -> None:
    metrics, states = left_behind(out)
    assert len(metrics) == len(states) == STEPS == len(expected[1])
    for actual, wanted in zip(metrics, expected[0], strict=True):
        for key in ("loss", "accuracy", "entropy", "grad_norm", "tokens"):
            assert actual[key] == pytest.approx(wanted[key], abs=1e-9), (key, actual["step"])
    for actual, wanted in zip(states, expected[1], strict=True):
        assert actual.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(
                actual[key], tensor, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_the_run_to_compare_with_clips_and_moves_every_parameter(alone, name):
    metrics, states = alone[name]
    assert all(m["grad_norm"] > 0.5 for m in metrics)
    for key, tensor in states[0].items():
        assert key == "step" or tensor.abs().amax() > 0, key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_train_as_one_process(pool2, tmp_path, alone, name, tp):
    pool2.run(train, str(tmp_path), MODELS[name], tp)
    assert_same_run(tmp_path, alone[name])


def test_two_replicas_of_two_shards_train_as_one_process(pool4, tmp_path, alone):
    name = "own head, normed heads"
    pool4.run(train, str(tmp_path), MODELS[name], 2)
    assert_same_run(tmp_path, alone[name])
