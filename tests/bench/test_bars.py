"""What a GPU is expected to reach, and the search for launches: the numbers behind a bar, and launches that differ."""

import interpreter
import pytest

from tritium.bench import tune
from tritium.bench.bars import BARS, table_of_bars
from tritium.bench.summary import table_of_curves, table_of_launches
from tritium.kernels import all_ops
from tritium.kernels.backend import HAS_TRITON, TARGETS


def row(op, provider, ms, **more):
    common = {"dtype": "bfloat16", "pass": "forward", "status": "ok", "reason": None, "bound": "matmul"}
    return common | {"op": op, "provider": provider, "ms": ms, "checked_shape": {}} | more


def met(rows):
    """{what: (measured, met)} of the bars that were measured."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table_of_bars(rows)[3:]]
    return {what: (found, yes) for what, _, found, yes in cells if yes != "not measured"}


def test_nothing_is_met_where_nothing_was_measured():
    assert not met([]) and len(table_of_bars([])) == 3 + len(BARS)


def test_attention_is_compared_at_its_shape_and_with_what_went_well():
    long = {"T": 16384, "N": 16384, "H": 32}
    ours = row("attention", "tritium", 5.0, shape=long, tflops=450.0)
    flash = row("attention", "SDPA flash", 4.0, shape=long)
    found = met([ours, flash, row("attention", "tritium", 9.0, shape={"T": 8192}, tflops=1.0)])
    assert found == {
        "attention forward, 16k: SDPA flash's time / ours": ("0.8", "NO"),
        "attention forward, 16k: TFLOP/s": ("450", "yes"),
    }
    assert not met([ours | {"status": "failed"}, flash, ours | {"searched": "attention forward"}])


def test_the_worst_op_counts_where_it_moves_enough():
    def memory(op, share, ms):
        return row(op, "tritium", ms, shape={"T": 1}, bound="memory", of_ceiling=share, gbps=4000.0)

    few = memory("rope", 0.1, 1e-3)  # 4 MB: launching takes longer
    assert met([memory("swiglu", 0.95, 0.1), memory("rms_norm", 0.91, 0.1), few]) == {
        "memory-bound ops, of the copy's bandwidth": ("0.91, the worst of 2", "yes")
    }


def test_losses_are_compared_step_by_step():
    common = {"op": "train", "stage": "pretrain", "status": "ok", "text": True, "shape": {"layers": 2}}
    ours = common | {"provider": "tritium", "contender": "tritium", "losses": [4.0, 2.0]}
    theirs = common | {"provider": "hf_autocast", "contender": "hf_autocast", "losses": [4.0, 2.2, 1.0]}
    assert met([ours, theirs]) == {"loss on real text: mean difference to transformers'": ("0.0455", "NO")}
    assert table_of_curves([ours, theirs])[-1] == "| hf_autocast | 4.0000 | 2.2000 |"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_launches_that_are_tried_are_other_ones_and_right(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    launch = tune.Launch("gated", {"BLOCK": (16, 32), "ROWS": (2,)})
    with interpreter.checked() as trace:
        found = tune.searched(launch, all_ops()["swiglu"], {"T": 3, "F": 40}, "cpu", tune.Config(seconds=0.0))
    assert {row["provider"] for row in found} == {"tritium", "BLOCK=16 ROWS=2", "BLOCK=32 ROWS=2"}
    assert all(row["status"] == "ok" and row["searched"] == "gated" for row in found)
    assert len({each.grid for each in trace.launches}) > 2
    assert [line.split(" | ")[1] for line in table_of_launches(found)[3:]] == ["forward", "backward", "both"]


def test_each_launch_has_what_is_tried():
    """A key that `_config` does not give would be left out in silence."""
    for name, launches in tune.LAUNCHES.items():
        kernels = all_ops()[name].launches(TARGETS["sm_90"])
        keys = {"num_warps", "num_stages"}.union(*(kernel.constexprs for kernel in kernels))
        assert all(launch.values.keys() <= keys for launch in launches), name
