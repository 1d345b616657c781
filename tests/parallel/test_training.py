"""Training does not depend on the mesh: losses, gradients and weights of any grid of ranks equal one process's.

The comparison is between what a run leaves on disk: its metrics, and the checkpoints of every step, which hold whole
tensors whatever the mesh. The first step's `exp_avg` is its clipped gradient times 1 - beta1.
"""

import dataclasses
import json
import pathlib
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import tritium
from tritium.core import checkpoint, experience
from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.checkpoint import CheckpointError
from tritium.core.config import from_dict, opt
from tritium.core.kept import Kept
from tritium.core.objectives.base import Objective
from tritium.core.objectives.distill import Distill
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.preference import PairOptions, Preference
from tritium.core.objectives.reward import Pairwise
from tritium.core.optim import OptimConfig
from tritium.core.rewards import Score
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import DTYPES
from tritium.core.trainer import Trainer
from tritium.model.adapters import attach
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.lora import LoraConfig
from tritium.model.transformer import Transformer, full_shape
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import shard
from tritium.stages import grpo, ppo

STEPS = 5
SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 32, "init_std": 0.2}
MODELS = {
    "tied head, biases": ModelConfig(**SHAPE, **HEADS, tie_embeddings=True, qkv_bias=True),
    "own head, normed heads": ModelConfig(**SHAPE, **HEADS, qk_norm=True),
    "one shared head": ModelConfig(**SHAPE, **HEADS | {"num_kv_heads": 1}, tie_embeddings=True, qk_norm=True),
}
TIED, OWN, SHARED = MODELS
OPTIMIZERS = {
    "muon": {"kind": "muon"},
    "offload": {"offload": True},
    "muon, offload": {"kind": "muon", "offload": True},
    "by name": {"lr_scale": {"*.qkv*": 0.5, "embedding": 3.0}, "decay": {"*norm": 0.2}, "ema": 0.7},
    "muon by name": {"kind": "muon", "lr_scale": {"*.qkv": 0.5}, "decay": {"*.down": 0.0, "*norm": 0.1}, "ema": 0.7},
}
METRICS = ("loss", "accuracy", "entropy", "margin", "grad_norm", "tokens")


@dataclasses.dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    schedule: ScheduleConfig = opt(ScheduleConfig, "")


class QuickTrainer(Trainer):
    def measure_peak(self) -> float:
        return 1.0


def bins_of(step: int) -> list[PackedBatch]:
    """The step's bins over all ranks: uneven, of pairs, and in step 2 a single one, so that a replica has none."""
    rng = np.random.default_rng(step)
    bins = []
    for _ in range(1 if step == 2 else 3):
        lengths = rng.integers(2, 12, size=2 * rng.integers(1, 3))
        documents = [
            Document(rng.integers(0, 32, n, dtype=np.int32), rng.random(n, np.float32).round()) for n in lengths
        ]
        for document in documents:
            document.weights[1] = 1.0
        pairs = [documents[i : i + 2] for i in range(0, len(documents), 2)]
        bins.append(pack(pairs, {"pairs": float(len(pairs))}))
    return bins


def networks_of(stage: str, config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> tuple[dict, Objective]:
    model = Transformer(config, mesh, dtype).initialize(seed=1)
    if stage == "reward":
        return {"reward": ScalarModel(model).initialize(seed=2)}, Pairwise(centering=0.1)
    if stage == "dpo":
        reference = Transformer(config, mesh, dtype).initialize(seed=3).requires_grad_(False)
        return {"policy": model, "reference": reference}, Preference("dpo", PairOptions(beta=0.5), 0.2, Kept())
    if stage == "distill":
        teacher = Transformer(config, mesh, dtype).initialize(seed=3).requires_grad_(False)
        return {"policy": model, "teacher": teacher}, Distill("reverse", temperature=1.5, sft=0.2)
    if stage == "lora":
        attach(model, LoraConfig(rank=4, alpha=8.0))
        with torch.no_grad():
            for i, (_, p) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
                whole = torch.randn(full_shape(p, mesh.tp), generator=torch.Generator().manual_seed(i)) * 0.1
                p.copy_(shard(whole, p.sharding, mesh))  # b starts at zero, and would hide a
    return {"policy": model}, CrossEntropy()


def train(
    out: str, stage: str, config: ModelConfig, tp: int = 1, cp: int = 1, zero: int = 0, dtype: str = "fp64", shard=0
) -> list[int]:
    """The steps that were done."""
    mesh = init_mesh(tp, cp, zero, device="cpu", shard=shard)
    run = RunConfig(out=out, steps=STEPS, dtype=dtype, save_every=1, keep=STEPS)
    settings = Settings(run, OptimConfig(lr=1e-2, clip=0.5, **OPTIMIZERS.get(stage, {})), ScheduleConfig(warmup=0.0))
    networks, objective = networks_of(stage, config, mesh, DTYPES[dtype])
    trainer = QuickTrainer(networks, objective, settings, mesh, name=stage, total_steps=STEPS)
    done = []
    with mock.patch.object(checkpoint, "flush"):  # nobody pulls the plug
        for step in trainer.steps():
            trainer.step(bins_of(step)[mesh.dp_rank :: mesh.dp])
            done.append(step)
    mesh.close()
    return done


def left_behind(out: pathlib.Path) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    states = []
    for folder in sorted(out.glob("step-*")):
        files = (folder / "trainer").glob("*.safetensors")  # one of each rank
        states.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    return [m for m in metrics if "loss" in m], states


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process: each is made once, when it is asked for."""
    folders = {}

    def run(stage: str, name: str) -> pathlib.Path:
        if (stage, name) not in folders:
            folders[stage, name] = out = tmp_path_factory.mktemp("alone")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            train(str(out), stage, MODELS[name])
            torch.set_num_threads(threads)
        return folders[stage, name]

    return run


def assert_same_run(out: pathlib.Path, alone: pathlib.Path) -> None:
    (metrics, states), (wanted_metrics, wanted_states) = left_behind(out), left_behind(alone)
    assert len(metrics) == len(states) == STEPS == len(wanted_states)
    for actual, wanted in zip(metrics, wanted_metrics, strict=True):
        for key in METRICS & wanted.keys():
            tolerance = 1e-6 if key == "accuracy" else 1e-9  # a count, divided in fp32
            assert actual[key] == pytest.approx(wanted[key], abs=tolerance), (key, actual["step"])
    for actual, wanted in zip(states, wanted_states, strict=True):
        assert actual.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(
                actual[key], tensor, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )


RUNS_OF_TWO = [  # stage, model, tp, cp, zero; the rest is dp
    *(("pretrain", name, tp, cp, 0) for name in (TIED, OWN) for tp, cp in ((1, 1), (2, 1), (1, 2))),
    ("pretrain", TIED, 1, 1, 1),
    ("pretrain", OWN, 1, 1, 2),
    ("pretrain", TIED, 1, 1, 3),
    ("pretrain", OWN, 1, 2, 3),
    ("dpo", OWN, 1, 2, 0),
    ("dpo", OWN, 1, 1, 3),
    ("reward", TIED, 2, 1, 0),
    ("reward", OWN, 1, 1, 3),
    ("muon", OWN, 2, 1, 0),
    ("distill", OWN, 2, 1, 0),
    ("distill", TIED, 1, 2, 0),
    ("distill", OWN, 1, 1, 3),
    ("lora", OWN, 2, 1, 0),
    ("lora", TIED, 1, 2, 3),
    ("muon", TIED, 1, 1, 1),
    ("muon", TIED, 1, 1, 3),
    ("by name", TIED, 1, 1, 3),
    ("by name", OWN, 2, 1, 0),
]
RUNS_OF_FOUR = [
    ("pretrain", OWN, 2, 1, 2),
    ("pretrain", TIED, 1, 2, 3),
    ("pretrain", OWN, 2, 2, 1),
    ("pretrain", TIED, 4, 1, 0),  # two ranks share a KV head
    pytest.param("pretrain", SHARED, 4, 1, 0, marks=pytest.mark.long),
    ("pretrain", TIED, 1, 1, 1),
    ("dpo", SHARED, 2, 2, 3),
    pytest.param("dpo", SHARED, 2, 1, 3, marks=pytest.mark.long),
    ("reward", OWN, 2, 2, 2),
    pytest.param("reward", TIED, 1, 2, 0, marks=pytest.mark.long),
    pytest.param("muon", TIED, 1, 1, 2, marks=pytest.mark.long),
    ("muon", SHARED, 4, 1, 0),
    ("lora", SHARED, 4, 1, 0),
    ("distill", OWN, 2, 2, 0),
    pytest.param("lora", SHARED, 2, 1, 3, marks=pytest.mark.long),
    pytest.param("muon", SHARED, 2, 1, 3, marks=pytest.mark.long),
    ("muon by name", SHARED, 2, 1, 2),
]


@pytest.mark.parametrize("stage,name", sorted({getattr(run, "values", run)[:2] for run in RUNS_OF_TWO + RUNS_OF_FOUR}))
def test_the_run_to_compare_with_clips_and_moves_every_parameter(alone, stage, name):
    metrics, states = left_behind(alone(stage, name))
    assert any(m["grad_norm"] > 0.5 for m in metrics)
    for key, tensor in states[0].items():
        assert key == "step" or tensor.abs().amax() > 0, key


@pytest.mark.parametrize("stage,name,tp,cp,zero", RUNS_OF_TWO)
def test_two_ranks_train_as_one_process(pool2, tmp_path, alone, stage, name, tp, cp, zero):
    pool2.run(train, str(tmp_path), stage, MODELS[name], tp, cp, zero)
    assert_same_run(tmp_path, alone(stage, name))


@pytest.mark.parametrize("stage,name,tp,cp,zero", RUNS_OF_FOUR)
def test_four_ranks_train_as_one_process(pool4, tmp_path, alone, stage, name, tp, cp, zero):
    pool4.run(train, str(tmp_path), stage, MODELS[name], tp, cp, zero)
    assert_same_run(tmp_path, alone(stage, name))


@pytest.mark.parametrize("stage,name,cp,zero,shard", [("pretrain", TIED, 1, 1, 2), ("muon", TIED, 1, 2, 2),
                                                      ("dpo", OWN, 2, 3, 2), ("pretrain", OWN, 1, 3, 1)])  # fmt: skip
def test_two_replicas_of_two_shards_train_as_one_process(pool4, tmp_path, alone, stage, name, cp, zero, shard):
    pool4.run(train, str(tmp_path), stage, MODELS[name], 1, cp, zero, "fp64", shard)
    assert_same_run(tmp_path, alone(stage, name))


@pytest.mark.parametrize("dtype,tolerance", [("fp32", 1e-5), ("bf16", 5e-2)])
def test_first_gradients_are_those_of_fp64_to_rounding(pool4, tmp_path, alone, dtype, tolerance):
    pool4.run(train, str(tmp_path), "pretrain", MODELS[OWN], 2, 2, 0, dtype)
    states, expected = left_behind(tmp_path)[1], left_behind(alone("pretrain", OWN))[1]
    for key, tensor in expected[0].items():
        if key.startswith("exp_avg."):
            actual, gradient = 10 * states[0][key], 10 * tensor.float()  # by 1 - beta1
            torch.testing.assert_close(actual, gradient, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("stage,like", [("offload", "pretrain"), ("muon, offload", "muon")])
@pytest.mark.parametrize("zero", [0, 3])
def test_an_optimizer_on_the_host_gives_the_same_numbers(pool2, tmp_path, alone, stage, like, zero):
    pool2.run(train, str(tmp_path), stage, MODELS[TIED], 1, 1, zero)
    assert_same_run(tmp_path, alone(like, TIED))


@pytest.mark.parametrize("zero", [1, 3])
def test_the_running_mean_of_the_weights_is_what_is_exported(pool2, tmp_path, zero):
    pool2.run(train, str(tmp_path), "by name", MODELS[OWN], 1, 1, zero)
    model, mean = tritium.load(str(tmp_path / "step-00000005"), dtype=torch.float64), left_behind(tmp_path)[1][-1]
    for name, p in model.named_parameters():
        assert torch.equal(p, mean[f"ema.{name}"]) and not torch.equal(p, mean[f"master.{name}"]), name


def test_a_run_of_muon_goes_on_on_another_mesh(pool4, tmp_path, alone):
    expected = alone("muon", SHARED)
    shutil.copytree(expected, tmp_path, dirs_exist_ok=True)
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    assert pool4.run(train, str(tmp_path), "muon", MODELS[SHARED], 2, 1, 3) == [[3, 4]] * 4
    assert_same_run(tmp_path, expected)


def test_a_run_goes_on_on_another_mesh(pool4, tmp_path, alone):
    """From one process's checkpoint of step 3, on ranks that share a KV head."""
    expected = alone("pretrain", SHARED)
    shutil.copytree(expected, tmp_path, dirs_exist_ok=True)
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    assert pool4.run(train, str(tmp_path), "pretrain", MODELS[SHARED], 4, 1) == [[3, 4]] * 4
    assert_same_run(tmp_path, expected)


def dropped(out: str, steps: int, tp: int) -> torch.Tensor:
    """Which elements of the blocks' outputs this rank drops in the last of so many steps, of batches all alike."""
    seen, real, mesh = [], F.dropout, init_mesh(tp, device="cpu")
    model = Transformer(MODELS[OWN], mesh, torch.float64).initialize(seed=1)
    model.set_noise(dropout=0.5)
    settings = Settings(RunConfig(out=out, dtype="fp64"), OptimConfig(), ScheduleConfig())
    trainer = QuickTrainer({"policy": model}, CrossEntropy(), settings, mesh, name="dropout", total_steps=steps)

    def noted(x: torch.Tensor, p: float) -> torch.Tensor:
        y = real(x, p)
        seen.append((y == 0).flatten())
        return y

    with mock.patch.object(F, "dropout", noted):
        for _ in trainer.steps():
            seen.clear()
            trainer.step(bins_of(0)[:1])
    mesh.close()
    return torch.cat(seen)


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_drop_other_elements_and_a_resumed_run_the_same_ones(pool2, tmp_path, tp):
    """Of data-parallel ranks, and of tensor-parallel ones, which have other tokens between the blocks."""
    first, resumed = (pool2.run(dropped, str(tmp_path / "cut"), steps, tp) for steps in (1, 2))
    second = pool2.run(dropped, str(tmp_path / "whole"), 2, tp)
    assert not any(torch.equal(a, b) for a, b in ((*first,), (*second,), (first[0], second[0])))
    assert 0.3 < first[0].double().mean() < 0.7
    assert all(torch.equal(*masks) for masks in zip(resumed, second, strict=True))


def resume_as(out: str, name: str) -> str:
    try:
        train(out, "pretrain", MODELS[name], tp=2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_checkpoint_of_another_model_is_refused_on_every_rank(pool2, tmp_path, alone):
    shutil.copytree(alone("pretrain", TIED), tmp_path, dirs_exist_ok=True)
    for said in pool2.run(resume_as, str(tmp_path), OWN):
        assert "step-00000005 does not fit this model: optimizer state " in said


def reinforce(stage: str, model: str, problems: str, scorer: str, text: str, out: str, mesh: dict[str, int]) -> None:
    """Two rollouts of GRPO, in which a judge likes odd token sums, or of PPO with a reward model, a reference that
    follows, and text in three bins, which two ranks can't share evenly; or of PPO on one answer, which one rank has,
    or of PPO with adapters of policy and critic."""
    sections = {"model": model, "data": {"sources": [problems]}, "mesh": mesh, "sampling": {"max_tokens": 12}}
    sections |= {"run": {"out": out, "steps": 2, "dtype": "fp64", "device": "cpu"}}
    quick = mock.patch.object(experience, "Trainer", QuickTrainer)
    if stage == "grpo":
        config = from_dict(grpo.Config, sections | {"grpo": {"prompts": 4, "group": 4}})
        odd = lambda ids, text, **_: Score(sum(ids) % 2)  # noqa: E731
        with mock.patch.object(experience, "open_reward", lambda *_: odd), quick:
            grpo.train(config)
        return
    settings = {"prompts": 1, "group": 1} if stage == "one answer" else {"prompts": 4, "group": 2}
    settings |= {"epochs": 1, "beta": 0.1, "ptx": 0.5}
    sections["text"] = {"sources": [text], "bins_per_step": 3, "bin_tokens": 64}  # no multiple of two ranks
    settings = {"ppo": settings, "reward_model": scorer, "reference": {"every": 1, "decay": 0.5}}
    if stage == "adapters":
        settings |= {"finetune": {"kind": "lora", "rank": 4}, "critic": model, "reference": {}}
    with quick:
        ppo.train(from_dict(ppo.Config, sections | settings))


@pytest.fixture(scope="module")
def learned(tiny, tmp_path_factory):
    """(what `reinforce` was given, what it left behind in one process), once for each stage."""
    folders = {}

    def run(stage: str) -> tuple[tuple, tuple]:
        if stage not in folders:
            out = tmp_path_factory.mktemp(stage)
            scorer = shutil.copytree(tiny.model, out / "scorer")
            ScalarModel(tritium.load(tiny.model, dtype=torch.float32)).initialize(0).save(scorer)
            given = stage, tiny.model, tiny.data("problems.jsonl"), str(scorer), tiny.data("chats.jsonl")
            reinforce(*given, str(out / "alone"), {})
            folders[stage] = given, left_behind(out / "alone")
        return folders[stage]

    return run


@pytest.mark.parametrize("stage,mesh", [
    *((stage, mesh) for stage in ("grpo", "ppo") for mesh in ({"cp": 2}, {"tp": 2}, {"zero": 2}, {"zero": 3})),
    *(("one answer", {"zero": level}) for level in (2, 3)),
    ("adapters", {"zero": 3}),
])  # fmt: skip
def test_rollouts_and_their_training_are_those_of_one_process(pool2, tmp_path, learned, stage, mesh):
    """Every rank of a replica samples the same answers; one that had others would learn from others."""
    given, expected = learned(stage)
    pool2.run(reinforce, *given, str(tmp_path), mesh)
    found = left_behind(tmp_path)
    assert stage != "grpo" or all(metrics["varied_groups"] > 0 for metrics in expected[0])
    keys = ("loss", "reward", "entropy", "ratio", "length", "grad_norm", "tokens", "value_loss", "kl_k1", "ptx")
    for actual, wanted in zip(found[0], expected[0], strict=True):
        for key in set(keys) & set(wanted):
            assert actual[key] == pytest.approx(wanted[key], abs=1e-9), key
    for key, tensor in expected[1][-1].items():
        torch.testing.assert_close(found[1][-1][key], tensor, rtol=0, atol=1e-9, msg=key)
