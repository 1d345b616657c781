"""`python -m tritium.bench parallel` from end to end, with a model of a few kilobytes."""

import json

import pytest

from tritium.bench import parallel
from tritium.bench.__main__ import main

TINY = ("--model.layers=1", "--model.hidden_size=16", "--model.intermediate_size=16", "--model.heads=2")
TINY += ("--model.head_dim=8", "--model.context=32", "--vocab_size=64", "--bin_tokens=64", "--rounds=2")


def run(tmp_path, *arguments: str) -> list[dict]:
    main(["parallel", "--device=cpu", f"--out={tmp_path}", *TINY, *arguments])  # 1 where it is slow, as here
    return [json.loads(line) for line in (tmp_path / "cpu" / "parallel.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quick")
def test_one_rank_compares_zero_3_with_the_plain_loop(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    here = lambda function, args, nprocs, start_method: function(0, *args)  # noqa: E731 - not in a process of its own
    monkeypatch.setattr(parallel.multiprocessing, "start_processes", here)
    rows = run(tmp_path, "--ranks=1")
    assert [(row["kind"], row["zero"]) for row in rows] == [
        ("overhead", 0),
        ("overhead", 3),
        ("strong", 0),
        ("weak", 0),
    ]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0
    assert all(row["rounds"] == 2 and row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    assert all({"machine", "date", "load", "dtype", "tokens_per_second"} <= row.keys() for row in rows)
    assert "overhead" in capsys.readouterr().out


@pytest.mark.long
def test_two_ranks_are_related_to_one(tmp_path):
    rows = [row for row in run(tmp_path, "--ranks=2") if row["kind"] != "overhead"]
    assert {(row["ranks"], row["dp"], row["cp"], row["tp"]) for row in rows} == {
        (1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)
    }  # fmt: skip
    one = {row["kind"]: row["tokens_per_second"] for row in rows if row["ranks"] == 1}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / one[row["kind"]])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ranks"])


def test_the_share_of_messages_that_kernels_hide():
    """A reduction from 10 to 30, of which a matmul covers 10 to 20 and another one 25 to 30; a gather from 40 to 60."""
    kernels = [("ncclDevKernel_ReduceScatter", 10, 30), ("gemm", 5, 20), ("gemm", 25, 35), ("Memcpy DtoD", 0, 99)]
    assert parallel.overlapped_share(kernels) == 15 / 20
    assert parallel.overlapped_share([*kernels, ("ncclDevKernel_AllGather", 40, 60), ("norm", 55, 58)]) == 18 / 40
    both = [("ncclA", 0, 10), ("ncclB", 5, 15), ("gemm", 0, 4), ("gemm", 2, 6)]  # two at a time count once
    assert parallel.overlapped_share(both) == 6 / 15
    assert parallel.overlapped_share([("gemm", 0, 9)]) is None


def test_what_can_not_be_measured_is_refused(tmp_path, capsys):
    assert main(["parallel", "--device=cpu", "--rounds=0", f"--out={tmp_path}"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
