"""Metrics: a file that stays valid whatever is logged, a display for people, and facts about the machine."""

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from tritium.core.health import diagnose
from tritium.core.metrics import Clock, Metrics, Pace, gpu_stats, machine, matmul_rate, peak_memory, read_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder, stream=None, total_steps=10) -> Metrics:
    return Metrics(folder, main=True, total_steps=total_steps, name="sft", stream=stream or io.StringIO())


def test_each_step_is_on_disk_at_once(tmp_path):
    log = metrics(tmp_path / "new" / "folder")
    log.log(1, {"loss": 2.5, "tokens": 7})
    assert lines(tmp_path / "new" / "folder") == [{"step": 1, "loss": 2.5, "tokens": 7}]
    log.close()


def test_values_that_json_does_not_know_stay_readable(tmp_path):
    log = metrics(tmp_path)
    log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(0.5)})
    log.close()
    (line,) = lines(tmp_path)
    assert math.isnan(float(line["a"])) and float(line["b"]) == math.inf and float(line["c"]) == -math.inf
    assert line["d"] == 0.5
    ((_, read),) = read_lines(tmp_path / "metrics.jsonl")  # numbers again, for what reads them: reports, health
    assert math.isnan(read["a"]) and read["b"] == math.inf and read["c"] == -math.inf


def test_the_health_of_a_run_whose_kl_was_infinite_can_be_told(tmp_path):
    log = metrics(tmp_path)
    for step in range(1, 17):
        log.log(step, {"reward": 0.0, "kl_k3": 0.1 * step if step % 2 else math.inf})
    log.close()
    assert list(diagnose([row for _, row in read_lines(tmp_path / "metrics.jsonl")])) == ["KL"]


@pytest.mark.parametrize("tail,whole", [(b'{"step": 6, "lo', []), (b"\xff\0\xfe", []), (b'{"step": 0}', [0])])
def test_a_resumed_run_leaves_no_duplicates(tmp_path, tail, whole):
    first = metrics(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
    first.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)  # the run was killed here
    second = metrics(tmp_path)
    second.resume(4)
    for step in range(4, 8):
        second.log(step, {"loss": -float(step)})
    second.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, *whole, 4, 5, 6, 7]
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line][2:4] == [3.0, -4.0]


def test_resume_at_zero_starts_afresh_and_needs_no_file(tmp_path):
    log = metrics(tmp_path)
    log.resume(0)
    log.log(1, {"loss": 1.0})
    log.resume(0)
    log.log(2, {"loss": 2.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_other_ranks_write_and_say_nothing(tmp_path):
    stream = io.StringIO()
    log = Metrics(tmp_path, main=False, total_steps=2, name="sft", stream=stream)
    log.resume(0)
    log.log(2, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir()) and stream.getvalue() == ""


def test_a_terminal_gets_one_line_that_is_written_over():
    stream = Terminal()
    log = metrics(None, stream)
    log.log(1, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.4123, "memory": 3 * 2**30, "lr": 3e-4, "time/x": 1})
    log.log(2, {"loss": 1.0})
    log.close()
    _, first, second = stream.getvalue().split("\r")
    for phrase in ("sft", "step 1/10", "loss 2.0000", "12.3k tok/s", "MFU 41.2%", "3.00 GiB"):
        assert phrase in first
    assert "time/x" not in first and "ETA" in second
    assert stream.getvalue().count("\n") == 1 and len(second.rstrip("\n")) >= len(first)


def test_a_file_gets_the_first_and_the_last_line_and_few_between():
    stream = io.StringIO()
    log = metrics(None, stream, total_steps=500)
    for step in range(1, 501):
        log.log(step, {"loss": 1.0})
    log.close()
    shown = stream.getvalue().splitlines()
    assert "step 1/500" in shown[0] and "step 500/500" in shown[-1] and len(shown) < 50


def test_the_clock_adds_up_by_name_and_starts_again():
    clock = Clock()
    for _ in range(2):
        with clock("forward"):
            sum(range(1000))
    with pytest.raises(RuntimeError), clock("backward"):
        raise RuntimeError
    taken = clock.take()
    assert set(taken) == {"forward", "backward"} and all(seconds > 0 for seconds in taken.values())
    assert clock.take() == {}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of resident memory")
def test_peak_memory_is_in_bytes_and_no_less_than_what_is_held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * resident <= peak_memory() <= physical  # the kernel updates its peak in steps


def test_matmul_rate_is_a_rate():
    rate = matmul_rate(torch.float32, [(64, 64, 64), (32, 128, 64)], seconds=0.01, device="cpu")
    assert 1e7 < rate < 1e14


def test_machine_names_what_a_number_depends_on():
    facts = machine()
    assert facts["torch"] == torch.__version__ and facts["cpu"] and facts["cores"] >= 1
    json.dumps(facts)


def test_on_a_gpu_mfu_is_of_the_steps_time_and_not_of_the_time_to_queue_it(monkeypatch):
    monkeypatch.setattr("tritium.core.metrics.gpu_stats", lambda: {"gpu/power": 70.0})
    for queued, seconds in ((False, 2.0), (True, 100.0)):
        pace = Pace(5e2, queued)
        pace.peaks.append(1.5e3)
        assert pace.total() == {}
        for _ in range(2):
            pace.since = time.perf_counter() - 100.0
            values = pace.step(tokens=10.0, work=1e5, spent={"forward": 2.0, "evaluate": 90.0})
        for rates in (values, pace.total()):
            assert rates["mfu"] == pytest.approx(100 / seconds, rel=0.01)
            assert rates["tokens_per_second"] == pytest.approx(0.1, rel=0.01)
        assert ("gpu/power" in values) == queued and values["time/evaluate"] == 90.0


def test_gpu_stats_are_empty_without_a_gpu_in_use():
    if not torch.cuda.is_available():
        assert gpu_stats() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_stats_on_a_gpu():
    torch.ones(1, device="cuda")
    stats = gpu_stats()
    assert stats["gpu/power"] > 1 and stats["gpu/memory"] > 0 and 0 <= stats["gpu/utilization"] <= 1
