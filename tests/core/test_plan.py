"""The plan's sizes are the model's, its memory the profiler's, its proposals fit; and docs/parallel.md shows them.

(What is sent: tests/parallel/test_collectives.py.)
"""

import contextlib
import gc
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

import tritium
from tritium.bench.scaling import scaling_table
from tritium.core.batch import Document, pack
from tritium.core.config import ConfigError, UserError, opt
from tritium.core.machines import MACHINES, PRESETS, Machine, Work
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.optim import OptimConfig
from tritium.core.plan import Plan, best, plans, units_of
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import DTYPES
from tritium.core.trainer import Trainer
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.context import Split
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.zero import FlatModule
from tritium.stages import plan as stage

SMALL = ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, num_kv_heads=2,
                    head_dim=32, max_positions=1024)  # fmt: skip
TIED = replace(SMALL, tie_embeddings=True, vocab_size=4096, num_layers=2)
DEEP = replace(SMALL, num_layers=8, qk_norm=True)
WINDOWED = replace(SMALL, windows=(None, 100, None, 17))
WIDE = replace(SMALL, hidden_size=256, intermediate_size=704, num_heads=8, vocab_size=8192, num_layers=2)
CPU = Machine("a CPU", 1, 1e10, 1e11, 1e11, 1e10, 1e9, 1e9, 1e9, device="cpu")
H100 = MACHINES["h100"]


@dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    schedule: ScheduleConfig = opt(ScheduleConfig, "")


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("config", [SMALL, replace(TIED, qkv_bias=True), replace(DEEP, num_kv_heads=1)])
def test_units_are_those_of_the_flat_buffers(config, tp):
    mesh = Mesh(world_size=tp, tp=tp, tp_rank=tp - 1)
    root, *layers = FlatModule(Transformer(config, mesh), mesh).units
    for (flat,), unit in zip(
        [root, *layers], [units_of(config, tp)[0], *[units_of(config, tp)[1]] * len(layers)], strict=True
    ):
        assert flat.size == unit.elements
        spans = list(flat.spans())
        for start, stop in [(0, flat.size), (flat.size // 3, flat.size // 2), (flat.size - 7, flat.size)]:
            found = sum(max(0, min(s.stop, stop) - max(s.start, start)) for s in spans if s.partial)
            assert unit.partial_in(start, stop) == found


def test_presets_have_as_many_parameters_as_their_names_say():
    for name, billions in {"1b": 1.236, "3b": 3.213, "8b": 8.030, "32b": 32.76, "70b": 70.55}.items():
        total = Plan(PRESETS[name], Mesh.single(), Work(8192, 8192), H100).total(lambda unit: unit.elements)
        assert total / 1e9 == pytest.approx(billions, rel=1e-3), name


# ---------------------------------------------------------------------------------------------- memory


class QuickTrainer(Trainer):
    def measure_peak(self) -> float:
        return 1.0


def held_bytes() -> int:
    """Of the memory of all tensors that there are; those that other tests let torch.compile trace have none."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [x for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu"]
    tensors = [x for x in tensors if not torch._is_functional_tensor(x)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_tensors_without_memory_are_none():
    with FakeTensorMode():
        fake = torch.ones(1000)  # noqa: F841
    functional, before = torch._to_functional_tensor(torch.ones(1000)), held_bytes()
    real = torch.ones(1000)
    assert held_bytes() - before == real.nbytes and functional is not None


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """After a collective its tensors are this thread's alone: gloo's, which wakes it before it lets go, has let go."""
    with pytest.MonkeyPatch.context() as patch:
        real = dist.Work.wait
        patch.setattr(dist.Work, "wait", lambda work, *args: (real(work, *args), time.sleep(1e-3))[0])
        yield


def step_of(
    config: ModelConfig,
    tokens: int,
    documents: int,
    micro_batches: int,
    dtype: str,
    tp=1,
    cp=1,
    zero=0,
    offload=False,
    ema=0.0,
    repeats=1,
):
    """The most bytes of tensors that live at any moment of a later step, and the plan of this rank.

    What lives when the step begins is counted, and what changes within is the profiler's. What gloo's threads let go of
    is not in its records: they are given the time to let go first. Of `repeats` steps that of the least."""
    of_others = held_bytes()
    rng, length = np.random.default_rng(0), tokens // documents
    rows = rng.integers(0, config.vocab_size, (documents, length), dtype=np.int32)
    batch = pack([[Document(row, np.ones(length, np.float32))] for row in rows])
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with tempfile.TemporaryDirectory() as out, unhurried(), profiler as seen:
        mesh = init_mesh(tp, cp, zero, device="cpu")
        model = Transformer(config, mesh, DTYPES[dtype]).initialize(0)
        settings = Settings(RunConfig(out=out, dtype=dtype), OptimConfig(offload=offload, ema=ema), ScheduleConfig())
        trainer = QuickTrainer({"policy": model}, CrossEntropy(), settings, mesh, name="plan", total_steps=9)
        trainer.step([batch])
        held = []
        for _ in range(repeats):
            held.append(held_bytes() - of_others)
            with record_function("the step"):
                trainer.step([batch] * micro_batches)
        trainer.metrics.close()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, live = np.array([at for at, _ in changes]), np.cumsum([size for _, size in changes])
    steps = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "the step"]
    more = [int(live[(start <= times) & (times <= stop)].max() - live[times < start][-1]) for start, stop in steps]
    peaks = [bytes_held + bytes_more for bytes_held, bytes_more in zip(held, more, strict=True)]
    own = int((Split.of(tokens, mesh).place(batch.supervised) >= 0).sum())
    groups = dict.fromkeys(
        ("dp_group", "cp_group", "tp_group", "data_group", "shard_group", "replica_group", "device_mesh")
    )  # can't be sent back
    work = Work(tokens, length, micro_batches, own, dtype, offload=offload, ema=bool(ema))
    return min(peaks), Plan(config, replace(mesh, **groups), work, CPU)


def assert_as_planned(found: int, plan: Plan, tolerance: float) -> None:
    """In all, and without what is easy to count."""
    held = sum(plan.memory[k] for k in ("parameters", "gradients", "optimizer", "tables"))
    assert plan.peak == pytest.approx(found, rel=tolerance)
    assert plan.peak - held == pytest.approx(found - held, rel=tolerance)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config,tokens,documents,micro_batches,zero",
    [
        (SMALL, 512, 4, 2, 0),
        (WINDOWED, 1024, 1, 1, 0),
        (SMALL, 1536, 2, 1, 2),
        (TIED, 256, 1, 1, 0),
        (TIED, 768, 2, 2, 3),
        (DEEP, 512, 8, 1, 3),
        (WIDE, 256, 8, 1, 1),
    ],
)
def test_live_bytes_of_a_step_are_those_of_the_plan(config, tokens, documents, micro_batches, zero, dtype):
    found, plan = step_of(config, tokens, documents, micro_batches, dtype, zero=zero)
    assert_as_planned(found, plan, 0.06 if plan.widens else 0.03)  # the plan leaves out what attention widens


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_so_are_those_of_an_optimizer_on_the_host_with_a_running_mean(dtype):
    found, plan = step_of(SMALL, 256, 2, 1, dtype, offload=True, ema=0.9)
    assert_as_planned(found, plan, 0.03)
    on_gpu = Plan(SMALL, plan.mesh, plan.work, H100)  # whose host is elsewhere
    assert on_gpu.memory["optimizer"] == 0 and on_gpu.optimizer == plan.optimizer == plan.memory["optimizer"]
    assert (
        on_gpu.times["optimizer"]
        > 10 * Plan(SMALL, plan.mesh, replace(plan.work, offload=False), H100).times["optimizer"]
    )


@pytest.mark.parametrize(
    "config,dtype,tp,cp,zero",
    [
        (SMALL, "bf16", 2, 1, 0),
        (TIED, "fp32", 2, 1, 0),
        (SMALL, "fp32", 1, 2, 0),
        (DEEP, "bf16", 1, 2, 3),
        (TIED, "bf16", 1, 1, 1),
        (SMALL, "fp32", 1, 1, 3),
    ],
)
def test_so_are_those_of_two_ranks(pool2, config, dtype, tp, cp, zero):
    for found, plan in pool2.run(step_of, config, 1024, 4, 1, dtype, tp, cp, zero, False, 0.0, 2):
        assert_as_planned(found, plan, 0.05)


def test_what_zero_cuts_it_cuts_by_the_number_of_ranks():
    memory = [Plan(SMALL, Mesh(world_size=8, dp=8, zero=zero), Work(512, 512), H100).memory for zero in range(4)]
    for kind, first in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        for zero in range(4):
            share = 8 if zero >= first else 1
            assert memory[zero][kind] == pytest.approx(memory[0][kind] / share, rel=1e-3), (kind, zero)


def test_sampling_needs_its_cache_and_at_level_3_the_whole_parameters():
    work = replace(Work(512, 512), sequences=4096, sampled_tokens=1024)
    alone, cut = (Plan(SMALL, mesh, work, H100) for mesh in (Mesh.single(), Mesh(world_size=8, dp=8, zero=3)))
    assert (
        alone.cache == 2 * (4096 * 1024 + 16) * 4 * 2 * 2 * 32
    )  # bytes · tokens, and a page · layers · k and v · G · D
    assert alone.peak == alone.cache + sum(alone.memory[k] for k in ("parameters", "gradients", "optimizer", "tables"))
    assert cut.peak > cut.cache + alone.memory["parameters"]


# ---------------------------------------------------------------------------------------------- time and choice


def test_layers_with_a_window_take_less_time():
    """Of 8192 tokens a query sees 1024 in half of the layers: these have 0.234 of the pairs."""
    windowed = replace(PRESETS["8b"], windows=(1024, None) * 16)
    full, less = (Plan(m, Mesh.single(), Work(8192, 8192), H100) for m in (PRESETS["8b"], windowed))
    saved = (1 - 2 * 1024 / 8192 + (1024 / 8192) ** 2) / 2
    pairs = 32 * 8192**2 / 2
    assert windowed.pairs(8192) == pairs * (1 - saved)
    # Forward 4, backward 14 · D · H a pair
    seconds = (4 + 14) * 128 * 32 * pairs * saved / full.peak_flops / H100.reached
    assert full.times["compute"] - less.times["compute"] == pytest.approx(seconds)
    assert less.mfu * less.seconds < full.mfu * full.seconds  # useful FLOPs, too


def test_time_is_at_least_that_of_the_useful_flops_and_of_the_messages():
    for plan in plans(PRESETS["8b"], H100, 16, Work(1, 8192), 1 << 20):
        assert 0 < plan.mfu < H100.reached
        assert plan.seconds >= plan.times["messages"] >= 0


def test_a_ring_between_hosts_has_the_adapters_of_its_ranks():
    def rate(axis: str, **mesh: int) -> float:
        return Plan(PRESETS["70b"], Mesh(**mesh), Work(8192, 8192), H100).rate(axis) / H100.reached

    assert rate("tp", tp=8) == rate("data", dp=8) == rate("cp", cp=2, tp=4) == H100.link
    assert rate("data", dp=2, tp=8) == H100.network  # the eight rings of a host share its eight adapters
    assert rate("data", dp=16, tp=2) == 4 * H100.network
    assert rate("data", dp=16) == min(H100.link, 8 * H100.network)


def test_proposals_fit_and_the_first_is_the_fastest_of_all():
    found = list(plans(PRESETS["8b"], H100, 16, Work(1, 8192), 1 << 20))
    proposed = best(found)
    assert all(plan.fits for plan in proposed)
    assert proposed[0].seconds == min(plan.seconds for plan in found if plan.fits)
    assert len({(p.mesh.tp, p.mesh.cp, p.mesh.zero) for p in proposed}) == len(proposed) == 5
    for plan in found:
        assert plan.mesh.dp * plan.mesh.cp * plan.mesh.tp == 16 and plan.step_tokens == 1 << 20
        assert plan.work.tokens % 8192 == 0


def test_where_nothing_fits_the_smallest_is_shown_with_what_is_in_its_way():
    found = list(plans(PRESETS["70b"], H100, 8, Work(1, 8192), 1 << 20))
    plan = best(found)[0]
    assert plan.peak == min(p.peak for p in found) and not plan.fits
    assert plan.verdict.startswith(f"does not fit: {plan.peak / 2**30:.1f} of 68.5 GiB, of which optimizer ")
    assert plan.mesh.zero == 3 and plan.verdict.endswith("; take more GPUs")


# ---------------------------------------------------------------------------------------------- the command


def run(capsys, *argv: str) -> tuple[int, str]:
    return stage.main(argv), capsys.readouterr().out


def test_one_mesh_is_shown_in_detail(capsys):
    code, out = run(capsys, "--preset=1b", "--gpus=4", "--mesh.tp=2", "--mesh.zero=3", "--bin_tokens=8192")
    assert code == 0 and "fits: " in out
    for words in (
        "activations",
        "peak",
        "all-gather      tp",
        "reduce-scatter  data",
        "parameters, layers",
        "seconds:",
    ):
        assert words in out


def test_what_does_not_fit_is_an_exit_code_of_1_with_a_remedy(capsys):
    code, out = run(capsys, "--preset=8b", "--gpus=2", "--bin_tokens=8192")
    assert code == 1 and "does not fit" in out and "cut it: mesh.zero ≥ 1, or mesh.tp; or optim.offload" in out


def test_a_stages_settings_are_planned(capsys, tmp_path):
    (tmp_path / "my.toml").write_text(
        'vocab_size = 1000\n[model]\nlayers = 3\n[data]\nsources = ["a.txt"]\nbin_tokens = 1024\nbins_per_step = 8\n'
        '[mesh]\nzero = 1\n[optim]\noffload = true\n[run]\ndtype = "fp32"\n'
    )
    code, out = run(capsys, f"--settings={tmp_path}/my.toml", "--gpus=4")
    row = out.splitlines()[3].split()
    assert code == 0 and row[:7] == ["4", "1", "1", "1", "4", "1024", "2"]  # shard before tokens and micro-batches
    config, model, kept = stage.from_settings(stage.Config(settings=f"{tmp_path}/my.toml"))
    assert (model.num_layers, model.vocab_size, model.tie_embeddings, config.dtype) == (3, 1000, True, "fp32")
    assert kept == {"muon": False, "offload": True, "ema": False}


def test_dpo_and_grpo_need_more(capsys):
    work = [Work(8192, 8192, **stage.passes(stage.Config(stage=name))) for name in ("sft", "dpo", "grpo")]
    sft, dpo, grpo = (Plan(PRESETS["1b"], Mesh(world_size=8, dp=8, zero=1), w, H100) for w in work)
    assert dpo.peak - sft.peak >= sft.memory["parameters"]
    assert grpo.memory["kv cache"] > 0 and dpo.seconds > 1.2 * sft.seconds < grpo.seconds


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--gpus=0"], "gpus=0 must be above 0"),
        (["--bin_tokens=-5"], "bin_tokens=-5 must be at least 0"),
        (["--context=4"], "^context=4 must be at least 8"),
        (
            ["--preset=8b", "--gpus=6", "--mesh.tp=4", "--bin_tokens=8192"],
            "cp=1 × tp=4 does not divide the 6",
        ),
        (["--preset=8b", "--gpus=6", "--mesh.tp=3", "--bin_tokens=8192"], "mesh.tp=3 does not divide num_heads=32"),
        (["--preset=8b", "--gpus=8", "--step_tokens=8191"], "can't be split into whole documents of context=8192"),
        (["--preset=9b"], "expected one of 1b, 3b, 8b"),
    ],
)
def test_impossible_plans_are_refused_in_a_sentence(argv, said):
    with pytest.raises(ConfigError, match=said):
        stage.main(argv)


def test_a_folder_that_holds_no_model_is_a_sentence(tmp_path):
    for text, words in ((None, "config.json does not exist"), ("[1]", "must hold a JSON object"), ("{}", "model_type")):
        if text:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            stage.main([f"--folder={tmp_path}"])


@pytest.mark.usefixtures("quick")
def test_this_machine_can_be_planned_for(monkeypatch):
    monkeypatch.setattr("tritium.stages.plan.matmul_rate", lambda *args, **kwargs: 1e9)
    monkeypatch.setattr(stage, "copy_rate", lambda *args, **kwargs: 1e9)
    machine = stage.this_machine()
    assert machine.memory > 1e8 and machine.reached == 1
    assert math.isfinite(Plan(SMALL, Mesh.single(), Work(512, 512), machine).mfu)
    assert torch.cuda.is_available() or machine.device == "cpu"


def test_the_page_shows_the_table():
    page = (pathlib.Path(tritium.__file__).parent / "docs/parallel.md").read_text(encoding="utf-8")
    assert f"<!-- python -m tritium.bench scaling -->\n{scaling_table()}<!-- end -->" in page
