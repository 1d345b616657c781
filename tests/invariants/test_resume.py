"""A stage that was killed and started again ends as if nothing had happened, bit for bit."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.run import LoopConfig, RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.trainer import Trainer
from tritium.stages import dpo, grpo, sft

pytestmark = pytest.mark.usefixtures("quick")


class Killed(Exception):
    pass


def sft_run(tiny, out: Path, dtype: str) -> None:
    data = DataConfig([tiny.data("chats.jsonl")], bin_tokens=256, bins_per_step=2, holdout=0.1)
    run = RunConfig(out=str(out), steps=6, dtype=dtype, save_every=2, eval_every=3, keep=9)
    sft.train(sft.Config(data=data, run=run, model=tiny.model))


def growing_run(tiny, out: Path, dtype: str) -> None:
    """With a batch that grows when the loss stalls, and the running mean of the weights."""
    data = DataConfig([tiny.data("chats.jsonl")], bin_tokens=256, bins_per_step=4, holdout=0.1)
    run = RunConfig(out=str(out), steps=6, dtype=dtype, save_every=2, eval_every=3, keep=9)
    optim, schedule = OptimConfig(ema=0.5), ScheduleConfig(batch_start=0.25, batch_patience=1)
    sft.train(sft.Config(data=data, run=run, model=tiny.model, optim=optim, schedule=schedule))
    assert len(json.loads((out / "step-00000006/trainer/state.json").read_text())["notes"]["batch"]["changes"]) > 1


def dpo_run(tiny, out: Path, dtype: str) -> None:
    data = DataConfig([tiny.data("pairs.jsonl")], bin_tokens=512)
    run = RunConfig(out=str(out), steps=6, dtype=dtype, save_every=2, keep=9)
    dpo.train(dpo.Config(data=data, run=run, model=tiny.model))


def grpo_run(tiny, out: Path, dtype: str) -> None:
    """With two updates on each rollout, and rewards that differ within every group."""
    config = grpo.Config(model=tiny.model)
    config.grpo = grpo.GRPOConfig(prompts=3, group=4, updates=2, beta=0.1)
    config.sampling.max_tokens, config.data.bin_tokens, config.optim.lr = 12, 256, 1e-3
    config.data.sources = [tiny.data("problems.jsonl")]
    config.run = LoopConfig(out=str(out), steps=6, dtype=dtype, save_every=2, keep=9)
    grpo.train(config)


@pytest.fixture
def odd_is_right(monkeypatch):
    """A verifier under which an untrained model is sometimes right: it likes odd token sums."""
    from tritium.core.rewards import Score

    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: lambda ids, text, **_: Score(sum(ids) % 2))


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (sft_run, "bf16"),
        (sft_run, "fp32"),
        (growing_run, "fp32"),
        (dpo_run, "bf16"),
        (grpo_run, "bf16"),
        (grpo_run, "fp32"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path, monkeypatch, odd_is_right, run, dtype):
    run(tiny, tmp_path / "whole", dtype)

    step = Trainer.step

    def fatal(trainer, *args):
        if trainer.index == 3:  # one step after a checkpoint; in GRPO, between the two updates of a rollout
            trainer.finish_save()
            raise Killed
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fatal)
        with pytest.raises(Killed):
            run(tiny, tmp_path / "cut", dtype)
    run(tiny, tmp_path / "cut", dtype)

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    for name in ("model.safetensors", "trainer/policy.safetensors"):
        files = [tmp_path / way / "step-00000006" / name for way in ("cut", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    folders = (tmp_path / "whole" / name for name in ("step-00000002", "step-00000006"))
    early, late = (load_file(folder / "trainer/policy.safetensors")["master.norm"] for folder in folders)
    assert not early.equal(late)  # there was something to resume


def numbers(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "sampled_tokens_per_second", "mfu", "memory")
    return [{k: v for k, v in line.items() if k not in timed and not k.startswith("time/")} for line in lines]
